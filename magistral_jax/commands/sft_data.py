"""What fine-tuning sees: traces packed by the update that they belong to, and some that are held out to measure on."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from magistral_jax.commands.setup import Model, load_prompts, start_run, think_tags
from magistral_jax.config import Config
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.sources import load_problems
from magistral_jax.data.tokenizer import encode_completion
from magistral_jax.data.traces import make_traces, read_traces
from magistral_jax.records import MagistralError, Problem, Prompt
from magistral_jax.train.collate import TrainingSequence


@dataclasses.dataclass(frozen=True)
class SftData:
    """Batches and held-out traces."""

    batch_at: Callable[[int], list[TrainingSequence]]
    """From the number of an update to its traces; nothing else decides them, so a resume repeats none."""
    validation: list[TrainingSequence]
    """Never trained on; empty unless `sft.validation_share` is given."""


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Problems, and where traces are given, for each its completion."""

    problems: list[Problem]
    general: list[Problem]
    completions: dict[str, str] | None


def load_sft_data(config: Config, model: Model, folder: pathlib.Path) -> SftData:
    """Traces of the settings. From here on the folder holds a run.

    Raises:
      MagistralError: A file is malformed, a trace is longer than a row, or there are none.
    """
    texts = _load_texts(config)
    prompts = load_prompts(config, model.tokenizer, texts.problems)
    prompts, held_out = split_prompts(prompts, config.sft.validation_share, config.run.seed)
    parts: list[tuple[float, int]] = []
    if texts.general:
        # Other instructions are asked as they are, without those for problems.
        plain = dataclasses.replace(config, data=dataclasses.replace(config.data, system_prompt="none"))
        general = load_prompts(plain, model.tokenizer, texts.general)
        parts = [(1 - config.sft.general_share, len(prompts)), (config.sft.general_share, len(general))]
        prompts = [*prompts, *general]
    loader = PromptLoader(prompts, config.run.seed, parts)
    size = config.sft.batch_size

    def batch_at(update: int) -> list[TrainingSequence]:
        drawn = [loader.prompt_at(cursor) for cursor in range(update * size, (update + 1) * size)]
        return _make_sequences(config, model, drawn, texts.completions, update)

    everything = [*prompts, *held_out]
    sequences = _make_sequences(config, model, everything, texts.completions, update=0)
    for prompt, sequence in zip(everything, sequences, strict=True):
        if len(sequence) > config.batch.row_tokens:
            raise MagistralError(
                f"The trace of problem {prompt.problem.id} has {len(sequence)} tokens with its prompt; expected at "
                f"most `batch.row_tokens` ({config.batch.row_tokens})."
            )
    start_run(folder, config, loader)
    return SftData(batch_at, sequences[len(prompts) :])


def split_prompts(prompts: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones; those of one statement stay together.

    Args:
      prompts: In a fixed order.
      share: Of the statements that are held out; above 0 it is one at least.
      seed: Of the choice.
    """
    statements = list(dict.fromkeys(prompt.problem.statement for prompt in prompts))
    num = min(max(round(share * len(statements)), 1), len(statements) - 1) if share else 0
    chosen = np.random.default_rng([seed, 1]).permutation(len(statements))[: max(num, 0)]
    taken = {statements[place] for place in chosen}
    train = [prompt for prompt in prompts if prompt.problem.statement not in taken]
    return train, [prompt for prompt in prompts if prompt.problem.statement in taken]


def _load_texts(config: Config) -> _Texts:
    settings = config.sft
    if settings.general and not settings.traces:
        raise MagistralError("`sft.general` is mixed into given traces; expected a file in `sft.traces`, too.")
    if settings.traces:
        traces = read_traces(settings.traces)
        general = read_traces(settings.general) if settings.general else []
        general = [
            dataclasses.replace(trace, problem=dataclasses.replace(trace.problem, id=f"general {trace.problem.id}"))
            for trace in general
        ]
        completions = {trace.problem.id: trace.completion for trace in [*traces, *general]}
        return _Texts([trace.problem for trace in traces], [trace.problem for trace in general], completions)
    if not config.data.train:
        raise MagistralError(
            "Neither `sft.traces` nor `data.train` is given; expected traces, or sums to make some for."
        )
    return _Texts(load_problems(config.data.train, config.data.num_train, config.run.seed), [], None)


def _make_sequences(
    config: Config, model: Model, drawn: Sequence[Prompt], completions: dict[str, str] | None, update: int
) -> list[TrainingSequence]:
    if completions is None:
        traces = make_traces(
            [prompt.problem for prompt in drawn],
            np.random.default_rng([config.run.seed, update]),
            thorough_share=config.sft.thorough_share,
            lucky_share=config.sft.lucky_share,
            native_share=config.sft.native_share,
            think_tags=think_tags(config),
        )
        texts = [trace.completion for trace in traces]
    else:
        texts = [completions[prompt.problem.id] for prompt in drawn]
    return [
        _sequence(prompt.token_ids, encode_completion(text, model.tokenizer, think_tags(config)))
        for prompt, text in zip(drawn, texts, strict=True)
    ]


def _sequence(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> TrainingSequence:
    nothing = np.zeros(len(completion_ids))
    return TrainingSequence(
        prompt_ids, completion_ids, nothing.astype(np.float32), advantage=1.0, staleness=nothing.astype(np.int32)
    )
