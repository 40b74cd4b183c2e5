"""Logits of folders that transformers wrote, against transformers, for every family and rotary variant."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from magistral_jax.policy.hf_folder import load_params, read_model_config, save_folder
from magistral_jax.policy.transformer import forward, logits
from magistral_jax.records import MagistralError

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that a wrong head or rotation shows in the logits
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
VARIANTS = {
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
}
ROWS, LENGTH = 2, 40


def reference_model(variant: str):
    """A model of transformers with random weights, norms and biases included."""
    class_name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**(SHAPE | settings), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(seed: int = 0):
    return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (ROWS, LENGTH)).astype(np.int32)


def reference_logits(model: Any, tokens: np.ndarray):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def our_logits(folder: pathlib.Path, tokens: np.ndarray):
    config = read_model_config(folder)
    params = jax.tree.map(jnp.asarray, load_params(folder, config))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = forward(params, config, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    return np.asarray(logits(params, config, hidden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, tmp_path: pathlib.Path):
    model = reference_model(variant)
    model.save_pretrained(tmp_path)
    tokens = tokens_of()
    expected = reference_logits(model, tokens)
    assert expected.std() > 0.5  # not a comparison of zeros
    np.testing.assert_allclose(our_logits(tmp_path, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_what_we_save_with_equal_logits(variant: str, tmp_path: pathlib.Path):
    model = reference_model(variant)
    model.save_pretrained(tmp_path / "theirs")
    config = read_model_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", config)
    save_folder(tmp_path / "ours", params, config, model_type=model.config.model_type, max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    tokens = tokens_of(1)
    np.testing.assert_array_equal(reference_logits(again, tokens), reference_logits(model, tokens))
    assert read_model_config(tmp_path / "ours") == config


def test_a_sliding_window_changes_the_logits():
    """The window of the variant above is one that matters: without it the comparison would prove nothing."""
    model = reference_model("mistral-window")
    tokens = tokens_of()
    windowed = reference_logits(model, tokens)
    tokens[:, 0] = (tokens[:, 0] + 1) % SHAPE["vocab_size"]
    changed = reference_logits(model, tokens)
    reach = 1 + SHAPE["num_hidden_layers"] * (5 - 1)  # two layers of a window of 5, itself included
    assert not np.allclose(windowed[:, : reach - 1], changed[:, : reach - 1])
    np.testing.assert_allclose(windowed[:, reach:], changed[:, reach:], atol=1e-5)


# --- a model that also sees ------------------------------------------------------------------------------------------


def vision_model():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 12, "sliding_window": None, **SHAPE},
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, **vision},
        image_token_index=60,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def rename_tensors(folder: pathlib.Path, rename: Any):
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def as_modules_are_named(name: str):
    name = name.removeprefix("language_model.")
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name if name.startswith("lm_head") else "model." + name


@pytest.mark.parametrize("rename", [str, as_modules_are_named], ids=["published", "modules"])
def test_of_a_model_that_also_sees_the_text_part_is_taken(rename: Any, tmp_path: pathlib.Path):
    model, theirs, ours = vision_model(), tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs)
    rename_tensors(theirs, rename)
    raw = json.loads((theirs / "config.json").read_text())
    del raw["tie_word_embeddings"]  # as published
    (theirs / "config.json").write_text(json.dumps(raw))
    tokens = tokens_of() % 60  # no places of pictures
    expected = reference_logits(model, tokens)
    np.testing.assert_allclose(our_logits(theirs, tokens), expected, atol=1e-4, rtol=1e-4)

    config = read_model_config(theirs)
    save_folder(ours, load_params(theirs, config), config, model_type="mistral", tokenizer_from=theirs)
    again = transformers.AutoModelForCausalLM.from_pretrained(ours, attn_implementation="eager").eval()
    assert type(again) is transformers.MistralForCausalLM
    np.testing.assert_allclose(reference_logits(again, tokens), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((ours / "config.json").read_text())["eos_token_id"] == raw["text_config"]["eos_token_id"]


def test_what_a_model_that_also_sees_must_not_be_is_refused(tmp_path: pathlib.Path):
    vision_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(MagistralError, match=r"tensor language_model\.lm_head\.weight has no place .*tie_word_embedd"):
        load_params(tmp_path, read_model_config(tmp_path))
    path.write_text(json.dumps(raw | {"text_config": raw["text_config"] | {"model_type": "ministral3"}}))
    with pytest.raises(MagistralError, match=r"the text part of mistral3 is 'ministral3'; expected mistral$"):
        read_model_config(tmp_path)
