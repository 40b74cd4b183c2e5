"""Curation of math from the command line, by a policy whose answers are known."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from magistral_jax.main import main

# The policy says 5, 6, 7 or 8, each to a quarter, whatever it is asked.
ROWS = [
    {"problem": "Which digit is it?", "answer": 7, "id": "solved sometimes", "level": 3},
    {"problem": "which  digit is it?", "answer": 7, "id": "again"},
    {"problem": "Prove that it is 7.", "answer": 7, "id": "proof"},
    {"problem": "Which digit is not said?", "answer": 3, "id": "never solved"},
    {"problem": "How many? (A) 5 (B) 6 (C) 9", "answer": "B", "id": "options"},
    {"problem": "What was seen in the evaluation?", "answer": 7, "id": "seen"},
    {"problem": "x" * 40, "answer": 7, "id": "long"},
    {"problem": "Is it?", "answer": "", "id": "empty"},
]


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("curate")
    return {
        "policy.path": tiny.model(),
        "data.train": write(folder / "raw.jsonl", ROWS),
        "data.evaluation": write(folder / "eval.jsonl", [{"problem": "What was seen in the evaluation?", "answer": 7}]),
        "data.num_evaluation": 0,
        "data.on_bad_row": "drop",
        "generation.max_prompt_tokens": 32,
        "curate.num_samples": 16,
        "curate.chunk": 2,
    }


@pytest.fixture(scope="module")
def finished(tiny: Any, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("curated") / "out"
    main(["curate", "math", *tiny.flags(settings), f"--out={folder}"])
    return folder


def test_what_stays_and_what_is_removed(finished: pathlib.Path):
    kept = {row["id"]: row for row in read(finished / "curated.jsonl")}
    assert list(kept) == ["solved sometimes", "options"]
    assert kept["options"]["problem"] == "How many?"
    assert kept["options"]["answer"] == "6"
    assert kept["solved sometimes"]["level"] == 3
    for row in kept.values():
        assert 0 < row["pass_rate_1"] < 0.7  # 4 of 16 expected
        assert row["num_graded_1"] == 16
    assert {row["id"]: row["reason"] for row in read(finished / "removed.jsonl")} == {
        "": "bad row",
        "again": "duplicate",
        "seen": "in evaluation",
        "proof": "proof",
        "long": "longer than generation.max_prompt_tokens",
        "never solved": "too hard",
    }
    table = json.loads((finished / "table.json").read_text())
    assert [(row["step"], row["in"], row["out"]) for row in table] == [
        ("read", 8, 7),
        ("duplicates", 7, 6),
        ("evaluation problems", 6, 5),
        ("format", 5, 4),
        ("prompt", 4, 3),
        ("difficulty, stage 1", 3, 2),
    ]


def test_a_killed_run_ends_with_the_same_files(
    finished: pathlib.Path, tiny: Any, settings: dict[str, Any], tmp_path: pathlib.Path
):
    folder = tmp_path / "out"
    words = ["curate", "math", *tiny.flags(settings), f"--out={folder}"]
    journal = folder / "samples_1.jsonl"
    with subprocess.Popen([sys.executable, "-c", "from magistral_jax.main import main; main()", *words]) as process:
        end = time.monotonic() + 300
        while not (journal.exists() and journal.stat().st_size) and time.monotonic() < end:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with journal.open("ab") as file:
        file.write(b'{"id": "op')  # a kill may come in the middle of a line
    main([*words, "--resume"])
    for path in finished.iterdir():
        if path.name != "config.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(SystemExit):  # not by mistake
        main(words)


def test_stage_2_regrades_the_pool(
    finished: pathlib.Path, tiny: Any, settings: dict[str, Any], tmp_path: pathlib.Path, capsys: Any
):
    stronger = settings | {"policy.path": tiny.model("7"), "data.train": finished / "pool.jsonl", "curate.stage": 2}
    main(["curate", "math", *tiny.flags(stronger), f"--out={tmp_path / 'out'}"])
    assert "| difficulty, stage 2 | 3 | 0 | 2 reference taken for wrong, 1 too easy |" in capsys.readouterr().out
    pool = {row["id"]: row for row in read(tmp_path / "out" / "pool.jsonl")}
    assert pool["solved sometimes"]["pass_rate_2"] == 1.0
    assert pool["never solved"]["top_answer_2"] == "7"
    assert 0 < pool["options"]["pass_rate_1"] < 1


def test_without_samples_there_is_no_model(settings: dict[str, Any], tmp_path: pathlib.Path, capsys: Any):
    raw = str(settings["data.train"])
    words = ["--data.on_bad_row=drop", "--curate.num_samples=0", "--out", str(tmp_path / "out")]
    main(["curate", "math", raw, *words])
    assert "| format | 6 | 5 | 1 proof |" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "curated.jsonl")) == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["prose"], "expected `magistral-jax curate math` or `magistral-jax curate code`, not `prose`"),
        (["math"], "`data.train` is empty"),
        (["math", "none.jsonl", "--out=OUT"], "none.jsonl: no such file"),
        (["math", "--curate.sample=3"], "unknown setting `curate.sample`; the nearest is `curate.num_samples`"),
    ],
)
def test_mistakes_are_named(words: list[str], sentence: str, tmp_path: pathlib.Path, capsys: Any):
    with pytest.raises(SystemExit) as exit_:
        main(["curate", *(word.replace("OUT", str(tmp_path / "out")) for word in words)])
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
