"""Rows of the `verify` command: completions to be graded, and what is written of each.

A row has `completion`, and `answer` (kind math) or `tests` (kind code). It may have `kind`, `format` ("strict" or
"none"), `language` (of a program whose fence names none, where the format is none), `problem`, `num_tokens`,
`truncated` and `id`; every other column is there for a reward function, and for the tests of a program.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from magistral_jax.config import Config
from magistral_jax.data.rows import read_rows
from magistral_jax.data.sources import STATEMENT_COLUMNS
from magistral_jax.records import MagistralError, Problem, Reward
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.item import VerifyItem

_OWN_COLUMNS = ("completion", "answer", "kind", "format", "language", "num_tokens", "truncated", "id")


@dataclasses.dataclass(frozen=True)
class Row:
    """One completion of a file."""

    line: int
    """Its line in the file, from 1."""
    columns: Mapping[str, Any]
    """What is written again beside the verdict: all but the tests."""
    item: VerifyItem


def read(path: pathlib.Path, config: Config) -> Iterator[Row]:
    """The rows of a file, one at a time.

    Raises:
      MagistralError: A row is malformed; the sentence names file and line.
    """
    for line, columns in read_rows(path):
        present = {name: value for name, value in columns.items() if not _is_missing(value)}
        try:
            item = _item(present, config, default_id=f"{path.stem}:{line}")
        except MagistralError as error:
            raise MagistralError(f"{path}, line {line}: {error}") from None
        yield Row(line, {name: value for name, value in columns.items() if name != "tests"}, item)


def check(path: pathlib.Path, config: Config) -> int:
    """Number of rows of a file, all of them sound.

    Raises:
      MagistralError: As `read`, and for the tests of a program.
    """
    num_rows = 0
    for row in read(path, config):
        num_rows += 1
        if row.item.problem.kind == "code" and not config.reward.function:
            try:
                select_tests(row.item.problem, config.code, row.item.test_seed)
            except MagistralError as error:
                raise MagistralError(f"{path}, line {row.line}: {error}") from None
    return num_rows


def graded(row: Row, reward: Reward) -> dict[str, Any]:
    """A row with its verdict, as it is written. Where the verifier failed, there is no reward."""
    return {
        "line": row.line,
        **row.columns,
        "verdict": reward.verdict.value,
        "path": reward.path,
        "parts": {
            "format": reward.format,
            "correctness": reward.correctness,
            "length": reward.length,
            "language": reward.language,
        },
        "reward": None if reward.verdict.is_infrastructure_failure else reward.total,
        "seconds": reward.seconds,
        "sandbox": reward.sandbox,
    }


def _item(columns: Mapping[str, Any], config: Config, *, default_id: str) -> VerifyItem:
    kind = columns.get("kind") or ("code" if "tests" in columns and "answer" not in columns else "math")
    if kind not in ("math", "code"):
        raise MagistralError(f"kind is {kind!r}; expected math or code")
    form = columns.get("format", "strict")
    if form not in ("strict", "none"):
        raise MagistralError(f"format is {form!r}; expected strict or none")
    needed = {"completion"} if config.reward.function else {"completion", "answer" if kind == "math" else "tests"}
    for name in sorted(needed - columns.keys()):
        raise MagistralError(f"no {name}; a row of kind {kind} needs one, and this has: {', '.join(columns)}")
    statement = next((name for name in STATEMENT_COLUMNS if name in columns), "")
    problem = Problem(
        id=str(columns.get("id", default_id)),
        statement=_text(columns, statement) if statement else "",
        answer=_text(columns, "answer"),
        kind=kind,
        extra={name: value for name, value in columns.items() if name not in (*_OWN_COLUMNS, statement)},
    )
    return VerifyItem(
        request_id=0,
        problem=problem,
        completion=_text(columns, "completion"),
        num_tokens=_num_tokens(columns, config),
        max_length=config.reward.max_length,
        truncated=bool(columns.get("truncated", False)),
        is_strict=form == "strict",
        code_language=_text(columns, "language"),
    )


def _text(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name, "")
    if isinstance(value, int | float) and not isinstance(value, bool) and name == "answer":
        return str(value)
    if not isinstance(value, str):
        raise MagistralError(f"{name} is of type {type(value).__name__}; expected text")
    return value


def _num_tokens(columns: Mapping[str, Any], config: Config) -> int:
    """Length of the completion for Eq. 1, which only matters where that is switched on."""
    value = columns.get("num_tokens", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise MagistralError(f"num_tokens is {value!r}; expected a whole number")
    if config.reward.length_cache and "num_tokens" not in columns:
        raise MagistralError("no num_tokens; `reward.length_cache` is set, so each row has to say how long it is")
    return value


def _is_missing(value: Any) -> bool:
    """Parquet fills a column that a row does not have with None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
