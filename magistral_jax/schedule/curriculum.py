"""The curriculum of a run: which stage and which pool of problems come next, and what a group is asked for.

    groups that end → running pass rates → StageBegan | PoolDrawn → OpenPool → assignments of later groups

It follows the actions of the machine and answers with events, which go to the machine like those of any role, and so
into the log. A stage is over when its last batch is put together: what is dispatched from then on belongs to the next
one. What a group is asked for follows from its id and from the pools that were opened, whatever happens later.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from magistral_jax.data.config import CurriculumConfig
from magistral_jax.data.curriculum import Stage
from magistral_jax.data.pool import PromptPools, from_text, in_window, to_text
from magistral_jax.records import Graded, SamplingParams, Verdict
from magistral_jax.schedule.holdings import Assignment, Group
from magistral_jax.schedule.machine import Action, Discard, OpenPool, PoolDrawn, StageBegan, Train


@dataclasses.dataclass(frozen=True)
class Ended:
    """Completions that ended."""

    num: int = 0
    num_right: int = 0
    num_tokens: int = 0

    def __add__(self, other: "Ended") -> "Ended":
        return Ended(self.num + other.num, self.num_right + other.num_right, self.num_tokens + other.num_tokens)

    @property
    def pass_rate(self) -> float:
        """Share of the right ones; NaN of none."""
        return self.num_right / self.num if self.num else float("nan")

    @property
    def length(self) -> float:
        """Mean length in tokens; NaN of none."""
        return self.num_tokens / self.num if self.num else float("nan")


class Curriculum:
    """Follows a run through its stages.

    Args:
      stages: At least one.
      pools: What pools are drawn from.
      settings: Where to begin, and how pass rates are kept.
      sampling: How completions are drawn; the limit is each stage's own.
      tell: Told in a sentence of each stage that begins, and of a pool that would have been empty.
      known: Pools that will be opened, for a replay, whose engines run ahead of the schedule.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        pools: PromptPools,
        settings: CurriculumConfig,
        sampling: SamplingParams,
        tell: Callable[[str], None],
        known: Sequence[OpenPool] = (),
    ) -> None:
        self._stages, self._pools, self._settings, self._tell = stages, pools, settings, tell
        self._sampling = [dataclasses.replace(sampling, max_new_tokens=stage.max_length) for stage in stages]
        self._measured: dict[int, float] = {}  # running pass rates of the prompts that were graded, by place
        first = self._number(settings.begin) if settings.begin else 0
        self._now = OpenPool(0, 0, first, self._draw(first))
        self._known, self._opened = known, [self._now, *known]  # in the order of their first groups
        self._first_step = 0  # of the stage
        self._steps: list[Ended] = []  # of the stage, as far back as it looks
        self._since = Ended()  # what ended after the last of them
        self._is_called = False  # a stage is about to begin by hand

    @property
    def stage(self) -> int:
        """The present one, from 0."""
        return self._now.stage

    def describe(self) -> str:
        """The present stage and its pool in a sentence."""
        stage, size, num = self._stages[self.stage], self._pool().sum(), self._pools.members(self.stage).sum()
        return (
            f"stage {self.stage + 1} of {len(self._stages)}, `{stage.name}`: {size} of {num} problems; "
            f"{stage.free_length} tokens before the length penalty, {stage.max_length} at most; batches of "
            f"{stage.batch_size}"
        )

    def metrics(self) -> dict[str, float]:
        """Of the step whose batch came together last."""
        pool, rates = self._pool(), self._rates()
        known = rates[pool & ~np.isnan(rates)]
        return {
            "stage": float(self.stage + 1),
            "pool_size": float(pool.sum()),
            "pool_pass_rate": float(known.mean()) if len(known) else float("nan"),
            "graded_pass_rate": self._steps[-1].pass_rate if self._steps else float("nan"),
        }

    # ---- what a group is asked for ----

    def assign(self, group_id: int) -> Assignment:
        """Prompt and limits of a group, by the pool out of which it is dispatched."""
        opened, place = self._find(group_id)
        length_cache = self._stages[opened.stage].length_cache
        return Assignment(self._pools.prompts[place], self._sampling[opened.stage], length_cache)

    def _find(self, group_id: int) -> tuple[OpenPool, int]:
        """The pool of a group, and the place of its prompt."""
        opened = self._opened[self._index(group_id)]
        first = opened.first_group
        return opened, self._pools.place(opened.stage, opened.pool, first_group=first, group_id=group_id)

    def _index(self, group_id: int) -> int:
        return bisect.bisect_right(self._opened, group_id, key=lambda opened: opened.first_group) - 1

    # ---- following the run ----

    def follow(self, action: Action, look: Callable[[int], Group]) -> StageBegan | PoolDrawn | None:
        """Take note of an action before it is carried out.

        Args:
          action: Of the machine; most mean nothing here.
          look: What is held of a group.

        Returns:
          An event for the machine, which has to come before that of the batch's end; or None.
        """
        match action:
            case OpenPool():
                self._open(action)
            case Discard(group_id, "zero_variance"):
                self._count(group_id, look(group_id)[1])
            case Train(step, group_ids):
                for group_id in group_ids:
                    self._count(group_id, look(group_id)[1])
                return self._review(step)
        return None

    def call(self, name: str) -> StageBegan | None:
        """Go over to a stage by hand, at once; None where the run is in it."""
        number = self._number(name)
        if number == self.stage:
            return None
        self._is_called = True
        return StageBegan(number, self._draw(number))

    def _open(self, opened: OpenPool) -> None:
        is_new_stage, self._now = opened.stage != self.stage, opened
        if opened not in self._opened:
            self._opened.append(opened)
        if is_new_stage:
            self._first_step, self._steps, self._since = opened.first_step, [], Ended()
            self._is_called = False
            self._tell(self.describe())

    def _count(self, group_id: int, graded: Sequence[Graded]) -> None:
        """A group has ended: that tells of its problem, and of the stage, if it was dispatched in this one."""
        opened, place = self._find(group_id)
        num_right = sum(member.reward.verdict is Verdict.CORRECT for member in graded)
        newest = num_right / len(graded)
        before = self._measured.get(place, float(self._pools.first_rates[place]))
        weight = 1.0 if math.isnan(before) else self._settings.newest_weight
        self._measured[place] = newest if weight == 1 else before + weight * (newest - before)
        if opened.stage == self.stage:
            num_tokens = sum(len(member.rollout.completion_ids) for member in graded)
            self._since += Ended(len(graded), num_right, num_tokens)

    def _review(self, step: int) -> StageBegan | PoolDrawn | None:
        """What begins now that batch number `step` has come together."""
        number, stage, refresh_steps = self.stage, self._stages[self.stage], self._settings.refresh_steps
        self._steps, self._since = [*self._steps, self._since][-2 * stage.window :], Ended()
        num_steps = step + 1 - self._first_step
        if self._is_called:
            return None
        if number + 1 < len(self._stages) and is_over(stage, num_steps, self._steps):
            return StageBegan(number + 1, self._draw(number + 1))
        if refresh_steps and num_steps % refresh_steps == 0 and (pool := self._draw(number)) != self._now.pool:
            return PoolDrawn(pool)
        return None

    def _draw(self, stage: int) -> str:
        members = self._pools.members(stage)
        pool = members & in_window(self._rates(), self._stages[stage].difficulty)
        if not pool.any():
            low, high = self._stages[stage].difficulty
            self._tell(
                f"warning: no problem of stage `{self._stages[stage].name}` has a pass rate from {low:g} to {high:g}; "
                f"all {members.sum()} of its sources are taken"
            )
            pool = members
        return to_text(pool)

    def _rates(self) -> Float[np.ndarray, " N"]:
        """Running pass rate of each prompt; NaN where nothing is known."""
        rates = self._pools.first_rates.copy()
        rates[list(self._measured)] = list(self._measured.values())
        return rates

    def _pool(self) -> Bool[np.ndarray, " N"]:
        return from_text(self._now.pool, len(self._pools.prompts))

    def _number(self, name: str) -> int:
        return [stage.name for stage in self._stages].index(name)

    # ---- saving ----

    def to_saved(self, oldest_group: int) -> dict[str, Any]:
        """Plain values for a checkpoint, from which `load` goes on.

        Args:
          oldest_group: Of those whose assignments will be asked for.
        """
        opened = self._opened[self._index(oldest_group) : self._opened.index(self._now) + 1]
        return {
            "opened": [dataclasses.astuple(pool) for pool in opened],
            "measured": sorted(self._measured.items()),
            "first_step": self._first_step,
            "steps": [dataclasses.astuple(ended) for ended in self._steps],
            "since": dataclasses.astuple(self._since),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Stand where the run stood that was saved."""
        opened = [OpenPool(*fields) for fields in saved["opened"]]
        self._now = opened[-1]
        if not self._known:  # a replay has them all
            self._opened = opened
        self._measured = dict(saved["measured"])
        self._first_step = saved["first_step"]
        self._steps = [Ended(*fields) for fields in saved["steps"]]
        self._since = Ended(*saved["since"])
        self._is_called = False


def is_over(stage: Stage, num_steps: int, steps: Sequence[Ended]) -> bool:
    """Whether a stage ends by its own rule.

    Args:
      stage: Its limits.
      num_steps: Batches so far.
      steps: What ended in the last of them, each.
    """
    if stage.num_steps and num_steps >= stage.num_steps:
        return True
    if not (stage.until_pass_rate or stage.until_growth):
        return False
    last, before = steps[-stage.window :], steps[-2 * stage.window : -stage.window]
    if len(last) < stage.window or (stage.until_growth and len(before) < stage.window):
        return False
    now, then = (sum(window, Ended()) for window in (last, before))
    is_solved = not stage.until_pass_rate or now.pass_rate >= stage.until_pass_rate
    is_flat = not stage.until_growth or now.length < (1 + stage.until_growth) * then.length
    return is_solved and is_flat
