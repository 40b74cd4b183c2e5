"""Training problems as the settings want them: read, mixed, free of duplicates and of evaluation problems."""

import dataclasses
import json
import pathlib
from typing import Literal

from magistral_jax.checks import stages_of
from magistral_jax.commands.setup import EVALUATION_SEED, load_prompts, say
from magistral_jax.config import Config
from magistral_jax.data.config import DataConfig
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.overlap import Removal, counted, decontaminated, deduplicated
from magistral_jax.data.rows import refuse
from magistral_jax.data.sources import GENERATORS, load_problems
from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.records import MagistralError, Problem

REMOVED_FILE = "removed.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainingProblems:
    """What there is to train on, and what was left out of it."""

    parts: tuple[tuple[float, tuple[Problem, ...]], ...]
    """Weight and problems of each source."""
    removed: tuple[Removal, ...]

    @property
    def problems(self) -> list[Problem]:
        """Of all sources, one after another."""
        return [problem for _, problems in self.parts for problem in problems]

    def loader(self, config: Config, tokenizer: Tokenizer) -> PromptLoader:
        """Their prompts in endless order."""
        prompts = [load_prompts(config, tokenizer, problems) for _, problems in self.parts]
        shares = [(weight, len(own)) for (weight, _), own in zip(self.parts, prompts, strict=True)]
        joined = [prompt for own in prompts for prompt in own]
        return PromptLoader(joined, config.run.seed, shares if len(shares) > 1 else ())

    def report(self, folder: pathlib.Path) -> None:
        """Write what was left out, and why, as JSON lines; nothing where nothing was."""
        if self.removed:
            lines = [json.dumps(dataclasses.asdict(removal), ensure_ascii=False) + "\n" for removal in self.removed]
            text = "".join(lines)
            (folder / REMOVED_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def load_training_problems(config: Config, evaluation: list[Problem]) -> TrainingProblems:
    """Problems of `data.train` or `data.mixture`; says what was left out and why.

    Args:
      config: Its sections `data` and `run` are read.
      evaluation: Held-out problems; those of `data.keep_out` come on top.

    Raises:
      MagistralError: A source is missing or malformed, two sources share an id, or nothing is left.
    """
    data = config.data
    held_out = list(evaluation)
    for source in data.keep_out:
        held_out += load_problems(source, data.num_evaluation, EVALUATION_SEED)
    removed: list[Removal] = []
    loaded = [
        (weight, source, load_source(source, data, config.run.seed, removed)) for weight, source in all_sources(config)
    ]
    loaded = _with_own_ids(loaded)
    _check_ids(loaded)
    num_loaded = sum(len(problems) for _, _, problems in loaded)
    kept = [problem for _, _, problems in loaded for problem in problems]
    if data.duplicates == "drop":
        kept, repeated = deduplicated(kept, min_similarity=data.similarity)
        removed += repeated
    kept, leaked = decontaminated(kept, held_out, min_share=data.overlap)
    removed += leaked
    if num_loaded and not kept:
        raise MagistralError(
            f"all {num_loaded} training problems are also evaluation problems; use another source or seed for one"
        )
    if removed:
        say(f"training problems left out: {', '.join(f'{n} {reason}' for reason, n in counted(removed).items())}")
    ids = {problem.id for problem in kept}
    parts = tuple((weight, tuple(p for p in problems if p.id in ids)) for weight, _, problems in loaded)
    return TrainingProblems(parts, tuple(removed))


def load_source(
    source: str, data: DataConfig, seed: int, removed: list[Removal], kind: Literal["", "math", "code"] = ""
) -> list[Problem]:
    """Problems of one source; bad rows are an error or are added to `removed`, as the settings say."""
    drop = lambda sentence: removed.append(Removal("", "bad row", sentence))
    return load_problems(
        source,
        data.num_train,
        seed,
        kind=kind,
        max_statement=data.max_statement,
        on_bad_row=refuse if data.on_bad_row == "error" else drop,
    )


def sources_of(data: DataConfig) -> list[tuple[float, str]]:
    """Weights and sources of the training problems.

    Raises:
      MagistralError: There is none, or a part of the mixture is not a weight and a source.
    """
    if not data.mixture:
        if not data.train:
            raise MagistralError("`data.train` is empty; expected a problem file or reasoning-gym:NAME.")
        return [(1.0, data.train)]
    return [_part(words, "data.mixture") for words in data.mixture]


def all_sources(config: Config) -> list[tuple[float, str]]:
    """Weights and sources of all that is trained on; where there are stages, each has weights of its own."""
    mixtures = _stage_sources(config)
    sources = dict.fromkeys(source for mixture in mixtures for _, source in mixture)
    return [(1.0, source) for source in sources] if mixtures else sources_of(config.data)


def mixtures_of(config: Config) -> list[list[tuple[float, int]]]:
    """Of each stage of the curriculum the weights of its sources, and their numbers among `all_sources`."""
    number = {source: number for number, (_, source) in enumerate(all_sources(config))}
    return [[(weight, number[source]) for weight, source in mixture] for mixture in _stage_sources(config)]


def _stage_sources(config: Config) -> list[list[tuple[float, str]]]:
    return [
        [_part(words, f"mixture of stage {stage.name}") for words in stage.mixture] or sources_of(config.data)
        for stage in stages_of(config)
    ]


def _part(words: str, field: str) -> tuple[float, str]:
    weight, _, source = words.strip().partition(" ")
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not (0 < number < float("inf") and source.strip()):
        raise MagistralError(f"`{field}` has the part `{words}`; expected a weight above 0, a space and a source.")
    return number, source.strip()


def _with_own_ids(loaded: list[tuple[float, str, list[Problem]]]) -> list[tuple[float, str, list[Problem]]]:
    """Where a generator stands there with several settings, its later problems get the number of their source."""
    generators = [source.partition("?")[0] if source.startswith(GENERATORS) else source for _, source, _ in loaded]
    return [
        (weight, source, [dataclasses.replace(problem, id=f"{problem.id}@{number}") for problem in problems])
        if generators[number] in generators[:number] and source.startswith(GENERATORS)
        else (weight, source, problems)
        for number, (weight, source, problems) in enumerate(loaded)
    ]


def _check_ids(loaded: list[tuple[float, str, list[Problem]]]) -> None:
    owners: dict[str, str] = {}
    for _, source, problems in loaded:
        for problem in problems:
            if owners.setdefault(problem.id, source) != source:
                raise MagistralError(f"{source}: has the id {problem.id!r}, and so has {owners[problem.id]}")
