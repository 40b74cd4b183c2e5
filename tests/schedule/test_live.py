"""The live driver with roles that are played: failures are named, silence has an end, what can be saved is saved."""

import os
import signal
import threading
import time
import typing
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.generate.handle import Intake, Notice
from magistral_jax.generate.process import GeneratorDiedError
from magistral_jax.records import WeightVersion
from magistral_jax.schedule import machine
from magistral_jax.schedule.live import Inbox, Report, RoleFailed, RoleFailedError, drive
from magistral_jax.schedule.machine import Checkpoint, Finish, Rules, State, StopRequested

RULES = Rules(
    group_size=2,
    batch_size=4,
    num_steps=3,
    num_async=8,
    max_ready=4,
    max_staleness=4,
    checkpoint_every=0,
    filter_zero_variance=False,
)
PATIENCE = 60.0


class Cast:
    """Every role answers at once, except where `on` says something else: {action type: what to report, or None}."""

    def __init__(self, on: dict[type, Callable[[Any], Any]] | None = None) -> None:
        self.on = on or {}
        self.inbox: Inbox = Inbox()
        self.actions: list[Any] = []
        self.events: list[machine.Event] = []
        self.reports: list[Report] = []

    def act(self, state: State, action: machine.Action) -> None:
        self.actions.append(action)
        if type(action) in self.on:
            reports = self.on[type(action)](action)
        else:
            reports = self.usual(action)
        for report in reports or []:
            self.inbox.put(report)

    def usual(self, action: machine.Action) -> list[Any] | None:
        match action:
            case machine.Dispatch(group_id):
                first = group_id * RULES.group_size
                return [machine.Generated(i) for i in range(first, first + RULES.group_size)]
            case machine.Verify(request_id):
                return [machine.Verified(request_id, float(request_id % 2))]
            case machine.Train():
                return [machine.Trained()]
            case machine.Publish(version):
                return [WeightVersion(version, 10 * version)]

    def drive(self, deadline: float = PATIENCE) -> State:
        self.inbox.put(machine.Started())
        return drive(
            RULES,
            State(),
            self.inbox,
            act=self.act,
            on_report=self.reports.append,
            record=self.events.append,
            deadline=deadline,
        )

    def count(self, kind: type) -> int:
        return sum(isinstance(action, kind) for action in self.actions)


def test_a_run_of_willing_roles():
    cast = Cast()
    state = cast.drive()
    assert state.is_finished
    assert (state.num_done, cast.count(machine.Train), cast.count(machine.Publish)) == (3, 3, 3)
    assert cast.actions[-2:] == [Checkpoint(3), Finish()]
    assert cast.reports == [WeightVersion(version, 10 * version) for version in (1, 2)]  # the last comes after the end
    # The record alone leads to the same end: a run can be replayed.
    replayed = State()
    for event in cast.events:
        replayed, _ = machine.step(RULES, replayed, event)
    assert replayed == state


def test_a_mishap_that_was_dealt_with_is_told_and_changes_nothing():
    notice, intake = Notice("generator_lost", 1, "Generator 1 was killed."), Intake(7, request_ids=(1, 2))
    cast = Cast({machine.Train: lambda action: [notice, intake, machine.Trained()]})
    assert cast.drive().num_done == 3
    assert [report for report in cast.reports if report in (notice, intake)] == 3 * [notice, intake]
    assert {type(event) for event in cast.events} <= set(typing.get_args(machine.Event))


def test_an_event_is_recorded_before_it_has_effects():
    cast = Cast()
    seen = []
    cast.on[machine.Train] = lambda action: (seen.append(cast.events[-1]), cast.usual(action))[1]
    cast.drive()
    assert all(isinstance(event, machine.Verified | machine.Trained) for event in seen)


@pytest.mark.parametrize("role", ["generator", "verifier pool"])
def test_a_role_that_fails_ends_the_run_in_order(role: str):
    error = ValueError("out of paper")

    def fail(action: machine.Action) -> Any:
        if cast.count(machine.Publish) == 1:
            return [RoleFailed(role, error)]
        return cast.usual(action)

    cast = Cast({machine.Dispatch: fail})
    with pytest.raises(RoleFailedError, match=rf"^The {role} failed: ValueError\('out of paper'\)$") as raised:
        cast.drive()
    assert raised.value.__cause__ is error
    # The step under way is finished and saved, and no prompt is dispatched after the failure.
    last = next(i for i, action in enumerate(cast.actions) if isinstance(action, Checkpoint))
    assert cast.actions[last:] == [cast.actions[last], Finish()]
    assert cast.actions[last] == Checkpoint(cast.count(machine.Train))
    assert StopRequested() in cast.events


def test_the_first_of_several_failures_is_named():
    cast = Cast({machine.Dispatch: lambda action: [RoleFailed("generator", ValueError(str(action.group_id)))]})
    with pytest.raises(RoleFailedError, match=r"The generator failed: ValueError\('0'\)"):
        cast.drive()


def test_a_failure_that_is_a_sentence_is_said_as_one():
    died = GeneratorDiedError("Generator 3 was killed by SIGKILL")
    cast = Cast({machine.Dispatch: lambda action: [RoleFailed("generator", died)]})
    with pytest.raises(RoleFailedError, match=r"^The generator failed: Generator 3 was killed by SIGKILL$"):
        cast.drive()


def test_a_failed_trainer_takes_its_state_along():
    cast = Cast({machine.Train: lambda action: [RoleFailed("trainer", MemoryError("no room"))]})
    with pytest.raises(RoleFailedError, match=r"^The trainer failed: MemoryError\('no room'\)$"):
        cast.drive()
    assert cast.count(Checkpoint) == cast.count(Finish) == 0  # its parameters may be half an update


@pytest.mark.parametrize(
    ("silent", "sentence"),
    [
        (machine.Dispatch, "4 groups are with the generator or the verifiers, 0 are ready."),
        (machine.Verify, "4 groups are with the generator or the verifiers, 0 are ready."),
        (machine.Train, "The trainer has been at step 0."),
    ],
)
def test_silence_has_an_end_and_a_name(silent: type, sentence: str):
    cast = Cast({silent: lambda action: None})
    began = time.monotonic()
    with pytest.raises(RoleFailedError) as raised:
        cast.drive(deadline=0.2)
    assert 0.2 <= time.monotonic() - began < PATIENCE
    assert str(raised.value) == f"No role reported anything for 0.2 s (schedule.role_deadline). {sentence}"
    # What the trainer has done so far is saved, unless the trainer itself is the silent one.
    assert [action for action in cast.actions if isinstance(action, Checkpoint)] == (
        [] if silent is machine.Train else [Checkpoint(0)]
    )


def test_a_failure_and_then_silence_names_the_failure():
    def train(action: machine.Action) -> Any:
        return [RoleFailed("generator", ValueError("gone"))]  # and the trainer never reports

    with pytest.raises(RoleFailedError, match="The generator failed"):
        Cast({machine.Train: train}).drive(deadline=0.2)


def test_a_stop_request_finishes_the_running_step():
    cast = Cast({machine.Train: lambda action: [StopRequested(), machine.Trained()]})
    state = cast.drive()
    assert state.num_done == 1
    assert cast.actions[-2:] == [Checkpoint(1), Finish()]


def test_a_receipt_that_is_refused_ends_the_run():
    cast = Cast()

    def refuse(report: Report) -> None:
        assert isinstance(report, WeightVersion)
        raise ValueError(f"not what was sent: {report.version}")

    with pytest.raises(ValueError, match="not what was sent: 1"):
        drive(
            RULES,
            State(),
            (cast.inbox.put(machine.Started()), cast.inbox)[1],
            act=cast.act,
            on_report=refuse,
            record=cast.events.append,
            deadline=PATIENCE,
        )


def test_a_signal_handler_may_report_while_the_driver_waits():
    # queue.Queue would lock itself up where the signal comes inside `get`; a SimpleQueue may be entered again.
    cast = Cast({machine.Dispatch: lambda action: None})
    previous = signal.signal(signal.SIGINT, lambda *_: cast.inbox.put(StopRequested()))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        state = cast.drive()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, previous)
    assert state.is_finished
    assert state.num_done == 0
