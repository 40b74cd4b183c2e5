"""google-tunix 0.1.7 as the other side: its Llama 3 model with our weights, its sampler, and its GRPO train step.

    pip install google-tunix==0.1.7

Everything that is timed is Tunix's own code: `Sampler.__call__` as its
`VanillaRollout` calls it (temperature, top-p 1, log-probs returned), and the jitted train step of its RL `Trainer`
with its registered GRPO loss (`beta` 0: no reference model), as `GRPOLearner` sets it up.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import forward, logits

# Tunix's Llama 3 ignores the rope_theta of its config and takes this one; ours follows so that both compute the same.
_ROPE_THETA = 1_000_000.0
_PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What both benchmarks have as flags: the shape of the policy on both sides."""

    layers: int = 4
    d_model: int = 256
    d_ff: int = 768
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    vocab: int = 4096

    def model(self) -> ModelConfig:
        """The shape of the policy."""
        return ModelConfig(
            vocab_size=self.vocab,
            d_model=self.d_model,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            d_ff=self.d_ff,
            rope_theta=_ROPE_THETA,
        )


def make_model(model: ModelConfig, params: dict[str, Any]) -> Any:
    """Tunix's Llama 3 (flax NNX) holding copies of our float32 weights."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    config = llama3.ModelConfig(
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        embed_dim=model.d_model,
        hidden_dim=model.d_ff,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        rope_theta=int(_ROPE_THETA),
        norm_eps=model.norm_eps,
    )
    peer = llama3.Llama3(config, rngs=nnx.Rngs(0))
    put = lambda variable, value: variable.set_value(jnp.array(value, copy=True))
    put(peer.embedder.input_embedding, params["embed"]["embedding"])
    put(peer.lm_head.w, params["head"]["kernel"])
    put(peer.final_norm.w, params["final_norm"]["scale"])
    for index, layer in enumerate(peer.layers):
        ours = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        put(layer.input_layernorm.w, ours["attn_norm"]["scale"])
        put(layer.post_attention_layernorm.w, ours["mlp_norm"]["scale"])
        for name in ("q", "k", "v", "o"):
            put(getattr(layer.attn, f"{name}_proj").w, ours["attn"][name]["kernel"])
        for name in ("gate", "up", "down"):
            put(getattr(layer.mlp, f"{name}_proj").kernel, ours["mlp"][name]["kernel"])
    _check_same_function(model, params, peer)
    return peer


def _check_same_function(model: ModelConfig, params: dict[str, Any], peer: Any) -> None:
    # Both sides must hold the same network, or the comparison is void.
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 1, model.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(64)[None], (2, 64))
    hidden, _ = forward(params, model, tokens, positions, jnp.ones_like(tokens))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((64, 64), bool))[None], (2, 64, 64))
    gap = float(jnp.abs(logits(params, model, hidden) - peer(tokens, positions, None, mask)[0]).max())
    if gap > 1e-3:
        raise SystemExit(f"The peer's logits differ from ours by {gap}: these are two different models.")


class _NumberTokenizer:
    """Text is token ids in decimal: the sampler takes strings, and its tokenizer should cost next to nothing."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # falsy: the sampler then adds none

    def eos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return _PAD_ID


def make_sampler(peer: Any, model: ModelConfig, cache_size: int) -> Callable[..., list[np.ndarray]]:
    """A function from one batch of prompts to its completions, each without its stop token (Tunix cuts it off)."""
    from tunix.generate import sampler as tunix_sampler  # pyright: ignore[reportMissingImports]

    cache = tunix_sampler.CacheConfig(cache_size, model.num_layers, model.num_kv_heads, model.head_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = tunix_sampler.Sampler(peer, _NumberTokenizer(), cache)

    def run(prompts: np.ndarray, max_new_tokens: int, stop_ids: Sequence[int], seed: int) -> list[np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = sampler(
                [" ".join(map(str, prompt)) for prompt in prompts],
                max_generation_steps=max_new_tokens,
                max_prompt_length=prompts.shape[1],
                temperature=1.0,
                top_p=1.0,
                return_logprobs=True,
                eos_tokens=list(stop_ids),
                seed=seed,
            )
        return output.tokens

    return run


def make_train_step(
    peer: Any,
    optimizer: optax.GradientTransformation,
    prompt_ids: np.ndarray,
    completion_ids: np.ndarray,
    advantage: np.ndarray,
    behavior_logprob: np.ndarray,
) -> Callable[[], Any]:
    """One update over padded rows (pad id 0), which returns once it is done.

    The step is compiled once for its shape: Tunix pads prompts and completions to the configured maximum.
    """
    from flax import nnx
    from tunix.rl import algo_core, common  # pyright: ignore[reportMissingImports]
    from tunix.rl.grpo.grpo_learner import GRPOConfig  # pyright: ignore[reportMissingImports]
    from tunix.rl.trainer import Trainer  # pyright: ignore[reportMissingImports]
    from tunix.sft.peft_trainer import TrainingConfig  # pyright: ignore[reportMissingImports]

    algorithm: Any = GRPOConfig(beta=0.0, epsilon=0.2)
    algorithm.temperature = 1.0  # as GRPOLearner sets it from the rollout's config
    loss = lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
        model, train_example, algo_config=algorithm, pad_id=_PAD_ID, eos_id=_PAD_ID
    )
    trainer = Trainer(peer, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9), lambda: {})
    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    example = common.TrainExample(
        prompt_ids=jnp.asarray(prompt_ids),
        prompt_mask=jnp.asarray(prompt_ids != _PAD_ID),
        completion_ids=jnp.asarray(completion_ids),
        completion_mask=jnp.asarray(completion_ids != _PAD_ID),
        advantages=jnp.asarray(advantage),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(behavior_logprob),
    )

    def run() -> Any:
        result = train_step(example)
        return jax.block_until_ready((result, nnx.state(peer)))

    return run
