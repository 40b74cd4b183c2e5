"""The command on small files; bounds on time are generous."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.main import main

WORDS = "We add the two numbers and look at the result for a moment. "
TESTS = [{"input": f"{number}\n", "output": f"{number + 1}\n"} for number in range(5)]
SOLUTION = "print(int(input()) + 1)"
STRICT = f"<think>{WORDS}</think>{WORDS}"

Verify = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def in_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def verify(in_folder: None) -> Verify:
    """Grade rows in a folder of their own and return what is written."""

    def run(rows: list[dict[str, Any]], *flags: str) -> list[dict[str, Any]]:
        pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(["verify", "rows.jsonl", "--out", "graded.jsonl", "--verifiers.num-workers=2", *flags])
        return [json.loads(line) for line in pathlib.Path("graded.jsonl").read_text().splitlines()]

    return run


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["verify", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_rows_come_back_in_order_with_their_verdicts(verify: Verify, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"completion": f"{STRICT}\\boxed{{1/2}}", "answer": "0.5", "problem": WORDS, "id": "half", "level": [3, 4]},
        {"completion": f"{STRICT}\\boxed{{3}}", "answer": 4},
        {"completion": "\\boxed{4}", "answer": "4"},
        {"kind": "code", "completion": f"{STRICT}\n```python\n{SOLUTION}\n```", "tests": TESTS},
        {"kind": "code", "completion": f"{STRICT}\n```cpp\nint main() {{ return 1; }}\n```", "tests": TESTS},
    ]
    graded = verify(rows)
    assert [row["verdict"] for row in graded] == ["correct", "wrong", "bad_format", "correct", "runtime_error"]
    assert [row["line"] for row in graded] == [1, 2, 3, 4, 5]
    half = graded[0]
    assert (half["id"], half["level"], half["answer"], half["path"]) == ("half", [3, 4], "0.5", "rational")
    assert half["parts"] == {"format": 0.1, "correctness": 0.9, "length": 0.0, "language": 0.1}
    assert half["reward"] == pytest.approx(1.1)
    assert half["seconds"] > 0
    assert half["sandbox"] in ("bubblewrap", "landlock")
    assert (graded[2]["reward"], graded[2]["path"]) == (0.0, "no_opening_tag")
    assert "tests" not in graded[3]
    said = capsys.readouterr().out
    assert said.startswith("5 rows: 2 correct, ")
    assert "written to graded.jsonl" in said
    assert not pathlib.Path("graded.jsonl.partial").exists()


def test_without_a_format_an_answer_or_a_program_may_stand_anywhere(verify: Verify):
    rows = [
        {"completion": "So the answer is 4.", "answer": "4"},
        {"completion": "", "answer": "4"},
        {"kind": "code", "completion": SOLUTION, "tests": TESTS, "language": "python"},
        {"kind": "code", "completion": f"```\n{SOLUTION}\n```", "tests": TESTS, "language": "python"},
        {"kind": "code", "completion": SOLUTION, "tests": TESTS},
    ]
    graded = verify([row | {"format": "none"} for row in rows])
    assert [row["verdict"] for row in graded] == ["correct", "unparsable", "correct", "correct", "unparsable"]
    assert graded[0]["parts"] == {"format": 0.0, "correctness": 0.9, "length": 0.0, "language": 0.0}


def test_settings_apply(verify: Verify):
    program = "n = int(input())\nprint(n + 1 if n < 2 else 0)"
    rows = [
        {"completion": f"[T]{WORDS}[/T]\\boxed{{4}}", "answer": "4", "num_tokens": 90},
        {"completion": f"[T]a[/T]\n```py\n{program}\n```", "tests": TESTS, "num_tokens": 10, "truncated": True},
    ]
    settings = ["--reward.think_open=[T]", "--reward.think-close=[/T]", "--reward.max-length=100"]
    math, code = verify(rows, *settings, "--reward.length-cache=20", "--code.partial", "--sandbox.mechanism=landlock")
    assert math["parts"]["length"] == pytest.approx(-0.05)
    assert code["parts"]["length"] == pytest.approx(-0.1)
    assert (code["verdict"], code["parts"]["correctness"]) == ("wrong", pytest.approx(0.9 * 2 / 5))
    assert code["sandbox"] == "landlock"


def test_an_own_function_grades_with_the_columns_of_the_row(verify: Verify):
    pathlib.Path("rewards.py").write_text(
        "def share(thoughts, targets, **rest):\n"
        "    assert set(rest) == {'completion', 'statement', 'answer', 'level'}, rest\n"
        "    return sum(word in thoughts for word in targets) / len(targets)\n"
    )
    rows = [
        {"completion": "<think>one two</think>x", "targets": ["one", "three"], "level": 3},
        {"completion": "<think>one two</think>x", "targets": ["one", "two"], "level": 3},
        {"completion": "<think>one two</think>x", "targets": [], "level": 3},
    ]
    half, whole, broken = verify(rows, "--reward.function=rewards:share")
    assert (half["verdict"], half["path"], half["parts"]["correctness"]) == ("wrong", "function", 0.45)
    assert (whole["verdict"], whole["parts"]["correctness"]) == ("correct", 0.9)
    assert (broken["verdict"], broken["path"], broken["reward"]) == (
        "sandbox_error",
        "function:ZeroDivisionError",
        None,
    )


def explanation(row: dict[str, Any], capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """What is printed about a row that stands in line 2."""
    pathlib.Path("rows.jsonl").write_text("\n" + json.dumps(row) + "\n")
    main(["verify", "rows.jsonl", "--explain", "2", *flags])
    said = json.loads(capsys.readouterr().out)
    assert said["line"] == 2
    return said


@pytest.mark.usefixtures("in_folder")
def test_an_answer_is_explained(capsys: pytest.CaptureFixture[str]):
    said = explanation({"completion": f"{STRICT}\\boxed{{2/4}}", "answer": "0.5"}, capsys)
    assert (said["verdict"], said["path"], said["explanation"]["path"]) == ("correct", "rational", "rational")
    assert (said["explanation"]["extracted"], said["explanation"]["reference"]) == ("2/4", "0.5")
    assert said["explanation"]["steps"]
    said = explanation({"completion": "\\boxed{2/4}", "answer": "0.5"}, capsys)
    assert (said["verdict"], said["explanation"]) == ("bad_format", {"extracted": None})


@pytest.mark.usefixtures("in_folder")
def test_a_program_is_explained(capsys: pytest.CaptureFixture[str]):
    row = {"kind": "code", "format": "none", "language": "python", "tests": TESTS}
    said = explanation(row | {"completion": "n = int(input())\nprint(min(n + 1, 3))"}, capsys)["explanation"]
    assert (said["language"], said["compiles"], said["tests_passed"], said["tests_sampled"]) == ("python", True, 3, 5)
    assert said["first_failed_test"] == {"number": 4, "input": "3\n", "expected": "4\n", "got": "3\n"}
    said = explanation(row | {"completion": "int main() {", "language": "cpp"}, capsys)["explanation"]
    assert not said["compiles"]
    assert "error" in said["words"]


@pytest.mark.usefixtures("in_folder")
def test_a_row_may_be_explained_while_all_are_graded(capsys: pytest.CaptureFixture[str]):
    pathlib.Path("rows.jsonl").write_text(json.dumps({"completion": "4", "answer": "4", "format": "none"}) + "\n")
    main(["verify", "rows.jsonl", "--explain=1", "--out=graded.jsonl"])
    assert "1 rows: 1 correct" in capsys.readouterr().out
    assert json.loads(pathlib.Path("graded.jsonl").read_text())["verdict"] == "correct"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"answer": "3"}', "no completion; a row of kind math needs one, and this has: answer"),
        ('{"completion": "x"}', "no answer"),
        ('{"completion": "x", "answer": ["3"]}', "answer is of type list; expected text"),
        ('{"completion": 3, "answer": "3"}', "completion is of type int; expected text"),
        ('{"completion": "x", "answer": "3", "kind": "art"}', "kind is 'art'; expected math or code"),
        ('{"completion": "x", "answer": "3", "format": "loose"}', "format is 'loose'; expected strict or none"),
        ('{"completion": "x", "kind": "code"}', "no tests"),
        ('{"completion": "x", "kind": "code", "tests": [{"input": 1}]}', "input of test 1 is 1; expected text"),
        ('{"completion": "x", "answer": "3", "num_tokens": "many"}', "num_tokens is 'many'"),
    ],
)
def test_a_malformed_row_is_named_before_anything_is_written(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], row: str, sentence: str
):
    (tmp_path / "rows.jsonl").write_text('{"completion": "x", "answer": "3"}\n\n' + row + "\n")
    error = fails([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "graded.jsonl")], capsys)
    assert f"{tmp_path / 'rows.jsonl'}, line 3: " in error
    assert sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "expected `magistral-jax verify ROWS.jsonl --out"),
        (["rows.jsonl"], "expected `magistral-jax verify ROWS.jsonl --out"),
        (["rows.jsonl", "--out"], "`--out` needs a value"),
        (["rows.jsonl", "more.jsonl", "--out=x"], "cannot place `more.jsonl`"),
        (["rows.jsonl", "--explain=first"], "`explain` must be a line number from 1, not `first`"),
        (["rows.jsonl", "--explain", "0"], "`explain` must be a line number from 1, not `0`"),
        (["rows.jsonl", "--out=x", "--verifiers.num_worker=3"], "the nearest is `verifiers.num_workers`"),
        (["rows.jsonl", "--out=x", "--verifiers.num_workers=none"], "must be a whole number, not `none`"),
        (["rows.jsonl", "--out=x", "--verifiers.num_workers=0"], "`verifiers.num_workers` is 0"),
        (["rows.jsonl", "--out=x", "--batch.batch-size", "4"], "`batch.batch_size` plays no part here"),
        (["rows.jsonl", "--out=x", "--reward.length_cache=4"], "needs `reward.max_length`"),
        (["rows.jsonl", "--out=./rows.jsonl"], "is the file that is read"),
        (["missing.jsonl", "--out=x"], "missing.jsonl: no such file"),
        (["rows.jsonl", "--explain=2"], "line 2 has no row"),
        (["rows.jsonl", "--out=no/folder"], "no/folder.partial: cannot write this file"),
        (["rows.jsonl", "--out=x", "--reward.function=nothing:here"], "`reward.function` is `nothing:here`"),
    ],
)
def test_a_mistake_is_one_sentence(
    in_folder: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
):
    pathlib.Path("rows.jsonl").write_text('{"completion": "x", "answer": "3"}\n')
    error = fails(words, capsys)
    assert sentence in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


SLOW = """
import time
def score(completion):
    time.sleep(0 if completion.endswith("quick") else 1000)
    return 1
"""


def test_an_interrupted_run_leaves_nothing_under_the_name_of_the_result(tmp_path: pathlib.Path):
    rows = [{"completion": "<think></think>quick"}] * 3 + [{"completion": "<think></think>"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["rows.jsonl", "--out=graded.jsonl", "--reward.function=slow:score", "--verifiers.deadline=1000"]
    command = [sys.executable, "-c", "from magistral_jax.main import main; main()", "verify", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path])}
    partial = tmp_path / "graded.jsonl.partial"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not (partial.exists() and partial.read_text().count("\n") == 3):
            assert process.poll() is None
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert not (tmp_path / "graded.jsonl").exists()
    assert [json.loads(line)["line"] for line in partial.read_text().splitlines()] == [1, 2, 3]


def test_no_jax_is_loaded():
    code = "import sys, magistral_jax.commands.verify; print('jax' in sys.modules, 'sympy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "False False\n"


def test_the_help_lists_what_may_be_set(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["verify", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in ("--out", "--explain", "--reward.function", "--code.num_tests", "--sandbox.mechanism", "--verifiers."):
        assert word in said
    assert "--batch" not in said
