"""Problems from files and generators; in: a source's name, out: Problems.

A source is a JSON-lines file, a Parquet file, a local Hugging Face dataset folder, or a generator:
`reasoning-gym:NAME?key=value&…` or `templated:sums?key=value&…`. Whatever is wrong with one is said with file and line.
"""

import dataclasses
import difflib
import hashlib
import math
import random
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from magistral_jax.data import templated
from magistral_jax.data.rows import read_source, refuse
from magistral_jax.records import MagistralError, Problem

GENERATOR_PREFIX = "reasoning-gym:"
TEMPLATED_PREFIX = "templated:"
GENERATORS = (GENERATOR_PREFIX, TEMPLATED_PREFIX)
"""How the names of sources begin that make their problems, as many as are asked for."""
STATEMENT_COLUMNS = ("problem", "question", "statement", "prompt", "text")
"""Names of a row's statement; the first that it has is it."""


def load_problems(
    source: str,
    num: int,
    seed: int,
    *,
    kind: Literal["", "math", "code"] = "",
    max_statement: int = 0,
    on_bad_row: Callable[[str], None] = refuse,
) -> list[Problem]:
    """Problems of a source.

    Args:
      source: `*.jsonl`, `*.parquet`, a dataset folder `FOLDER?split=NAME`, `reasoning-gym:NAME?key=value&…`, or
        `templated:sums?key=value&…` (its keys: `templated.sums`). A row has its text in one of `STATEMENT_COLUMNS`,
        its reference in `answer`, and may have `id` and `kind` ("math" or "code"). A code row needs no answer; a row
        with `tests` and without an answer is one even if it does not say so. Every other column goes to
        `Problem.extra`.
      num: How many, at most; 0 is all. A file is sampled without replacement, in file order.
      seed: Of the sample, or of the generator: different seeds give streams of their own.
      kind: Of rows that do not say theirs; empty tells it from their columns.
      max_statement: Longest statement in characters; 0 is no limit.
      on_bad_row: Gets a sentence about each row that is malformed or has the id of an earlier one, which is then left
        out. The first such sentence is an error unless something else is given.

    Raises:
      MagistralError: The source is missing, empty, malformed, or has no good row; the sentence names the place.
    """
    if source.startswith(GENERATOR_PREFIX):
        return _generate(source, num, seed)
    if source.startswith(TEMPLATED_PREFIX):
        return _write(source, num, seed)
    problems: dict[str, Problem] = {}
    places: dict[str, str] = {}
    for row in read_source(source, on_bad_row):
        try:
            problem = _problem({"kind": kind} | row.columns, f"{row.path.stem}:{row.line}", row.place, max_statement)
        except MagistralError as error:
            on_bad_row(str(error))
            continue
        if problem.id in problems:
            on_bad_row(f"{row.place}: has the id {problem.id!r}, and so has {places[problem.id]}")
            continue
        problems[problem.id], places[problem.id] = problem, row.place
    if not problems:
        raise MagistralError(f"{source}: no row can be used")
    chosen = list(problems.values())
    if 0 < num < len(chosen):
        chosen = [chosen[i] for i in sorted(random.Random(seed).sample(range(len(chosen)), num))]
    return chosen


def _problem(row: Mapping[str, Any], default_id: str, where: str, max_statement: int) -> Problem:
    """A row as a Problem; `where` is for the error sentence."""
    columns = ", ".join(name for name in row if name != "kind" or row[name])
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
    if 0 < max_statement < len(row[name]):
        raise MagistralError(
            f"{where}: {name} has {len(row[name])} characters; at most {max_statement} are taken (data.max_statement)"
        )
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
    if isinstance(answer, str):
        return answer if answer.strip() else None
    return None if isinstance(answer, float) and math.isnan(answer) else answer


def _generate(source: str, num: int, seed: int) -> list[Problem]:
    """Problems of a reasoning-gym generator."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, _, query = source.removeprefix(GENERATOR_PREFIX).partition("?")
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        raise MagistralError(f"{source}: reasoning-gym has no generator {name!r}{_did_you_mean(close)}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    settings = _settings(source, name, query, known, num)
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


def _write(source: str, num: int, seed: int) -> list[Problem]:
    """Problems from templates."""
    name, _, query = source.removeprefix(TEMPLATED_PREFIX).partition("?")
    if name != "sums":
        raise MagistralError(f"{source}: there are no templates of that name; expected {TEMPLATED_PREFIX}sums")
    settings = _settings(source, "sums", query, list(_SUMS_PARAMETERS), num)
    for key, value in settings.items():
        kind, expected = _SUMS_PARAMETERS[key]
        parts = value if isinstance(value, list) and key != "largest" else [value]
        if not all(type(part) is kind for part in parts):
            raise MagistralError(f"{source}: generator sums refuses its parameters: {key} is {expected}")
    try:
        return templated.sums(num, seed, **settings)
    except ValueError as error:
        raise MagistralError(f"{source}: generator sums refuses its parameters: {error}") from None


_SUMS_PARAMETERS = {
    "language": (str, "a code or several"),
    "terms": (int, "a whole number or two"),
    "largest": (int, "a whole number"),
}


def _settings(source: str, name: str, query: str, known: Sequence[str], num: int) -> dict[str, Any]:
    """Parameters of a generator, out of those that it knows."""
    if num <= 0:
        raise MagistralError(f"{source}: a generator needs a number of problems (data.num_train, …), found {num}")
    settings: dict[str, Any] = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3) or known
            raise MagistralError(f"{source}: generator {name} has no parameter {key!r}{_did_you_mean(close)}")
        settings[key] = _value(value)
    return settings


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
