"""Attention to KV pages on a CPU: our kernel beside XLA's formulation, for a decode step and for reading prompts.

    python benchmarks/cpu_attention.py

Both take turns in one process and read the same shuffled pages, float32; the least of the rounds counts.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tyro

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.paged_attention import choose_reader, paged_attention
from magistral_jax.policy.pages import LayerPages, PageReader

_CALLS = 10  # of a round, one after the other


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes; the defaults are those of docs/kernels.md."""

    rows: int = 32
    context: int = 192
    layers: int = 4
    """A decode step: so many rows, tokens that each reads, and layers."""
    prompts: int = 4
    prompt: int = 128
    prompt_layers: int = 3
    """Prompts of one dispatch, their tokens, and layers: the last one's attention is not needed for a prompt."""
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    page_size: int = 16
    repeats: int = 20


@functools.partial(jax.jit, static_argnames="reader")
def attend(q: jax.Array, pools: Any, table: Any, positions: Any, is_live: Any, reader: PageReader) -> jax.Array:
    """All layers, one after the other."""
    for keys, values in pools:
        q = q + paged_attention(q, LayerPages(keys, values, reader=reader), table, positions, is_live, None)
    return q


def measure(args: Args, rows: int, tokens: int, context: int, layers: int) -> dict[str, float]:
    """Milliseconds of a call on each side; the last `tokens` of each row's context ask."""
    rng, width = np.random.default_rng(0), -(-context // args.page_size)
    shape = (rows * width, args.kv_heads, args.page_size, args.head_dim)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    pools = [(draw(shape), draw(shape)) for _ in range(layers)]
    table = jnp.asarray(rng.permutation(rows * width).reshape(rows, width), jnp.int32)
    positions = jnp.tile(jnp.arange(context - tokens, context, dtype=jnp.int32)[None], (rows, 1))
    q, is_live = draw((rows, tokens, args.heads, args.head_dim)), jnp.ones((rows, tokens), bool)
    model = ModelConfig(8, 8, 1, args.heads, args.kv_heads, args.head_dim, 8)
    run = lambda reader: jax.block_until_ready(
        [attend(q, pools, table, positions, is_live, reader=reader) for _ in range(_CALLS)]
    )
    sides = {name: choose_reader(name, model, kv_dtype="float32") for name in ("xla", "native")}
    contestants = {name: functools.partial(run, reader) for name, reader in sides.items()}
    times = machine.time_side_by_side(contestants, args.repeats)
    found = {f"{name}_ms": time.wall / _CALLS * 1e3 for name, time in times.items()}
    found |= {f"{name}_cpu_ms": time.cpu / _CALLS * 1e3 for name, time in times.items()}
    return {name: round(value, 2) for name, value in found.items()} | {
        "ratio": round(times["xla"].wall / times["native"].wall, 2)
    }


def main(args: Args) -> None:
    """Measure and print."""
    decode = measure(args, args.rows, 1, args.context, args.layers)
    prompts = measure(args, args.prompts, args.prompt, args.prompt, args.prompt_layers)
    setting = machine.setting(machine.gemm_peak())
    result = {"benchmark": "cpu_attention", **setting, "sizes": dataclasses.asdict(args)}
    print(json.dumps(result | {"decode": decode, "prompts": prompts}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
