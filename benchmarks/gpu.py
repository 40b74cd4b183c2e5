"""One accelerator: the engine and the trainer against what its memory and its matrix units can do.

    python benchmarks/gpu.py [--toy] [--sections parity decode ...] [--out gpu.json]

Unattended, less than ten minutes on one H100 (not measured yet); `--toy` runs every line on a CPU within a minute, and
its figures mean nothing. A section that fails is reported, the others run, and the exit code is then 1.

  parity   each implementation of attention, and each KV type, against the reference
  decode   tokens/s at several batch sizes and contexts, beside the bound: (weights + KV bytes) / bandwidth
  blocks   decode steps a dispatch (K), and keys that a step of the online softmax reads
  prefill  prompt tokens/s, and the share of the GEMM peak
  swap     publish of new weights, and how much longer the next block takes
  train    a gradient step on rows of 4,096 tokens: tokens/s, MFU, peak memory

Bandwidth and GEMM peak are measured in the same run. Both models are random, about 1.2 billion parameters.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import tyro
from gpu_card import CARD, TOY, Card, Row, Sizes, attempt, forward_flops, measure_card, seconds_of
from gpu_parity import parity
from rich.table import Table

from magistral_jax.generate import engine
from magistral_jax.policy.attention import choose_attention
from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.paged_attention import choose_reader
from magistral_jax.policy.pages import PageReader
from magistral_jax.policy.transformer import init_params
from magistral_jax.publish.same_process import make_publish
from magistral_jax.pytrees import Batch
from magistral_jax.train.config import LossConfig
from magistral_jax.train.step import grpo_objective, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run."""

    toy: bool = False
    """Toy sizes: does every line run?"""
    sections: tuple[str, ...] = ("parity", "decode", "blocks", "prefill", "swap", "train")
    """Sections, in this order."""
    out: pathlib.Path = pathlib.Path("gpu.json")
    """Where the figures go."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if unknown := set(args.sections) - set(SECTIONS):
        machine.console.print(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
        return 2
    sizes = TOY if args.toy else CARD
    card = measure_card(sizes)
    machine.console.print(
        f"{card.name}: copy {card.bandwidth / 1e9:,.0f} GB/s, bfloat16 GEMM {card.gemm / 1e12:,.1f} TFLOP/s"
        + (f" of {card.sheet / 1e12:,.0f} on the sheet" if card.sheet else "")
    )
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "toy": args.toy,
        "jax": jax.__version__,
        **dataclasses.asdict(card),
        "sizes": dataclasses.asdict(sizes),
        "sections": {},
        "failures": {},
    }
    for name in args.sections:
        began, rows = time.perf_counter(), []
        try:
            for row in SECTIONS[name](sizes, card):
                rows.append(row)  # what came before a failure counts
        except Exception as error:  # one section must not take the others with it
            traceback.print_exc()
            result["failures"][name] = f"{type(error).__name__}: {error}"
        failed = [f"{row['case']}: {row['error']}" for row in rows if row.get("error")]
        if failed:
            result["failures"][name] = "; ".join([*failed, *filter(None, [result["failures"].get(name)])])
        result["sections"][name] = {"seconds": round(time.perf_counter() - began, 1), "rows": rows}
        show(name, rows)
        gc.collect()
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, reason in result["failures"].items():
        machine.console.print(f"[red]{name} failed[/red]: {reason}", markup=True, highlight=False)
    print(json.dumps(result), flush=True)
    return 1 if result["failures"] else 0


# --- engine ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def random_params(model: ModelConfig) -> Any:
    """Float32 weights in the layout of training."""
    return init_params(model, jax.random.key(0))


@functools.cache
def publisher(model: ModelConfig) -> Callable[[Any], Any]:
    """From there to the engine's bfloat16."""
    return make_publish(model, jnp.dtype("bfloat16"))


class Engine:
    """A model with random weights, a pool, and slots that never stop."""

    def __init__(self, sizes: Sizes, tokens_per_step: int | None = None, num_layers: int | None = None) -> None:
        self.sizes = sizes
        self.model = dataclasses.replace(sizes.model, num_layers=num_layers or sizes.model.num_layers)
        reader = choose_reader("auto", self.model, kv_dtype="bfloat16")
        self.reader = reader if tokens_per_step is None else PageReader("xla", None, tokens_per_step)
        self.params = publisher(self.model)(random_params(self.model))
        self.state = engine.init_state(
            self.model,
            num_slots=max(rows for rows, _ in sizes.decode),
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            dtype=jnp.dtype("bfloat16"),
            reader=self.reader,
        )
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def table(self, rows: int) -> np.ndarray:
        """Pages of each row, up to the model's last position; rows share some where the pool is too small."""
        width = self.model.max_positions // self.sizes.page_size
        own = np.arange(rows)[:, None] * (self.sizes.num_pages // rows) + np.arange(width)
        return (own % self.sizes.num_pages).astype(np.int32)

    def block(self, rows: int, context: int, num_steps: int, params: Any = None) -> engine.Block:
        """A block after which the rows' contexts have that length."""
        count = self.state.slots.token.shape[0]
        stop, key = jnp.asarray([-1], jnp.int32), jax.random.key(0)
        fill = lambda value: jnp.full(count, value, jnp.int32)
        slots = dataclasses.replace(
            self.state.slots,
            position=fill(context - num_steps),
            last_position=fill(2**30),
            is_active=jnp.arange(count) < rows,
        )
        state = engine.EngineState(self.state.layers, slots)
        weights = self.params if params is None else params
        chosen, table = np.arange(rows, dtype=np.int32), self.table(rows)
        self.state, block = engine.decode_block(
            weights, self.model, state, chosen, table, stop, key, num_steps=num_steps
        )
        return block

    def decode(self, rows: int, context: int, num_steps: int) -> float:
        """Seconds of such a block."""
        return seconds_of(lambda: self.block(rows, context, num_steps), self.sizes.seconds, calls=2)

    def kv_bytes(self, rows: int, context: int) -> float:
        """Keys and values that a step must read."""
        return 2.0 * 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * rows * context


def decode(sizes: Sizes, card: Card) -> Iterator[Row]:
    """Tokens a second against the bytes that a step cannot do without."""
    own, steps = Engine(sizes), sizes.blocks[-1]
    for rows, context in sizes.decode:

        def measure(rows: int = rows, context: int = context) -> Row:
            speed = rows * steps / own.decode(rows, context, steps)
            bound = rows * card.bandwidth / (own.weight_bytes + own.kv_bytes(rows, context))
            return {"tok_per_s": round(speed), "bound_tok_per_s": round(bound), "of_bound": round(speed / bound, 3)}

        yield attempt(f"{own.reader.implementation}, {rows} rows, context {context:,}", measure)


def block_speed(own: Engine, rows: int, context: int, steps: int) -> Row:
    """Milliseconds of a step in blocks of so many."""
    return {"ms_per_step": round(1e3 * own.decode(rows, context, steps) / steps, 3)}


def blocks(sizes: Sizes, card: Card) -> Iterator[Row]:
    """Steps a dispatch, on the whole model; keys a step, on four layers of it."""
    del card
    rows, context = sizes.decode[min(1, len(sizes.decode) - 1)]
    own = Engine(sizes)
    for steps in sizes.blocks:
        measure = functools.partial(block_speed, own, rows, context, steps)
        yield attempt(f"K = {steps}, {rows} rows, context {context:,}", measure)
        del measure
    del own
    rows, context = sizes.decode[min(4, len(sizes.decode) - 1)]
    for tokens in sizes.tokens_per_step:

        def measure_reading(tokens: int = tokens) -> Row:
            few = Engine(sizes, tokens, num_layers=min(4, sizes.model.num_layers))
            return {"ms_per_step": round(1e3 * few.decode(rows, context, 4) / 4, 3)}

        yield attempt(f"{tokens} keys a step, {rows} rows, context {context:,}, 4 layers", measure_reading)


def prefill(sizes: Sizes, card: Card) -> Iterator[Row]:
    """Prompt tokens a second, first chunks."""
    own = Engine(sizes)
    for rows, tokens in sizes.prefill:

        def measure(rows: int = rows, tokens: int = tokens) -> Row:
            ids = np.ones((rows, tokens), np.int32)
            starts, lengths = np.zeros(rows, np.int32), np.full(rows, tokens, np.int32)

            def run() -> Any:
                own.state = engine.prefill(own.params, own.model, own.state, ids, starts, lengths, own.table(rows))
                return own.state.slots.token

            seconds = seconds_of(run, sizes.seconds, calls=1)
            work = forward_flops(own.model, rows, tokens, has_head=False)
            return {"tok_per_s": round(rows * tokens / seconds), "of_gemm": round(work / seconds / card.gemm, 3)}

        yield attempt(f"{rows} × {tokens:,} tokens", measure)


def swap(sizes: Sizes, card: Card) -> Iterator[Row]:
    """New weights: what a publish takes, and what it adds to a block that waits for it."""
    del card
    own, steps = Engine(sizes), sizes.blocks[-1]
    rows, context = sizes.decode[0]
    params, publish = random_params(own.model), publisher(own.model)

    def measure() -> Row:
        usual = seconds_of(lambda: own.block(rows, context, steps), sizes.seconds, calls=1)
        alone = seconds_of(lambda: publish(params), sizes.seconds, calls=1)
        swapped = seconds_of(lambda: own.block(rows, context, steps, publish(params)), sizes.seconds, calls=1)
        return {
            "publish_ms": round(1e3 * alone, 2),
            "gb_per_s": round(own.weight_bytes / alone / 1e9, 1),
            "block_ms": round(1e3 * usual, 2),
            "pause_ms": round(1e3 * (swapped - usual), 2),
        }

    yield attempt(f"{own.weight_bytes / 1e9:.2f} GB, same device", measure)


# --- trainer ---------------------------------------------------------------------------------------------------------


def train(sizes: Sizes, card: Card) -> Iterator[Row]:
    """A gradient step of AdamW on two microbatches of one row, for each attention and remat policy."""
    platform_kernel = choose_attention("auto", sizes.model, dtype="bfloat16", platform=card.platform)
    for attention in dict.fromkeys((platform_kernel, "blocked")):
        for remat in sizes.remats:
            policy = PolicyConfig(dtype="bfloat16", remat=remat, attention=attention, logprob_chunk=1024)
            yield attempt(f"{attention}, remat {remat}", functools.partial(train_step, sizes, card, policy))
            gc.collect()


def train_step(sizes: Sizes, card: Card, policy: PolicyConfig) -> Row:
    """Tokens a second, MFU and memory of one setting."""
    model, shape = sizes.model, (2, 1, sizes.row_tokens)
    optimizer = optax.adamw(1e-5, b1=0.9, b2=0.95)
    step = make_train_step(model, policy, grpo_objective(LossConfig()), optimizer)
    rng, full = np.random.default_rng(0), functools.partial(jnp.full, shape)
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, model.vocab_size, shape), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(shape[2], dtype=jnp.int32), shape),
        segment_ids=full(1, jnp.int32),
        loss_mask=jnp.broadcast_to(jnp.arange(shape[2]) > 0, shape),
        behavior_logprob=full(-np.log(model.vocab_size), jnp.float32),
        advantage=jnp.asarray(rng.normal(size=shape), jnp.float32),
        loss_weight=jnp.broadcast_to((jnp.arange(shape[2]) > 0).astype(jnp.float32), shape),
        staleness=full(0, jnp.int32),
    )
    states = [init_state(random_params(model), optimizer)]

    def run() -> Any:
        states[0], metrics = step(states[0], batch, None)
        return metrics

    seconds, tokens = seconds_of(run, sizes.seconds, calls=1), 2 * sizes.row_tokens
    work = 3 * forward_flops(model, 2, sizes.row_tokens)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "tok_per_s": round(tokens / seconds),
        "mfu_of_gemm": round(work / seconds / card.gemm, 3),
        "mfu_of_sheet": round(work / seconds / card.sheet, 3) if card.sheet else None,
        "peak_gib_so_far": round(memory["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in memory else None,
    }


SECTIONS: dict[str, Callable[[Sizes, Card], Iterator[Row]]] = {
    "parity": parity,
    "decode": decode,
    "blocks": blocks,
    "prefill": prefill,
    "swap": swap,
    "train": train,
}


def show(name: str, rows: list[Row]) -> None:
    """The table of a section."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in map(row.get, columns)))
    machine.console.print(table)


if __name__ == "__main__":
    sys.exit(main())
