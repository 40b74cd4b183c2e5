"""Weights from trainer to generator inside one process.

One jitted call gathers, casts and unstacks the layers; then each array goes to the generator's device, where a whole
copy of it lies already, so that nothing passes through the host (a `device_put` between different layouts would). The
result is a new set of buffers: the trainer may donate its own while the generator still reads these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import unstack


def make_publish(model: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None = None) -> Callable[[Any], dict[str, Any]]:
    """A function from the trainer's parameters to the generator's.

    Args:
      model: Shape of the model.
      dtype: Precision in which the generator computes.
      mesh: The trainer's, where it has several devices; the generator is on its first one.
    """

    def convert(params: Any) -> dict[str, Any]:
        # `copy=True`: jit may hand an unchanged input on as its output, and the trainer's donation would take it away.
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=dtype, copy=True), unstack(params, model))

    if mesh is None:
        return jax.jit(convert)
    gather = jax.jit(convert, out_shardings=NamedSharding(mesh, P()))
    return lambda params: jax.device_put(gather(params), mesh.devices.flat[0])
