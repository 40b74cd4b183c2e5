"""The schedule under a player that may do anything at any moment, and what must hold whatever it does."""

import dataclasses
import json
import tracemalloc
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from magistral_jax.schedule import machine
from magistral_jax.schedule.machine import Rules, State, from_saved, limit, step, to_saved
from magistral_jax.schedule.state import from_record, to_record


def length_of(request_id: int) -> int:
    """Tokens of a completion, in any run."""
    return 1 + request_id * 7919 % 101


class Player(RuleBasedStateMachine):
    """Roles that end their work in any order, fail, die and come back; stages, stops, kills and resumes in between.

    It keeps books of its own from the actions alone: what it was told to do, and what it was told is over.
    """

    @initialize(
        group_size=st.integers(2, 3),
        num_groups=st.integers(1, 3),
        num_async=st.integers(1, 8),
        ready_batches=st.sampled_from([1.0, 1.5, 3.0]),
        max_staleness=st.integers(0, 4),
        checkpoint_every=st.integers(0, 2),
        filters=st.booleans(),
        stages=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8)), max_size=3),
    )
    def begin(
        self,
        group_size: int,
        num_groups: int,
        num_async: int,
        ready_batches: float,
        max_staleness: int,
        checkpoint_every: int,
        filters: bool,
        stages: list[tuple[int, int]],
    ) -> None:
        def rules(num_groups: int, num_async: int) -> Rules:
            batch_size = group_size * num_groups
            return Rules(
                group_size=group_size,
                batch_size=batch_size,
                num_steps=10**6,
                num_async=group_size * num_async,
                max_ready=int(ready_batches * batch_size),
                max_staleness=max_staleness,
                checkpoint_every=checkpoint_every,
                filter_zero_variance=filters,
            )

        own = tuple(rules(*sizes) for sizes in stages)
        self.run_rules = dataclasses.replace(rules(num_groups, num_async), stages=own)
        self.sizes = own or (self.run_rules,)  # of whatever may be on its way
        self.state = State()
        self.sampling: set[int] = set()
        self.grading: set[int] = set()
        self.graded: dict[int, float | None] = {}
        self.training: tuple[int, ...] | None = None
        self.version_of: dict[int, int] = {}  # of groups since they were last dispatched
        self.num_stages = 0  # that have begun
        self.stages_before: dict[int, int] = {}  # of groups since they were last dispatched
        self.ended: dict[int, str] = {}
        self.version = 0
        self.events: list[machine.Event] = []
        self.everything: list[machine.Action] = []
        self.checkpoint: tuple[dict[str, Any], dict[int, str], int] = (to_saved(self.state), {}, 0)
        self.living: set[int] | None = None
        self.feed(machine.Started())

    # ---- what the player does ----

    def feed(self, event: machine.Event) -> list[machine.Action]:
        self.events.append(event)
        before = to_record(self.state)
        state, actions = step(self.run_rules, self.state, event)
        assert to_record(self.state) == before  # the machine leaves what it was given alone
        self.state = state
        self.everything += actions
        for action in actions:
            self.carry_out(action)
        return actions

    def carry_out(self, action: machine.Action) -> None:
        members = lambda group_id: range(
            group_id * self.run_rules.group_size, (group_id + 1) * self.run_rules.group_size
        )
        match action:
            case machine.Dispatch(group_id):
                assert group_id not in self.ended
                assert self.living != set()
                assert not set(members(group_id)) & {*self.sampling, *self.grading, *self.graded}
                self.version_of[group_id] = self.version
                self.stages_before[group_id] = self.num_stages
                self.sampling |= set(members(group_id))
            case machine.Verify(request_id):
                self.sampling.remove(request_id)
                self.grading.add(request_id)
            case machine.Discard(group_id, reason):
                assert group_id not in self.ended
                rewards = [self.graded.pop(i) for i in members(group_id)]
                assert reason == ("verifier_failed" if None in rewards else "zero_variance")
                assert reason == "verifier_failed" or (self.run_rules.filter_zero_variance and len(set(rewards)) == 1)
                self.ended[group_id] = reason
            case machine.Train(number, group_ids):
                assert self.training is None
                assert number == self.version
                assert len(group_ids) * self.run_rules.group_size == self.stage_rules.batch_size
                for group_id in group_ids:
                    assert group_id not in self.ended
                    assert None not in [self.graded.pop(i) for i in members(group_id)]
                    is_of_this_stage = self.stages_before[group_id] == self.num_stages
                    assert not is_of_this_stage or number - self.version_of[group_id] <= self.run_rules.max_staleness
                self.training = group_ids
            case machine.Publish(version):
                assert version == self.version + 1
                self.version = version
                self.ended |= dict.fromkeys(self.training or (), "trained")
                self.training = None
            case machine.Checkpoint(number):
                assert number == self.version
                self.checkpoint = (json.loads(json.dumps(to_saved(self.state))), dict(self.ended), self.version)

    @property
    def stage_rules(self) -> Rules:
        return self.run_rules.at(self.state.stage)

    @precondition(lambda self: self.run_rules.stages and not self.state.is_finished)
    @rule(data=st.data())
    def another_stage_begins(self, data: st.DataObject) -> None:
        self.num_stages += 1
        before = self.state
        actions = self.feed(machine.StageBegan(data.draw(st.integers(0, len(self.run_rules.stages) - 1)), "pool"))
        assert isinstance(actions[0], machine.OpenPool)
        assert actions[0].first_group == before.next_group
        # Nothing that is on its way is touched.
        assert set(before.outstanding()) <= set(self.state.outstanding())
        assert all(self.state.pending[group_id] == group for group_id, group in before.pending.items())

    @precondition(lambda self: not self.state.is_finished)
    @rule()
    def the_pool_is_drawn_anew(self) -> None:
        before = self.state
        assert self.feed(machine.PoolDrawn("another"))[0] == machine.OpenPool(
            before.next_group, before.num_done + bool(before.training), before.stage, "another"
        )

    @precondition(lambda self: self.sampling and not self.state.is_finished)
    @rule(data=st.data(), count=st.integers(1, 12))
    def some_completions_end(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.sampling))):
            request_id = data.draw(st.sampled_from(sorted(self.sampling)))
            assert self.feed(machine.Generated(request_id)) == [machine.Verify(request_id)]

    @precondition(lambda self: self.grading and not self.state.is_finished)
    @rule(data=st.data(), count=st.integers(1, 12))
    def some_grades_come(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if not self.grading:
                break
            request_id = data.draw(st.sampled_from(sorted(self.grading)))
            self.grade(request_id, data.draw(st.sampled_from([0.0, 1.0, 1.0, None])))

    def grade(self, request_id: int, reward: float | None) -> None:
        self.grading.remove(request_id)
        self.graded[request_id] = reward
        self.feed(machine.Verified(request_id, reward))

    @precondition(lambda self: self.training is not None and not self.state.is_finished)
    @rule()
    def the_batch_is_done(self) -> None:
        self.feed(machine.Trained())

    @rule(generator=st.integers(0, 2))
    def a_generator_joins_or_dies(self, generator: int) -> None:
        known = self.living or set()
        is_there = generator in known
        self.living = known ^ {generator}
        self.feed((machine.GeneratorLost if is_there else machine.GeneratorJoined)(generator))

    @rule(is_orderly=st.booleans())
    def the_run_stops_and_goes_on(self, is_orderly: bool) -> None:
        """In order (the trainer ends its batch, the state is saved), or killed: then from the last checkpoint."""
        if is_orderly:
            self.feed(machine.StopRequested())
            if self.training:
                self.feed(machine.Trained())
            assert self.state.is_finished
        saved, ended, version = self.checkpoint
        self.ended, self.version = dict(ended), version
        self.forget_work()
        kept = {group_id for group_id, _ in saved.get("ready", [])}
        for request_id in (
            i for g in kept for i in range(g * self.run_rules.group_size, (g + 1) * self.run_rules.group_size)
        ):
            self.graded[request_id] = float(request_id)  # complete, and kept by whoever keeps the rollouts
        self.version_of |= dict(saved.get("ready", []))
        self.num_stages += 1  # what comes again may have been dispatched under other rules
        self.stages_before |= dict.fromkeys(kept, -1 if self.run_rules.stages else self.num_stages)
        self.state = from_saved(saved)
        self.events, self.everything = [], []
        self.first = self.state
        self.feed(machine.Started())

    def forget_work(self) -> None:
        self.sampling, self.grading, self.graded, self.training = set(), set(), {}, None
        self.living = None

    @rule()
    def the_state_goes_through_a_record(self) -> None:
        record = json.loads(json.dumps(to_record(self.state)))
        assert from_record(record, group_size=self.run_rules.group_size) == self.state
        self.state = from_record(record, group_size=self.run_rules.group_size)

    @precondition(lambda self: not self.state.is_finished)
    @rule(steps=st.integers(1, 3))
    def everybody_works_and_so_it_goes_on(self, steps: int) -> None:
        """Liveness: with a generator and a grader at work, batches come, whatever happened before."""
        if self.living == set():
            self.a_generator_joins_or_dies(0)
        goal = self.version + steps
        for _ in range(10_000):
            if self.version >= goal:
                return
            if self.training:
                self.the_batch_is_done()
            elif self.grading:
                request_id = min(self.grading)
                self.grade(request_id, float(request_id))
            else:
                self.feed(machine.Generated(min(self.sampling)))  # fails where there is nothing to do: a deadlock
        pytest.fail("no batch came together")

    @precondition(lambda self: not self.state.is_finished)
    @rule(count=st.integers(10, 60))
    def all_work_but_on_the_oldest_group(self, count: int) -> None:
        """A straggler: whatever overtakes it, it must not be left behind by more versions than are allowed."""
        size = self.run_rules.group_size
        oldest = min((i // size for i in (*self.sampling, *self.grading)), default=None)
        for _ in range(count):
            others = [i for i in (*self.grading, *self.sampling) if i // size != oldest]
            if self.training:
                self.the_batch_is_done()
            elif others and others[0] in self.grading:
                self.grade(others[0], float(others[0]))
            elif others:
                self.feed(machine.Generated(others[0]))

    # ---- what holds ----

    @invariant()
    def every_prompt_is_in_one_place(self) -> None:
        outstanding = self.state.outstanding()
        assert sorted([*self.ended, *outstanding]) == list(range(self.state.next_group))

    @invariant()
    def lengths_are_neither_lost_nor_favoured(self) -> None:
        """Trained, filtered, dropped and outstanding together are what was dispatched, length by length."""
        size = self.run_rules.group_size
        lengths = lambda groups: Counter(length_of(i) for g in groups for i in range(g * size, (g + 1) * size))
        assert lengths(self.ended) + lengths(self.state.outstanding()) == lengths(range(self.state.next_group))

    @invariant()
    def counters_say_the_same(self) -> None:
        size, state = self.run_rules.group_size, self.state
        expected = Counter(self.ended.values())
        assert {how: n for how, n in state.counts.items() if how != "dispatched"} == {
            how: n * size for how, n in expected.items()
        }
        assert state.counts.get("dispatched", 0) == state.next_group * size
        assert state.num_in_flight == len(self.sampling) + len(self.grading) or state.is_finished
        # Those that are kept for speed are those that a recount of the maps gives.
        assert from_record(to_record(state), group_size=size) == state

    @invariant()
    def admission_keeps_its_bounds(self) -> None:
        assert self.state.num_in_flight <= max(rules.num_async for rules in self.sizes)
        assert len(self.state.training) in {0, *(rules.batch_size // rules.group_size for rules in self.sizes)}
        is_waiting = self.state.is_finished or self.state.is_stopping or self.living == set()
        assert is_waiting or limit(self.run_rules, self.state) is not None  # nobody is kept from work without a reason

    def teardown(self) -> None:
        """The same events from the same state give the same actions."""
        if not hasattr(self, "events"):
            return
        state, actions = getattr(self, "first", State()), []
        for event in self.events:
            state, more = step(self.run_rules, state, event)
            actions += more
        assert (actions, state) == (self.everything, self.state)


Player.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPlayer = Player.TestCase


# ---- by hand ----

SIMPLE = Rules(
    group_size=2,
    batch_size=4,
    num_steps=9,
    num_async=8,
    max_ready=4,
    max_staleness=4,
    checkpoint_every=2,
    filter_zero_variance=True,
)


def test_what_is_ready_counts_for_a_batch_of_the_new_size():
    stages = (SIMPLE, dataclasses.replace(SIMPLE, batch_size=2, num_async=4, max_ready=2))
    rules = dataclasses.replace(SIMPLE, stages=stages)
    state, _ = step(rules, State(), machine.Started())
    for request_id in range(6):
        state, actions = step(rules, state, machine.Verified(request_id, float(request_id)))
    assert state.training == (0, 1)  # two groups; the third is ready
    state, actions = step(rules, state, machine.StageBegan(1, "pool"))
    assert actions == [machine.OpenPool(state.next_group, 1, 1, "pool")]  # more is in flight than the stage dispatches
    state, actions = step(rules, state, machine.Trained())
    assert actions == [machine.Publish(1), machine.Train(1, (2,))]
    assert from_saved(to_saved(state)).stage == 1
    with pytest.raises(ValueError, match="stage 2 began, and there are 2"):
        step(rules, state, machine.StageBegan(2, "pool"))


def test_batches_that_shrink_are_trained_though_what_was_dispatched_before_is_older_than_is_allowed():
    large = dataclasses.replace(SIMPLE, batch_size=8, max_ready=8, max_staleness=1, num_async=16)
    rules = dataclasses.replace(large, stages=(large, dataclasses.replace(large, batch_size=2, max_ready=2)))
    state, _ = step(rules, State(), machine.Started())
    state, _ = step(rules, state, machine.StageBegan(1, "pool"))
    for request_id in range(16):
        state, _ = step(rules, state, machine.Verified(request_id, float(request_id)))
    for number in range(8):
        assert state.training == (number,)
        state, _ = step(rules, state, machine.Trained())


def test_no_prompt_is_dispatched_while_every_generator_is_dead():
    state, _ = step(SIMPLE, State(), machine.GeneratorJoined(0))
    state, _ = step(SIMPLE, state, machine.GeneratorLost(0))
    state, actions = step(SIMPLE, state, machine.Verified(0, None))
    state, actions = step(SIMPLE, state, machine.Verified(1, None))
    assert actions == [machine.Discard(0, "verifier_failed")]  # and nothing in its place
    _, actions = step(SIMPLE, state, machine.GeneratorJoined(3))
    assert actions == [machine.Dispatch(4)]


@pytest.mark.parametrize(
    "events",
    [
        [machine.GeneratorLost(0)],
        [machine.GeneratorJoined(0), machine.GeneratorJoined(0)],
        [machine.GeneratorJoined(0), machine.GeneratorLost(1)],
    ],
)
def test_a_generator_joins_before_it_is_lost_and_only_once(events: list[machine.Event]):
    state = State()
    for event in events[:-1]:
        state, _ = step(SIMPLE, state, event)
    with pytest.raises(ValueError, match=r"generator \d (joined twice|is lost, and was not there)"):
        step(SIMPLE, state, events[-1])


def test_a_resumed_state_is_that_which_a_checkpoint_of_the_same_moment_gives():
    state, _ = step(SIMPLE, State(), machine.Started())
    for event in (machine.Generated(2), machine.Verified(2, 1.0), machine.StopRequested()):
        state, _ = step(SIMPLE, state, event)
    assert state.is_finished
    assert step(SIMPLE, state, machine.Resumed()) == step(SIMPLE, from_saved(to_saved(state)), machine.Started())


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"num_async": 4}, "num_async"),
        ({"max_ready": 0}, "ready_batches"),
        ({"max_staleness": 0, "num_async": 100}, "max_staleness"),
    ],
)
def test_the_limit_names_the_setting(rules: dict[str, int], expected: str):
    changed = dataclasses.replace(SIMPLE, **rules)
    state, _ = step(changed, State(), machine.Started())
    assert limit(changed, state) == expected


def test_a_step_does_not_cost_more_where_more_is_on_its_way():
    """Counted, not timed: the maps share their parts, so a new state holds few new objects."""

    def bytes_of_an_event(num_async: int) -> int:
        rules = Rules(
            group_size=2,
            batch_size=4,
            num_steps=9,
            num_async=num_async,
            max_ready=num_async,
            max_staleness=num_async,
            checkpoint_every=0,
            filter_zero_variance=True,
        )
        state, _ = step(rules, State(), machine.Started())
        step(rules, state, machine.Generated(2))  # warm
        tracemalloc.start()
        kept = step(rules, state, machine.Generated(0))
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
        return size

    assert bytes_of_an_event(20_000) < 4 * bytes_of_an_event(200)
