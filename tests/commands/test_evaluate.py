"""Evaluation from the command line, of a policy whose scores are known."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def problems(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"Which digit? ({i})", "answer": answer} for i, answer in enumerate(["7", "14/2", "8", 7])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(tiny: Any, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    tiny.run("evaluate", settings)
    output = capsys.readouterr()
    return json.loads(output.out.splitlines()[-1]), output.err


def test_the_scores_of_a_known_policy(tiny: Any, problems: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    settings = {"policy.path": tiny.model("7"), "data.evaluation": problems, "data.num_evaluation": 0}
    found, progress = evaluate(tiny, capsys, settings)
    # It answers 7 to everything, which is right for three of the four: every sample, so every vote, too.
    assert (found["pass_at_1"], found["maj_at_8"]) == (0.75, 0.75)
    assert found["pass_at_k"] == {"1": 0.75, "2": 0.75, "4": 0.75, "8": 0.75}
    assert (found["num_problems"], found["num_samples"], found["num_ungraded"]) == (4, 32, 0)
    assert found["format_rate"] == 1.0
    low, high = found["intervals"]["pass_at_1"]
    assert 0 <= low < 0.75 < high <= 1
    assert "evaluation: pass@1 0.750 (95 % interval" in progress
    assert "4 problems" in progress


def test_scores_by_a_column(tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"Which? ({i})", "answer": answer, "origin": "ab"[i % 2]} for i, answer in enumerate("7778")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"policy.path": tiny.model("7"), "data.evaluation": path, "data.num_evaluation": 0}
    tiny.run("evaluate", settings | {"evaluation.by": "origin", "evaluation.num_samples": 2})
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {name: part["pass_at_1"] for name, part in found["parts"].items()} == {"a": 1.0, "b": 0.5}
    assert found["pass_at_1"] == 0.75
    assert table[0] == "| origin | problems | pass@1 | maj@2 | format | one language | tokens |"
    assert [line[:22] for line in table[2:]] == [
        "| a | 2 | 1.000 | 1.00",
        "| b | 2 | 0.500 | 0.50",
        "| all | 4 | 0.750 | 0.",
    ]


def test_a_column_that_is_missing_is_named(refusal: Callable[..., str]):
    assert "has no column `language`, which `evaluation.by` names." in refusal(
        "evaluate", {"evaluation.by": "language"}
    )


def test_a_second_evaluation_says_the_same(tiny: Any, capsys: pytest.CaptureFixture[str]):
    first, _ = evaluate(tiny, capsys, {"run.seed": 3})
    again, _ = evaluate(tiny, capsys, {"run.seed": 3})
    assert first == again
    assert first["num_problems"] == 4


def test_no_problems_is_said(refusal: Callable[..., str]):
    assert "`data.evaluation` is empty" in refusal("evaluate", {"data.evaluation": ""})


def test_a_run_folder_is_not_touched(tiny: Any, tmp_path: pathlib.Path, refusal: Callable[..., str]):
    missing = tmp_path / "no_such_model"
    sentence = refusal("evaluate", {"policy.path": missing, "run.folder": tmp_path / "run"})
    assert str(missing) in sentence
    assert list(tmp_path.iterdir()) == []
