"""The exported folder is the policy of the latest checkpoint."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.data.tokenizer import load_tokenizer
from magistral_jax.metrics import read_json_lines
from magistral_jax.policy.hf_folder import load_params, read_model_config
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state


def test_the_folder_equals_the_checkpoint(
    finished_run: pathlib.Path, tiny: Any, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    tiny.run("export", {"run.folder": folder})
    exported = load_params(folder / "export", read_model_config(folder / "export"))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        _, state, _ = checkpoints.restore(init_state(exported, make_optimizer(OptimizerConfig(), 1)))
    jax.tree.map(np.testing.assert_array_equal, exported, state.params)
    jax.tree.map(np.testing.assert_array_equal, exported, load_params(folder / "policy", tiny.config))
    assert load_tokenizer(folder / "export").vocab_size == tiny.config.vocab_size
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        assert (folder / "export" / name).read_bytes() == (folder / "policy" / name).read_bytes()

    # What stands there is not written over.
    assert "is there already" in refusal("export", {"run.folder": folder})


def test_the_best_checkpoint_is_written_where_it_is_asked_for(
    finished_run: pathlib.Path, tiny: Any, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    rewards = [line["reward"] for line in read_json_lines(folder / "metrics.jsonl")]
    good = load_params(folder / "policy", tiny.config)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step, state, schedule = checkpoints.restore(init_state(good, make_optimizer(OptimizerConfig(), 1)))
        assert schedule["reward"] == pytest.approx(np.mean(rewards))  # of all steps, since this is the first one
        state.params["final_norm"]["scale"] *= 2  # a later one, and worse
        checkpoints.save(step + 1, state, schedule | {"reward": schedule["reward"] - 0.1})
    tiny.run("export", {"run.folder": folder}, "--best")
    jax.tree.map(np.testing.assert_array_equal, load_params(folder / "export", tiny.config), good)
    shutil.rmtree(folder / "export")
    tiny.run("export", {"run.folder": folder})
    latest = load_params(folder / "export", tiny.config)["final_norm"]["scale"]
    np.testing.assert_array_equal(latest, 2 * good["final_norm"]["scale"])

    shutil.rmtree(folder / "checkpoints")
    assert "there is no best one" in refusal("export", {"run.folder": folder}, "--best")


def test_a_folder_without_a_run_is_said(tmp_path: pathlib.Path, refusal: Callable[..., str]):
    assert "holds no run: config.json is missing" in refusal("export", {"run.folder": tmp_path / "none"})
    assert not (tmp_path / "none").exists()


def test_a_run_without_a_checkpoint_is_said(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    shutil.copy(finished_run / "config.json", tmp_path)
    assert "holds no complete checkpoint" in refusal("export", {"run.folder": tmp_path})
    assert not (tmp_path / "export").exists()
