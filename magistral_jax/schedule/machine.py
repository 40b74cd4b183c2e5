"""The asynchronous schedule as a pure state machine: `step(state, event) -> (state, actions)`.

It knows prompts, versions and rewards as numbers, and nothing of arrays, threads or clocks: the live driver, a replay
and a simulation run the same code. A group's id is its place in the endless order of prompts, and its completions are
requests `id · G … id · G + G − 1`, so that no request is ever ambiguous.

Every dispatched sequence ends in exactly one counter: trained, filtered (zero variance), or dropped with a reason.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from magistral_jax.schedule.config import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Rules:
    """What stays the same over a run."""

    group_size: int
    batch_size: int
    num_steps: int
    num_async: int
    max_ready: int
    max_staleness: int
    checkpoint_every: int
    filter_zero_variance: bool

    @classmethod
    def of(cls, config: ScheduleConfig, *, group_size: int, batch_size: int, filter_zero_variance: bool) -> "Rules":
        """Rules from configuration."""
        return cls(
            group_size=group_size,
            batch_size=batch_size,
            num_steps=config.num_steps,
            num_async=config.num_async,
            max_ready=int(config.ready_batches * batch_size),
            max_staleness=config.max_staleness,
            checkpoint_every=config.checkpoint_every,
            filter_zero_variance=filter_zero_variance,
        )


@dataclasses.dataclass(frozen=True)
class Pending:
    """A group on its way: the version at its dispatch, which members ended, and the rewards so far, by member."""

    version: int
    rewards: Mapping[int, float]
    ended: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that decides what happens next."""

    next_group: int = 0
    again: tuple[int, ...] = ()  # groups dispatched before a stop, to be dispatched again
    pending: Mapping[int, Pending] = dataclasses.field(default_factory=dict)
    ready: Mapping[int, int] = dataclasses.field(default_factory=dict)  # complete groups and their versions
    training: tuple[int, ...] = ()  # groups of the batch in the trainer
    num_done: int = 0  # batches trained, and so the version of the trainer's weights
    is_stopping: bool = False
    is_finished: bool = False
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # sequences by how they ended

    def outstanding(self) -> tuple[int, ...]:
        """Groups dispatched and not yet ended, oldest first."""
        return tuple(sorted({*self.again, *self.pending, *self.ready, *self.training}))


# ---- events: what happened ----


@dataclasses.dataclass(frozen=True)
class Started:
    """The generator holds weights; sampling may begin."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """A completion ended."""

    request_id: int


@dataclasses.dataclass(frozen=True)
class Verified:
    """A completion was graded; `reward` None means that the verifier itself failed, retries included."""

    request_id: int
    reward: float | None


@dataclasses.dataclass(frozen=True)
class Trained:
    """The batch in the trainer is done."""


@dataclasses.dataclass(frozen=True)
class StopRequested:
    """The user, or a failed role, asks for an orderly end."""


Event = Started | Generated | Verified | Trained | StopRequested

# ---- actions: what is to be done ----


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Sample a group."""

    group_id: int


@dataclasses.dataclass(frozen=True)
class Verify:
    """Grade a completion."""

    request_id: int


@dataclasses.dataclass(frozen=True)
class Discard:
    """Forget a group's data; it ended as `reason`."""

    group_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Train:
    """Update on these groups."""

    step: int
    group_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Publish:
    """Send the trainer's weights to the generators."""

    version: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Save the run as it stands after `step` batches."""

    step: int


@dataclasses.dataclass(frozen=True)
class Finish:
    """The loop is over."""


Action = Dispatch | Verify | Discard | Train | Publish | Checkpoint | Finish


def step(rules: Rules, state: State, event: Event) -> tuple[State, list[Action]]:
    """What an event changes, and what is to be done about it.

    Raises:
      ValueError: The event speaks of something that is not on its way: a result lost its owner or came twice.
    """
    if state.is_finished:
        return state, []
    match event:
        case Started():
            actions: list[Action] = []
        case Generated(request_id):
            state, actions = _end_completion(rules, state, request_id)
        case Verified(request_id, reward):
            state, actions = _grade(rules, state, request_id, reward)
        case Trained():
            state, actions = _finish_batch(rules, state)
        case StopRequested():
            state, actions = dataclasses.replace(state, is_stopping=True), []
    for advance in (_end, _train, _dispatch):
        state, more = advance(rules, state)
        actions += more
    return state, actions


def is_at_bound(rules: Rules, state: State) -> bool:
    """Whether admission, and nothing else, keeps the generator from more work."""
    is_crowded = _num_in_flight(rules, state) + rules.group_size > rules.num_async
    return is_crowded or _is_full(rules, state) or _is_too_far_ahead(rules, state)


def to_saved(state: State) -> dict[str, Any]:
    """Plain values to save: what is on its way is dispatched again later, whole groups, so none is lost or favoured."""
    return {
        "next_group": state.next_group,
        "again": list(state.outstanding()),
        "num_done": state.num_done,
        "counts": dict(state.counts),
    }


def from_saved(saved: Mapping[str, Any]) -> State:
    """The state in which a saved run goes on."""
    return State(
        next_group=saved["next_group"],
        again=tuple(saved["again"]),
        num_done=saved["num_done"],
        counts=dict(saved["counts"]),
    )


def _member(rules: Rules, state: State, request_id: int) -> tuple[int, int]:
    group_id, member = divmod(request_id, rules.group_size)
    if group_id not in state.pending or member in state.pending[group_id].rewards:
        raise ValueError(f"request {request_id} of group {group_id} is not on its way")
    return group_id, member


def _end_completion(rules: Rules, state: State, request_id: int) -> tuple[State, list[Action]]:
    group_id, member = _member(rules, state, request_id)
    group = state.pending[group_id]
    if member in group.ended:
        raise ValueError(f"request {request_id} of group {group_id} ended twice")
    group = dataclasses.replace(group, ended=group.ended | {member})
    return dataclasses.replace(state, pending={**state.pending, group_id: group}), [Verify(request_id)]


def _grade(rules: Rules, state: State, request_id: int, reward: float | None) -> tuple[State, list[Action]]:
    group_id, member = _member(rules, state, request_id)
    group = state.pending[group_id]
    # A missing reward stands as NaN until the group is complete, and then ends the group; it is never a number.
    rewards = {**group.rewards, member: float("nan") if reward is None else reward}
    if len(rewards) < rules.group_size:
        pending = {**state.pending, group_id: dataclasses.replace(group, rewards=rewards)}
        return dataclasses.replace(state, pending=pending), []
    rest = {g: p for g, p in state.pending.items() if g != group_id}
    state = dataclasses.replace(state, pending=rest)
    values = rewards.values()
    if any(math.isnan(value) for value in values):
        return _count(rules, state, "verifier_failed"), [Discard(group_id, "verifier_failed")]
    if rules.filter_zero_variance and max(values) - min(values) < 1e-6:
        return _count(rules, state, "zero_variance"), [Discard(group_id, "zero_variance")]
    return dataclasses.replace(state, ready={**state.ready, group_id: group.version}), []


def _finish_batch(rules: Rules, state: State) -> tuple[State, list[Action]]:
    if not state.training:
        raise ValueError("a batch was reported as trained, but none was in the trainer")
    state = _count(rules, state, "trained", len(state.training))
    state = dataclasses.replace(state, training=(), num_done=state.num_done + 1)
    actions: list[Action] = [Publish(state.num_done)]
    is_last = state.is_stopping or state.num_done >= rules.num_steps  # then the end saves
    if rules.checkpoint_every and state.num_done % rules.checkpoint_every == 0 and not is_last:
        actions.append(Checkpoint(state.num_done))
    return state, actions


def _end(rules: Rules, state: State) -> tuple[State, list[Action]]:
    is_over = state.is_stopping or state.num_done >= rules.num_steps
    if not is_over or state.training:
        return state, []
    # What is on its way stays in the saved state: a resumed or a longer run dispatches it again.
    return dataclasses.replace(state, is_finished=True), [Checkpoint(state.num_done), Finish()]


def _train(rules: Rules, state: State) -> tuple[State, list[Action]]:
    num_groups = rules.batch_size // rules.group_size
    if state.is_finished or state.training or len(state.ready) < num_groups:
        return state, []
    batch = tuple(sorted(state.ready)[:num_groups])
    rest = {group_id: version for group_id, version in state.ready.items() if group_id not in batch}
    # Staleness is bounded by waiting for the slowest, not by throwing it away: no bias towards short completions.
    left = sorted([*rest.items(), *((group_id, group.version) for group_id, group in state.pending.items())])
    for place, (_, version) in enumerate(left):
        if state.num_done + 1 + place // num_groups - version > rules.max_staleness:
            return state, []  # it would be too stale when its turn comes, oldest first
    return dataclasses.replace(state, ready=rest, training=batch), [Train(state.num_done, batch)]


def _dispatch(rules: Rules, state: State) -> tuple[State, list[Action]]:
    actions: list[Action] = []
    while not state.is_finished and not state.is_stopping and not is_at_bound(rules, state):
        again = state.again
        group_id = again[0] if again else state.next_group
        pending = {**state.pending, group_id: Pending(state.num_done, {})}
        state = dataclasses.replace(
            state,
            again=again[1:],
            pending=pending,
            next_group=state.next_group if again else state.next_group + 1,
            counts=state.counts if again else _plus(state.counts, "dispatched", rules.group_size),
        )
        actions.append(Dispatch(group_id))
    return state, actions


def _num_in_flight(rules: Rules, state: State) -> int:
    return sum(rules.group_size - len(group.rewards) for group in state.pending.values())


def _is_full(rules: Rules, state: State) -> bool:
    return len(state.ready) * rules.group_size >= rules.max_ready


def _is_too_far_ahead(rules: Rules, state: State) -> bool:
    # A group dispatched now has its turn when all those before it are trained: that must not be too late.
    num_before = len(state.pending) + len(state.ready)
    return bool(state.training) + num_before * rules.group_size // rules.batch_size > rules.max_staleness


def _count(rules: Rules, state: State, how: str, num_groups: int = 1) -> State:
    return dataclasses.replace(state, counts=_plus(state.counts, how, num_groups * rules.group_size))


def _plus(counts: Mapping[str, int], name: str, amount: int) -> dict[str, int]:
    return {**counts, name: counts.get(name, 0) + amount}
