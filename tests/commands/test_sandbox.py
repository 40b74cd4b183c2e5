"""`magistral-jax sandbox`: which mechanism holds, and the verdict on one program as one line of JSON."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from magistral_jax.commands import sandbox as command
from magistral_jax.commands.sandbox import sandbox
from magistral_jax.main import main
from magistral_jax.records import MagistralError
from magistral_jax.verify.code_run import GraderBoxes
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.mechanism import SandboxUnavailable, choose_mechanism

Program = Callable[[str, str], str]
Verdict = Callable[..., dict[str, Any]]


@pytest.fixture
def program(tmp_path: pathlib.Path) -> Program:
    def write(name: str, source: str) -> str:
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.fixture
def verdict(capsys: pytest.CaptureFixture[str]) -> Verdict:
    """Runs the command; its standard output is one line."""

    def run(*words: str) -> dict[str, Any]:
        sandbox(["run", *words])
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return run


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    choose_mechanism.cache_clear()
    yield
    choose_mechanism.cache_clear()


# --- run -------------------------------------------------------------------------------------------------------------

ADD_PY = "print(sum(map(int, input().split())))\n"
ADD_CPP = "#include <bits/stdc++.h>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }\n"


@pytest.mark.parametrize("mechanism", ["auto", "bubblewrap", "bwrap", "landlock", "unsafe"])
@pytest.mark.parametrize(("name", "source"), [("add.py", ADD_PY), ("add.cpp", ADD_CPP)])
def test_a_program_and_its_input(mechanism: str, name: str, source: str, program: Program, verdict: Verdict):
    words = [program(name, source), "--stdin", program("input", "20 22\n")]
    found = verdict(*words, *(["--mechanism", mechanism] if mechanism != "auto" else []))
    assert {key: found[key] for key in ("verdict", "exit_code", "signal", "stdout", "stderr")} == {
        "verdict": "ok",
        "exit_code": 0,
        "signal": None,
        "stdout": "42\n",
        "stderr": "",
    }
    assert found["mechanism"] == {"auto": "bubblewrap", "bwrap": "bubblewrap"}.get(mechanism, mechanism)
    assert 0 < found["cpu_seconds"] < 1
    assert found["wall_seconds"] > 0
    assert 1 < found["peak_mib"] < 300


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        (
            "a.py",
            "import sys\nprint('a')\nsys.exit('b')",
            {"verdict": "runtime_error", "exit_code": 1, "stdout": "a\n"},
        ),
        ("a.py", "import os\nos.abort()", {"verdict": "runtime_error", "exit_code": None, "signal": 6}),
        ("a.py", "while True: pass", {"verdict": "timeout", "exit_code": None, "signal": 9}),
        ("a.py", "x = [0] * 10**9", {"verdict": "memory_limit"}),
        ("a.py", "while True: print('x' * 10**6)", {"verdict": "output_limit"}),
        ("a.py", "print('é')", {"verdict": "ok", "stdout": "é\n"}),
        ("a.py", "import os\nos.write(1, b'\\xff')", {"verdict": "ok", "stdout": "\ufffd"}),
        ("a.cc", "int main() { return 3; }", {"verdict": "runtime_error", "exit_code": 3}),
        ("a.cxx", "int main() { return x; }", {"verdict": "compile_error", "exit_code": None, "stdout": ""}),
    ],
)
def test_verdicts(name: str, source: str, expected: dict[str, Any], program: Program, verdict: Verdict):
    found = verdict(program(name, source))
    assert {key: found[key] for key in expected} == expected
    if name == "a.cxx":
        assert "'x' was not declared" in found["stderr"]


def test_a_box_that_fails_is_no_verdict_on_the_program(
    program: Program, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise BoxError("the runner is gone")

    monkeypatch.setattr(GraderBoxes, "run", fail)
    found = verdict(program("a.py", ""))
    assert (found["verdict"], found["stderr"]) == ("sandbox_error", "the runner is gone")


def test_as_a_process(program: Program):
    words = ["sandbox", "run", program("a.py", "print(input())"), "--stdin", program("in", "hello")]
    code = "from magistral_jax.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["stdout"] == "hello\n"
    assert done.stderr == ""


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_says_which_mechanism_holds(capsys: pytest.CaptureFixture[str]):
    sandbox(["check"])
    table = capsys.readouterr().out
    assert table.count("holds") == 2
    assert table.endswith("programs are confined by bubblewrap\n")


def test_check_says_why_one_does_not_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    sandbox(["check"])
    table = capsys.readouterr().out
    assert "bwrap" in table
    assert "fails" in table
    assert table.endswith("programs are confined by landlock\n")


def test_check_fails_where_none_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(wanted: str = "auto") -> None:
        raise SandboxUnavailable(f"no sandbox: {wanted} does not hold")

    monkeypatch.setattr(command, "choose_mechanism", refuse)
    with pytest.raises(SystemExit) as exit_:
        main(["sandbox", "check"])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out.count("fails") == 2
    assert output.err == "error: no sandbox: auto does not hold\n"


# --- mistakes and help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "none.py"], "none.py: cannot read this file: No such file or directory"),
        (["run", "a.rs"], "a.rs: expected a file that ends in .py, .cpp, .cc, .cxx"),
        (["run", os.devnull + ".py/x.py"], "/dev/null.py/x.py: cannot read this file: No such file or directory"),
        (["run", __file__, "--stdin", "none"], "none: cannot read this file: No such file or directory"),
        (
            ["run", __file__, "--mechanism", "jail"],
            "--mechanism: unknown mechanism `jail`; expected one of auto, bubblewrap, landlock, unsafe, bwrap",
        ),
        (
            ["runn", "a.py"],
            "cannot make sense of `runn a.py`; expected `magistral-jax sandbox check` or "
            "`magistral-jax sandbox run FILE.cpp|FILE.py [--stdin FILE] [--mechanism NAME]`",
        ),
    ],
)
def test_mistakes(words: list[str], sentence: str):
    with pytest.raises(MagistralError) as error:
        sandbox(words)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "words", [[], ["run"], ["check", "now"], ["run", "a.py", "--input", "x"], ["run", "a.py", "b.py"]]
)
def test_words_that_make_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(MagistralError, match="cannot make sense of"):
        sandbox(words)
    assert capsys.readouterr() == ("", "")


HELP_PROBE = """
import sys, time
from magistral_jax.main import main
try:
    main(["sandbox", "run", "--help"])
except SystemExit as end:
    assert not end.code
print(time.process_time(), *(name for name in ("jax", "sympy", "torch", "pyarrow") if name in sys.modules))
"""


def test_help_is_fast_and_imports_no_jax():
    done = subprocess.run([sys.executable, "-c", HELP_PROBE], capture_output=True, text=True, check=True)
    assert "usage: magistral-jax sandbox run" in done.stdout
    seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert heavy == []
    assert float(seconds) < 1.0
