"""What the schedule decides from: the rules of a run, the state between two events, and both forms that are saved."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from immutables import Map

from magistral_jax.schedule.config import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Rules:
    """What stays the same over a run, or over each stage of it."""

    group_size: int
    batch_size: int
    num_steps: int
    num_async: int
    max_ready: int
    max_staleness: int
    checkpoint_every: int
    filter_zero_variance: bool
    stages: tuple["Rules", ...] = ()  # those of each stage of a curriculum, in the place of these

    def at(self, stage: int) -> "Rules":
        """The rules of a stage."""
        return self.stages[stage] if self.stages else self

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
    """A group on its way: the version at its dispatch, which members ended, and the rewards so far, by member.

    A reward of None is that of a verifier which failed: it stands until the group is complete, and then ends the group.
    """

    version: int
    rewards: Mapping[int, float | None]
    ended: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that decides what happens next.

    The groups of `again[num_again:]`, `pending`, `ready` and `training` are those dispatched and not yet ended. Groups
    are dispatched in the order of their ids, so an older group never has a newer version.
    """

    next_group: int = 0
    again: tuple[int, ...] = ()  # groups dispatched before a stop, to be dispatched again, oldest first
    num_again: int = 0  # how many of them have been
    pending: Map[int, Pending] = dataclasses.field(default_factory=Map)
    ready: Map[int, int] = dataclasses.field(default_factory=Map)  # complete groups and their versions
    training: tuple[int, ...] = ()  # groups of the batch in the trainer
    num_done: int = 0  # batches trained, and so the version of the trainer's weights
    num_in_flight: int = 0  # sequences dispatched and not yet graded
    num_by_version: Mapping[int, int] = dataclasses.field(default_factory=dict)  # groups pending or ready
    num_ready_by_version: Mapping[int, int] = dataclasses.field(default_factory=dict)
    stage: int = 0  # of the curriculum
    generators: frozenset[int] | None = None  # those that live; None where nobody counts them
    is_stopping: bool = False
    is_finished: bool = False
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # sequences by how they ended

    def outstanding(self) -> tuple[int, ...]:
        """Groups dispatched and not yet ended, oldest first."""
        return tuple(sorted({*self.again[self.num_again :], *self.pending, *self.ready, *self.training}))

    def oldest_group(self) -> int:
        """The first group that may still be spoken of."""
        return min(self.outstanding(), default=self.next_group)

    def oldest_after(self, group_id: int) -> int:
        """Version for a group that others have overtaken: as an older one, it must not have a newer version."""
        pending = ((other, group.version) for other, group in self.pending.items())
        return min(
            (version for other, version in (*self.ready.items(), *pending) if other > group_id), default=self.num_done
        )


def to_saved(state: State) -> dict[str, Any]:
    """Plain values to save: complete groups are kept; those on their way are dispatched again later, whole ones.

    A group in the trainer is complete, and in the next batch again: it is older than all that are ready.
    """
    kept = {group_id: state.oldest_after(group_id) for group_id in state.training} | dict(state.ready)
    return {
        "next_group": state.next_group,
        "again": [group_id for group_id in state.outstanding() if group_id not in kept],
        "ready": sorted(kept.items()),
        "num_done": state.num_done,
        "stage": state.stage,
        "counts": dict(state.counts),
    }


def from_saved(saved: Mapping[str, Any]) -> State:
    """The state in which a saved run goes on."""
    ready = Map(dict(saved["ready"]))
    num_ready = dict(collections.Counter(ready.values()))
    return State(
        next_group=saved["next_group"],
        again=tuple(saved["again"]),
        ready=ready,
        num_by_version=num_ready,
        num_ready_by_version=num_ready,
        num_done=saved["num_done"],
        stage=saved.get("stage", 0),  # older checkpoints know of none
        counts=dict(saved["counts"]),
    )


def to_record(state: State) -> dict[str, Any]:
    """The whole state as plain values for JSON, what is on its way included; `from_record` gives it back equal."""
    pending = [
        [group_id, group.version, sorted(group.ended), sorted(group.rewards.items())]
        for group_id, group in sorted(state.pending.items())
    ]
    return {
        "next_group": state.next_group,
        "again": list(state.again),
        "num_again": state.num_again,
        "pending": pending,
        "ready": sorted(state.ready.items()),
        "training": list(state.training),
        "num_done": state.num_done,
        "stage": state.stage,
        "generators": None if state.generators is None else sorted(state.generators),
        "is_stopping": state.is_stopping,
        "is_finished": state.is_finished,
        "counts": dict(state.counts),
    }


def from_record(record: Mapping[str, Any], *, group_size: int) -> State:
    """The state of which `to_record` made a record."""
    pending = Map(
        {
            group_id: Pending(version, dict(map(tuple, rewards)), frozenset(ended))
            for group_id, version, ended, rewards in record["pending"]
        }
    )
    ready = Map(dict(map(tuple, record["ready"])))
    num_ready = collections.Counter(ready.values())
    num_pending = collections.Counter(group.version for group in pending.values())
    generators = record["generators"]
    return State(
        next_group=record["next_group"],
        again=tuple(record["again"]),
        num_again=record["num_again"],
        pending=pending,
        ready=ready,
        training=tuple(record["training"]),
        num_done=record["num_done"],
        stage=record["stage"],
        num_in_flight=sum(group_size - len(group.rewards) for group in pending.values()),
        num_by_version=dict(num_ready + num_pending),
        num_ready_by_version=dict(num_ready),
        generators=None if generators is None else frozenset(generators),
        is_stopping=record["is_stopping"],
        is_finished=record["is_finished"],
        counts=dict(record["counts"]),
    )
