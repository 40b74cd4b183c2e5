"""Pools of problems: which of a run's prompts a stage of a curriculum draws from, and in which order.

A prompt is known by its place among all prompts of the run. A pool is a set of places; as text it is the base 64 of one
bit for each place, so that it may stand in an event log and in a checkpoint.
"""

import base64
import functools
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Bool, Float

from magistral_jax.data.loader import PromptLoader, endless_order
from magistral_jax.records import Problem

_COLUMNS = ("pass_rate", "pass_rate_2", "pass_rate_1")  # of a row, the first that it has: what curation measured last
_SPREAD = 1_000_003  # a prime: pools that are opened one after another have other orders


class PromptPools:
    """What the pools of a run are drawn from.

    Args:
      loader: All prompts, source by source.
      mixtures: Of each stage the weight and the number of each of its sources.
      seed: Of the orders.
    """

    def __init__(self, loader: PromptLoader, mixtures: Sequence[Sequence[tuple[float, int]]], seed: int) -> None:
        self.prompts = loader.prompts
        self.first_rates = np.array([known_rate(prompt.problem) for prompt in self.prompts])
        self._sources, self._mixtures, self._seed = loader.places(), mixtures, seed
        self._order = functools.lru_cache(maxsize=8)(self._make_order)

    def members(self, stage: int) -> Bool[np.ndarray, " N"]:
        """True for the prompts of a stage's sources."""
        is_member = np.zeros(len(self.prompts), bool)
        for _, source in self._mixtures[stage]:
            is_member[self._sources[source]] = True
        return is_member

    def place(self, stage: int, pool: str, *, first_group: int, group_id: int) -> int:
        """The prompt of a group, out of the pool that was opened with group `first_group`.

        The order is made of epochs of the pool, each shuffled, in the shares of the stage's mixture; a source that has
        nothing in the pool is left out. A later pool begins an order of its own.
        """
        order = self._order(stage, pool, first_group)
        return int(order[group_id - first_group])  # pyright: ignore[reportArgumentType]

    def _make_order(self, stage: int, pool: str, first_group: int) -> grain.MapDataset:
        is_in = from_text(pool, len(self.prompts))
        parts = [
            (weight, [place for place in self._sources[source] if is_in[place]])
            for weight, source in self._mixtures[stage]
        ]
        return endless_order([part for part in parts if part[1]], self._seed + _SPREAD * first_group)


def known_rate(problem: Problem) -> float:
    """Pass rate that a problem's row brings along; NaN where it brings none."""
    value = next((problem.extra[name] for name in _COLUMNS if problem.extra.get(name) is not None), None)
    return float(value) if isinstance(value, int | float) else float("nan")


def in_window(rates: Float[np.ndarray, " N"], window: tuple[float, float]) -> Bool[np.ndarray, " N"]:
    """True where a pass rate lies in the window, both ends included, or is unknown (NaN)."""
    low, high = window
    return np.isnan(rates) | ((low <= rates) & (rates <= high))


def to_text(pool: Bool[np.ndarray, " N"]) -> str:
    """A pool as text."""
    return base64.b64encode(np.packbits(pool).tobytes()).decode()


def from_text(text: str, num_prompts: int) -> Bool[np.ndarray, " N"]:
    """The pool of which `to_text` made a text."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=num_prompts).astype(bool)
