"""Adapters from the command line: what is trained, saved, published, exported, and refused."""

import json
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.policy import enqueue
from magistral_jax.policy.hf_folder import load_params, read_model_config

LORA = {"policy.lora_rank": 2, "optimizer.learning_rate": 5e-2, "generation.max_new_tokens": 40}


@pytest.fixture(scope="module")
def tuned(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    settings = {"run.folder": folder, "sft.num_updates": 10, "sft.batch_size": 8, "sft.checkpoint_every": 5}
    tiny.run("sft", LORA | settings)
    return folder


def sizes_of(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_sft_changes_the_adapted_matrices_and_no_others(tuned: pathlib.Path, tiny: Any):
    before, after = load_params(tiny.model(), tiny.config), load_params(tuned / "policy", tiny.config)
    is_changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    for path, changed in jax.tree.leaves_with_path(is_changed):
        names = [key.key for key in path]
        assert changed == (names[0] == "layers" and names[-1] == "kernel"), names
    # Each change has the rank of its adapters.
    change = after["layers"]["mlp"]["up"]["kernel"][0] - before["layers"]["mlp"]["up"]["kernel"][0]
    values = np.linalg.svd(change, compute_uv=False)
    assert values[1] > 1e3 * values[2]


def test_an_export_merges_and_equals_the_policy(tuned: pathlib.Path, tiny: Any, tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    shutil.copytree(tuned, folder)
    tiny.run("export", {"run.folder": folder})
    exported = load_params(folder / "export", read_model_config(folder / "export"))
    jax.tree.map(np.testing.assert_array_equal, exported, load_params(tuned / "policy", tiny.config))


def test_other_weights_under_the_adapters_are_refused(
    tuned: pathlib.Path, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    folder = tmp_path / "run"
    shutil.copytree(tuned, folder)
    noted = json.loads((folder / "base.json").read_text())["fingerprint"]
    (folder / "base.json").write_text(json.dumps({"fingerprint": noted ^ 1}))
    sentence = refusal("export", {"run.folder": folder})
    assert "base.json: the run's adapters were trained beside weights with the fingerprint" in sentence


def test_reinforcement_learning_publishes_merged_adapters_and_resumes(tiny: Any, tmp_path: pathlib.Path):
    settings = LORA | {
        "run.folder": tmp_path,
        "generation.max_new_tokens": 24,
        "optimizer.learning_rate": 1e-3,
        "loss.kl_coef": 0.1,
        "loss.entropy_coef": 0.1,  # moves the policy even where all rewards of a group are equal
        "loss.filter_zero_variance": False,
    }
    tiny.run("train", settings | {"schedule.num_steps": 2})
    tiny.run("train", settings | {"schedule.num_steps": 3}, "--resume")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The engine had the merged weights: on tokens that the newest weights sampled it agrees with the trainer.
    assert all(line["logprob_gap"] < 1e-3 for line in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is what stands under the adapters
    assert lines[2]["kl"] > 0
    before, after = load_params(tiny.model(), tiny.config), load_params(tmp_path / "policy", tiny.config)
    np.testing.assert_array_equal(before["embed"]["embedding"], after["embed"]["embedding"])
    assert not np.array_equal(before["layers"]["attn"]["q"]["kernel"], after["layers"]["attn"]["q"]["kernel"])
    # Adapters and their moments: a small part of what the whole model and its moments would be.
    newest = tmp_path / "checkpoints" / "3"
    assert sizes_of(newest / "state") < 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(before)) / 2


class CountedTurns:
    """The turns of enqueueing, with the names of the threads that took one."""

    def __init__(self) -> None:
        self._lock, self.takers = threading.RLock(), set[str]()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.takers.add(threading.current_thread().name)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_on_a_mesh_that_the_engine_shares_adapters_are_trained_published_and_merged(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    turns = CountedTurns()
    monkeypatch.setattr(enqueue, "_TURN", turns)
    settings = LORA | {
        "run.folder": tmp_path,
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
        "generation.tensor": 2,
        "generation.num_slots": 4,
        "generation.on_publish": "recompute",  # what a token was sampled from is then the weights of its version alone
        "data.num_evaluation": 1,
        "evaluation.num_samples": 1,
        "generation.max_new_tokens": 24,
        "schedule.num_steps": 2,
        "loss.entropy_coef": 0.1,
        "loss.filter_zero_variance": False,
    }
    tiny.run("train", settings)
    assert "shared with the trainer" in capsys.readouterr().err
    assert turns.takers >= {"generator", "trainer"}  # two programs with collectives on the same devices
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["logprob_gap"] < 1e-3 for line in lines)  # the engine had the merged weights
    # One device merges what the mesh has saved, and it is what the mesh has merged.
    tiny.run("export", {"run.folder": tmp_path})
    before = load_params(tiny.model(), tiny.config)
    exported, after = (load_params(tmp_path / name, tiny.config) for name in ("export", "policy"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported, after)
    np.testing.assert_array_equal(before["embed"]["embedding"], after["embed"]["embedding"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["layers"], after["layers"])
    assert moved["attn"]["q"]["kernel"] > 1e-3
    assert moved["mlp"]["down"]["kernel"] > 1e-3
