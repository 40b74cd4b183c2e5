"""The policy: one decoder definition, reached through pure functions of its parameters.

`forward` serves training and scoring (no cache: segment-causal attention within packed rows) and prefill and decode
(with a cache: keys and values go to pages). Parameters are plain nested dicts; layers are stacked on a leading axis
for the scan of training and may be a tuple of single layers, which decoding reads without slicing.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from magistral_jax.policy.attention import RowAttention, packed_rows, segment_attention
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.layers import DecoderLayer, rms_norm, rope_frequencies, rotation
from magistral_jax.policy.layout import Layout
from magistral_jax.policy.paged_attention import paged_attention
from magistral_jax.policy.pages import PagedCache, write_pages
from magistral_jax.policy.remat import Remat, name_weights, rematerialise

_FLOAT32 = jnp.dtype("float32")


def init_params(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Any]:
    """Random float32 parameters, layers stacked on the leading axis."""
    return nn.meta.unbox(_init_boxed(config, key))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """For each parameter the names of its axes, which `policy.sharding` maps to mesh axes."""
    boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    specs = nn.get_partition_spec(boxed)
    stack = lambda spec: jax.sharding.PartitionSpec("layers", *spec)
    is_spec = lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
    return specs | {"layers": jax.tree.map(stack, specs["layers"], is_leaf=is_spec)}


def _init_boxed(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Any]:
    embed_key, layer_key, head_key = jax.random.split(key, 3)
    table = nn.with_logical_partitioning(jax.nn.initializers.normal(0.02), ("vocab", "embed"))
    kernel = nn.with_logical_partitioning(jax.nn.initializers.normal(config.d_model**-0.5), ("embed", "vocab"))
    scale = nn.with_logical_partitioning(jax.nn.initializers.ones, (None,))
    layer = DecoderLayer(config)
    x = jnp.zeros((1, 1, config.d_model))
    unturned = rotation(jnp.zeros((1, 1), jnp.int32), rope_frequencies(config))
    init_layer = lambda k: layer.init(k, x, unturned, lambda q, k, v: (q, None))["params"]
    params = {
        "embed": {"embedding": table(embed_key, (config.vocab_size, config.d_model))},
        "layers": jax.vmap(init_layer)(jax.random.split(layer_key, config.num_layers)),
        "final_norm": {"scale": scale(embed_key, (config.d_model,))},
    }
    if not config.tie_embeddings:
        params["head"] = {"kernel": kernel(head_key, (config.d_model, config.vocab_size))}
    return params


def forward(  # noqa: PLR0913, what a caller may choose about one computation
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: PagedCache | None = None,
    *,
    dtype: jnp.dtype = _FLOAT32,
    remat: Remat = "none",
    unroll: int = 1,
    layout: Layout | None = None,
    attention: RowAttention = "blocked",
) -> tuple[Float[Array, "B T D"], PagedCache | None]:
    """Hidden states after the final norm, and the cache with the keys and values of these tokens.

    Args:
      params: As made by `init_params`; `params["layers"]` stacked, or a tuple with one dict a layer. In training there
        may be low-rank adapters beside them, under "adapters" (`policy.lora`).
      config: Shape of the model.
      tokens: Token ids.
      positions: Position of each token in its sequence, from 0.
      segment_ids: 0 on padding; without a cache, tokens see only tokens of their own segment; with a cache each row
        is one sequence and sees the pages of its row.
      cache: Page pool and page table, or None.
      dtype: Precision of the computation.
      remat: What of a layer is kept for the backward pass; see `policy.remat`.
      unroll: Layers in one turn of the loop over stacked layers; 0 is all.
      layout: Where `params` and the tokens are one device's part (inside `shard_map`), how they come together.
      attention: How attention is computed without a cache; pages say for themselves how they are read.

    Returns:
      Hidden states, and the updated cache (None without one).
    """
    layer = DecoderLayer(config)
    turn = rotation(positions, rope_frequencies(config))
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    embed = cast(params["embed"])
    x = (embed if layout is None else layout.gather(embed, layout.specs["embed"]))["embedding"][tokens]

    if cache is None:
        whole = layout.whole_rows if layout else lambda x: x
        rows = packed_rows(whole(positions), whole(segment_ids), config.sliding_window, attention)
        mix = functools.partial(layout.attend, segment_attention) if layout else segment_attention
        attend = lambda q, k, v: (mix(q, k, v, rows), None)

        def block(x: Array, parts: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Array, None]:
            weights, adapters = cast(parts)
            weights = name_weights(weights if layout is None else layout.gather_layer(weights))
            variables = {"params": weights, "adapters": adapters}
            return layer.apply(variables, x, turn, attend)  # pyright: ignore[reportReturnType]

        body = rematerialise(block, remat, is_unrolled=unroll != 1)
        x, _ = jax.lax.scan(body, x, (params["layers"], params.get("adapters", {})), unroll=unroll)
        return final_norm(params, config, x), None

    is_live = segment_ids > 0
    new_layers = []
    for weights, pages in zip(layer_list(params, config), cache.layers, strict=True):

        def attend_pages(q: Array, k: Array, v: Array, pages: Any = pages) -> tuple[Array, Any]:
            pages = write_pages(pages, k, v, cache.page_table, positions, is_live)
            return paged_attention(q, pages, cache.page_table, positions, is_live, config.sliding_window), pages

        x, new_pages = layer.apply({"params": cast(weights)}, x, turn, attend_pages)
        new_layers.append(new_pages)
    return final_norm(params, config, x), PagedCache(tuple(new_layers), cache.page_table)


def final_norm(params: dict[str, Any], config: ModelConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm before the output head."""
    return rms_norm(x, params["final_norm"]["scale"].astype(x.dtype), config.norm_eps)


def layer_list(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """The layers one by one, whether stacked or not."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(config.num_layers))


def unstack(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The same parameters with one dict a layer: the layout that decoding reads without slicing."""
    return params | {"layers": layer_list(params, config)}


def head_kernel(params: dict[str, Any], config: ModelConfig) -> Float[Array, "D V"]:
    """The output head; the transposed embedding table where tied."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def logits(params: dict[str, Any], config: ModelConfig, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits. For many tokens at a time use `policy.logprob`, which never holds them all."""
    kernel = head_kernel(params, config).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
