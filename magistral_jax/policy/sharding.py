"""Where arrays live: the trainer's mesh, and a sharding for each array of a training state and a batch.

Modules name the axes of their parameters (`policy.layers`); the table in `policy.layout` alone says what is split over
what. Optimizer state lies as the parameters do.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.policy.config import MeshConfig, ModelConfig
from magistral_jax.policy.layout import MESH_AXES, TOKEN_AXES, Layout, mesh_spec
from magistral_jax.policy.transformer import init_params, logical_axes, unstack
from magistral_jax.pytrees import Batch, TrainState
from magistral_jax.records import MagistralError


def make_mesh(config: MeshConfig) -> Mesh:
    """The trainer's mesh: the first devices of one process, or all devices of all processes.

    Raises:
      MagistralError: There are other devices than the mesh asks for.
    """
    shape = (config.data, config.fsdp, config.sequence, config.tensor)
    count, there = math.prod(shape), jax.device_count()
    if count > there or (count < there and jax.process_count() > 1):
        processes = f" over {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise MagistralError(
            f"`mesh` asks for {' × '.join(map(str, shape))} = {count} devices (data × fsdp × sequence × tensor), there "
            f"are {there}{processes}."
        )
    # Auto axes: what `shard_map` does not name is left to the compiler, as everywhere in this package.
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=jax.devices()[:count])


def check_mesh(model: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh on which attention cannot be split.

    Raises:
      MagistralError: The heads cannot be dealt out evenly.
    """
    num = mesh.shape["tensor"] * mesh.shape["sequence"]
    if model.num_heads % num:
        raise MagistralError(
            f"`mesh.tensor` × `mesh.sequence` ({num}) must divide the model's {model.num_heads} attention heads."
        )


def param_specs(model: ModelConfig, mesh: Mesh, shapes: Any) -> Any:
    """The placement of each parameter; one that the model does not declare is whole everywhere."""
    names = dict(jax.tree.leaves_with_path(logical_axes(model), is_leaf=lambda leaf: isinstance(leaf, P)))
    place = lambda path, leaf: mesh_spec(names.get(path, (None,) * leaf.ndim), leaf.shape, mesh)
    return jax.tree.map_with_path(place, shapes)


def param_shardings(model: ModelConfig, mesh: Mesh, shapes: Any) -> Any:
    """A sharding for each parameter; an axis that the mesh does not divide evenly stays whole."""
    return _shardings(param_specs(model, mesh, shapes), mesh)


def state_shardings(model: ModelConfig, mesh: Mesh, shapes: TrainState) -> TrainState:
    """A sharding for each array of a training state: what mirrors a parameter lies as it does, counters everywhere."""
    specs = jax.tree.leaves_with_path(param_specs(model, mesh, shapes.params), is_leaf=lambda leaf: isinstance(leaf, P))
    sizes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes.params)}

    def place(path: tuple[Any, ...], leaf: Any) -> P:
        # The state of an optimizer holds trees like that of the parameters: their paths end as a parameter's does.
        mirrored = (spec for own, spec in specs if path[-len(own) :] == own and sizes[own] == leaf.shape)
        return next(mirrored, P())

    return _shardings(jax.tree.map_with_path(place, shapes), mesh)


def make_layout(model: ModelConfig, mesh: Mesh, shapes: Any) -> Layout:
    """What a device needs to know inside `shard_map` over `TOKEN_AXES`; `shapes` are those of the parameters."""
    return Layout(mesh, jax.tree.map(token_spec, param_specs(model, mesh, shapes), is_leaf=lambda s: isinstance(s, P)))


def token_spec(spec: P) -> P:
    """The part of a placement that `shard_map` over `TOKEN_AXES` handles."""

    def keep(axes: Any) -> Any:
        chosen = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a in TOKEN_AXES)
        return chosen if len(chosen) > 1 else (chosen[0] if chosen else None)

    return P(*map(keep, spec))


BATCH_SPEC = P(None, ("data", "fsdp"), "sequence")
"""Microbatches one after the other; rows and tokens as `policy.layout` has them."""


def shard_batch(batch: Batch | Mapping[str, Any], mesh: Mesh) -> Batch:
    """Rows and tokens of each microbatch over the mesh.

    Each process takes its devices' parts of a batch that all of them have, as a record or as arrays by their names.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    arrays = batch if isinstance(batch, Mapping) else vars(batch)
    return Batch(**{name: place(array) for name, array in arrays.items()})


def make_generator_mesh(num_devices: int, *, num_taken: int) -> Mesh:
    """The mesh of one engine: the devices after those that the trainer takes, or, where too few are left, the first.

    Raises:
      MagistralError: There are fewer devices than the engine asks for.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise MagistralError(f"`generation.tensor` asks for {num_devices} devices, there are {len(devices)}.")
    first = num_taken if num_taken + num_devices <= len(devices) else 0
    chosen = devices[first : first + num_devices]
    return jax.make_mesh((num_devices,), ("tensor",), (AxisType.Auto,), devices=chosen)


def generator_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """A sharding for each parameter in the layout of decoding (one dict a layer), on a mesh with the axis `tensor`."""
    axes = logical_axes(model)
    one_layer = jax.tree.map(lambda spec: P(*spec[1:]), axes["layers"], is_leaf=lambda leaf: isinstance(leaf, P))
    axes = axes | {"layers": (one_layer,) * model.num_layers}
    shapes = jax.eval_shape(lambda: unstack(init_params(model, jax.random.key(0)), model))

    place = lambda names, leaf: NamedSharding(mesh, mesh_spec(names, leaf.shape, mesh))
    return jax.tree.map(place, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, P))


def _shardings(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
