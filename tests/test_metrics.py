"""Metrics and rollouts on disk: valid JSON whatever the value, and nothing twice after a resume."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.metrics import Means, MetricsWriter, RolloutWriter, graded_of, read_json_lines, replace_text
from magistral_jax.records import Graded, MagistralError, Problem, Prompt, Reward, Rollout, Verdict


def strict_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Every line as strict JSON: NaN and half lines are errors here."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def test_means_divide_once():
    means = Means()
    means.add("reward", 3.0, 4)  # four completions
    means.add("reward", 1.0, 1)  # one completion
    means.add("empty", 0.0, 0)
    result = means.result()
    assert result["reward"] == pytest.approx(0.8)  # (3 + 1) / (4 + 1), not the mean of means (0.75 + 1) / 2 = 0.875
    assert math.isnan(result["empty"])


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 9)), min_size=1), st.randoms())
@settings(max_examples=30, deadline=None)
def test_means_do_not_depend_on_the_order(pairs: list[tuple[float, int]], random: Any):
    forward, shuffled = Means(), Means()
    for total, weight in pairs:
        forward.add("x", np.float32(total), np.int32(weight))
    random.shuffle(pairs)
    for total, weight in pairs:
        shuffled.add("x", np.float32(total), np.int32(weight))
    assert forward.result()["x"] == pytest.approx(shuffled.result()["x"], abs=1e-9)


def test_a_line_per_step_with_null_for_what_is_not_finite(tmp_path: pathlib.Path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"reward": np.float32(0.5), "entropy": math.nan, "grad_norm": -math.inf, "in_flight": 7})
    (line,) = strict_lines(tmp_path / "metrics.jsonl")  # before close: written through
    assert line.pop("time") > 1.7e9
    assert line == {"step": 1, "reward": 0.5, "entropy": None, "grad_norm": None, "in_flight": 7}
    writer.close()


def test_resume_drops_later_steps_and_the_half_line(tmp_path: pathlib.Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"reward": step / 10})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 1, "rew')  # a kill in the middle of a line
    writer = MetricsWriter(tmp_path, resumed_step=2)
    writer.write(3, {"reward": 9.0})
    writer.close()
    assert [(line["step"], line["reward"]) for line in strict_lines(path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_dropped_too(tmp_path: pathlib.Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    MetricsWriter(tmp_path, resumed_step=2).close()
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: pathlib.Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(MagistralError, match="--resume"):
        MetricsWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    MetricsWriter(tmp_path / ".", resumed_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_killed_process_leaves_every_finished_line(tmp_path: pathlib.Path):
    program = (
        "import os, pathlib, sys; from magistral_jax.metrics import MetricsWriter\n"
        "assert 'jax' not in sys.modules\n"
        "w = MetricsWriter(pathlib.Path(sys.argv[1])); w.write(1, {'x': 1.0}); w.write(2, {'x': 2.0}); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == 9
    assert [line["x"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_tensorboard_events_are_written(tmp_path: pathlib.Path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(1, {"reward": 0.25, "entropy": math.nan})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward" in events.read_bytes()


def test_wandb_is_asked_for_by_name_and_goes_on_with_the_same_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MagistralError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb=True)
    assert list(tmp_path.iterdir()) == []

    started, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **settings: started.append(settings["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    MetricsWriter(tmp_path, wandb=True).close()
    writer = MetricsWriter(tmp_path, wandb=True, resumed_step=0)
    writer.write(1, {"reward": 1.0})
    writer.close()
    assert started[0] == started[1]
    assert logged == [(1, {"reward": 1.0})]


def make_graded(versions: list[int]) -> Graded:
    n = len(versions)
    rollout = Rollout(
        request_id=1,
        prompt_ids=np.arange(3, dtype=np.int32),
        completion_ids=np.arange(n, dtype=np.int32),
        behavior_logprob=np.zeros(n, np.float32),
        weight_version=np.array(versions, np.int32),
        truncated=False,
    )
    reward = Reward(
        verdict=Verdict.CORRECT,
        format=0.1,
        correctness=0.9,
        length=-0.05,
        language=0.1,
        path="string",
        seconds=0.0,
        sandbox="unsafe",
    )
    return Graded(rollout, reward)


def test_a_rollout_line_is_complete_and_readable(tmp_path: pathlib.Path):
    prompt = Prompt(Problem("sum-1", "1+1?", "2"), np.arange(3, dtype=np.int32), "Combien font 1+1 ? é")
    completion = 'thinks\n"é" \u2028 \r \udc80 </think>'  # line separators, quotes, an undecodable byte
    writer = RolloutWriter(tmp_path)
    writer.write(5, prompt, make_graded([3, 3, 4]), completion=completion, answer="2", advantage=np.float32(1.5))
    writer.write(5, prompt, make_graded([]), completion="")
    writer.close()
    line, empty = strict_lines(tmp_path / "rollouts.jsonl")
    assert line["completion"] == completion
    assert "é" in (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8")  # for people, not \u00e9
    assert line["reward"] == pytest.approx(1.05)
    expected = {
        "step": 5,
        "problem": "sum-1",
        "prompt": "Combien font 1+1 ? é",
        "answer": "2",
        "reference": "2",
        "verdict": "correct",
        "reward_format": 0.1,
        "reward_correctness": 0.9,
        "reward_length": -0.05,
        "reward_language": 0.1,
        "sandbox": "unsafe",
        "advantage": 1.5,
        "version_min": 3,
        "version_max": 4,
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "truncated": False,
    }
    assert line == {**line, **expected}
    assert (empty["version_min"], empty["advantage"], empty["answer"]) == (None, None, None)


def test_what_was_trained_comes_back_bit_by_bit(tmp_path: pathlib.Path):
    prompt = Prompt(Problem("sum-1", "1+1?", "2"), np.arange(3, dtype=np.int32), "1+1?")
    graded = make_graded([3, 3, 4])
    odd = np.array([-1 / 3, -np.float32(1e-42), -87.2], np.float32)  # a third, a denormal number, and a rounded one
    graded = Graded(dataclasses.replace(graded.rollout, behavior_logprob=odd), graded.reward)
    writer = RolloutWriter(tmp_path)
    writer.write(1, prompt, graded, completion="")
    writer.close()
    (line,) = strict_lines(tmp_path / "rollouts.jsonl")
    assert line["weight_versions"] == [[3, 2], [4, 1]]
    found = graded_of(line, prompt.token_ids)
    assert (found.rollout.request_id, found.reward.total) == (graded.rollout.request_id, graded.reward.total)
    for name in ("completion_ids", "behavior_logprob", "weight_version"):
        values, expected = getattr(found.rollout, name), getattr(graded.rollout, name)
        assert (values.dtype, values.tobytes()) == (expected.dtype, expected.tobytes())


def test_a_file_is_replaced_in_one_move(tmp_path: pathlib.Path):
    path = tmp_path / "summary.json"
    replace_text(path, "old")
    replace_text(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\udc80")
    assert path.read_text(encoding="utf-8") == "é"


def test_reading_passes_over_what_is_broken(tmp_path: pathlib.Path):
    path = tmp_path / "rollouts.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"step": 1}\n[1]\nnonsense\n\xff\n{"no": "step"}\n{"step": 2, "x": null}\n{"step": 3')
    assert list(read_json_lines(path)) == [{"step": 1}, {"step": 2, "x": None}]
