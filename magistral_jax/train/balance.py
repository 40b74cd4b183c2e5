"""Equal work for the devices that share a microbatch: which row goes to which of them.

A step waits for its slowest device in every microbatch. Rows of much the same cost are put into one microbatch, and
there dealt out, the dearest first, each to the rank with the least so far.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from magistral_jax.policy.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who shares the rows of a microbatch, and what a row costs them."""

    count: int = 1
    """Data-parallel ranks; each takes its stretch of the rows of a microbatch."""
    pair_cost: float = 0.0
    """What one token costs for each token of its sequence (attention), in units of all else that a token costs."""

    def cost(self, lengths: Sequence[int]) -> float:
        """Work of a row with sequences of these lengths, in tokens."""
        return float(sum(length * (1 + self.pair_cost * length) for length in lengths))


ONE_RANK = Ranks()


def ranks_of(model: ModelConfig, count: int) -> Ranks:
    """The ranks for a model, by the matrix products of a forward pass.

    A token multiplies with every matrix of a layer and its share of the output head, and with the keys and values of
    half of its sequence.
    """
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.d_model * (2 * heads + 2 * kv_heads + 3 * model.d_ff)
    return Ranks(count, heads / (layer + model.d_model * model.vocab_size / model.num_layers))


def deal(costs: Float[np.ndarray, " R"], rows_per_microbatch: int, num_ranks: int) -> Int[np.ndarray, " R"]:
    """Order of rows, so that row `order[i]` stands at place i of the microbatches one after the other.

    Args:
      costs: Of each row; as many as fill whole microbatches, those of empty rows 0, which thus come last.
      rows_per_microbatch: A multiple of the number of ranks.
      num_ranks: Each takes a stretch of `rows_per_microbatch / num_ranks` rows.
    """
    if num_ranks == 1:
        return np.arange(len(costs))
    by_cost = np.argsort(-costs, kind="stable")
    return np.concatenate(
        [_deal_microbatch(rows, costs, num_ranks) for rows in by_cost.reshape(-1, rows_per_microbatch)]
    )


def imbalance(costs: Float[np.ndarray, " R"], rows_per_microbatch: int, num_ranks: int) -> float:
    """Share of time that ranks wait for the slowest one, if time goes with cost: 1 − mean / max, over microbatches."""
    loads = costs.reshape(-1, num_ranks, rows_per_microbatch // num_ranks).sum(axis=2)
    return float(1 - loads.mean(axis=1).sum() / loads.max(axis=1).sum()) if loads.any() else 0.0


def _deal_microbatch(rows: Int[np.ndarray, " B"], costs: np.ndarray, num_ranks: int) -> Int[np.ndarray, " B"]:
    room = len(rows) // num_ranks
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in rows:
        open_hands = [hand for hand in hands if len(hand) < room]
        min(open_hands, key=lambda hand: costs[hand].sum()).append(int(row))
    return np.concatenate([np.asarray(hand, int) for hand in hands])
