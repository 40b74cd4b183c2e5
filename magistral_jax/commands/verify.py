"""`magistral-jax verify`: grades a file of completions with the verifiers of training, or explains one verdict."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import tyro

from magistral_jax.checks import check as check_config
from magistral_jax.commands import verify_rows
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.verify_rows import Row
from magistral_jax.config import FIELD_TYPES, Config, load
from magistral_jax.records import MagistralError, Reward
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.pool import VerifierPool, VerifyItem

_PROG = "magistral-jax verify"
_SECTIONS = ("reward", "code", "sandbox", "verifiers")


@dataclasses.dataclass(frozen=True)
class Words:
    """Grade a file of completions, or explain the verdict on one of them.

    A row has `completion`, and `answer` (kind math) or `tests` (kind code: a list of {input, output}). It may have
    `kind`, `format` (strict, or none to judge an answer wherever it stands), `language` (of a program whose fence names
    none, where the format is none), `problem`, `num_tokens`, `truncated`, `id` and columns of your own.

    The output has each row with its verdict, path, parts, reward, seconds and sandbox, in the order of the input. It is
    written to a file whose name ends in `.partial`, which becomes OUT when it is complete.
    """

    rows: tyro.conf.Positional[pathlib.Path]
    """Completions: a .jsonl or .parquet file."""
    out: str = ""
    """Where the graded rows go, as JSON lines."""
    explain: int = 0
    """Print as JSON what was extracted, parsed and decided for the row in this line, counted from 1."""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    code: CodeConfig = dataclasses.field(default_factory=CodeConfig)
    sandbox: SandboxConfig = dataclasses.field(default_factory=SandboxConfig)
    verifiers: PoolConfig = dataclasses.field(default_factory=PoolConfig)


def verify(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name."""
    rows, out, explain, config = parse(words)
    num_rows = verify_rows.check(rows, config)  # before anything is started or written
    explained = _row_of_line(rows, config, explain) if explain else None
    with VerifierPool(config.reward, config.verifiers, code=config.code, sandbox=config.sandbox) as pool:
        if explained:
            reward, explanation = pool.explain(explained.item)
            record = verify_rows.graded(explained, reward) | {"explanation": explanation}
            _say(json.dumps(record, indent=2, ensure_ascii=False, default=str))
        if out:
            _say(_grade_file(pool, rows, out, config, num_rows))


def _grade_file(pool: VerifierPool, rows: pathlib.Path, out: pathlib.Path, config: Config, num_rows: int) -> str:
    """Write the graded rows; returns a sentence about them."""
    verdicts = collections.Counter[str]()
    total = 0.0
    partial = out.with_name(out.name + ".partial")
    try:
        file = partial.open("w", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise MagistralError(f"{partial}: cannot write this file: {error.strerror}") from None
    with file, progress_bar("verify") as report:
        for num_done, (row, reward) in enumerate(_stream(pool, rows, config), 1):
            _write(file, verify_rows.graded(row, reward))
            verdicts[reward.verdict.value] += 1
            total += 0.0 if reward.verdict.is_infrastructure_failure else reward.total
            report(num_done, num_rows)
    os.replace(partial, out)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    num_rewards = num_rows - verdicts["sandbox_error"]
    return f"{num_rows} rows: {counts}; mean reward {total / max(num_rewards, 1):.3f}; written to {out}"


def _stream(pool: VerifierPool, rows: pathlib.Path, config: Config) -> Iterator[tuple[Row, Reward]]:
    """Rows with their rewards, in order; only those under way are held."""
    under_way = collections.deque[Row]()

    def items() -> Iterator[VerifyItem]:
        for row in verify_rows.read(rows, config):
            problem = dataclasses.replace(row.item.problem, extra={})  # the pool has what it needs of the tests
            under_way.append(dataclasses.replace(row, item=dataclasses.replace(row.item, problem=problem)))
            yield row.item

    for _, reward in pool.grade_stream(items(), ordered=True):
        yield under_way.popleft(), reward


def _write(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _row_of_line(rows: pathlib.Path, config: Config, line: int) -> Row:
    for row in verify_rows.read(rows, config):
        if row.line == line:
            return row
    raise MagistralError(f"{rows}: line {line} has no row; lines are counted from 1")


def _say(text: str) -> None:
    print(text)  # noqa: T201 (the result)


# ---- the command line -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> tuple[pathlib.Path, pathlib.Path | None, int, Config]:
    """Rows, output, line to explain, and the settings, of which only four sections may be given.

    Raises:
      MagistralError: A word is unknown, missing or of the wrong kind, or a setting is out of range.
    """
    if {"-h", "--help"} & set(words):
        tyro.cli(Words, args=["--help"], prog=_PROG, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    own, settings = _split(words)
    if own.get("rows") is None or not (own.get("out") or own.get("explain")):
        raise MagistralError(f"expected `{_PROG} ROWS.jsonl --out GRADED.jsonl` or `{_PROG} ROWS.jsonl --explain LINE`")
    line = own.get("explain", "0")
    if not line.isdecimal() or (int(line) == 0 and "explain" in own):
        raise MagistralError(f"command line: `explain` must be a line number from 1, not `{line}`.")
    config = load(settings, prog=_PROG)
    check_config(config)
    if config.reward.length_cache and not config.reward.max_length:
        raise MagistralError("`reward.length_cache` needs `reward.max_length` here: rows have no sampling limit.")
    rows, out = pathlib.Path(own["rows"]), own.get("out")
    if out and pathlib.Path(out).resolve() == rows.resolve():
        raise MagistralError(f"{out} is the file that is read; give another --out.")
    return rows, pathlib.Path(out) if out else None, int(line), config


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own words by name, and the settings."""
    own: dict[str, str] = {}
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            name, value = "rows", word
            if "rows" in own:
                raise MagistralError(f"command line: cannot place `{word}`: one file of rows is graded.")
        elif name in ("out", "explain"):
            if not equals and not rest:
                raise MagistralError(f"command line: `--{name}` needs a value.")
            value = value if equals else rest.pop(0)
        else:
            if name in FIELD_TYPES and name.partition(".")[0] not in _SECTIONS:
                raise MagistralError(
                    f"command line: `{name}` plays no part here; there are {', '.join(f'{s}.*' for s in _SECTIONS)}."
                )
            settings.append(word)
            if not equals and _takes_value(name, rest):
                settings.append(rest.pop(0))
            continue
        own[name] = value
    return own, settings


def _takes_value(name: str, rest: Sequence[str]) -> bool:
    """Whether the next word belongs to a setting: a switch may stand alone."""
    if not rest or rest[0].startswith("--"):
        return False
    return FIELD_TYPES.get(name) is not bool or rest[0].lower() in ("true", "false")
