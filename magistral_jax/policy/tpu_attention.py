"""The TPU kernels that jax ships, with our shapes: ragged paged attention for pages, splash attention for rows.

Both have run here on a CPU only: splash in Pallas' interpreter, paged attention through jax's own reference of the
same signature; both are lowered for TPU in the tests. Neither has run on a TPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LANES = 128  # of a TPU's vector unit: what the kernels' blocks are made of
_SPLASH_BLOCK = 512  # queries and keys of a block, at most


def why_no_tpu_pages(platform: str, head_dim: int, num_kv_heads: int, kv_dtype: str) -> str:
    """Why the paged kernel cannot be used, as the end of a sentence; "" where it can.

    Args:
      platform: Of the engine's devices.
      head_dim: Of the model.
      num_kv_heads: On one device.
      kv_dtype: Precision of the pages.
    """
    if platform != "tpu":
        return f"the engine runs on {platform}"
    if kv_dtype not in ("float32", "bfloat16"):
        return f"its kernel reads float32 and bfloat16, and `generation.kv_dtype` is `{kv_dtype}`"
    if head_dim % _LANES:
        return f"its kernel wants heads of a multiple of {_LANES} dimensions, and the model's have {head_dim}"
    packed = 2 * num_kv_heads // (2 if kv_dtype == "bfloat16" else 1)
    if packed not in (1, 2, 4, 8) and packed % 8:
        return f"its kernel cannot tile {num_kv_heads} KV heads on a device"
    return ""


def tpu_paged_attention(
    q: Float[Array, "B T H E"],
    pairs: Float[Array, "P C K2 E"],
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
    window: int | None,
    *,
    kernel: Callable[..., Array] | None = None,
) -> Float[Array, "B T H E"]:
    """`paged_attention` by the ragged kernel.

    Each row counts as a sequence with T queries at its end. Padding behind the live tokens of a row then reads beyond
    them, which nobody sees; a row without a live token reads T keys.

    Args:
      q: Queries; those of a row are consecutive tokens.
      pairs: Interleaved pages.
      page_table: Pages of each row.
      positions: Of the queries.
      is_live: False on padding and in rows that are not in use.
      window: A token reads this many tokens, itself included.
      kernel: Stands in for jax's kernel, in tests.
    """
    if kernel is None:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel
    rows, tokens, heads, size = q.shape
    first = jnp.where(is_live.any(axis=1), positions[:, 0], 0)
    mixed = kernel(
        q.reshape(rows * tokens, heads, size).astype(pairs.dtype),
        pairs,
        (first + tokens).astype(jnp.int32),
        page_table.astype(jnp.int32),
        jnp.arange(rows + 1, dtype=jnp.int32) * tokens,
        jnp.array([rows], jnp.int32),
        sm_scale=size**-0.5,
        sliding_window=window,
    )
    return mixed.reshape(q.shape).astype(q.dtype)


def splash_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    segment_ids: Int[Array, "B T"],
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Segment-causal attention by the splash kernel, differentiable.

    Rows are padded to whole blocks of 128 tokens with a segment of their own; tokens of a segment are consecutive in
    their row, so that distances between columns are those between positions.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, tokens, heads, size = q.shape
    padded = -(-tokens // _LANES) * _LANES
    fill = lambda x, value: jnp.pad(x, ((0, 0), (0, padded - tokens), *((0, 0),) * (x.ndim - 2)), constant_values=value)
    block = max(size for size in range(_LANES, min(_SPLASH_BLOCK, padded) + 1, _LANES) if padded % size == 0)
    mask = masks.CausalMask((padded, padded))
    if window is not None:
        mask = masks.LocalMask((padded, padded), window_size=(window - 1, 0), offset=0)
    with jax.ensure_compile_time_eval():  # the kernel keeps arrays made from the mask; they must not be traced
        kernel: Callable[..., Any] = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            interpret=interpret,
        )
    q, k, v = (fill(x, 0).swapaxes(1, 2) for x in (q * size**-0.5, k, v))
    ids = fill(segment_ids, -1)
    mixed: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))
    return mixed.swapaxes(1, 2)[:, :tokens]
