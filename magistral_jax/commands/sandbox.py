"""`magistral-jax sandbox`: which mechanism confines programs on this machine, and one program run in it."""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from magistral_jax.records import MagistralError
from magistral_jax.verify.code_compile import CompileError
from magistral_jax.verify.code_folders import claimed_folder
from magistral_jax.verify.code_run import GraderBoxes
from magistral_jax.verify.code_tests import Language, Program
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Execution, Limits
from magistral_jax.verify.sandbox.mechanism import Mechanism, SandboxUnavailable, choose_mechanism

_PROG = "magistral-jax sandbox"
_NAMES = {"auto": "auto", **{mechanism.value: mechanism.value for mechanism in Mechanism}, "bwrap": "bubblewrap"}
_LANGUAGES = {".py": Language.PYTHON, **dict.fromkeys((".cpp", ".cc", ".cxx"), Language.CPP)}


@dataclasses.dataclass(frozen=True)
class Check:
    """Run the self-test of each mechanism and say which one holds."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run one program confined, under the limits of one test, and print its verdict as one JSON object."""

    file: tyro.conf.Positional[pathlib.Path]
    """Program: a .py or .cpp file."""
    stdin: pathlib.Path | None = None
    """File with its standard input; none: empty."""
    mechanism: str = "auto"
    """What confines it: auto, bubblewrap (or bwrap), landlock, unsafe."""


def sandbox(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name."""
    chosen = _parse(words)
    if isinstance(chosen, Check):
        check()
    else:
        print(json.dumps(run(chosen)))  # noqa: T201 (the one line that is promised)


def check() -> None:
    """Print a table of the mechanisms.

    Raises:
      SandboxUnavailable: None holds.
    """
    table = Table("mechanism", "self-test", "why not")
    for mechanism in (Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK):
        try:
            choose_mechanism(mechanism.value)
        except SandboxUnavailable as error:
            table.add_row(mechanism.value, "[red]fails[/red]", str(error))
        else:
            table.add_row(mechanism.value, "[green]holds[/green]", "")
    console = Console()
    console.print(table)
    console.print(f"programs are confined by {choose_mechanism().value}")


def run(words: Run) -> dict[str, Any]:
    """The verdict on one program, as it is printed."""
    language = _LANGUAGES.get(words.file.suffix)
    if language is None:
        raise MagistralError(f"{words.file}: expected a file that ends in {', '.join(_LANGUAGES)}")
    if words.mechanism not in _NAMES:
        raise MagistralError(f"--mechanism: unknown mechanism `{words.mechanism}`; expected one of {', '.join(_NAMES)}")
    program = Program(language, _read(words.file).decode("utf-8", "replace"))
    stdin = b"" if words.stdin is None else _read(words.stdin)
    mechanism = choose_mechanism(_NAMES[words.mechanism])
    config = CodeConfig()
    limits = Limits(config.cpu_seconds, config.wall_seconds, config.memory_mib)
    with claimed_folder() as folder:
        boxes = GraderBoxes(mechanism, config, folder=folder)
        with contextlib.closing(boxes):
            try:
                done = _fields(boxes.run(program, stdin, limits))
            except CompileError as refusal:
                done = _EMPTY | {"verdict": "compile_error", "stderr": refusal.message or refusal.path}
            except BoxError as failure:
                done = _EMPTY | {"verdict": "sandbox_error", "stderr": str(failure)}
    return done | {"mechanism": mechanism.value}


_EMPTY: dict[str, Any] = {
    "verdict": "",
    "exit_code": None,
    "signal": None,
    "stdout": "",
    "stderr": "",
    "cpu_seconds": 0.0,
    "wall_seconds": 0.0,
    "peak_mib": 0.0,
}


def _fields(done: Execution) -> dict[str, Any]:
    is_exit = done.exit_code >= 0
    return _EMPTY | {
        "verdict": done.status.value,
        "exit_code": done.exit_code if is_exit else None,
        "signal": None if is_exit else -done.exit_code,
        "stdout": done.stdout.decode("utf-8", "replace"),
        "stderr": done.stderr.decode("utf-8", "replace"),
        "cpu_seconds": round(done.cpu_seconds, 4),
        "wall_seconds": round(done.wall_seconds, 4),
        "peak_mib": round(done.peak_mib, 2),
    }


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MagistralError(f"{path}: cannot read this file: {error.strerror}") from None


def _parse(words: Sequence[str]) -> Check | Run:
    """Tyro's framed error pages give way to one sentence, and only the help is shown."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(Check | Run, args=list(words), prog=_PROG)
    except SystemExit as end:
        if not end.code:
            raise
        raise MagistralError(
            f"cannot make sense of `{' '.join(words)}`; expected `{_PROG} check` or "
            f"`{_PROG} run FILE.cpp|FILE.py [--stdin FILE] [--mechanism NAME]`"
        ) from None
