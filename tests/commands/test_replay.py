"""A run is done again from its log, bit by bit; what was changed is named; a killed run goes on."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.main import main
from magistral_jax.policy.hf_folder import load_params
from magistral_jax.schedule.event_log import LOG_FILE, EventLog, Generated, Record, Trained, Verified, read_log

STEPS = 3
ROOT = pathlib.Path(__file__).parents[2]


def copy(run: pathlib.Path, target: pathlib.Path, change: Callable[[Record], Record] = lambda record: record) -> Any:
    """The run with a log in which every record was changed."""
    shutil.copytree(run, target)
    log = EventLog(target / LOG_FILE)
    for _, record in read_log(run / LOG_FILE):
        log.write(change(record))
    log.close()
    return target


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_run_is_replayed_bit_by_bit(
    finished_run: pathlib.Path, tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    main(["replay", str(finished_run), "--check", "--out", str(tmp_path / "policy")])
    *_, mark, verdict = said(capsys)
    records = [record for _, record in read_log(finished_run / LOG_FILE)]
    num_completions = sum(isinstance(record, Generated) for record in records)
    assert verdict == f"0 differences in {num_completions} completions, {STEPS} steps"
    (last,) = [record for record in records if isinstance(record, Trained) and record.step == STEPS]
    assert mark == f"parameters after step {STEPS}: {last.fingerprint:#010x}"
    recorded, replayed = (load_params(path / "policy", tiny.config) for path in (finished_run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, replayed, recorded)


def test_a_step_is_rebuilt_from_its_rollouts(finished_run: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    main(["replay", str(finished_run), "--step", "2"])
    assert said(capsys)[-1] == "0 differences in step 2, rebuilt from the start and 2 steps' rollouts"


@pytest.mark.parametrize("place", ["completion", "parameters"])
def test_what_is_not_as_recorded_is_named(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], place: str
):
    def change(record: Record) -> Record:
        match record:
            case Generated(6) if place == "completion":
                return Generated(6, record.engine, record.engine_step, record.num_tokens, record.checksum ^ 1)
            case Trained(1) if place == "parameters":
                return Trained(1, record.group_ids, record.fingerprint ^ 1)
        return record

    folder = copy(finished_run, tmp_path / "run", change)
    with pytest.raises(SystemExit) as exit_:
        main(["replay", str(folder), "--check", "--until", "1"])
    assert exit_.value.code == 1
    *_, count, first = said(capsys)
    assert count.startswith("1 differences in ")
    what = {
        "completion": "the first: tokens, log-probs and versions of completion 6: recorded ",
        "parameters": "the first: fingerprint of the parameters of step 1: recorded 0x",
    }
    assert first.startswith(what[place])


def test_another_verdict_is_counted_and_the_recorded_one_used(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    # A slow machine's timeout: the reward that was trained on stays, and with it all that follows.
    first_verdict = next(record for _, record in read_log(finished_run / LOG_FILE) if isinstance(record, Verified))
    late = dataclasses.replace(first_verdict, verdict="timeout")
    change = lambda record: late if record == first_verdict else record
    with pytest.raises(SystemExit):
        main(["replay", str(copy(finished_run, tmp_path / "run", change)), "--check", "--until", "1"])
    *_, mark, count, first = said(capsys)
    (fingerprint,) = [
        r.fingerprint for _, r in read_log(finished_run / LOG_FILE) if isinstance(r, Trained) and r.step == 1
    ]
    assert mark == f"parameters after step 1: {fingerprint:#010x}"
    assert count.startswith("1 differences in ")
    assert first.startswith(f"the first: reward of completion {late.request_id}: recorded ('timeout', ")


def test_the_log_is_shown_as_lines(finished_run: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    main(["replay", str(finished_run), "--show"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["event"] == "Session"
    assert [line["step"] for line in lines if line["event"] == "Trained"] == [1, 2, 3]


def test_a_folder_without_a_log_is_one_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["replay", str(tmp_path)])
    assert exit_.value.code == 2
    assert "no event log; expected the folder of a run" in said(capsys)[-1]


def test_a_run_that_is_killed_ends_where_its_log_says(tiny: Any, tmp_path: pathlib.Path):
    """Two generator processes; killed once at any time and once at the very end; then replayed over its sessions."""
    settings = {
        "data.num_evaluation": 1,
        "evaluation.num_samples": 1,
        "schedule.num_steps": 10,
        "schedule.checkpoint_every": 1,
        "loss.filter_zero_variance": False,
        "generation.where": "process",
        "generation.num_generators": 2,
    }
    result = subprocess.run(
        [sys.executable, "benchmarks/kill_resume.py", tmp_path / "run", "--kills=2", "--", *tiny.flags(settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=tiny.environment,
    )
    assert result.returncode == 0, result.stderr + (tmp_path / "run.output").read_text()
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kills"] >= 1  # the run may come to its end before the second
    assert found["steps"] == 10
    assert found["is_equal"]
