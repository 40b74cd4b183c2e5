"""Where arrays live: mesh axes, and the one table from the axes of parameters to the axes of the mesh.

Modules name the axes of their parameters (`policy.layers`); this table alone says what is split over what. Batches are
split by rows over `data` and `fsdp`; parameters and optimizer state over `fsdp` and `tensor`.
"""

from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.policy.config import MeshConfig, ModelConfig
from magistral_jax.policy.transformer import logical_axes
from magistral_jax.pytrees import Batch, TrainState
from magistral_jax.records import MagistralError

RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def make_mesh(config: MeshConfig) -> Mesh:
    """The trainer's mesh over the first devices.

    Raises:
      MagistralError: There are fewer devices than the mesh asks for.
    """
    shape = (config.data, config.fsdp, config.tensor)
    count = config.data * config.fsdp * config.tensor
    if count > jax.device_count():
        raise MagistralError(
            f"`mesh` asks for {config.data} × {config.fsdp} × {config.tensor} = {count} devices, there are "
            f"{jax.device_count()}."
        )
    # Auto axes: shardings of results are inferred by the compiler, as everywhere in this package.
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:count])


def param_shardings(model: ModelConfig, mesh: Mesh, shapes: Any) -> Any:
    """A sharding for each parameter; an axis that the mesh does not divide evenly stays whole."""

    def shard(spec: P, leaf: Any) -> NamedSharding:
        names = [RULES.get(axis) if isinstance(axis, str) else None for axis in spec]
        fits = [
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree.map(shard, logical_axes(model), shapes, is_leaf=lambda leaf: isinstance(leaf, P))


def shard_state(
    state: TrainState, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Parameters, and the optimizer's moments beside them, on the mesh; counters on every device."""
    shardings = param_shardings(model, mesh, state.params)
    whole = NamedSharding(mesh, P())
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        jax.device_put,
        state.opt_state,
        shardings,
        transform_non_params=lambda leaf: jax.device_put(leaf, whole),
    )
    params = jax.tree.map(jax.device_put, state.params, shardings)
    return TrainState(params, opt_state, jax.device_put(state.num_updates, whole))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Rows of each microbatch over the data-parallel axes."""
    return jax.device_put(batch, NamedSharding(mesh, P(None, ("data", "fsdp"), None)))
