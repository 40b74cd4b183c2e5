"""magistral_jax: reinforcement learning with verifiable rewards for language models, in JAX.

The pure API is importable from here and loaded on first use, so that verifier workers and `--help` never import jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "grpo_loss": "magistral_jax.train.loss",
    "group_advantage": "magistral_jax.train.advantage",
    "collate": "magistral_jax.train.collate",
    "shape_reward": "magistral_jax.verify.reward",
    "forward": "magistral_jax.policy.transformer",
    "Batch": "magistral_jax.pytrees",
    "Rollout": "magistral_jax.records",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
