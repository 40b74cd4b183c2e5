"""A run in stages from the command line, killed where a stage begins, gone on with, and called back by hand.

What each stage asks for, that nothing is lost or doubled, and that all of it is replayed bit by bit.
"""

import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from magistral_jax.main import main
from magistral_jax.metrics import read_json_lines
from magistral_jax.schedule.event_log import LOG_FILE, Happened, Session, read_log

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from magistral_jax.main import main; main()"]
SHORT = {"name": "short", "max_length": 16, "length_cache": 4, "batch_size": 16, "num_async": 16, "num_steps": 3}
LONG = {"name": "long", "max_length": 24, "length_cache": 2, "batch_size": 8, "num_async": 8, "difficulty": [0.0, 0.6]}
STAGES = [1, 1, 1, 2, 2, 2, 2, 2, 2, 1]  # of each step


def in_stages(tiny: Any, folder: pathlib.Path, *words: str, **settings: Any) -> list[str]:
    """Words of a run in two stages, the second on sums of larger numbers."""
    larger = tiny.sums.replace("max_digits=1", "max_digits=2")
    stages = [json.dumps(SHORT), json.dumps(LONG | {"mixture": [f"1 {larger}"]})]
    given = {
        "run.folder": folder,
        "schedule.num_steps": 9,
        "schedule.checkpoint_every": 1,
        "curriculum.refresh_steps": 1,
        "data.num_train": 20,
        "data.num_evaluation": 1,
        "evaluation.num_samples": 1,
        **settings,
    }
    return ["train", *tiny.flags(given), "--curriculum.stages", *stages, *words]


@pytest.fixture(scope="module")
def staged(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that is killed where the second stage begins, goes on to its end, and is then called back for a step."""
    folder = tmp_path_factory.mktemp("runs") / "staged"
    process = subprocess.Popen([*PROGRAM, *in_stages(tiny, folder)], cwd=ROOT, env=tiny.environment)
    while not has_begun(folder) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    main([*in_stages(tiny, folder), "--resume"])
    main([*in_stages(tiny, folder, **{"schedule.num_steps": 10}), "--resume", "--curriculum.begin=short"])
    return folder


def has_begun(folder: pathlib.Path) -> bool:
    """Whether the second stage has begun, and a checkpoint of the first is there to go on from."""
    log = folder / LOG_FILE
    if not log.exists() or not log.stat().st_size or not any((folder / "checkpoints").glob("[0-9]")):
        return False
    return any(isinstance(record, Happened) and record.name == "StageBegan" for _, record in read_log(log))


def test_nothing_is_lost_or_doubled_by_a_kill_where_a_stage_begins(staged: pathlib.Path):
    metrics = list(read_json_lines(staged / "metrics.jsonl"))
    assert [line["stage"] for line in metrics] == STAGES
    rollouts = list(read_json_lines(staged / "rollouts.jsonl"))
    assert [sum(line["step"] == step for line in rollouts) for step in range(1, 11)] == [16] * 3 + [8] * 6 + [16]
    assert len({line["request"] for line in rollouts}) == len(rollouts)
    records = [record for _, record in read_log(staged / LOG_FILE)]
    assert sum(isinstance(record, Session) for record in records) == 3  # it went on from checkpoints
    began = [r.fields[0] for r in records if isinstance(r, Happened) and r.name == "StageBegan"]
    assert began == [1, 0]


def test_each_group_ends_with_the_limits_and_problems_that_it_was_dispatched_with(staged: pathlib.Path):
    rollouts = [line for line in read_json_lines(staged / "rollouts.jsonl") if line["step"] <= 9]
    is_long = {line["request"] // 4: line["problem"].endswith("@1") for line in rollouts}
    first = min(group_id for group_id, long in is_long.items() if long)
    assert all(long == (group_id >= first) for group_id, long in is_long.items())
    for line in rollouts:
        limit, cache = (24, 2) if is_long[line["request"] // 4] else (16, 4)
        length = line["completion_tokens"]
        assert length <= limit
        if line["verdict"] != "bad_format":
            assert line["reward_length"] == pytest.approx(-0.1 * max(0, length - limit + cache) / cache)


def test_the_whole_run_is_replayed_bit_by_bit(staged: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    main(["replay", str(staged), "--check"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("0 differences in ")
    main(["replay", str(staged), "--step", "5"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("0 differences in step 5")


def test_the_page_says_what_held(staged: pathlib.Path):
    page = (staged / "report.html").read_text()
    assert "Violated: l_max − l_cache grows (tokens without a length penalty): 12 → 22, 22 → 12." in page
    assert "Violated: batches shrink (batch / minibatch, sequences): 16 / 16 → 8 / 8, 8 / 8 → 16 / 16." in page


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reward.max_length": 20}, "`reward.max_length` (20) must be 0 where `curriculum.stages` is given"),
        ({"curriculum.begin": "middle"}, "`curriculum.begin` (middle) must be the name of a stage; there are: short"),
        ({"generation.max_new_tokens": 20}, "stage `long`: `max_length` (24) must lie between 1 and `gen"),
    ],
)
def test_a_table_that_cannot_work_is_one_sentence_and_leaves_nothing(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], sentence: str
):
    with pytest.raises(SystemExit) as exit_:
        main(in_stages(tiny, tmp_path / "run", **settings))
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
