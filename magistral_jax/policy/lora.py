"""Low-rank adapters: a small trained subtree beside frozen parameters.

    y = x W + (α / R) · (x A) B,   A [in, R] random, B [R, out] zeros at first

The adapters of the stacked layers stand under the key "adapters", with the names of the modules that they adapt.
Everything that does not train sees merged parameters and knows nothing of them.

Source: Hu et al., LoRA (arXiv:2106.09685), section 4.1.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from magistral_jax.policy.config import PolicyConfig

Targets = Literal["attention", "mlp", "all"]
_MODULES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_INPUT_AXES = {"o": 2}  # axes of a kernel that its input runs over: heads and head size; else one


def init_adapters(params: dict[str, Any], policy: PolicyConfig, key: PRNGKeyArray) -> dict[str, Any]:
    """Adapters under the key "adapters", float32, which at first change nothing.

    Args:
      params: The parameters that they stand beside; only shapes are read.
      policy: Rank and targets.
      key: Of the random numbers in A.
    """
    adapters: dict[str, Any] = {}
    for place, (part, name) in enumerate(_targets(policy.lora_targets)):
        kernel = params["layers"][part][name]["kernel"]
        num_layers, inputs, outputs = _matrix_shape(name, kernel.shape)
        a = jax.random.normal(jax.random.fold_in(key, place), (num_layers, inputs, policy.lora_rank)) * inputs**-0.5
        b = jnp.zeros((num_layers, policy.lora_rank, outputs))
        adapters.setdefault(part, {})[name] = {"lora_a": a, "lora_b": b}
    return {"adapters": adapters}


def attach(params: dict[str, Any], trained: dict[str, Any], policy: PolicyConfig) -> dict[str, Any]:
    """Parameters for `forward`: frozen ones with trained ones beside them, adapters with their scale applied."""
    if not policy.lora_rank:
        return params | trained
    scale = policy.lora_alpha / policy.lora_rank
    scaled = jax.tree.map_with_path(
        lambda path, leaf: leaf * scale if path[-1].key == "lora_b" else leaf, trained["adapters"]
    )
    return params | {"adapters": scaled}


def merge(params: dict[str, Any], trained: dict[str, Any], policy: PolicyConfig) -> dict[str, Any]:
    """Parameters without adapters that compute the same: W + (α / R) · A B, in float32.

    What is not adapted is passed on as it is.
    """
    layers = {part: dict(module) for part, module in params["layers"].items()}
    for part, name in _targets(policy.lora_targets):
        adapter, kernel = trained["adapters"][part][name], layers[part][name]["kernel"]
        change = jnp.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"], preferred_element_type=jnp.float32)
        change *= policy.lora_alpha / policy.lora_rank
        merged = kernel.astype(jnp.float32) + change.reshape(kernel.shape)
        layers[part][name] = layers[part][name] | {"kernel": merged}
    return params | {"layers": layers}


def _targets(targets: Targets) -> list[tuple[str, str]]:
    parts = {"attention": ("attention",), "mlp": ("mlp",), "all": ("attention", "mlp")}[targets]
    return [("attn" if part == "attention" else "mlp", name) for part in parts for name in _MODULES[part]]


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(layers, in, out) of a stacked kernel."""
    cut = 1 + _INPUT_AXES.get(name, 1)
    return shape[0], math.prod(shape[1:cut]), math.prod(shape[cut:])
