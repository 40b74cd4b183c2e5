"""Weights of Hugging Face model folders, in and out.

One table pairs each parameter with its tensor in the folder; reading and writing both follow it. A folder appears under
its name only when it is complete.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from magistral_jax.policy import hf_vision
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_config import also_sees, hf_config, read_json, read_model_config, read_text_config
from magistral_jax.records import MagistralError

__all__ = [
    "TOKENIZER_FILES",
    "Entry",
    "TensorFiles",
    "assemble",
    "load_params",
    "read_model_config",
    "save_folder",
    "tensor_table",
]

# Copied from the folder that a model came from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "tekken.json",
    "generation_config.json",
)
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READABLE = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter and its tensor.

    Torch keeps a matrix as [out, in] and heads flattened; here a kernel is [in, out] with its axes apart:
    `parameter = tensor.T.reshape(shape)`. RoPE rotates halves in both, so no rows are permuted.
    """

    path: tuple[str, ...]  # in the parameter tree
    name: str  # in the folder; {} is the layer
    shape: tuple[int, ...]  # without the layer axis
    hf_shape: tuple[int, ...]
    is_kernel: bool = True  # transposed

    @property
    def is_stacked(self) -> bool:
        """True for a parameter of every layer."""
        return self.path[0] == "layers"

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter of a tensor."""
        return (tensor.T if self.is_kernel else tensor).reshape(self.shape)

    def to_hf(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor of a parameter."""
        return parameter.reshape(self.hf_shape[::-1]).T if self.is_kernel else parameter.reshape(self.hf_shape)


def tensor_table(config: ModelConfig) -> list[Entry]:
    """Every parameter of an architecture, in the order of the folder."""
    v, d, f, e = config.vocab_size, config.d_model, config.d_ff, config.head_dim
    h, k = config.num_heads, config.num_kv_heads

    def layer(path: str, name: str, shape: tuple[int, ...], hf_shape: tuple[int, ...] | None = None) -> Entry:
        is_kernel = path.endswith("/kernel")
        return Entry(("layers", *path.split("/")), f"model.layers.{{}}.{name}", shape, hf_shape or shape, is_kernel)

    return [
        Entry(("embed", "embedding"), "model.embed_tokens.weight", (v, d), (v, d), is_kernel=False),
        layer("attn_norm/scale", "input_layernorm.weight", (d,)),
        layer("attn/q/kernel", "self_attn.q_proj.weight", (d, h, e), (h * e, d)),
        layer("attn/k/kernel", "self_attn.k_proj.weight", (d, k, e), (k * e, d)),
        layer("attn/v/kernel", "self_attn.v_proj.weight", (d, k, e), (k * e, d)),
        layer("attn/o/kernel", "self_attn.o_proj.weight", (h, e, d), (d, h * e)),
        *(
            layer(f"attn/{x}/bias", f"self_attn.{x}_proj.bias", (n, e), (n * e,))
            for x, n in (("q", h), ("k", k), ("v", k))
            if config.qkv_bias
        ),
        *(layer(f"attn/{x}_norm/scale", f"self_attn.{x}_norm.weight", (e,)) for x in ("q", "k") if config.qk_norm),
        layer("mlp_norm/scale", "post_attention_layernorm.weight", (d,)),
        layer("mlp/gate/kernel", "mlp.gate_proj.weight", (d, f), (f, d)),
        layer("mlp/up/kernel", "mlp.up_proj.weight", (d, f), (f, d)),
        layer("mlp/down/kernel", "mlp.down_proj.weight", (f, d), (d, f)),
        Entry(("final_norm", "scale"), "model.norm.weight", (d,), (d,), is_kernel=False),
        *([] if config.tie_embeddings else [Entry(("head", "kernel"), "lm_head.weight", (d, v), (v, d))]),
    ]


def load_params(folder: str | pathlib.Path, config: ModelConfig, dtype: npt.DTypeLike = np.float32) -> dict[str, Any]:
    """Parameters of a model folder as NumPy arrays, layers stacked on the leading axis.

    Args:
      folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.
      config: The folder's architecture, from `read_model_config`.
      dtype: Of the result; stored float32, float16 and bfloat16 are converted.

    Raises:
      MagistralError: A file is missing or damaged, or a tensor is missing, unknown, or of another shape or type.
    """
    return assemble(config, TensorFiles(folder, config).read, dtype)


class TensorFiles:
    """The tensors of a model folder, to be read whole or in part; all that the architecture asks for are there.

    Raises:
      MagistralError: A file is missing or damaged, or a tensor is missing or unknown.
    """

    def __init__(self, folder: str | pathlib.Path, config: ModelConfig) -> None:
        folder = pathlib.Path(folder)
        self._files = _tensor_files(folder)
        has_vision = also_sees(folder)
        self._names = hf_vision.text_names(self._files) if has_vision else {name: name for name in self._files}
        unknown = dict(self._names)
        for entry in tensor_table(config):
            for name in _names(entry, config):
                if unknown.pop(name, None) is None:
                    raise MagistralError(
                        f"{folder}: tensor {name} is missing; config.json asks for {list(entry.hf_shape)}"
                    )
        # Beside `mistral3`'s setting that the head is the embedding, another head may be stored, and would count.
        ignored = {"lm_head.weight"} if config.tie_embeddings and not has_vision else set()
        rest = sorted(name for name in unknown if name not in ignored and not name.endswith("rotary_emb.inv_freq"))
        if rest:
            stored = unknown[rest[0]]
            hint = " (tie_word_embeddings is true there)" if rest[0] == "lm_head.weight" else ""
            raise MagistralError(
                f"{self._files[stored]}: tensor {stored} has no place in a model of this config.json{hint}"
            )

    def read(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or what lies at `index` of it: nothing else is read.

        Raises:
          MagistralError: The file is damaged, or the tensor is not as config.json says.
        """
        name = self._names[name]
        path = self._files[name]
        with _open(path) as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                raise MagistralError(f"{path}: tensor {name} is missing; {_INDEX} says that it is there")
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise MagistralError(
                    f"{path}: tensor {name} has shape {stored.get_shape()}; config.json asks for {list(shape)}"
                )
            if stored.get_dtype() not in _READABLE:
                raise MagistralError(
                    f"{path}: tensor {name} is stored as {stored.get_dtype()}; expected F32, F16 or BF16"
                )
            return file.get_tensor(name) if index is None else stored[index]


def assemble(
    config: ModelConfig, read: Callable[[str, tuple[int, ...]], np.ndarray], dtype: npt.DTypeLike
) -> dict[str, Any]:
    """The parameter tree from tensors that `read(name, shape)` gives one by one, under their names in the folder."""
    params: dict[str, Any] = {}
    for entry in tensor_table(config):
        names = _names(entry, config)
        leaf = np.empty((len(names), *entry.shape), dtype)
        for i, name in enumerate(names):
            leaf[i] = entry.from_hf(read(name, entry.hf_shape)).astype(dtype)
        tree = params
        for key in entry.path[:-1]:
            tree = tree.setdefault(key, {})
        tree[entry.path[-1]] = leaf if entry.is_stacked else leaf[0]
    return params


def save_folder(
    folder: str | pathlib.Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"],
    tokenizer_from: str | pathlib.Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that transformers loads; it is built beside its place and then renamed.

    Args:
      folder: Where to; must not exist, or be empty.
      params: Arrays on host or device, layers stacked.
      config: Their architecture.
      model_type: Family that the folder names in `config.json`.
      tokenizer_from: Folder whose tokenizer files, generation defaults and token ids are taken over.
      dtype: Of the stored weights.
      max_shard_bytes: A folder with more bytes of weights is split into shards with an index.

    Raises:
      MagistralError: The folder is taken, a parameter has another shape, or `model_type` does not fit.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MagistralError(f"{folder}: is there already and not an empty folder; choose another place or remove it")
    raw = hf_config(config, model_type, dtype)
    partial = folder.absolute().with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier save that was killed
    partial.mkdir(parents=True)
    try:
        if tokenizer_from is not None:
            source = pathlib.Path(tokenizer_from)
            for name in TOKENIZER_FILES:
                if (source / name).exists():
                    shutil.copy(source / name, partial / name)
            if (source / "config.json").exists():
                given = read_text_config(source)
                raw |= {key: given[key] for key in _TOKEN_KEYS if key in given}
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        _write_weights(partial, params, config, np.dtype(getattr(ml_dtypes, dtype, dtype)), max_shard_bytes)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(
    folder: pathlib.Path, params: Mapping[str, Any], config: ModelConfig, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """The safetensors files; at most one shard is held in memory."""
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    weight = used = 0
    for name, size, read in _tensors(params, config):
        num_bytes = size * dtype.itemsize
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, read))
        used, weight = used + num_bytes, weight + num_bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: np.ascontiguousarray(read().astype(dtype)) for name, read in shard}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": weight}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(params: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """(name, elements, how to read it) of every tensor of the folder."""
    for entry in tensor_table(config):
        array: Any = params
        for key in entry.path:
            array = array[key]
        expected = (config.num_layers, *entry.shape) if entry.is_stacked else entry.shape
        if array.shape != expected:
            raise MagistralError(f"parameter {'.'.join(entry.path)} is {list(array.shape)}; expected {list(expected)}")
        for i, name in enumerate(_names(entry, config)):
            part = lambda array=array, entry=entry, i=i: entry.to_hf(
                np.asarray(array[i] if entry.is_stacked else array)
            )
            yield name, math.prod(entry.shape), part


def _names(entry: Entry, config: ModelConfig) -> list[str]:
    return [entry.name.format(i) for i in range(config.num_layers if entry.is_stacked else 1)]


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor of a folder."""
    if (folder / _INDEX).exists():
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        missing = sorted(file for file in set(weight_map.values()) if not (folder / file).exists())
        if missing:
            raise MagistralError(f"{folder}: shard {missing[0]} is missing; {_INDEX} names it")
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / _SINGLE
    if not path.exists():
        raise MagistralError(f"{folder}: no weights there; expected {_SINGLE}, or shards with {_INDEX}")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise MagistralError(f"{path}: truncated or damaged, download it again: {error}") from None
