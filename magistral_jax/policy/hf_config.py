"""`config.json` of a Hugging Face model folder, in both directions.

What the model definition does not implement is refused by name, so that a folder either gives the right logits or none.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from magistral_jax.policy import hf_vision
from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.records import MagistralError


@dataclasses.dataclass(frozen=True)
class _Family:
    """What sets a `model_type` apart; the defaults are those of transformers for a key that is left out."""

    architecture: str
    max_positions: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    has_window_switch: bool = False  # `use_sliding_window`, `max_window_layers`


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048),
    "mistral": _Family("MistralForCausalLM", 131072, sliding_window=4096),
    "qwen2": _Family("Qwen2ForCausalLM", 32768, qkv_bias=True, sliding_window=4096, has_window_switch=True),
    "qwen3": _Family("Qwen3ForCausalLM", 32768, 128, qk_norm=True, sliding_window=4096, has_window_switch=True),
}


def read_model_config(folder: str | pathlib.Path) -> ModelConfig:
    """Architecture of a model folder.

    Raises:
      MagistralError: No config.json, a key is missing, or the model has a part that is not implemented.
    """
    path = pathlib.Path(folder) / "config.json"
    raw = read_text_config(folder)
    family = _FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        known = ", ".join([*_FAMILIES, hf_vision.MODEL_TYPE])
        raise MagistralError(f"{path}: model_type {raw.get('model_type')!r} is not one of {known}")
    _refuse_unsupported(path, raw)
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}  # transformers 4, 5
    num_heads = _require(path, raw, "num_attention_heads")
    d_model = _require(path, raw, "hidden_size")
    if raw["model_type"] == "llama" and raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = num_heads
    head_dim = raw.get("head_dim") or family.head_dim
    if head_dim is None and d_model % num_heads:
        raise MagistralError(
            f"{path}: head_dim is missing and hidden_size {d_model} is no multiple of {num_heads} heads"
        )
    return ModelConfig(
        vocab_size=_require(path, raw, "vocab_size"),
        d_model=d_model,
        num_layers=_require(path, raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_require(path, raw, "num_key_value_heads"),
        head_dim=head_dim or d_model // num_heads,
        d_ff=_require(path, raw, "intermediate_size"),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_positions=raw.get("max_position_embeddings", family.max_positions),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(path, raw, family),
        rope_scaling=_rope_scaling(path, rope),
    )


def hf_config(config: ModelConfig, model_type: str, dtype: str) -> dict[str, Any]:
    """Content of `config.json`, in the keys that transformers 4 and 5 both read.

    Raises:
      MagistralError: The family cannot express the architecture.
    """
    if model_type not in _FAMILIES:
        raise MagistralError(f"model_type {model_type!r} is not one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[model_type]
    for name in ("qkv_bias", "qk_norm"):
        if getattr(config, name) != getattr(family, name):
            raise MagistralError(
                f"model_type {model_type} has {name} {getattr(family, name)}, the model has {getattr(config, name)}"
            )
    if config.sliding_window is not None and family.sliding_window is None:
        raise MagistralError(f"model_type {model_type} has no sliding window, the model has {config.sliding_window}")
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if family.sliding_window is not None:
        raw["sliding_window"] = config.sliding_window
    if family.has_window_switch:
        raw |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    if config.rope_scaling is not None:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    return raw


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MagistralError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise MagistralError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise MagistralError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """`config.json` of a model folder; of a model that also sees, what it says of the text part."""
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)
    return hf_vision.text_config(path, raw) if also_sees(folder) else raw


def also_sees(folder: str | pathlib.Path) -> bool:
    """Whether a folder holds a model of which only the text part is taken."""
    return read_json(pathlib.Path(folder) / "config.json").get("model_type") == hf_vision.MODEL_TYPE


def _require(path: pathlib.Path, raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MagistralError(f"{path}: {key} is {value!r}; expected a positive integer")
    return value


def _refuse_unsupported(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    """Parts that would change the logits and that the model definition lacks."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise MagistralError(f"{path}: hidden_act {activation!r} is not supported; expected silu")
    if raw.get("attention_bias") and raw["model_type"] != "qwen2":  # there the output projection has one as well
        raise MagistralError(f"{path}: attention_bias is not supported for model_type {raw['model_type']}")
    if raw.get("mlp_bias"):
        raise MagistralError(f"{path}: mlp_bias is not supported")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise MagistralError(
            f"{path}: quantised weights ({method}) are not supported; expected float32, float16, bfloat16"
        )


def _sliding_window(path: pathlib.Path, raw: Mapping[str, Any], family: _Family) -> int | None:
    """The window if every layer has it, None if no layer has it."""
    window = raw.get("sliding_window", family.sliding_window)
    if family.sliding_window is None or window is None:
        return None
    if not family.has_window_switch:
        return window
    num_layers = _require(path, raw, "num_hidden_layers")
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * max(
        num_layers - first, 0
    )
    if not raw.get("use_sliding_window", False) or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise MagistralError(f"{path}: a sliding window on some layers only (layer_types, max_window_layers)")
    return window


def _rope_scaling(path: pathlib.Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise MagistralError(
            f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; expected 1"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise MagistralError(f"{path}: rope_type {kind!r} is not supported; expected default or llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if rope.get(key) is None]
    if missing:
        raise MagistralError(f"{path}: rope_type llama3 lacks {', '.join(missing)}")
    factor, low, high, original = (rope[key] for key in keys)
    return RopeScaling(float(factor), float(low), float(high), int(original))
