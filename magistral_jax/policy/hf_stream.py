"""Weights of a model folder straight onto a mesh: each process reads what its own devices hold, a part at a time.

At no time is more than one device's part of one parameter in host memory, whatever the size of the model.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import Entry, TensorFiles, tensor_table

Index = tuple[slice, ...]


def load_sharded(
    folder: str | pathlib.Path, config: ModelConfig, shardings: Any, dtype: npt.DTypeLike = np.float32
) -> dict[str, Any]:
    """Parameters of a model folder as arrays on devices, layers stacked on the leading axis.

    Args:
      folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.
      config: The folder's architecture, from `read_model_config`.
      shardings: One for each parameter, from `policy.sharding.param_shardings`.
      dtype: Of the result; stored float32, float16 and bfloat16 are converted.

    Raises:
      MagistralError: A file is missing or damaged, or a tensor is missing, unknown, or of another shape or type.
    """
    files = TensorFiles(folder, config)
    params: dict[str, Any] = {}
    for entry in tensor_table(config):
        tree, places = params, shardings
        for key in entry.path[:-1]:
            tree, places = tree.setdefault(key, {}), places[key]
        tree[entry.path[-1]] = _load(files, entry, config, places[entry.path[-1]], np.dtype(dtype))
    return params


def _load(
    files: TensorFiles, entry: Entry, config: ModelConfig, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    shape = (config.num_layers, *entry.shape) if entry.is_stacked else entry.shape
    parts: dict[Any, jax.Array] = {}
    last: Index | None = None
    part = np.empty(0, dtype)
    # Copies of a part come one after the other, and are read once.
    for device, cut in sorted(sharding.addressable_devices_indices_map(shape).items(), key=lambda item: str(item[1])):
        index = tuple(slice(*i.indices(size)) for i, size in zip(cut or (), shape, strict=True))
        if index != last:
            last, part = index, _read_part(files, entry, index, dtype)
        # Until it has arrived: else the next part would be read while this one is still held.
        parts[device] = jax.device_put(part, device).block_until_ready()
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


def _read_part(files: TensorFiles, entry: Entry, index: Index, dtype: np.dtype) -> np.ndarray:
    if not entry.is_stacked:
        return _read_tensor(files, entry, entry.name, index).astype(dtype)
    layers, *rest = index
    part = np.empty([i.stop - i.start for i in index], dtype)
    for row, layer in enumerate(range(layers.start, layers.stop)):
        part[row] = _read_tensor(files, entry, entry.name.format(layer), tuple(rest)).astype(dtype)
    return part


def _read_tensor(files: TensorFiles, entry: Entry, name: str, index: Index) -> np.ndarray:
    """The part of a tensor that makes up `index` of the parameter."""
    sizes = entry.hf_shape[::-1] if entry.is_kernel else entry.hf_shape
    bounds = _merged(entry.shape, index, sizes)
    tensor = files.read(name, entry.hf_shape, bounds[::-1] if entry.is_kernel else bounds)
    return (tensor.T if entry.is_kernel else tensor).reshape([i.stop - i.start for i in index])


def _merged(shape: Sequence[int], index: Index, sizes: Sequence[int]) -> Index:
    """The bounds of an index after its axes were flattened to `sizes`; only the first of merged axes may be cut."""
    axes, bounds = list(zip(shape, index, strict=True)), []
    for size in sizes:
        (length, cut), merged = axes.pop(0), 1
        while length * merged < size:
            inner, whole = axes.pop(0)
            if (whole.start, whole.stop) != (0, inner):
                raise ValueError(f"cannot cut an inner axis: {index} of {list(shape)}")
            merged *= inner
        bounds.append(slice(cut.start * merged, cut.stop * merged))
    if math.prod(shape) != math.prod(sizes):
        raise ValueError(f"{list(shape)} is not {list(sizes)} with axes apart")
    return tuple(bounds)
