"""The exported folder is the policy of the latest checkpoint."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.data.tokenizer import load_tokenizer
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


def test_a_folder_without_a_run_is_said(tmp_path: pathlib.Path, refusal: Callable[..., str]):
    assert "holds no run: config.json is missing" in refusal("export", {"run.folder": tmp_path / "none"})
    assert not (tmp_path / "none").exists()


def test_a_run_without_a_checkpoint_is_said(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, refusal: Callable[..., str]
):
    shutil.copy(finished_run / "config.json", tmp_path)
    assert "holds no complete checkpoint" in refusal("export", {"run.folder": tmp_path})
    assert not (tmp_path / "export").exists()
