"""Decoding: tokens a second of the engine, beside google-tunix's sampler in the same run.

    python benchmarks/decode.py [--peer tunix|none] [--batch 32] [--num-batches 4] ...

Both sides hold the same weights (checked: their logits agree) and answer the same prompts: `num_batches` x `batch`
requests. The engine takes them as a stream through `batch` slots; the peer takes a batch at a time, as it must.

  full    nothing stops: every completion has `new` tokens
  ragged  vocab/32 of the token ids stop a completion, so that each sampled token stops it with probability near 1/32
          (the random policy is nearly uniform), cut at `new` tokens

Prefill counts, compilation does not. Only useful tokens count, stop token included: what a completion holds when it is
handed out. A finished row of the peer's batch is decoded on until the longest row ends and yields nothing more; that is
the cost of batching without refill, not of this workload, and is why `ragged` is a case of its own. Which tokens are
drawn differs between the sides (other random streams), so each is divided by its own count.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tunix_peer
import tyro

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params
from magistral_jax.publish.same_process import make_publish
from magistral_jax.records import SamplingParams


@dataclasses.dataclass(frozen=True)
class Args(tunix_peer.Sizes):
    """Sizes of the comparison; the defaults are those of the documented figures."""

    batch: int = 32
    """Sequences decoded at one time, on both sides."""
    num_batches: int = 4
    """Batches' worth of requests in one timed run."""
    prompt: int = 128
    """Tokens of a prompt."""
    new: int = 128
    """Most tokens of a completion."""
    mean_length: int = 32
    """Mean completion length of the ragged case before the cut: one token in so many stops."""
    group_size: int = 1
    """Completions of a prompt. The engine prefills a prompt once for its group; 1 forgoes that."""
    repeats: int = 5
    """Timed runs of each side, taken in turn; the fastest counts."""
    page_size: int = 16
    decode_block: int = 4
    prefill_rows: int = 8


Run = Callable[[], int]  # decodes all requests and returns the useful tokens


def main(args: Args) -> None:
    """Measure and print."""
    model = args.model()
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    distinct = rng.integers(1, args.vocab, (args.batch * args.num_batches // args.group_size, args.prompt))
    prompts = np.repeat(distinct.astype(np.int32), args.group_size, axis=0)
    ragged_stops = tuple(int(i) for i in rng.permutation(args.vocab)[: args.vocab // args.mean_length])
    peer = tunix_peer.make_model(model, params) if tunix_peer.is_wanted(args) else None

    cases: dict[str, dict[str, Any]] = {}
    peak = machine.gemm_peak()
    for name, stop_ids in (("full", ()), ("ragged", ragged_stops)):
        runs: dict[str, Run] = {"ours": make_ours(args, model, params, prompts, stop_ids)}
        if peer is not None:
            runs["peer"] = make_peer(args, model, peer, prompts, stop_ids)
        tokens = {side: run() for side, run in runs.items()}
        timings = machine.time_side_by_side(runs, args.repeats)
        cases[name] = machine.compare(tokens, timings) | {
            "ours_tokens": tokens["ours"],
            "peer_tokens": tokens.get("peer"),
            "ours_share_of_gemm_peak": round(flops(args, model, tokens["ours"]) / timings["ours"].cpu / peak.cpu, 3),
        }
    title = f"decode: batch {args.batch}, {args.num_batches} batches, prompt {args.prompt}, {args.new} new tokens"
    machine.report(title, cases, {"benchmark": "decode", **machine.setting(peak), "sizes": dataclasses.asdict(args)})


def make_ours(
    args: Args, model: ModelConfig, params: dict[str, Any], prompts: np.ndarray, stop_ids: tuple[int, ...]
) -> Run:
    """The engine, fed all requests at once; request ids go on, so that each run draws anew."""
    config = GenerationConfig(
        num_slots=args.batch,
        page_size=args.page_size,
        max_prompt_tokens=args.prompt,
        max_new_tokens=args.new,
        decode_block=args.decode_block,
        prefill_rows=args.prefill_rows,
    )
    batcher = ContinuousBatcher(model, config, stop_ids, seed=0)
    batcher.set_weights(make_publish(model, jnp.dtype("float32"))(params), 0)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=args.new)

    def run() -> int:
        for index, prompt in enumerate(prompts):
            batcher.submit(GenerationRequest(index, prompt, sampling))
        before = batcher.num_sampled
        while batcher.num_running or batcher.num_waiting:
            batcher.step()
        return batcher.num_sampled - before

    return run


def make_peer(args: Args, model: ModelConfig, peer: Any, prompts: np.ndarray, stop_ids: tuple[int, ...]) -> Run:
    """The peer's sampler, a batch after the other."""
    sampler = tunix_peer.make_sampler(peer, model, cache_size=args.prompt + args.new)
    # Without stop ids Tunix would stop at its tokenizer's; an id beyond the vocabulary never comes.
    stops = stop_ids or (args.vocab,)

    def run() -> int:
        count = 0
        for index, batch in enumerate(np.split(prompts, args.num_batches)):
            completions = sampler(batch, args.new, stops, seed=index)
            count += sum(min(len(c) + 1, args.new) for c in completions)  # the stop token that Tunix cuts off
        return count

    return run


def flops(args: Args, model: ModelConfig, num_tokens: int) -> float:
    """The floor of the run's work: matrix products and attention of useful tokens and of distinct prompts."""
    heads = model.num_heads * model.head_dim
    layer = 2 * model.d_model * (heads + model.num_kv_heads * model.head_dim) + 3 * model.d_model * model.d_ff
    attention = lambda context: 4 * model.num_layers * heads * context
    num_requests = args.batch * args.num_batches
    mean_context = args.prompt + num_tokens / num_requests / 2
    decode = 2 * (model.num_layers * layer + model.d_model * model.vocab_size) + attention(mean_context)
    prefill = 2 * model.num_layers * layer + attention(args.prompt / 2)
    return num_tokens * decode + num_requests // args.group_size * args.prompt * prefill


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
