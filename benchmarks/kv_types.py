"""What rounding the KV cache costs: gaps of log-probs, and bytes, for each type of `generation.kv_dtype`.

    python benchmarks/kv_types.py [--model FOLDER] [--tokens 512] [--rows 4] [--compute float32|bfloat16]

Given tokens are read through pages of each type, in chunks as prefill does, and their log-probs compared with those of
float32 pages under the same weights and the same precision of computation. Without a folder the model is random, whose
attention is flatter than a trained one's and whose gaps are therefore smaller: use a real one to decide.
"""

import dataclasses
import json
import pathlib
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tyro
from rich.table import Table

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.engine import init_state
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_config import read_model_config
from magistral_jax.policy.hf_folder import load_params
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.pages import PagedCache
from magistral_jax.policy.transformer import forward, init_params, unstack

_PAGE = 16


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes; the defaults take seconds on a CPU."""

    model: str = ""
    """Model folder; empty is a random model of 4 layers and width 256."""
    tokens: int = 512
    """Tokens of a row."""
    rows: int = 4
    """Rows of random tokens."""
    chunk: int = 128
    """Tokens read at a time; divides `tokens`."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of everything but the pages."""


def main(args: Args) -> None:
    """Measure and print."""
    model, params = load(args)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (args.rows, args.tokens)).astype(np.int32)
    types = typing.get_args(typing.get_type_hints(GenerationConfig)["kv_dtype"])
    logprob = {name: score(args, model, params, ids, name) for name in types}
    cases: dict[str, dict[str, Any]] = {}
    for name in types:
        gap = np.abs(logprob[name] - logprob["float32"])
        figures = {"mean": gap.mean(), "99 %": np.quantile(gap, 0.99), "largest": gap.max()}
        bits = 8 * jnp.dtype(name).itemsize
        scale = 32 / model.head_dim if bits == 8 else 0
        cases[name] = {key: float(f"{value:.3g}") for key, value in figures.items()} | {
            "KV bytes a token": round(2 * model.num_layers * model.num_kv_heads * model.head_dim * (bits + scale) / 8)
        }
    columns = list(cases["float32"])
    table = Table("kv_dtype", *columns, title="|Δ log-prob| in nats against float32 pages")
    for name, case in cases.items():
        table.add_row(name, *(f"{case[column]:,}" for column in columns))
    machine.console.print(table)
    print(json.dumps({"benchmark": "kv_types", "args": dataclasses.asdict(args), **cases}), flush=True)


def load(args: Args) -> tuple[ModelConfig, Any]:
    """The model in the layout of decoding."""
    if args.model:
        folder = pathlib.Path(args.model)
        model = read_model_config(folder)
        params = jax.tree.map(jnp.asarray, load_params(folder, model))
    else:
        model = ModelConfig(
            vocab_size=4096, d_model=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, d_ff=768
        )
        params = init_params(model, jax.random.key(0))
    cast = lambda leaf: leaf.astype(jnp.dtype(args.compute))
    return model, jax.tree.map(cast, unstack(params, model))


def score(args: Args, model: ModelConfig, params: Any, ids: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Log-probs of the tokens after the first of each chunk's, read through pages of a type."""
    width = -(-args.tokens // _PAGE)
    layers = init_state(
        model,
        num_slots=1,
        num_pages=args.rows * width,
        page_size=_PAGE,
        dtype=jnp.dtype(kv_dtype),
    ).layers
    table = jnp.arange(args.rows * width, dtype=jnp.int32).reshape(args.rows, width)

    @jax.jit
    def read(params: Any, cache: PagedCache, tokens: Any, start: Any) -> Any:
        positions = jnp.broadcast_to(start + jnp.arange(args.chunk, dtype=jnp.int32), tokens.shape)
        hidden, cache_after = forward(
            params, model, tokens, positions, jnp.ones_like(tokens), cache, dtype=jnp.dtype(args.compute)
        )
        return token_logprob(params, model, hidden, tokens)[0][:, 1:], cache_after

    cache, scores = PagedCache(layers, table), []
    for start in range(0, args.tokens, args.chunk):
        part, cache = read(params, cache, jnp.asarray(ids[:, start : start + args.chunk]), jnp.int32(start))
        scores.append(np.asarray(part, np.float32))
    return np.concatenate(scores, axis=1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
