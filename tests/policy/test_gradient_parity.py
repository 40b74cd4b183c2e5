"""One gradient step equals that of transformers: the same loss, gradients leaf by leaf, parameters after an update."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from magistral_jax.policy import smollm2
from magistral_jax.policy.config import PolicyConfig
from magistral_jax.policy.hf_folder import load_params, read_model_config, tensor_table
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state, make_train_step, sft_objective

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
}
LENGTHS = ((3, 9), (5, 14), (2, 6))  # prompt and completion
LEARNING_RATE, EPS = 1e-2, 1e-4  # a large eps: gradients near 0 differ in the last bits, and their signs with them


def sequences(vocab_size: int) -> list[TrainingSequence]:
    rng = np.random.default_rng(0)
    draw = lambda num: rng.integers(0, vocab_size, num).astype(np.int32)
    nothing = lambda num: np.zeros(num, np.float32)
    return [TrainingSequence(draw(p), draw(c), nothing(c), 1.0, np.zeros(c, np.int32)) for p, c in LENGTHS]


def reference_step(
    model: Any, examples: list[TrainingSequence]
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(loss, gradients, parameters after AdamW) of the mean log-likelihood, each sequence on its own in torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    total = sum(len(s.completion_ids) for s in examples)
    loss = torch.zeros(())
    for s in examples:
        ids = torch.from_numpy(np.concatenate([s.prompt_ids, s.completion_ids])[None]).long()
        scores = model(ids).logits.float().log_softmax(-1)[0, :-1]
        logprob = scores.gather(1, ids[0, 1:, None])[len(s.prompt_ids) - 1 :, 0]
        loss = loss - logprob.sum() / total
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    optimizer.step()
    return float(loss.detach()), gradients, {name: p.detach().numpy() for name, p in model.named_parameters()}


def our_step(folder: pathlib.Path, examples: list[TrainingSequence]):
    """The same by our train step, packed, as tensors under the folder's names: (loss, norm, parameters)."""
    config = read_model_config(folder)
    settings = OptimizerConfig(learning_rate=LEARNING_RATE, b1=0.9, b2=0.95, eps=EPS, clip_norm=0.0)
    optimizer = make_optimizer(settings, 10)
    params = jax.tree.map(jnp.asarray, load_params(folder, config))
    state = init_state(params, optimizer)
    step = make_train_step(config, PolicyConfig(logprob_chunk=16), sft_objective, optimizer)
    state, metrics = step(state, collate(examples, row_tokens=32, rows_per_microbatch=1), None)
    # After one update the first moment is a tenth of the gradient.
    moments = next(
        s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    )
    gradients = named(jax.tree.map(lambda m: m / (1 - settings.b1), moments), config)
    return float(metrics["loss"].mean()), gradients, named(state.params, config)


def named(tree: Any, config: Any) -> dict[str, np.ndarray]:
    """Leaves as the tensors of a folder."""
    found = {}
    for entry in tensor_table(config):
        leaf = functools.reduce(lambda part, key: part[key], entry.path, tree)
        for i in range(config.num_layers if entry.is_stacked else 1):
            found[entry.name.format(i)] = entry.to_hf(np.asarray(leaf[i] if entry.is_stacked else leaf))
    return found


def assert_same_step(folder: pathlib.Path, model: Any):
    examples = sequences(min(model.config.vocab_size, 49_000))
    loss, gradients, params = our_step(folder, examples)
    expected = reference_step(model, examples)
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert set(gradients) == set(expected[1])
    for name, gradient in expected[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0
        np.testing.assert_allclose(gradients[name], gradient, atol=2e-4 * largest, rtol=1e-3, err_msg=name)
        # AdamW's first update is almost the sign of the gradient, and that of a gradient of nothing is chance.
        is_clear = np.abs(gradient) > 1e-3 * largest
        assert is_clear.any()
        ours, theirs = params[name][is_clear], expected[2][name][is_clear]
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_random_weights(family: str, tmp_path: pathlib.Path):
    class_name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**(SHAPE | settings), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.save_pretrained(tmp_path)
    assert_same_step(tmp_path, model)


def test_a_step_on_a_pretrained_model(tmp_path: pathlib.Path):
    smollm2.convert(tmp_path / "model", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).train()
    assert_same_step(tmp_path / "model", model)
