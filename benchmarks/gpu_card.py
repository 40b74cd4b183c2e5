"""What the sections of `gpu.py` share: sizes, what the card can do, timing, and rows that hold their own failure."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from magistral_jax.policy.config import ModelConfig
from magistral_jax.records import MagistralError

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s on the data sheet of the SXM card."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: ModelConfig
    page_size: int
    num_pages: int
    decode: tuple[tuple[int, int], ...]
    """(rows, tokens of context)"""
    blocks: tuple[int, ...]
    tokens_per_step: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]
    """(rows, tokens)"""
    row_tokens: int
    remats: tuple[Any, ...]
    gemm: int
    copy_bytes: int
    seconds: float
    """Least time that a figure is measured over."""


CARD = Sizes(
    model=ModelConfig(
        vocab_size=131072,
        d_model=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        d_ff=8192,
        max_positions=40960,
        tie_embeddings=True,
    ),
    page_size=32,
    num_pages=16384,
    decode=((8, 1024), (64, 1024), (256, 1024), (8, 8192), (64, 8192), (8, 32768)),
    blocks=(1, 4, 8, 16),
    tokens_per_step=(256, 1024, 4096),
    prefill=((1, 2048), (8, 512)),
    row_tokens=4096,
    remats=("full", "outputs"),
    gemm=8192,
    copy_bytes=2**30,
    seconds=1.0,
)
TOY = Sizes(
    model=ModelConfig(
        vocab_size=96,
        d_model=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=48,
        max_positions=256,
        tie_embeddings=True,
    ),
    page_size=8,
    num_pages=32,
    decode=((2, 64),),
    blocks=(1, 2),
    tokens_per_step=(16,),
    prefill=((1, 32),),
    row_tokens=64,
    remats=("full",),
    gemm=128,
    copy_bytes=2**20,
    seconds=0.0,
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What the machine can do."""

    name: str
    platform: str
    bandwidth: float
    """Bytes a second, read and written, of a copy."""
    gemm: float
    """FLOP a second of a large bfloat16 matrix product."""
    sheet: float | None
    """The same on the data sheet."""


def measure_card(sizes: Sizes) -> Card:
    """Bandwidth of a copy and FLOP/s of a matrix product, as they are on this machine now."""
    device = jax.devices()[0]
    source = jnp.zeros(sizes.copy_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    square = jnp.ones((sizes.gemm, sizes.gemm), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    sheet = next((peak for name, peak in PEAKS.items() if name in device.device_kind), None)
    return Card(
        name=device.device_kind,
        platform=device.platform,
        bandwidth=2 * sizes.copy_bytes / seconds_of(lambda: copy(source), sizes.seconds),
        gemm=2 * sizes.gemm**3 / seconds_of(lambda: product(square), sizes.seconds),
        sheet=sheet,
    )


def seconds_of(run: Callable[[], Any], at_least: float, calls: int = 4) -> float:
    """Seconds of one call: the least of several rounds of a few calls each, once it is compiled."""
    jax.block_until_ready(run())
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < at_least:
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def bounded(value: float, bound: float) -> Row:
    """A gap, and an error where it is beyond the bound (or no number)."""
    row: Row = {"gap": float(f"{value:.2g}"), "bound": bound}
    return row if value <= bound else row | {"error": f"the gap is {value:.2g}, more than {bound}"}


def attempt(case: str, run: Callable[[], Row]) -> Row:
    """One row; what goes wrong is in it."""
    try:
        return {"case": case} | run()
    except (MagistralError, RuntimeError, ValueError, TypeError) as error:
        return {"case": case, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def forward_flops(model: ModelConfig, rows: int, tokens: int, *, has_head: bool = True) -> float:
    """Matrix products and causal attention of a forward pass, nothing counted twice."""
    heads = model.num_heads * model.head_dim
    layer = 2 * model.d_model * (heads + model.num_kv_heads * model.head_dim) + 3 * model.d_model * model.d_ff
    head = model.d_model * model.vocab_size if has_head else 0
    return rows * tokens * (2.0 * (model.num_layers * layer + head) + 2.0 * model.num_layers * heads * tokens)
