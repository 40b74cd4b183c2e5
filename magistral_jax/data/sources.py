"""Problems from files and generators; in: a source's name, out: Problems.

A source is a JSON-lines file, a Parquet file, or `reasoning-gym:NAME?key=value&…`. Whatever is wrong with one is said
with file and line.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
import random
import unicodedata
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from magistral_jax.records import MagistralError, Problem

GENERATOR_PREFIX = "reasoning-gym:"
STATEMENT_COLUMNS = ("problem", "question", "statement")


def load_problems(source: str, num: int, seed: int) -> list[Problem]:
    """Problems of a source.

    Args:
      source: `*.jsonl`, `*.parquet`, or `reasoning-gym:NAME?key=value&…`. A row has its text in `problem`, `question`
        or `statement`, its reference in `answer`, and may have `id` and `kind` ("math" or "code"). A code row needs no
        answer; a row with `tests` and without an answer is one even if it does not say so. Every other column goes to
        `Problem.extra`.
      num: How many, at most; 0 is all. A file is sampled without replacement, in file order.
      seed: Of the sample, or of the generator: different seeds give streams of their own.

    Raises:
      MagistralError: The source is missing, empty or malformed; the sentence names the place.
    """
    if source.startswith(GENERATOR_PREFIX):
        return _generate(source, num, seed)
    path = pathlib.Path(source)
    problems = [_problem(row, f"{path.stem}:{line}", f"{path}, line {line}") for line, row in read_rows(path)]
    seen: dict[str, int] = {}
    for line, problem in enumerate(problems, 1):
        if problem.id in seen:
            raise MagistralError(f"{path}: rows {seen[problem.id]} and {line} have the same id {problem.id!r}")
        seen[problem.id] = line
    if 0 < num < len(problems):
        problems = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), num))]
    return problems


def held_out(train: Sequence[Problem], evaluation: Sequence[Problem]) -> tuple[list[Problem], int]:
    """Training problems whose statement does not occur in the evaluation, and how many were taken out.

    Statements are compared after Unicode normalisation, without case and with white space collapsed.

    Raises:
      MagistralError: Nothing is left to train on.
    """
    taken = {_normalized(problem.statement) for problem in evaluation}
    kept = [problem for problem in train if _normalized(problem.statement) not in taken]
    if train and not kept:
        raise MagistralError(
            f"all {len(train)} training problems are also evaluation problems; use another source or seed for one"
        )
    return kept, len(train) - len(kept)


def read_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a `.jsonl` or `.parquet` file; blank lines are passed over."""
    if not path.is_file():
        raise MagistralError(
            f"{path}: no such file; a source is a .jsonl file, a .parquet file or {GENERATOR_PREFIX}NAME?key=value&…"
        )
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise MagistralError(f"{path}: expected a file that ends in .jsonl or .parquet")
    is_empty = True
    for line, row in readers[path.suffix](path):
        is_empty = False
        yield line, row
    if is_empty:
        raise MagistralError(f"{path}: the file has no rows")


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                raise MagistralError(f"{path}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise MagistralError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise MagistralError(f"{path}: not a readable Parquet file: {error}") from None
    yield from enumerate(rows, 1)


def _problem(row: Mapping[str, Any], default_id: str, where: str) -> Problem:
    """A row as a Problem; `where` is for the error sentence."""
    columns = ", ".join(row)
    answer = _answer(row)
    kind = row.get("kind") or ("code" if row.get("tests") and answer is None else "math")
    if kind not in ("math", "code"):
        raise MagistralError(f"{where}: kind is {kind!r}; expected math or code")
    name = next((name for name in STATEMENT_COLUMNS if row.get(name)), None)
    if name is None:
        raise MagistralError(
            f"{where}: no statement; expected a column {', '.join(STATEMENT_COLUMNS)}, found: {columns}"
        )
    if not isinstance(row[name], str):
        raise MagistralError(f"{where}: {name} is of type {type(row[name]).__name__}; expected text")
    if answer is None:
        if kind == "math":
            raise MagistralError(f"{where}: no answer; expected a column answer, found: {columns}")
        answer = ""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise MagistralError(f"{where}: answer is of type {type(answer).__name__}; expected text or a number")
    extra = {key: value for key, value in row.items() if key not in (name, "answer", "id", "kind")}
    row_id = default_id if row.get("id") is None else str(row["id"])
    return Problem(id=row_id, statement=row[name], answer=str(answer), kind=kind, extra=extra)


def _answer(row: Mapping[str, Any]) -> Any:
    """The reference of a row, None where there is none; Parquet fills gaps with None or NaN."""
    answer = row.get("answer")
    return None if answer == "" or (isinstance(answer, float) and math.isnan(answer)) else answer


def _generate(source: str, num: int, seed: int) -> list[Problem]:
    """Problems of a reasoning-gym generator."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, _, query = source.removeprefix(GENERATOR_PREFIX).partition("?")
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        raise MagistralError(f"{source}: reasoning-gym has no generator {name!r}{_did_you_mean(close)}")
    if num <= 0:
        raise MagistralError(f"{source}: a generator needs a number of problems (data.num_train, …), found {num}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    settings: dict[str, Any] = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3) or known
            raise MagistralError(f"{source}: generator {name} has no parameter {key!r}{_did_you_mean(close)}")
        settings[key] = _value(value)
    # reasoning-gym draws item i from seed + i: neighbouring seeds would give almost the same problems.
    spread_seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    try:
        items = list(reasoning_gym.create_dataset(name, size=num, seed=spread_seed, **settings))
    except (AssertionError, TypeError, ValueError) as error:
        raise MagistralError(f"{source}: generator {name} refuses its parameters: {error}") from None
    if any(item["answer"] is None for item in items):
        raise MagistralError(f"{source}: generator {name} gives problems without a reference answer")
    return [
        Problem(f"{name}:{seed}:{i}", item["question"], str(item["answer"]), extra={"metadata": item["metadata"]})
        for i, item in enumerate(items)
    ]


def _value(text: str) -> int | float | bool | str | list[Any]:
    """`3`, `0.5`, `true` and `false` as what they look like, `a,b` as a list, everything else as text."""
    if "," in text:
        return [_value(part) for part in text.split(",")]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _did_you_mean(close: Sequence[str]) -> str:
    return f"; perhaps you meant: {', '.join(close)}" if close else ""


def _normalized(statement: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", statement).casefold().split())
