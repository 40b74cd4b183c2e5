"""Flax modules of a decoder layer: each declares its parameters' shapes, logical axes and initialisers.

They are used only through pure functions (`policy.transformer`): `module.apply({"params": weights}, ...)` with plain
nested dicts. Attention over the sequence is passed in, so that training and paged decoding share one definition.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.policy.remat import ATTENTION_OUTPUT, MLP_OUTPUT

# (q, k, v) -> (mixed values, whatever the cache becomes)
Attend = Callable[
    [Float[Array, "B T H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]],
    tuple[Float[Array, "B T H E"], Any],
]

Rotation = tuple[Float[Array, "B T E_half"], Float[Array, "B T E_half"]]
"""Cosine and sine of the angle by which each pair of dimensions turns at a token's position."""


def _logical(init: Callable[..., Array], *axes: str | None) -> Callable[..., Any]:
    return nn.with_logical_partitioning(init, axes)


def _scaled(fan_in: int, gain: float = 1.0) -> Callable[..., Array]:
    return jax.nn.initializers.normal(gain * fan_in**-0.5)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm, computed in float32 whatever the precision of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def project(x: Float[Array, "B T M"], kernel: Float[Array, "M N"]) -> Float[Array, "B T N"]:
    """`x @ kernel` as one matrix product over all tokens: on CPU the gradient of the batched form costs twice."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def adapt(module: nn.Module, x: Float[Array, "B T M"], y: Float[Array, "B T *N"]) -> Float[Array, "B T *N"]:
    """`y` with what the low-rank adapters of a module add to it; most modules have none (`policy.lora`)."""
    if not module.has_variable("adapters", "lora_a"):
        return y
    a, b = (module.get_variable("adapters", name) for name in ("lora_a", "lora_b"))
    return y + project(project(x, a), b).reshape(y.shape)


def rope_frequencies(config: ModelConfig) -> Float[Array, " E_half"]:
    """Angular frequency of each pair of dimensions, radians per token."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequencies if config.rope_scaling is None else _llama3_scaled(frequencies, config.rope_scaling)


def _llama3_scaled(frequencies: Float[Array, " E_half"], scaling: RopeScaling) -> Float[Array, " E_half"]:
    # Long wavelengths are stretched by `factor`, short ones kept, a linear blend in between.
    wavelengths = 2 * jnp.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((scaling.original_max_positions / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotation(positions: Int[Array, "B T"], frequencies: Float[Array, " E_half"]) -> Rotation:
    """Cosine and sine for `rope`, float32: the same for all heads and layers, so computed once.

    What a loop yields is stored. Otherwise XLA for CPUs would fuse both functions into each of their uses and compute
    them again for every head, at 12 ns each: a third of a prefill.
    """
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jax.lax.map(lambda is_sine: jnp.where(is_sine, jnp.sin(angles), jnp.cos(angles)), jnp.arange(2) == 1)
    return cos, sin


def rope(x: Float[Array, "B T N E"], rotation: Rotation) -> Float[Array, "B T N E"]:
    """Rotate the halves of each head by position (rotate-half layout of Hugging Face)."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """Scaled root-mean-square norm over the last axis."""

    size: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise over the last axis."""
        scale = self.param("scale", _logical(jax.nn.initializers.ones, None), (self.size,))
        return rms_norm(x, scale, self.eps)


class HeadProjection(nn.Module):
    """Linear map from the model width to heads."""

    width: int
    num_heads: int
    head_dim: int
    axis: str
    bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N E"]:
        """Project to heads."""
        shape = (self.width, self.num_heads, self.head_dim)
        kernel = self.param("kernel", _logical(_scaled(self.width), "embed", self.axis, "head_dim"), shape)
        y = project(x, kernel.reshape(self.width, -1)).reshape(*x.shape[:2], *shape[1:])
        y = adapt(self, x, y)
        if self.bias:
            y += self.param("bias", _logical(jax.nn.initializers.zeros, self.axis, "head_dim"), shape[1:])[None, None]
        return y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the mixing over tokens is `attend`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attend, and return what `attend` made of its cache beside the mixed values."""
        c = self.config
        q = HeadProjection(c.d_model, c.num_heads, c.head_dim, "heads", c.qkv_bias, name="q")(x)
        k = HeadProjection(c.d_model, c.num_kv_heads, c.head_dim, "kv_heads", c.qkv_bias, name="k")(x)
        v = HeadProjection(c.d_model, c.num_kv_heads, c.head_dim, "kv_heads", c.qkv_bias, name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c.head_dim, c.norm_eps, name="q_norm")(q)
            k = RMSNorm(c.head_dim, c.norm_eps, name="k_norm")(k)
        mixed, cache = attend(rope(q, rotation), rope(k, rotation), v)
        return OutputProjection(c, name="o")(mixed), cache


class OutputProjection(nn.Module):
    """Linear map from heads back to the model width."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T H E"]) -> Float[Array, "B T D"]:
        """Project back."""
        c = self.config
        # Residual branches start small: the sum over 2·L branches then keeps unit scale.
        init = _scaled(c.num_heads * c.head_dim, (2 * c.num_layers) ** -0.5)
        shape = (c.num_heads, c.head_dim, c.d_model)
        kernel = self.param("kernel", _logical(init, "heads", "head_dim", "embed"), shape)
        x = x.reshape(*x.shape[:2], -1)
        return adapt(self, x, project(x, kernel.reshape(-1, c.d_model)))


class Linear(nn.Module):
    """Bias-free linear map."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T N"]:
        """Apply the map."""
        kernel = self.param("kernel", _logical(_scaled(self.shape[0], self.gain), *self.axes), self.shape)
        return adapt(self, x, project(x, kernel))


class GatedMlp(nn.Module):
    """SwiGLU feed-forward."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Feed forward."""
        c = self.config
        gate = Linear((c.d_model, c.d_ff), ("embed", "mlp"), name="gate")(x)
        up = Linear((c.d_model, c.d_ff), ("embed", "mlp"), name="up")(x)
        gain = (2 * c.num_layers) ** -0.5
        return Linear((c.d_ff, c.d_model), ("mlp", "embed"), gain, name="down")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One block; the second value is what `attend` made of its cache."""
        c = self.config
        normed = RMSNorm(c.d_model, c.norm_eps, name="attn_norm")(x)
        mixed, cache = Attention(c, name="attn")(normed, rotation, attend)
        x = x + checkpoint_name(mixed, ATTENTION_OUTPUT)
        out = GatedMlp(c, name="mlp")(RMSNorm(c.d_model, c.norm_eps, name="mlp_norm")(x))
        return x + checkpoint_name(out, MLP_OUTPUT), cache
