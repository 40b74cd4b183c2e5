"""Attention over packed rows, for training and scoring: one function, several implementations.

  reference  the whole score matrix in float32: the oracle of the tests, any platform
  blocked    portable: blocks of queries on short rows, and on long ones a stream of blocks with no [T, T] array
  cudnn      cuDNN's fused attention, by `jax.nn.dot_product_attention`: NVIDIA GPUs, bfloat16
  splash     the splash kernel that jax ships (`policy.tpu_attention`): TPUs

Queries, keys and values carry their positions already (rotary); attention knows nothing of parameters. `cudnn` and
`splash` have not run on their hardware: see docs/kernels.md for what was checked without it.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.streamed_attention import streamed_attention
from magistral_jax.policy.tpu_attention import splash_attention
from magistral_jax.pytrees import pytree_dataclass, static_field
from magistral_jax.records import MagistralError

RowAttention = Literal["reference", "blocked", "cudnn", "splash"]

_MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
_QUERY_BLOCK = 64  # fewest queries that share a slice of keys in a row
_MOST_BLOCKS = 4  # slices of a row: each is compiled on its own
_LONGEST_DENSE = 2048  # tokens of a row; longer ones are streamed
_CUDNN_WIDEST = 256  # dimensions of a head, on Hopper and later


def choose_attention(choice: str, model: ModelConfig, *, dtype: str, platform: str) -> RowAttention:
    """The implementation that `choice` stands for on this platform; "auto" takes the fastest that works.

    Raises:
      MagistralError: The choice cannot work here.
    """
    obstacles = {
        "reference": "",
        "blocked": "",
        "cudnn": _why_no_cudnn(model, dtype, platform),
        "splash": "" if platform == "tpu" else f"the trainer runs on {platform}",
    }
    if choice == "auto":
        choice = next(name for name in ("cudnn", "splash", "blocked") if not obstacles[name])
    if obstacles[choice]:
        raise MagistralError(f"`policy.attention` is `{choice}`, but {obstacles[choice]}.")
    return choice  # pyright: ignore[reportReturnType]


def _why_no_cudnn(model: ModelConfig, dtype: str, platform: str) -> str:
    if platform != "gpu":
        return f"the trainer runs on {platform}"
    if dtype != "bfloat16":
        return f"cuDNN's attention wants bfloat16, and `policy.dtype` is `{dtype}`"
    if model.head_dim % 8 or model.head_dim > _CUDNN_WIDEST:
        return f"cuDNN wants heads of a multiple of 8 and at most {_CUDNN_WIDEST} dimensions, not {model.head_dim}"
    return ""


@pytree_dataclass
class PackedRows:
    """Who may read whom in packed rows, prepared once for all layers, and how attention is computed over them."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T T"] | None
    """None where the implementation needs no such array."""
    window: int | None = static_field(None)
    implementation: RowAttention = static_field("blocked")


def packed_rows(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    implementation: RowAttention = "blocked",
) -> PackedRows:
    """What `segment_attention` needs to know of the rows.

    Args:
      positions: Of each token in its sequence; the tokens of a segment are consecutive, in the row and in position.
      segment_ids: Which sequence of its row a token belongs to. Padding, 0, reads padding, and means nothing.
      window: A token reads this many tokens, itself included; None is all.
      implementation: See the module.
    """
    has_mask = implementation in ("reference", "cudnn") or not (implementation == "splash" or _is_long(positions))
    mask = segment_mask(positions, segment_ids, window) if has_mask else None
    return PackedRows(positions, segment_ids, mask, window, implementation)


def segment_attention(
    q: Float[Array, "B T H E"], k: Float[Array, "B T K E"], v: Float[Array, "B T K E"], rows: PackedRows
) -> Float[Array, "B T H E"]:
    """Causal softmax attention within the segments of packed rows, grouped queries, scores in float32."""
    match rows.implementation:
        case "splash":
            return splash_attention(q, k, v, rows.segment_ids, rows.window)
        case "cudnn":
            return _cudnn_attention(q, k, v, rows)
        case "reference":
            q_wide, k_wide, v_wide = (x.astype(jnp.float32) for x in (q, k, v))
            return _dense_attention(q_wide, k_wide, v_wide, _mask_of(rows)).astype(v.dtype)
        case "blocked" if rows.mask is None:
            return streamed_attention(q, k, v, rows.positions, rows.segment_ids, rows.window)
        case "blocked":
            return _blocked_attention(q, k, v, _mask_of(rows))


def _is_long(positions: Int[Array, "B T"]) -> bool:
    return positions.shape[1] > _LONGEST_DENSE


def _mask_of(rows: PackedRows) -> Bool[Array, "B T T"]:
    assert rows.mask is not None
    return rows.mask


def segment_mask(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], window: int | None
) -> Bool[Array, "B T T"]:
    """True where query t may read key s: same segment, not later, and within the sliding window."""
    distance = positions[:, :, None] - positions[:, None, :]
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def _blocked_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T H E"]:
    # Queries go in blocks, each reading the keys up to its own end, so most of the empty half of a causal score matrix
    # is never computed. A key to the right of its query may thus be left out whatever the mask says: only padding has
    # such.
    rows, tokens, heads, size = q.shape
    kv_heads = k.shape[2]
    block = max(_QUERY_BLOCK, -(-tokens // _MOST_BLOCKS))
    q = (q * size**-0.5).reshape(rows, tokens, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    mixed = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        bias = jnp.where(mask[:, start:end, :end], 0.0, _MASKED)
        mixed.append(_mix(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], bias))
    return jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows, tokens, heads, size)


@jax.custom_vjp
def _mix(
    q: Float[Array, "B K G Q E"], k: Float[Array, "B K S E"], v: Float[Array, "B K S E"], bias: Float[Array, "B Q S"]
) -> Float[Array, "B K G Q E"]:
    """Softmax attention of scaled queries. Its gradient keeps one array of the size of the scores, the weights."""
    return _mix_forward(q, k, v, bias)[0]


def _mix_forward(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Any]:
    # The query heads of a KV head are laid side by side, so that each KV head is one matrix product.
    shape, queries = q.shape, q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("bkqe,bkse->bkqs", queries, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*shape[:4], -1) + bias[:, None, None]
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    mass = weights.sum(axis=-1).reshape(*queries.shape[:3], 1)
    weights = weights.reshape(*queries.shape[:3], -1).astype(v.dtype)
    # Divided after the product: fewer numbers.
    mixed = jnp.einsum("bkqs,bkse->bkqe", weights, v, preferred_element_type=jnp.float32) / mass
    mixed = mixed.astype(v.dtype)
    return mixed.reshape(shape), (queries, k, v, weights, mass, mixed)


def _mix_backward(saved: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, mass, mixed = saved
    wide = gradient.reshape(q.shape).astype(jnp.float32) / mass
    # Σₛ weightₛ · (gradient · vₛ), the part of the softmax's gradient that all keys of a query share.
    shared = (wide * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    wide = wide.astype(v.dtype)
    to_weights = jnp.einsum("bkqe,bkse->bkqs", wide, v, preferred_element_type=jnp.float32)
    to_scores = (weights.astype(jnp.float32) * (to_weights - shared)).astype(k.dtype)
    to_q = jnp.einsum("bkqs,bkse->bkqe", to_scores, k).reshape(gradient.shape)
    to_k = jnp.einsum("bkqs,bkqe->bkse", to_scores, q)
    return to_q, to_k, jnp.einsum("bkqs,bkqe->bkse", weights, wide), None


_mix.defvjp(_mix_forward, _mix_backward)


def _dense_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    mask: Bool[Array, "B Q T"],
) -> Float[Array, "B Q H E"]:
    # The query heads of a KV head are laid side by side, so that each KV head is one matrix product.
    rows, tokens, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.reshape(rows, tokens, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * tokens, size)
    scores = jnp.einsum("bkqe,bske->bkqs", q, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(jnp.tile(mask, (1, group, 1))[:, None], scores, _MASKED)
    mixed = jnp.einsum("bkqs,bske->bkqe", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    mixed = mixed.reshape(rows, kv_heads, group, tokens, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, tokens, heads, size)


def _cudnn_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    rows: PackedRows,
) -> Float[Array, "B T H E"]:
    """Right of the diagonal and before the window cuDNN skips whole blocks; segments are a mask on the rest.

    The mask costs 2 · B · T² bytes, once for all heads. Padding to an even number of tokens (cuDNN wants one where
    there is a mask) reads itself.
    """
    tokens = q.shape[1]
    odd = tokens % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    mask = jnp.pad(_mask_of(rows), ((0, 0), (0, odd), (0, odd))) | (jnp.arange(tokens + odd) >= tokens)[None, :, None]
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask[:, None],
        is_causal=True,
        local_window_size=None if rows.window is None else (rows.window - 1, 0),
        implementation="cudnn",
    )
    return mixed[:, :tokens]
