"""`magistral-jax curate math|code`: training problems out of raw ones, and an account of what was removed."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from magistral_jax.commands.problems import load_source, sources_of
from magistral_jax.commands.setup import EVALUATION_SEED, open_run, say
from magistral_jax.config import Config, dump, load
from magistral_jax.curate.journal import write_atomically
from magistral_jax.curate.ledger import Step, summary, table
from magistral_jax.data.overlap import Removal, decontaminated, deduplicated
from magistral_jax.data.sources import load_problems
from magistral_jax.records import MagistralError, Problem

POOL_FILE = "pool.jsonl"
CURATED_FILE = "curated.jsonl"
REMOVED_FILE = "removed.jsonl"
TABLE_FILE = "table.md"
_PROG = "magistral-jax curate"
_USAGE = f"""usage: {_PROG} math|code [CONFIG.toml | SOURCE] --out FOLDER [--section.key=value ...]

  math   format filter, open answers, difficulty and wrong references by samples of `policy.path`
  code   every known solution on every test: agreeing tests stay, outputs are repaired, new tests are made

SOURCE stands for --data.train=SOURCE. The folder gets {CURATED_FILE} (the result), {POOL_FILE} (the problems that
were graded, with what was found out as columns), {REMOVED_FILE}, {TABLE_FILE} and config.json. `--resume` goes on after
a kill. `magistral-jax train --help` lists every setting; the sections curate, data, generation, policy, code, sandbox
and verifiers play a part.
"""


def curate(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name."""
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write(_USAGE)
        return
    kind, config = parse(words)
    # Imported only now: math needs the engine, and code does not.
    if kind == "math":
        from magistral_jax.commands.curate_math import curate_math

        run: Callable[[Config, pathlib.Path], None] = curate_math
    else:
        from magistral_jax.commands.curate_code import curate_code

        run = curate_code
    folder = open_run(config)
    sources_of(config.data)
    try:
        run(config, folder)
    except KeyboardInterrupt:
        if (folder / "config.json").exists():
            say(f"what is in {folder} stays; go on with --resume")
        raise


def parse(words: Sequence[str]) -> tuple[str, Config]:
    """Kind of problems and the settings: `--out` is `run.folder`, and a bare source is `data.train`.

    Raises:
      MagistralError: A word is missing, unknown or out of place.
    """
    kind, *rest = words
    if kind not in ("math", "code"):
        raise MagistralError(f"expected `{_PROG} math` or `{_PROG} code`, not `{kind}`")
    return kind, load(with_source([_renamed(word) for word in rest]), prog=f"{_PROG} {kind}")


def with_source(words: Sequence[str]) -> list[str]:
    """A bare word, the first or behind a TOML file, as the setting `data.train`."""
    place = 1 if words and words[0].endswith(".toml") else 0
    is_source = len(words) > place and not words[place].startswith("--")
    return [f"--data.train={word}" if is_source and i == place else word for i, word in enumerate(words)]


def _renamed(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--run.folder{equals}{value}" if name == "--out" else word


@dataclasses.dataclass(frozen=True)
class Raw:
    """Raw problems without duplicates and evaluation problems, and the steps so far."""

    problems: list[Problem]
    steps: list[Step]


def load_raw(config: Config, kind: Literal["math", "code"] = "math") -> Raw:
    """Problems of the settings' sources. Duplicates always go; how near is `data.similarity`.

    Args:
      config: Its sections `data` and `run` are read.
      kind: Of rows that do not say theirs.
    """
    data = config.data
    bad: list[Removal] = []
    problems = [
        problem for _, source in sources_of(data) for problem in load_source(source, data, config.run.seed, bad, kind)
    ]
    steps = [Step("read", len(problems) + len(bad), len(problems), tuple(bad))]
    unique, removed = deduplicated(problems, min_similarity=data.similarity)
    steps.append(Step("duplicates", len(problems), len(unique), tuple(removed)))
    held_out = [
        problem
        for source in filter(None, (data.evaluation, *data.keep_out))
        for problem in load_problems(source, data.num_evaluation, EVALUATION_SEED)
    ]
    kept, removed = decontaminated(unique, held_out, min_share=data.overlap)
    steps.append(Step("evaluation problems", len(unique), len(kept), tuple(removed)))
    return Raw(kept, steps)


def start_folder(config: Config, folder: pathlib.Path) -> None:
    """From here on the folder holds a run; comes after everything that the user may have got wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", dump(config))


def write_results(
    folder: pathlib.Path, pool: Sequence[Problem], kept: Sequence[Problem], steps: Sequence[Step]
) -> None:
    """All files of the result; prints the table."""
    write_atomically(folder / POOL_FILE, "".join(map(to_row, pool)))
    write_atomically(folder / CURATED_FILE, "".join(map(to_row, kept)))
    removed = [{"step": step.name, **dataclasses.asdict(removal)} for step in steps for removal in step.removed]
    write_atomically(folder / REMOVED_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in removed))
    write_atomically(folder / "table.json", json.dumps(summary(steps), indent=2) + "\n")
    text = table(steps)
    write_atomically(folder / TABLE_FILE, text)
    print(text, end="")  # noqa: T201 (the result)
    say(f"{len(kept)} problems: {folder / CURATED_FILE}")


def to_row(problem: Problem) -> str:
    """A problem as a line of JSON that `load_problems` reads back."""
    row = {"id": problem.id, "problem": problem.statement, "answer": problem.answer, "kind": problem.kind}
    if problem.kind == "code" and not problem.answer:
        del row["answer"]
    return json.dumps(row | dict(problem.extra), ensure_ascii=False, default=str) + "\n"
