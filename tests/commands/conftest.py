r"""A policy whose behaviour is known, and the commands at a size at which they take seconds.

The policy is a Mistral-architecture model of 35 k parameters with the byte tokenizer in which each token decides the
next one: whatever it is asked, it writes `<think>`, some dots, `</think>\boxed{`, a digit from a given set, `}` and the
stop token. So the format is always right, lengths vary, and the share of right answers is known.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.main import main
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import save_folder, tensor_table

MODEL = ModelConfig(
    vocab_size=264,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_positions=256,
)
SURE = 20.0  # logit of what follows; all other tokens have 0, which leaves them 5e-7 together

SUMS = (
    "reasoning-gym:basic_arithmetic?min_terms=2&max_terms=2&max_digits=1&operators=%2B"
    "&allow_parentheses=false&allow_negation=false"
)
SMALL = {
    "data.train": SUMS,
    "data.num_train": 60,
    "data.evaluation": SUMS,
    "data.num_evaluation": 4,
    "data.system_prompt": "none",
    "data.overlong_prompts": "drop",
    "generation.num_slots": 8,
    "generation.page_size": 8,
    "generation.max_prompt_tokens": 24,
    "generation.max_new_tokens": 24,
    "generation.decode_block": 4,
    "generation.prefill_rows": 2,
    "reward.language": 0.0,
    "verifiers.num_workers": 1,
    "verifiers.deadline": 60.0,
    "batch.group_size": 4,
    "batch.batch_size": 8,
    "batch.row_tokens": 64,
    "batch.rows_per_microbatch": 4,
    "optimizer.learning_rate": 1e-3,
    "schedule.num_steps": 3,
    "schedule.num_async": 16,
    "schedule.checkpoint_every": 0,
    "schedule.role_deadline": 300.0,
}


def talker_params(digits: str) -> dict[str, Any]:
    """Weights of the policy; attention and MLP add nothing yet, but learn."""
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {}
    for entry in tensor_table(MODEL):
        shape = (MODEL.num_layers, *entry.shape) if entry.is_stacked else entry.shape
        leaf = rng.normal(0, 0.1, shape)
        if entry.path[-1] == "scale":
            leaf = np.ones(shape)
        if entry.path[-2] in ("o", "down", "embed", "head"):
            leaf = np.zeros(shape)
        tree = params
        for key in entry.path[:-1]:
            tree = tree.setdefault(key, {})
        tree[entry.path[-1]] = leaf.astype(np.float32)

    special = ByteTokenizer.special_tokens
    think, close, stop = special["<think>"], special["</think>"], special["<eos>"]
    after: dict[int, Mapping[int, float]] = {
        ord("\n"): {think: 1.0},
        think: {ord("."): 1.0},
        ord("."): {ord("."): 0.6, close: 0.4},
        close: {ord("\\"): 1.0},
        **{ord(a): {ord(b): 1.0} for a, b in zip("\\boxed", "boxed{", strict=True)},
        ord("{"): {ord(digit): 1 / len(digits) for digit in digits},
        **{ord(digit): {ord("}"): 1.0} for digit in digits},
        ord("}"): {stop: 1.0},
    }
    size = math.sqrt(MODEL.d_model)  # of a one-hot vector after RMSNorm
    for axis, (token, followers) in enumerate(after.items()):
        params["embed"]["embedding"][token, axis] = 1.0
        for follower, probability in followers.items():
            params["head"]["kernel"][axis, follower] = (SURE + math.log(probability)) / size
    return params


class Tiny:
    """Model folders and commands for the tests of this folder."""

    sums = SUMS
    config = MODEL
    environment = os.environ | {  # of another process, for which the compiled programs of this one serve too
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root

    def model(self, digits: str = "5678") -> pathlib.Path:
        """Folder of the policy that draws its answers from `digits`."""
        folder = self._root / f"talker_{digits}"
        if not folder.exists():
            save_folder(folder, talker_params(digits), MODEL, model_type="mistral")
            ByteTokenizer().save(folder)
        return folder

    def flags(self, settings: Mapping[str, Any], *words: str) -> list[str]:
        """Command line of the small settings with some changed."""
        return [*(f"--{name}={value}" for name, value in self._merged(settings).items()), *words]

    def toml(self, settings: Mapping[str, Any]) -> str:
        """The same as lines of a TOML file."""
        plain = lambda value: value if isinstance(value, bool | int | float) else str(value)
        return "".join(f"{name} = {json.dumps(plain(value))}\n" for name, value in self._merged(settings).items())

    def _merged(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return SMALL | {"policy.path": self.model(), "run.tensorboard": False} | dict(settings)

    def run(self, command: str, settings: Mapping[str, Any], *words: str) -> None:
        """A command in this process."""
        main([command, *self.flags(settings, *words)])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def finished_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of one whole run of `train`; for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    tiny.run("train", {"run.folder": folder, "run.tensorboard": True})
    return folder


@pytest.fixture
def refusal(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with code 2 and one sentence, and returns the sentence."""

    def run(command: str, settings: Mapping[str, Any], *words: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            tiny.run(command, settings, *words)
        assert exit_.value.code == 2
        *_, sentence = capsys.readouterr().err.splitlines()
        assert sentence.startswith("error: ")
        return sentence

    return run
