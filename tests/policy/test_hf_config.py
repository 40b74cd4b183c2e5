"""The families: what the `config.json` of published models says, and what is refused.

The numbers are those of the published files, written down by hand; keys that say nothing about the architecture are
left out.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import pytest

from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.policy.hf_config import hf_config, read_model_config
from magistral_jax.policy.transformer import init_params
from magistral_jax.records import MagistralError


def published(model_type: str, sizes: tuple[int, ...], **others: Any) -> dict[str, Any]:
    """A config.json; `sizes` are vocabulary, width, feed-forward width, layers, heads, key-value heads."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    common = {"model_type": model_type, "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    return common | dict(zip(names, sizes, strict=True)) | others


_LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_WINDOW_OFF = {"use_sliding_window": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6}

MODELS = {
    "Mistral-7B-v0.1": (
        published(
            "mistral",
            (32000, 4096, 14336, 32, 32, 8),
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        ModelConfig(32000, 4096, 32, 32, 8, 128, 14336, 1e4, 1e-5, 32768, sliding_window=4096),
        7_241_732_096,
    ),
    # 32 heads of 128 are 4096, less than the width of 5120: head_dim has to be read. The window is null: none.
    "Mistral-Small-24B-Instruct-2501": (
        published(
            "mistral",
            (131072, 5120, 32768, 40, 32, 8),
            head_dim=128,
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_theta=100000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        ModelConfig(131072, 5120, 40, 32, 8, 128, 32768, 1e8, 1e-5, 32768),
        23_572_403_200,
    ),
    "Magistral-Small-2506": (
        published(
            "mistral",
            (131072, 5120, 32768, 40, 32, 8),
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-5,
            rope_theta=1000000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        ModelConfig(131072, 5120, 40, 32, 8, 128, 32768, 1e9, 1e-5, 40960),
        23_572_403_200,
    ),
    "Meta-Llama-3-8B": (
        published(
            "llama",
            (128256, 4096, 14336, 32, 32, 8),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=None,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 5e5, 1e-5, 8192),
        8_030_261_248,
    ),
    "Llama-3.1-8B": (
        published(
            "llama",
            (128256, 4096, 14336, 32, 32, 8),
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=_LLAMA_3_1,
            attention_bias=False,
            mlp_bias=False,
        ),
        ModelConfig(
            128256, 4096, 32, 32, 8, 128, 14336, 5e5, 1e-5, 131072, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
        ),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        published(
            "llama",
            (128256, 2048, 8192, 16, 32, 8),
            head_dim=64,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=_LLAMA_3_1 | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        ModelConfig(
            128256,
            2048,
            16,
            32,
            8,
            64,
            8192,
            5e5,
            1e-5,
            131072,
            tie_embeddings=True,
            rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        ),
        1_235_814_400,
    ),
    # A window is written down, and switched off.
    "Qwen2.5-7B-Instruct": (
        published(
            "qwen2",
            (152064, 3584, 18944, 28, 28, 4),
            max_position_embeddings=32768,
            sliding_window=131072,
            max_window_layers=28,
            **_WINDOW_OFF,
        ),
        ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, 1e6, 1e-6, 32768, qkv_bias=True),
        7_615_616_512,
    ),
    "Qwen2.5-0.5B": (
        published(
            "qwen2",
            (151936, 896, 4864, 24, 14, 2),
            max_position_embeddings=32768,
            sliding_window=32768,
            max_window_layers=24,
            **_WINDOW_OFF | {"tie_word_embeddings": True},
        ),
        ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 1e6, 1e-6, 32768, tie_embeddings=True, qkv_bias=True),
        494_032_768,
    ),
    # 16 heads of 128 are 2048, more than the width of 1024.
    "Qwen3-0.6B": (
        published(
            "qwen3",
            (151936, 1024, 3072, 28, 16, 8),
            head_dim=128,
            max_position_embeddings=40960,
            sliding_window=None,
            max_window_layers=28,
            attention_bias=False,
            rope_scaling=None,
            **_WINDOW_OFF | {"tie_word_embeddings": True},
        ),
        ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 1e6, 1e-6, 40960, tie_embeddings=True, qk_norm=True),
        596_049_920,
    ),
    "Qwen3-8B": (
        published(
            "qwen3",
            (151936, 4096, 12288, 36, 32, 8),
            head_dim=128,
            max_position_embeddings=40960,
            sliding_window=None,
            max_window_layers=36,
            attention_bias=False,
            rope_scaling=None,
            **_WINDOW_OFF,
        ),
        ModelConfig(151936, 4096, 36, 32, 8, 128, 12288, 1e6, 1e-6, 40960, qk_norm=True),
        8_190_735_360,
    ),
}

# Mistral-Small-3.1-24B-Instruct-2503: a text model, and eyes.
SEEING = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    "text_config": published(
        "mistral",
        (131072, 5120, 32768, 40, 32, 8),
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1000000000.0,
        sliding_window=None,
    ),
}


def write(folder: pathlib.Path, raw: dict[str, Any]) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_gives_the_published_architecture(name: str, tmp_path: pathlib.Path):
    raw, expected, num_params = MODELS[name]
    assert read_model_config(write(tmp_path, raw)) == expected
    shapes = jax.eval_shape(lambda: init_params(expected, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == num_params  # as its model card has it


def test_of_mistral_small_3_1_the_text_part_is_read(tmp_path: pathlib.Path):
    expected = dataclasses.replace(MODELS["Magistral-Small-2506"][1], max_positions=131072)
    assert read_model_config(write(tmp_path, SEEING)) == expected
    tied = dataclasses.replace(expected, tie_embeddings=True)
    assert read_model_config(write(tmp_path, SEEING | {"tie_word_embeddings": True})) == tied


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_back_is_the_same_model(name: str, tmp_path: pathlib.Path):
    raw, expected, _ = MODELS[name]
    written = hf_config(expected, raw["model_type"], "bfloat16")
    assert read_model_config(write(tmp_path, written)) == expected


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral' is not one of"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not one of"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type None is not one of"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
            "the text part of mistral3 is",
        ),
        (SEEING | {"quantization_config": {"quant_method": "fp8"}}, "quantised weights (fp8) are not supported"),
        # Qwen2.5 stretched to 131,072 tokens, as its model card describes.
        (
            MODELS["Qwen2.5-7B-Instruct"][0] | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type 'yarn' is not supported; expected default or llama3",
        ),
        (
            MODELS["Llama-3.1-8B"][0] | {"quantization_config": {"quant_method": "fp8"}},
            "quantised weights (fp8) are not supported",
        ),
    ],
)
def test_others_are_refused_in_a_sentence(raw: dict[str, Any], sentence: str, tmp_path: pathlib.Path):
    with pytest.raises(MagistralError) as error:
        read_model_config(write(tmp_path, raw))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
