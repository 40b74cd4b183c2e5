"""`magistral-jax translate`: a share of the English problems into other languages, by a chat endpoint."""

import collections
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.commands.curate import start_folder, to_row, with_source
from magistral_jax.commands.problems import load_source, sources_of
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import open_run, say
from magistral_jax.config import FIELD_TYPES, Config, load
from magistral_jax.curate.journal import in_chunks, write_atomically
from magistral_jax.curate.ledger import Step, summary, table
from magistral_jax.curate.translation import LANGUAGE_NAMES, Order, choose_orders, translated
from magistral_jax.data.overlap import Removal
from magistral_jax.records import MagistralError, Problem

TRANSLATED_FILE = "translated.jsonl"
KEPT_FILE = "kept_in_english.jsonl"
TABLE_FILE = "table.md"
JOURNAL_FILE = "answers.jsonl"
_PROG = "magistral-jax translate"
_USAGE = f"""usage: {_PROG} [CONFIG.toml] SOURCE --out FOLDER --endpoint URL [--share 0.1] [--section.key=value ...]

SOURCE stands for --data.train=SOURCE, a name without a section for one of the section translate: --model, --key_file,
--share, --languages fr de, --attempts, --concurrency, ... The folder gets {TRANSLATED_FILE} (all problems, those that
were translated in their places), {KEPT_FILE} (chosen, and why each stayed as it was), {TABLE_FILE} and config.json.
`--resume` goes on after a kill. `magistral-jax train --help` lists every setting; the sections translate, data and run
play a part.
"""


def translate(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name.

    Source: Magistral (arXiv:2506.10910), section 4.
    """
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write(_USAGE)
        return
    config = parse(words)
    folder = open_run(config)
    problems, steps = _load(config)
    settings = config.translate
    orders, unfit = choose_orders(problems, share=settings.share, languages=settings.languages, seed=config.run.seed)
    steps.append(Step("can be translated", len(problems), len(problems) - len(unfit), tuple(unfit)))
    records = _translate(config, folder, orders) if orders else []
    write_results(folder, problems, records, steps)


def parse(words: Sequence[str]) -> Config:
    """The settings: `--out` is `run.folder`, a bare source is `data.train`, `--endpoint` is `translate.endpoint`.

    Raises:
      MagistralError: A word is unknown or out of place.
    """
    return load(with_source([_renamed(word) for word in words]), prog=_PROG)


def _renamed(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--"):
        return word
    if name == "out":
        return f"--run.folder{equals}{value}"
    section = "translate." if f"translate.{name.replace('-', '_')}" in FIELD_TYPES else ""
    return f"--{section}{name}{equals}{value}"


def _load(config: Config) -> tuple[list[Problem], list[Step]]:
    bad: list[Removal] = []
    problems = [
        problem
        for _, source in sources_of(config.data)
        for problem in load_source(source, config.data, config.run.seed, bad)
    ]
    return problems, [Step("read", len(problems) + len(bad), len(problems), tuple(bad))]


def _translate(config: Config, folder: pathlib.Path, orders: Sequence[Order]) -> list[dict[str, Any]]:
    """A record of each order, from the journal of the folder or from the endpoint."""
    try:
        from magistral_jax.commands.endpoint import Endpoint
    except ModuleNotFoundError as error:
        raise MagistralError(
            f"`{_PROG}` needs the package {error.name}; expected pip install 'magistral-jax[translate]'."
        ) from None
    with Endpoint(config.translate, config.run.seed) as endpoint:
        model = endpoint.find_model()
        say(f"{len(orders)} problems are translated by {model} at {config.translate.endpoint}")
        start_folder(config, folder)
        try:
            with progress_bar("translating") as report:
                return in_chunks(
                    orders,
                    lambda start, chunk: endpoint.translate(chunk),
                    journal=folder / JOURNAL_FILE,
                    key=lambda order: order.problem.id,
                    chunk=config.translate.chunk,
                    on_progress=report,
                )
        except (KeyboardInterrupt, MagistralError):
            say(f"what is in {folder} stays; go on with --resume")
            raise


def write_results(
    folder: pathlib.Path, problems: Sequence[Problem], records: Sequence[Mapping[str, Any]], steps: Sequence[Step]
) -> None:
    """All files of the result; prints the table."""
    found = {record["id"]: record for record in records}
    write_atomically(folder / TRANSLATED_FILE, "".join(to_row(translated(p, found.get(p.id))) for p in problems))
    kept = [{name: record[name] for name in ("id", "language", "reason")} for record in records if record["reason"]]
    write_atomically(folder / KEPT_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    steps = [*steps, *_steps_of_languages(records)]
    write_atomically(folder / "table.json", json.dumps(summary(steps), indent=2) + "\n")
    text = table(steps)
    write_atomically(folder / TABLE_FILE, text)
    print(text, end="")  # noqa: T201 (the result)
    say(
        f"{len(problems)} problems, {len(records) - len(kept)} of them translated and {len(kept)} that were chosen "
        f"kept in English: {folder / TRANSLATED_FILE}"
    )


def _steps_of_languages(records: Sequence[Mapping[str, Any]]) -> list[Step]:
    """What became of the problems chosen for each language."""
    groups = collections.defaultdict[str, list[Mapping[str, Any]]](list)
    for record in records:
        groups[record["language"]].append(record)
    return [
        Step(
            f"into {LANGUAGE_NAMES[language]}",
            len(own),
            sum(not record["reason"] for record in own),
            tuple(Removal(record["id"], record["reason"]) for record in own if record["reason"]),
        )
        for language, own in sorted(groups.items())
    ]
