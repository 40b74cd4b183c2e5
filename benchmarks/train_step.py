"""One gradient step: tokens a second of the train step, beside google-tunix's in the same run.

    python benchmarks/train_step.py [--peer tunix|none] [--sequences 32] [--tokens 256] ...

Both sides start from the same weights (checked: their logits agree) and make one GRPO update without KL term on the
same sequences: forward, backward, AdamW, log-ratios against given behaviour log-probs, entropy for the metrics.

  full    every sequence has `tokens` tokens
  ragged  lengths uniform in `shortest` ... `tokens`; `step` holds the same figures under the name that the issue gives

We pack sequences into rows under a token budget (`train.collate`, timed apart in the JSON line: it is host work of a
few milliseconds). The peer gets what its GRPO learner makes by default: prompts padded on the left, completions on the
right, to their maximum. (It can pack too, for models that take segment ids, as its Qwen 2 does and its Llama 3 does
not; that is not measured here.) Only real tokens count, prompt included. Compilation does not count.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import machine
import numpy as np
import optax
import tunix_peer
import tyro

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.transformer import init_params
from magistral_jax.pytrees import Batch
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import LossConfig
from magistral_jax.train.step import TrainStep, grpo_objective, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Args(tunix_peer.Sizes):
    """Sizes of the comparison; the defaults are those of the documented figures."""

    sequences: int = 32
    """Sequences of a step."""
    tokens: int = 256
    """Tokens of the longest sequence, prompt included."""
    shortest: int = 32
    """Tokens of the shortest sequence of the ragged case."""
    prompt: int = 16
    """Tokens of every prompt."""
    repeats: int = 5
    """Timed steps of each side, taken in turn; the fastest counts."""
    row_tokens: int = 256
    """Tokens of a packed row."""
    rows_per_microbatch: int = 2
    remat: Literal["none", "full"] = "none"


def main(args: Args) -> None:
    """Measure and print."""
    model, policy = args.model(), PolicyConfig(remat=args.remat)
    params = init_params(model, jax.random.key(0))
    has_peer = tunix_peer.is_wanted(args)
    optimizer = optax.adamw(1e-5, b1=0.9, b2=0.95)  # the same one on both sides
    train_step = make_train_step(model, policy, grpo_objective(LossConfig()), optimizer)
    rng = np.random.default_rng(0)
    peak = machine.gemm_peak()
    cases: dict[str, dict[str, Any]] = {}
    for name, lengths in (
        ("full", np.full(args.sequences, args.tokens)),
        ("ragged", rng.integers(args.shortest, args.tokens + 1, args.sequences)),
    ):
        sequences = make_sequences(args, lengths, rng)
        start = time.perf_counter()
        batch = collate(sequences, row_tokens=args.row_tokens, rows_per_microbatch=args.rows_per_microbatch)
        collate_seconds = time.perf_counter() - start
        contestants: dict[str, Callable[[], object]] = {"ours": Ours(train_step, params, optimizer, batch)}
        if has_peer:
            contestants["peer"] = make_peer(args, tunix_peer.make_model(model, params), optimizer, sequences)
        timings = machine.time_side_by_side(contestants, args.repeats)
        count = int(lengths.sum())
        cases[name] = machine.compare(dict.fromkeys(timings, count), timings) | {
            "tokens": count,
            "collate_seconds": round(collate_seconds, 4),
            "ours_share_of_gemm_peak": round(flops(model, lengths) / timings["ours"].cpu / peak.cpu, 3),
        }
    cases["step"] = cases["ragged"]
    title = f"train step: {args.sequences} sequences of up to {args.tokens} tokens"
    machine.report(
        title, cases, {"benchmark": "train_step", **machine.setting(peak), "sizes": dataclasses.asdict(args)}
    )


def make_sequences(args: Args, lengths: np.ndarray, rng: np.random.Generator) -> list[TrainingSequence]:
    """Random tokens (never 0, the peer's pad id) with plausible behaviour log-probs."""
    tokens = lambda count: rng.integers(1, args.vocab, count).astype(np.int32)
    return [
        TrainingSequence(
            prompt_ids=tokens(args.prompt),
            completion_ids=tokens(length - args.prompt),
            behavior_logprob=np.full(length - args.prompt, -np.log(args.vocab), np.float32),
            advantage=float(rng.normal()),
            staleness=np.zeros(length - args.prompt, np.int32),
        )
        for length in lengths
    ]


class Ours:
    """Steps from our own weights; each call is one update, done when it returns."""

    def __init__(
        self, train_step: TrainStep, params: Any, optimizer: optax.GradientTransformation, batch: Batch
    ) -> None:
        self._train_step, self._batch = train_step, batch
        self._state = init_state(jax.tree.map(lambda x: x.copy(), params), optimizer)  # the step donates it

    def __call__(self) -> None:
        self._state, metrics = self._train_step(self._state, self._batch, None)
        jax.block_until_ready((self._state, metrics))


def make_peer(
    args: Args, peer: Any, optimizer: optax.GradientTransformation, sequences: Sequence[TrainingSequence]
) -> Callable[[], object]:
    """The same sequences as padded arrays."""
    shape = (len(sequences), args.tokens - args.prompt)
    completion_ids, behavior_logprob = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, sequence in enumerate(sequences):
        completion_ids[row, : len(sequence.completion_ids)] = sequence.completion_ids
        behavior_logprob[row, : len(sequence.completion_ids)] = sequence.behavior_logprob
    prompt_ids = np.stack([sequence.prompt_ids for sequence in sequences])
    advantage = np.array([sequence.advantage for sequence in sequences], np.float32)
    return tunix_peer.make_train_step(peer, optimizer, prompt_ids, completion_ids, advantage, behavior_logprob)


def flops(model: ModelConfig, lengths: np.ndarray) -> float:
    """The floor of the step's work: forward and backward of real tokens, with causal attention, nothing recomputed."""
    heads = model.num_heads * model.head_dim
    layer = 2 * model.d_model * (heads + model.num_kv_heads * model.head_dim) + 3 * model.d_model * model.d_ff
    per_token = 2 * (model.num_layers * layer + model.d_model * model.vocab_size)
    attention = 4 * model.num_layers * heads * float((lengths.astype(float) ** 2).sum()) / 2
    return 3 * (float(lengths.sum()) * per_token + attention)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
