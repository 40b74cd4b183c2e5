"""From rollouts to one packed minibatch: greedy collation under a token budget (report §3).

Host arrays in, one `Batch` out. Sequences go, longest first, into the first row with room, or open a new row; rows
fill microbatches. The loss does not depend on the outcome, only the padding does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from magistral_jax.pytrees import Batch
from magistral_jax.records import MagistralError
from magistral_jax.train.balance import ONE_RANK, Ranks, deal


@dataclasses.dataclass(frozen=True)
class TrainingSequence:
    """A prompt with its completion and what the loss needs to know of it."""

    prompt_ids: Int32[np.ndarray, " T"]
    completion_ids: Int32[np.ndarray, " N"]
    behavior_logprob: Float32[np.ndarray, " N"]
    advantage: float
    staleness: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each row: longest first, each into the first row with room.

    Raises:
      MagistralError: A sequence is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_tokens:
            raise MagistralError(f"A sequence has {length} tokens, but batch.row_tokens allows {row_tokens}.")
        row = next((r for r, left in enumerate(room) if left >= length), None)
        if row is None:
            rows.append([])
            room.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= length
    return rows


def collate(
    sequences: Sequence[TrainingSequence],
    *,
    row_tokens: int,
    rows_per_microbatch: int,
    normalization: Literal["token", "sequence"] = "token",
    ranks: Ranks = ONE_RANK,
) -> Batch:
    """Pack a minibatch.

    Args:
      sequences: All sequences of one gradient step.
      row_tokens: T, tokens of a row.
      rows_per_microbatch: B; the number of microbatches M is rounded up to a power of two with empty ones, which the
        train step never computes, so that few shapes are ever compiled.
      normalization: "token" weighs every completion token alike; "sequence" gives every completion the same total.
      ranks: Who shares the rows of a microbatch; rows are dealt to them for equal work.

    Raises:
      MagistralError: A sequence is longer than a row.
      ValueError: A sequence has no prompt (nothing would predict its first token) or no completion.

    Source: Magistral (arXiv:2506.10910), §3, greedy collation; §2.1, loss normalisation.
    """
    if not all(len(s.prompt_ids) and len(s.completion_ids) for s in sequences):
        raise ValueError("every sequence needs at least one prompt token and one completion token")
    rows = pack([len(s) for s in sequences], row_tokens)
    needed = -(-len(rows) // rows_per_microbatch)
    num_microbatches = 1 << max(needed - 1, 0).bit_length()
    rows += [[] for _ in range(num_microbatches * rows_per_microbatch - len(rows))]
    costs = np.array([ranks.cost([len(sequences[i]) for i in row]) for row in rows])
    order = deal(costs, rows_per_microbatch, ranks.count)
    shape = (num_microbatches * rows_per_microbatch, row_tokens)
    integers = {n: np.zeros(shape, np.int32) for n in ("tokens", "positions", "segment_ids", "staleness")}
    floats = {n: np.zeros(shape, np.float32) for n in ("behavior_logprob", "advantage", "loss_weight")}
    loss_mask = np.zeros(shape, bool)
    for row, source in enumerate(order):
        start = 0
        for segment, index in enumerate(rows[source], start=1):
            s = sequences[index]
            middle, end = start + len(s.prompt_ids), start + len(s)
            integers["tokens"][row, start:end] = np.concatenate([s.prompt_ids, s.completion_ids])
            integers["positions"][row, start:end] = np.arange(len(s))
            integers["segment_ids"][row, start:end] = segment
            integers["staleness"][row, middle:end] = s.staleness
            floats["behavior_logprob"][row, middle:end] = s.behavior_logprob
            floats["advantage"][row, middle:end] = s.advantage
            floats["loss_weight"][row, middle:end] = 1.0 if normalization == "token" else 1 / len(s.completion_ids)
            loss_mask[row, middle:end] = True
            start = end
    fold = lambda x: jnp.asarray(x.reshape(num_microbatches, rows_per_microbatch, row_tokens))
    return Batch(loss_mask=fold(loss_mask), **{n: fold(x) for n, x in (integers | floats).items()})
