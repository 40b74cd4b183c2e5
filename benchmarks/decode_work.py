"""What the decoding benchmark asks of each side, and the least time in which a machine could do it.

Imports NumPy alone: a side's environment need not have jax.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from magistral_jax.policy.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Requests, all at once. A completion ends at its limit, or before with one of the stop ids."""

    prompts: np.ndarray  # [N, T]; equal rows stand side by side
    limits: np.ndarray  # [N]
    stop_ids: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest completion that is allowed."""
        return int(self.limits.max())

    def lengths(self, completions: list[np.ndarray]) -> list[int]:
        """Useful tokens of each completion: up to its limit or its first stop token, which counts."""
        counts = []
        for tokens, limit in zip(completions, self.limits.tolist(), strict=True):
            stops = np.flatnonzero(np.isin(tokens[:limit], self.stop_ids))
            counts.append(int(stops[0]) + 1 if len(stops) else min(len(tokens), limit))
        return counts

    def save(self, path: pathlib.Path) -> None:
        """Write for `load`."""
        np.savez(path, prompts=self.prompts, limits=self.limits, stop_ids=np.asarray(self.stop_ids, np.int32))


def load(path: pathlib.Path) -> Work:
    """What `Work.save` has written."""
    with np.load(path) as data:
        return Work(data["prompts"], data["limits"], tuple(data["stop_ids"].tolist()))


def read_model(folder: pathlib.Path) -> "ModelConfig":
    """Shape of the model that all sides load."""
    from magistral_jax.policy.config import ModelConfig

    return ModelConfig(**json.loads((folder / "magistral_model.json").read_text(encoding="utf-8")))


_PROBE = "probe.npz"
_LARGEST_GAP = 1e-3  # between logits of two float32 implementations; those of a random policy are of order 1


def save_probe(folder: pathlib.Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Leave tokens [B, T] and what the model in `folder` makes of them [B, T, V] for `check_probe`."""
    np.savez(folder / _PROBE, tokens=tokens, logits=logits)


def check_probe(folder: pathlib.Path, side: str, compute: Callable[[np.ndarray], np.ndarray]) -> None:
    """Compare a side's logits with ours: both must hold the same network, or the comparison is void.

    Raises:
      ValueError: They differ.
    """
    with np.load(folder / _PROBE) as probe:
        gap = float(np.abs(compute(probe["tokens"]) - probe["logits"]).max())
    if not gap <= _LARGEST_GAP:
        raise ValueError(f"the logits of {side} differ from ours by {gap:.2g}: these are two different models")


def long_tail(rng: np.random.Generator, num: int, mean: int, cap: int) -> np.ndarray:
    """Log-normal lengths with standard deviation 1 of the logarithm, mean `mean` before the cut at `cap`."""
    lengths = rng.lognormal(np.log(mean) - 0.5, 1.0, num)
    return np.clip(np.rint(lengths), 1, cap).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least that the useful tokens need with `slots` sequences at a time."""

    prefill_flop: float
    decode_flop: float
    decode_bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Matrix products at their peak; decoding no faster than its weights and KV cache are read."""
        return self.prefill_flop / peak + max(self.decode_flop / peak, self.decode_bytes / bandwidth)


def floor(model: "ModelConfig", work: Work, lengths: list[int], slots: int) -> Floor:
    """Products and bytes (float32): each step reads the weights, each token its context, each distinct prompt once.

    Reading a prompt ends with the keys and values of the last layer, and leaves the last token to the first step.
    """
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = 2 * model.d_model * (heads + kv_heads) + 3 * model.d_model * model.d_ff
    dense = model.num_layers * layer + model.d_model * model.vocab_size
    read = (model.num_layers - 1) * layer + 2 * model.d_model * kv_heads
    prompt, done = work.prompts.shape[1], np.asarray(lengths, np.float64)
    contexts = float((done * prompt + done * done / 2).sum())  # tokens read, over all decode steps
    num_prompts = len(np.unique(work.prompts, axis=0))
    num_steps = max(done.max(), -(-done.sum() // slots))
    attention = 4 * heads  # of one layer, for each token of context
    return Floor(
        prefill_flop=num_prompts * (prompt - 1) * (2 * read + (model.num_layers - 1) * attention * prompt / 2),
        decode_flop=2 * dense * float(done.sum()) + model.num_layers * attention * contexts,
        decode_bytes=4 * (dense * float(num_steps) + 2 * model.num_layers * kv_heads * contexts),
    )
