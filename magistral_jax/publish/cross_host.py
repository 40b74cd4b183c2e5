"""Weights between processes of one `jax.distributed` job: `device_put` from the trainer's devices to the generator's.

The fastest way between GPUs (NCCL), and the most coupled one: all processes of the job must make the same calls in the
same order, so nothing is fetched when a generator likes, and the death of one process aborts the others after jax's
heartbeat timeout, without an exception. For that reason no fleet is built on it (`planes`): it is for programs that run
both roles in one job and end together.

On CPU each process needs `jax_cross_host_transfer_socket_address="HOST:PORT"` with a real port (port 0 hangs). Run on
CPU only; not yet on GPU or TPU.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from magistral_jax.publish.manifest import WeightsRefusedError


def cross_host_copy(params: Any, sources: Any, targets: Any) -> Any:
    """Copy arrays from some processes to others of the job; to be called in all of them.

    Args:
      params: Arrays where they are, in the processes that have them; their `jax.ShapeDtypeStruct` in the others.
      sources: Where they are: a tree of `NamedSharding`.
      targets: Where they go: shardings that cut each array as the sources do, on as many devices of other processes.

    Returns:
      The arrays on the targets' devices, to be read in the processes that have those. The others must keep theirs, and
      stay, until these have them.

    Raises:
      WeightsRefusedError: A target cuts its array otherwise (see `same_process` for the way to change that first).
    """
    check_cuts(params, sources, targets)
    stand_in = lambda leaf, source: leaf if isinstance(leaf, jax.Array) else _placeholder(leaf, source)
    return jax.device_put(jax.tree.map(stand_in, params, sources), targets)


def check_cuts(params: Any, sources: Any, targets: Any) -> None:
    """Compare the index maps of both sides.

    Raises:
      WeightsRefusedError: Names the first array that is cut differently.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), source, target in zip(leaves, *map(jax.tree.leaves, (sources, targets)), strict=True):
        there, here = (_parts(sharding, leaf.shape) for sharding in (source, target))
        if there != here:
            raise WeightsRefusedError(
                f"leaf {jax.tree_util.keystr(path)} is cut into {there} at the trainer, into {here} at the generator"
            )


def _parts(sharding: Any, shape: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
    indices = sharding.devices_indices_map(tuple(shape)).values()
    return [tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)) for index in indices]


def _placeholder(leaf: Any, source: Any) -> jax.Array:
    """An array of which this process has no part."""
    return jax.make_array_from_callback(leaf.shape, source, lambda index: np.zeros(0), dtype=leaf.dtype)
