"""Weights from trainer to generator inside one process.

One jitted call casts, unstacks the layers and lands on the generator's devices. The result is a new set of buffers:
the trainer may donate its own to the next update while the generator still reads these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import unstack


def make_publish(model: ModelConfig, dtype: jnp.dtype) -> Callable[[Any], dict[str, Any]]:
    """A function from the trainer's parameters to the generator's.

    Args:
      model: Shape of the model.
      dtype: Precision in which the generator computes.
    """

    def convert(params: Any) -> dict[str, Any]:
        # `copy=True`: jit forwards an output that is an input unchanged, and donation would pull it from under us.
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=dtype, copy=True), unstack(params, model))

    return jax.jit(convert)
