"""Traces of a teacher whose answers are known, and what a student reads of them."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.data.traces import read_traces


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("traces")
    rows = [{"problem": f"Which digit? {i}", "answer": answer, "id": i} for i, answer in enumerate([7, 5, 9, 7])]
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "policy.path": tiny.model(),  # says 5, 6, 7 or 8
        "data.train": folder / "raw.jsonl",
        "data.num_train": 0,
        "data.evaluation": "",
        "traces.num_samples": 16,
        "traces.chunk": 2,
    }


@pytest.fixture(scope="module")
def finished(tiny: Any, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("traced") / "out"
    tiny.run("traces", settings | {"run.folder": folder})
    return folder


def test_right_completions_are_kept(finished: pathlib.Path):
    found = read(finished / "traces.jsonl")
    answers = {"0": "7", "1": "5", "3": "7"}
    assert {trace["problem_id"] for trace in found} == answers.keys()  # 2 is never solved
    for trace in found:
        assert trace["completion"].startswith("<think>")
        assert trace["completion"].endswith(f"\\boxed{{{answers[trace['problem_id']]}}}")
    assert len(found) <= 6
    assert len({(trace["problem_id"], trace["completion"]) for trace in found}) == len(found)


def test_a_killed_run_ends_with_the_same_traces(
    finished: pathlib.Path, tiny: Any, settings: dict[str, Any], tmp_path: pathlib.Path
):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:3]))
    (folder / "traces.jsonl").unlink()
    tiny.run("traces", settings | {"run.folder": folder}, "--resume")
    for name in ("samples.jsonl", "traces.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_fine_tuning_reads_them(finished: pathlib.Path):
    found = read(finished / "traces.jsonl")
    traces = read_traces(finished / "traces.jsonl")
    assert [(trace.problem.statement, trace.completion) for trace in traces] == [
        (row["problem"], row["completion"]) for row in found
    ]


def test_a_teacher_that_solves_nothing_is_named(
    settings: dict[str, Any], tiny: Any, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"problem": "Which digit?", "answer": 3}\n')
    sentence = refusal("traces", settings | {"data.train": raw, "run.folder": tmp_path / "out"})
    assert "has solved none of 1 problems in the right format" in sentence
