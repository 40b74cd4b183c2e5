"""The cold start from the command line: it learns, from made and from given traces, and goes on after a stop."""

import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.metrics import read_json_lines
from magistral_jax.policy.hf_folder import load_params

UPDATES = 30
SETTINGS = {
    "policy.random_init": True,
    "sft.num_updates": UPDATES,
    "sft.batch_size": 8,
    "sft.checkpoint_every": 10,
    "optimizer.learning_rate": 1e-2,
    "generation.max_new_tokens": 40,
}


def losses(folder: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_json_lines(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sft") / "run"
    tiny.run("sft", SETTINGS | {"run.folder": folder})
    return folder


def test_the_loss_falls(finished: pathlib.Path, tiny: Any):
    found = losses(finished)
    assert list(found) == [10, 20, 30]
    assert found[10] > found[20] > found[30]
    assert found[30] < np.log(264) / 2  # chance is log of the vocabulary
    start, end = load_params(tiny.model(), tiny.config), load_params(finished / "policy", tiny.config)
    assert not np.array_equal(start["head"]["kernel"], end["head"]["kernel"])


def test_a_killed_run_ends_as_if_it_had_not_been(finished: pathlib.Path, tiny: Any, tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "30")  # as if killed after update 20, with lines of later ones written
    tiny.run("sft", SETTINGS | {"run.folder": folder}, "--resume")
    assert losses(folder) == losses(finished)
    ours, theirs = (load_params(f / "policy", tiny.config) for f in (folder, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_ctrl_c_saves(tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"

    def interrupt() -> None:
        end = time.monotonic() + 300
        while not losses(folder) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    tiny.run("sft", SETTINGS | {"run.folder": folder, "sft.num_updates": 100_000, "sft.checkpoint_every": 0})
    thread.join()
    (last,) = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert f"stopped after update {last}; go on with --resume" in capsys.readouterr().err
    assert max(losses(folder)) == last
    assert not (folder / "policy").exists()


@pytest.fixture
def traces(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "traces.jsonl"
    rows = [
        {"problem": "What is seven?", "completion": "<think>7</think>\\boxed{7}"},
        {"question": "What is two?", "completion": "<think>2</think>\\boxed{2}", "answer": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_given_traces_are_learnt(
    traces: pathlib.Path,
    tiny: Any,
    tmp_path: pathlib.Path,
    refusal: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "run"
    settings = SETTINGS | {"run.folder": folder, "sft.traces": traces, "sft.num_updates": 60, "data.train": ""}
    tiny.run("sft", settings)
    assert losses(folder)[60] < 0.1
    capsys.readouterr()

    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "What is two?", "answer": "2"}\n')
    greedy = {"evaluation.temperature": 0.0, "evaluation.num_samples": 1, "policy.path": folder / "policy"}
    tiny.run("generate", greedy | {"data.evaluation": problems})
    line = json.loads(capsys.readouterr().out)
    assert line["completion"] == "<think>2</think>\\boxed{2}"
    assert not line["truncated"]  # the stop token was trained

    traces.write_text(traces.read_text().replace("seven", "eight"))
    assert "started with other data" in refusal("sft", settings, "--resume")


def test_a_trace_that_fits_in_no_row_is_named_before_the_folder_is_a_run(
    traces: pathlib.Path, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    with traces.open("a") as file:
        file.write(json.dumps({"problem": "What is one?", "completion": "<think>" + "1" * 500 + "</think>"}) + "\n")
    folder = tmp_path / "run"
    sentence = refusal("sft", SETTINGS | {"run.folder": folder, "sft.traces": traces, "data.train": ""})
    assert "The trace of problem traces:3 has 5" in sentence
    assert "`batch.row_tokens`" in sentence
    assert not folder.exists()


def test_no_traces_and_no_problems_is_said(tmp_path: pathlib.Path, refusal: Callable[..., str]):
    sentence = refusal("sft", SETTINGS | {"run.folder": tmp_path / "run", "data.train": ""})
    assert "Neither `sft.traces` nor `data.train` is given" in sentence
    assert not (tmp_path / "run").exists()


def test_on_a_mesh_it_is_what_it_is_on_one_device(tiny: Any, tmp_path: pathlib.Path):
    settings = SETTINGS | {"sft.num_updates": 10, "sft.validation_share": 0.2, "sft.validate_every": 5}
    found, policies = [], []
    for name, mesh in {"one": {}, "four": {"mesh.fsdp": 2, "mesh.sequence": 2}}.items():
        tiny.run("sft", settings | mesh | {"run.folder": tmp_path / name})
        found.append(list(read_json_lines(tmp_path / name / "metrics.jsonl")))
        policies.append(load_params(tmp_path / name / "policy", tiny.config))
    for one, four in zip(*found, strict=True):
        for metric in ("loss", "entropy", "grad_norm", "validation_loss"):
            assert four[metric] == pytest.approx(one[metric], rel=1e-3)
    # Ten Adam updates of 0.01: where a gradient is nearly 0 its sign, and so a step, is a matter of rounding.
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).mean(), *policies)
    assert max(jax.tree.leaves(gaps)) < 1e-3
    # The state was cut, not copied: Orbax notes how each array lay when it was saved.
    noted = (tmp_path / "four" / "checkpoints" / "10" / "state" / "_sharding").read_text()
    assert re.search(r'partition_spec[^}]*"fsdp', noted)
