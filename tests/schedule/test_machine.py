"""The schedule against a random world: nothing lost, doubled or too stale, whoever is slow and whatever fails."""

import collections
import dataclasses
import heapq
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.schedule import machine
from magistral_jax.schedule.config import ScheduleConfig
from magistral_jax.schedule.machine import (
    Checkpoint,
    Discard,
    Dispatch,
    Finish,
    Generated,
    Publish,
    Rules,
    Started,
    State,
    StopRequested,
    Train,
    Trained,
    Verified,
    Verify,
    from_saved,
    is_at_bound,
    step,
    to_saved,
)

SIMPLE = Rules(
    group_size=2,
    batch_size=4,
    num_steps=3,
    num_async=8,
    max_ready=4,
    max_staleness=4,
    checkpoint_every=2,
    filter_zero_variance=True,
)


def saved_and_loaded(state: State) -> State:
    """The state that a run goes on with: through the JSON of a checkpoint."""
    return from_saved(json.loads(json.dumps(to_saved(state))))


def length_of(request_id: int) -> float:
    """Tokens of a completion: one heavy-tailed number for each request, in any run."""
    return min(1.0 / (1.0 - random.Random(request_id).random()) ** 1.5, 3000.0)


A = TypeVar("A", bound=machine.Action)


class World:
    """Generator, verifiers and trainer as latencies; every action is checked, and the books after every few events.

    A completion takes as long as it is, so long ones end last. Rewards, failures and the other latencies are random.
    """

    def __init__(
        self,
        rules: Rules,
        seed: int,
        state: State | None = None,
        *,
        failure_rate: float = 0.1,
        same_rate: float = 0.3,
        train_time: float = 20.0,
        check_every: int = 1,
    ) -> None:
        self.rules, self.state = rules, state or State()
        self.first_state = self.state
        self.random = random.Random(seed)
        self.failure_rate, self.same_rate, self.train_time = failure_rate, same_rate, train_time
        self.check_every = check_every
        self.clock, self.order = 0.0, itertools.count()
        self.in_flight = 0
        self.coming: list[tuple[float, int, machine.Event]] = []
        self.dispatched: dict[int, int] = {}  # group -> version
        self.reward_of: dict[int, float | None] = {}  # request -> what its verification will say
        self.verified: set[int] = set()
        for group_id in self.first_state.ready:  # kept over a resume: graded before
            self.reward_of |= {request_id: float(request_id) for request_id in self.members(group_id)}
            self.verified |= set(self.members(group_id))
        self.trained: list[int] = []
        self.discarded: dict[int, str] = {}
        self.actions: list[machine.Action] = []
        self.snapshots: list[tuple[State, set[int]]] = []  # what a checkpoint saves, and the groups ended by then

    def run(self, stop_after: int | None = None) -> "World":
        """Feed events until the end. `stop_after`: number of events before a request to stop."""
        self.feed(Started())
        count = 0
        while not self.state.is_finished:
            if count == stop_after:
                self.feed(StopRequested())
            else:
                assert self.coming, f"deadlock: {self.state}"
                self.clock, _, event = heapq.heappop(self.coming)
                self.feed(event)
            count += 1
            if count % self.check_every == 0 or self.state.is_finished:
                self.check_books()
        return self

    def feed(self, event: machine.Event) -> None:
        if isinstance(event, Verified):
            self.verified.add(event.request_id)
            self.in_flight -= 1
        self.state, actions = step(self.rules, self.state, event)
        for action in actions:
            self.carry_out(action)
        self.actions += actions
        assert sum(isinstance(action, Checkpoint) for action in actions) <= 1
        assert self.in_flight <= self.rules.num_async

    def carry_out(self, action: machine.Action) -> None:
        match action:
            case Dispatch(group_id):
                assert group_id not in self.dispatched
                self.dispatched[group_id] = self.state.num_done
                self.in_flight += self.rules.group_size
                is_same = self.random.random() < self.same_rate
                for request_id in self.members(group_id):
                    reward = 0.5 if is_same else request_id % self.rules.group_size + self.random.random() / 2
                    self.reward_of[request_id] = None if self.random.random() < self.failure_rate else reward
                    self.after(length_of(request_id), Generated(request_id))
            case Verify(request_id):
                self.after(self.random.expovariate(0.3), Verified(request_id, self.reward_of[request_id]))
            case Discard(group_id, reason):
                assert self.fate(group_id) == reason
                assert group_id not in self.discarded
                self.discarded[group_id] = reason
            case Train(number, group_ids):
                assert number == self.state.num_done
                assert len(group_ids) * self.rules.group_size == self.rules.batch_size
                for group_id in group_ids:
                    assert group_id not in self.trained
                    assert self.fate(group_id) == "trained"
                    assert set(self.members(group_id)) <= self.verified
                    version = {**self.first_state.ready, **self.dispatched}[group_id]
                    assert number - version <= self.rules.max_staleness
                self.trained += group_ids
                self.after(self.random.expovariate(1 / self.train_time), Trained())
            case Checkpoint(number):
                assert number == self.state.num_done
                # What is in the trainer is not yet in the weights that are saved.
                ended = {*self.trained, *self.discarded} - {*self.state.training}
                self.snapshots.append((saved_and_loaded(self.state), ended))

    def after(self, latency: float, event: machine.Event) -> None:
        heapq.heappush(self.coming, (self.clock + latency, next(self.order), event))

    def members(self, group_id: int) -> range:
        return range(group_id * self.rules.group_size, (group_id + 1) * self.rules.group_size)

    def fate(self, group_id: int) -> str:
        """How a group ends, whoever is slow: its rewards alone decide."""
        rewards = [self.reward_of[request_id] for request_id in self.members(group_id)]
        if None in rewards:
            return "verifier_failed"
        return "zero_variance" if self.rules.filter_zero_variance and len(set(rewards)) == 1 else "trained"

    def check_books(self) -> None:
        rules, state = self.rules, self.state
        assert state.num_done + bool(state.training) == self.first_state.num_done + len(self.of(Train))
        # Every group that was ever dispatched is in exactly one place.
        done = set(self.trained) - set(state.training)
        places = [done, set(self.discarded), set(state.outstanding())]
        before = set(self.first_state.outstanding())
        assert set().union(*places) == before | set(self.dispatched)
        assert sum(map(len, places)) == len(before | set(self.dispatched))
        # The counters say the same in sequences.
        counts = collections.Counter(state.counts)
        counts.subtract(self.first_state.counts)
        ended = collections.Counter({"trained": len(done), **collections.Counter(self.discarded.values())})
        assert {how: counts[how] for how in ended} == {how: n * rules.group_size for how, n in ended.items()}
        assert counts["dispatched"] == len(set(self.dispatched) - before) * rules.group_size
        assert state.next_group == max([self.first_state.next_group, *(g + 1 for g in self.dispatched)])

    def of(self, kind: type[A]) -> list[A]:
        return [action for action in self.actions if isinstance(action, kind)]


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    group_size, groups = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    config = ScheduleConfig(
        num_steps=draw(st.integers(0, 12)),
        num_async=group_size * draw(st.integers(1, 12)),
        ready_batches=draw(st.sampled_from([1.0, 1.3, 2.5])),
        max_staleness=draw(st.integers(0, 6)),
        checkpoint_every=draw(st.integers(0, 3)),
    )
    filters = draw(st.booleans())
    return Rules.of(config, group_size=group_size, batch_size=group_size * groups, filter_zero_variance=filters)


WORLDS = st.fixed_dictionaries(
    {
        "rules": rules(),
        "seed": st.integers(0, 10**6),
        "failure_rate": st.sampled_from([0.0, 0.1, 0.3]),
        "same_rate": st.sampled_from([0.0, 0.3, 0.6]),
        "train_time": st.sampled_from([0.1, 5.0, 200.0]),
        "check_every": st.sampled_from([1, 5, 5]),
    }
)


# ---- any world ----


@settings(max_examples=50, deadline=None)
@given(world=WORLDS)
def test_a_run_keeps_every_promise_and_ends(world: Any):
    world = World(**world).run()  # actions and books are checked on the way
    num_steps = world.rules.num_steps
    assert world.of(Publish) == [Publish(version + 1) for version in range(num_steps)]
    assert [action.step for action in world.of(Train)] == list(range(num_steps))
    every = world.rules.checkpoint_every
    periodic = [n for n in range(1, num_steps) if every and n % every == 0]
    assert [action.step for action in world.of(Checkpoint)] == [*periodic, num_steps]
    assert world.actions[-2:] == [Checkpoint(num_steps), Finish()]
    assert list(world.dispatched) == list(range(len(world.dispatched)))  # in the order of prompts, none left out
    final = world.state
    assert step(world.rules, final, Verified(0, 1.0)) == (final, [])  # latecomers change nothing


@settings(max_examples=40, deadline=None)
@given(world=WORLDS, stop_after=st.integers(0, 150), data=st.data())
def test_a_stopped_run_goes_on_where_it_was(world: Any, stop_after: int, data: st.DataObject):
    world = World(**world).run(stop_after)
    assert world.actions[-2:] == [Checkpoint(world.state.num_done), Finish()]

    # From the last checkpoint, or from an earlier one after a kill: those ended by then never come back.
    saved, ended = data.draw(st.sampled_from(world.snapshots))
    more = dataclasses.replace(world.rules, num_steps=saved.num_done + 4)
    resumed = World(more, 1, saved, same_rate=0.0, failure_rate=0.0).run()
    again, fresh = list(saved.again), range(saved.next_group, resumed.state.next_group)
    assert list(resumed.dispatched) == [*again, *fresh][: len(resumed.dispatched)]  # outstanding ones first
    assert not ended & set(resumed.dispatched)
    assert ended | {*again, *saved.ready} == set(range(saved.next_group))
    # What was complete is trained as it is, and never sampled again.
    assert not {*saved.ready} & set(resumed.dispatched)
    assert [action.version for action in resumed.of(Publish)] == [saved.num_done + n for n in (1, 2, 3, 4)]
    assert len(resumed.trained) == len(set(resumed.trained)) == 4 * more.batch_size // more.group_size


@settings(max_examples=25, deadline=None)
@given(world=WORLDS)
def test_the_lengths_that_are_trained_are_those_that_were_dispatched(world: Any):
    """Every group before the oldest that is still on its way ended by its rewards alone, however long it was."""
    world = World(**world).run()
    outstanding = world.state.outstanding()
    horizon = min(outstanding, default=world.state.next_group)
    for group_id in range(horizon):
        fate = world.fate(group_id)
        assert (group_id in world.trained) == (fate == "trained")
        assert world.discarded.get(group_id, "trained") == fate


def test_long_completions_are_trained_as_often_as_short_ones():
    rules = dataclasses.replace(SIMPLE, num_steps=300, batch_size=8, num_async=16, max_ready=8)
    world = World(rules, 0, failure_rate=0.0, same_rate=0.0, train_time=3.0, check_every=100).run()
    horizon = min(world.state.outstanding())
    assert horizon > 0.97 * world.state.next_group  # nobody is put off for ever
    trained = sorted(length_of(r) for g in world.trained if g < horizon for r in world.members(g))
    assert trained == sorted(length_of(r) for g in range(horizon) for r in world.members(g))
    assert trained[-1] > 50 * trained[len(trained) // 2]  # the tail is heavy, and it is in there
    staleness = [a.step - world.dispatched[g] for a in world.of(Train) for g in a.group_ids]
    assert max(staleness) == rules.max_staleness  # the bound was met, not merely never reached


def test_a_verifier_that_mostly_fails_delays_the_run_and_gives_no_reward():
    world = World(SIMPLE, 0, failure_rate=0.6).run()
    assert world.state.counts["verifier_failed"] > 0.5 * world.state.counts["dispatched"]
    assert world.state.counts["trained"] == 12


# ---- by hand ----


def drive(rules: Rules, *events: machine.Event, state: State | None = None) -> tuple[State, list[list[machine.Action]]]:
    state = state or State()
    everything = []
    for event in events:
        state, actions = step(rules, state, event)
        everything.append(actions)
    return state, everything


def grade(group_id: int, rewards: tuple[float | None, ...] = (0.0, 1.0)) -> list[machine.Event]:
    first = group_id * len(rewards)
    requests = range(first, first + len(rewards))
    return [*map(Generated, requests), *itertools.starmap(Verified, zip(requests, rewards, strict=True))]


def test_the_course_of_a_small_run():
    # 8 in flight are 4 groups of 2. Two complete groups are a batch of 4, and fill the queue for a moment.
    state, (actions,) = drive(SIMPLE, Started())
    assert actions == [Dispatch(0), Dispatch(1), Dispatch(2), Dispatch(3)]
    assert is_at_bound(SIMPLE, state)
    state, actions = drive(SIMPLE, *grade(2), state=state)
    # A place opens for whole groups only: one graded sequence is not enough, two are.
    assert actions == [[Verify(4)], [Verify(5)], [], [Dispatch(4)]]
    state, actions = drive(SIMPLE, *grade(1, (1.0, 1.0)), state=state)
    assert actions[-1] == [Discard(1, "zero_variance"), Dispatch(5)]
    state, actions = drive(SIMPLE, *grade(3, (1.0, None)), state=state)
    assert actions[-1] == [Discard(3, "verifier_failed"), Dispatch(6)]
    state, actions = drive(SIMPLE, *grade(0), state=state)
    assert actions[-1] == [Train(0, (0, 2)), Dispatch(7)]  # oldest first
    state, (actions,) = drive(SIMPLE, Trained(), state=state)
    assert actions == [Publish(1)]
    assert state.counts == {"dispatched": 16, "zero_variance": 2, "verifier_failed": 2, "trained": 4}
    assert state.outstanding() == (4, 5, 6, 7)


def test_a_full_queue_stops_dispatching_while_the_trainer_is_busy():
    state, _ = drive(SIMPLE, Started(), *grade(0), *grade(1))
    assert state.training == (0, 1)
    state, actions = drive(SIMPLE, *grade(2), *grade(3), state=state)
    assert [a for step_actions in actions for a in step_actions if isinstance(a, Dispatch)] == [Dispatch(6)]
    assert set(state.ready) == {2, 3}
    assert is_at_bound(SIMPLE, state)
    state, actions = drive(SIMPLE, *grade(4), state=state)
    assert actions[-1] == []  # places in flight are free, but the queue is full
    state, (actions,) = drive(SIMPLE, Trained(), state=state)
    assert actions == [Publish(1), Train(1, (2, 3)), Dispatch(7), Dispatch(8)]


def test_the_trainer_waits_for_a_group_that_would_become_too_stale():
    rules = dataclasses.replace(SIMPLE, max_staleness=1, num_steps=9)
    state, _ = drive(rules, Started(), *grade(1), *grade(2))
    assert state.training == (1, 2)  # group 0 may still make it to the next batch
    state, _ = drive(rules, Trained(), *grade(3), *grade(4), state=state)
    assert state.training == ()  # a batch is ready, but after it group 0 would be two versions old
    assert len(state.ready) == 2
    state, actions = drive(rules, *grade(0), state=state)
    assert actions[-1][0] == Train(1, (0, 3))


def test_groups_that_wait_in_the_queue_are_bounded_too():
    # One group a batch, and room for ten: with a bound of 1 only two may be on their way, since the third to be
    # trained would be two versions old, even if it were ready at once.
    rules = dataclasses.replace(SIMPLE, batch_size=2, num_async=20, max_ready=20, max_staleness=1)
    state, (actions,) = drive(rules, Started())
    assert actions == [Dispatch(0), Dispatch(1)]
    assert is_at_bound(rules, state)


def test_a_staleness_of_zero_is_a_synchronous_run():
    world = World(dataclasses.replace(SIMPLE, max_staleness=0, num_steps=5), 0).run()
    assert all(world.dispatched[g] == a.step for a in world.of(Train) for g in a.group_ids)


def test_a_stop_lets_the_trainer_finish_and_begins_nothing():
    state, _ = drive(SIMPLE, Started(), *grade(0), *grade(1), Trained(), *grade(2), *grade(3))
    assert state.training == (2, 3)
    state, actions = drive(SIMPLE, StopRequested(), *grade(4), *grade(5), state=state)
    assert [a for step_actions in actions for a in step_actions] == [Verify(8), Verify(9), Verify(10), Verify(11)]
    # Two steps are done, which is the time of a periodic checkpoint as well: it is saved once.
    final, (actions,) = drive(SIMPLE, Trained(), state=state)
    assert actions == [Publish(2), Checkpoint(2), Finish()]
    assert saved_and_loaded(final) == State(
        next_group=final.next_group,
        again=(6, 7),
        ready=final.ready,
        num_by_version={0: 2},
        num_ready_by_version={0: 2},
        num_done=2,
        counts=final.counts,
    )
    assert dict(final.ready) == {4: 0, 5: 0}


def test_a_stop_without_a_batch_in_the_trainer_ends_at_once():
    state, actions = drive(SIMPLE, Started(), StopRequested())
    assert actions[-1] == [Checkpoint(0), Finish()]
    assert state.is_finished
    assert saved_and_loaded(state).again == (0, 1, 2, 3)


def test_a_run_killed_while_training_trains_that_batch_again():
    state, _ = drive(SIMPLE, Started(), *grade(0), *grade(1), *grade(2))
    assert state.training == (0, 1)
    saved = saved_and_loaded(state)
    assert (saved.num_done, saved.again, dict(saved.ready)) == (
        0,
        (3, 4, 5, 6)[: saved.next_group - 3],
        {0: 0, 1: 0, 2: 0},
    )
    _, (actions,) = drive(SIMPLE, Started(), state=saved)
    assert actions[:2] == [Train(0, (0, 1)), Dispatch(3)]


def test_a_resumed_run_that_has_all_its_steps_ends_at_once():
    _, (actions,) = drive(SIMPLE, Started(), state=State(num_done=3, next_group=9, again=(7,)))
    assert actions == [Checkpoint(3), Finish()]


@pytest.mark.parametrize(
    "events",
    [
        [Generated(8)],
        [Verified(8, 1.0)],
        [Generated(0), Generated(0)],
        [Generated(0), Verified(0, 1.0), Verified(0, 1.0)],
        [Generated(0), Verified(0, 1.0), Generated(0)],
        [Generated(0), Verified(0, None), Verified(0, 1.0)],
        [*grade(0), Generated(0)],
        [*grade(0), Verified(1, 1.0)],
        [*grade(0, (1.0, 1.0)), Verified(0, 0.0)],
        [Trained()],
        [*grade(0), *grade(1), Trained(), Trained()],
    ],
    ids=[
        "unknown completion",
        "unknown grade",
        "completion twice",
        "grade twice",
        "completion after its grade",
        "grade after a failure",
        "completion of a group in the queue",
        "grade of a group in the queue",
        "grade of a discarded group",
        "trained without a batch",
        "trained twice",
    ],
)
def test_what_is_unknown_or_comes_twice_is_an_error(events: Sequence[machine.Event]):
    state, _ = drive(SIMPLE, Started(), *events[:-1])
    with pytest.raises(ValueError, match=r"^(request \d+ of group \d+ |a batch was reported as trained)"):
        step(SIMPLE, state, events[-1])


def test_a_failed_verification_ends_the_group_only_when_it_is_complete():
    state, actions = drive(SIMPLE, Started(), Generated(0), Verified(0, None))
    assert actions[-1] == []
    assert 0 in state.pending
    _, actions = drive(SIMPLE, Generated(1), Verified(1, 0.0), state=state)
    assert actions[-1][0] == Discard(0, "verifier_failed")


def test_equal_rewards_are_trained_where_the_filter_is_off():
    rules = dataclasses.replace(SIMPLE, filter_zero_variance=False)
    state, _ = drive(rules, Started(), *grade(0, (1.0, 1.0)), *grade(1, (0.0, 0.0)))
    assert state.training == (0, 1)


def test_rewards_that_differ_by_rounding_only_are_equal():
    state, actions = drive(SIMPLE, Started(), *grade(0, (0.1 + 0.2, 0.3)))
    assert actions[-1][0] == Discard(0, "zero_variance")
    assert 0 not in state.outstanding()


def test_steps_leave_their_state_alone():
    state, _ = drive(SIMPLE, Started(), *grade(0), Generated(2))
    copy = json.dumps(dataclasses.asdict(state), default=sorted)
    for event in (Verified(2, 1.0), Generated(3), StopRequested()):
        step(SIMPLE, state, event)
    assert json.dumps(dataclasses.asdict(state), default=sorted) == copy


def test_rules_come_from_the_configuration():
    config = ScheduleConfig(num_steps=7, num_async=24, ready_batches=1.5, max_staleness=3, checkpoint_every=5)
    assert Rules.of(config, group_size=4, batch_size=8, filter_zero_variance=False) == Rules(
        group_size=4,
        batch_size=8,
        num_steps=7,
        num_async=24,
        max_ready=12,
        max_staleness=3,
        checkpoint_every=5,
        filter_zero_variance=False,
    )


def test_the_machine_imports_no_jax():
    code = "import sys, magistral_jax.schedule.machine; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
