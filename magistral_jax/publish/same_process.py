"""Weights from trainer to generator inside one process, from mesh to mesh, without a detour through the host.

A `device_put` between two layouts that cut an array differently gathers it in host memory, silently. So, three stages:

    1. trainer mesh     cast to the generator's precision, and into the wire layout (collectives of one jitted call)
    2. mesh → mesh      `device_put`: each part that is wanted there exists here, so it is copied from device to device
    3. generator mesh   unstack the layers, and into the generator's layout (jitted)

The wire layout is the generator's own where its devices divide the trainer's, and there is nothing left to move in
stage 3; else arrays are cut along one axis, into as many parts as both meshes can be divided by. The result is a new
set of buffers: the trainer may donate its own while the generator still reads these.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import unstack


def make_publish(
    model: ModelConfig,
    dtype: jnp.dtype,
    trainer_mesh: Mesh | None = None,
    generator_mesh: Mesh | None = None,
    generator_shardings: Any = None,
) -> Callable[[Any], dict[str, Any]]:
    """A function from the trainer's parameters to the generator's.

    Args:
      model: Shape of the model.
      dtype: Precision in which the generator computes.
      trainer_mesh: Where the parameters are, where the trainer has a mesh.
      generator_mesh: Where they go. None is one device: the trainer's first of this process.
      generator_shardings: A `NamedSharding` on the generator's mesh for each parameter, layers unstacked.
    """
    if trainer_mesh is None:
        trainer_mesh = Mesh(jax.devices()[:1], ("device",), axis_types=(AxisType.Auto,))
        if generator_mesh is None:
            return jax.jit(lambda params: unstack(_copy(params, dtype), model))
    if generator_mesh is None:
        whole = NamedSharding(trainer_mesh, P())
        gather = jax.jit(lambda params: unstack(_copy(params, dtype), model), out_shardings=whole)
        return lambda params: jax.tree.map(lambda leaf: leaf.addressable_data(0), gather(params))
    return _mesh_to_mesh(model, dtype, trainer_mesh, generator_mesh, generator_shardings)


def _mesh_to_mesh(
    model: ModelConfig, dtype: jnp.dtype, trainer_mesh: Mesh, generator_mesh: Mesh, generator_shardings: Any
) -> Callable[[Any], dict[str, Any]]:
    sources, targets = _wire_meshes(trainer_mesh, generator_mesh)
    is_own = sources.axis_names[:-1] == generator_mesh.axis_names
    stacked = generator_shardings | {"layers": jax.tree.map(_stack, generator_shardings["layers"][0])}
    finish = jax.jit(lambda wire: unstack(wire, model), out_shardings=generator_shardings)

    def place(mesh: Mesh) -> Callable[[Any, NamedSharding], NamedSharding]:
        return lambda leaf, target: NamedSharding(mesh, target.spec if is_own else _cut(leaf.shape, mesh))

    def publish(params: Any) -> dict[str, Any]:
        wire = send(params)
        return finish(jax.device_put(wire, jax.tree.map(place(targets), wire, stacked)))

    @jax.jit
    def send(params: Any) -> Any:
        copy = _copy(params, dtype)
        return jax.lax.with_sharding_constraint(copy, jax.tree.map(place(sources), copy, stacked))

    return publish


def _copy(params: Any, dtype: jnp.dtype) -> Any:
    # `copy=True`: jit may hand an unchanged input on as its output, and the trainer's donation would take it away.
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=dtype, copy=True), params)


def _wire_meshes(trainer_mesh: Mesh, generator_mesh: Mesh) -> tuple[Mesh, Mesh]:
    """The devices of both, each as parts × copies; the axes of the parts are alike. Neighbours have the same part."""
    num_parts = math.gcd(trainer_mesh.size, generator_mesh.size)
    shape, names = (num_parts,), ("wire",)
    if num_parts == generator_mesh.size:
        shape, names = generator_mesh.devices.shape, generator_mesh.axis_names
    arrange = lambda mesh: Mesh(
        mesh.devices.reshape(*shape, -1), (*names, "copy"), axis_types=(AxisType.Auto,) * (1 + len(shape))
    )
    return arrange(trainer_mesh), arrange(generator_mesh)


def _stack(sharding: NamedSharding) -> NamedSharding:
    """The sharding of all layers in one array."""
    return NamedSharding(sharding.mesh, P(None, *sharding.spec))


def _cut(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Along the last axis that can be cut; an array without one goes whole."""
    num_parts = mesh.shape["wire"]
    axis = next((axis for axis in reversed(range(len(shape))) if shape[axis] % num_parts == 0), None)
    return P() if axis is None else P(*[None] * axis, "wire")
