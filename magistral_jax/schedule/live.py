"""The live driver: events of real threads and processes go through the state machine, and its actions are carried out.

Every wait has a deadline and says what it waits for. A role that fails ends the run in order: what can be finished is
finished, a checkpoint is written, and the failure is reported.
"""

import dataclasses
import queue
from collections.abc import Callable

from magistral_jax.generate.handle import Intake, Notice
from magistral_jax.records import MagistralError, WeightVersion
from magistral_jax.schedule.machine import Action, Event, Rules, State, StopRequested, step


@dataclasses.dataclass(frozen=True)
class RoleFailed:
    """A role ended with an exception and will report nothing more."""

    role: str
    error: Exception


Report = WeightVersion | Notice | Intake
"""What a role says that decides nothing."""

# A SimpleQueue: a signal handler may put into it while this very thread is inside `get`.
Inbox = queue.SimpleQueue[Event | RoleFailed | Report]


class RoleFailedError(MagistralError):
    """A role died; the message names it, and the checkpoint that was written."""


def drive(
    rules: Rules,
    state: State,
    inbox: Inbox,
    *,
    act: Callable[[State, Action], None],
    on_report: Callable[[Report], None],
    record: Callable[[Event], None],
    deadline: float,
) -> State:
    """Run the machine until it has finished.

    Args:
      rules: Of the run.
      state: Where to begin.
      inbox: Where the roles report.
      act: Carries out an action, without waiting for its effect.
      on_report: Receives what changes nothing here: receipts for weights, what was dealt with, what an engine took in.
      record: Receives every event before it takes effect: the log from which a run can be replayed.
      deadline: Seconds without any report after which the run is given up.

    Raises:
      RoleFailedError: A role failed, or all were silent for too long.
    """
    failure: RoleFailedError | None = None
    while not state.is_finished:
        try:
            message = inbox.get(timeout=deadline)
        except queue.Empty:
            silence = f"No role reported anything for {deadline:g} s (schedule.role_deadline). {_waiting_for(state)}"
            failure = failure or RoleFailedError(silence)
            if state.training:  # the state is in the trainer's hands; the last checkpoint stands
                break
            message = StopRequested()
        if isinstance(message, Report):
            on_report(message)
            continue
        if isinstance(message, RoleFailed):
            if failure is None:
                said = str(message.error) if isinstance(message.error, MagistralError) else repr(message.error)
                failure = RoleFailedError(f"The {message.role} failed: {said}")
                failure.__cause__ = message.error
            if message.role == "trainer":  # its state is gone with it; the last checkpoint stands
                break
            message = StopRequested()
        record(message)
        state, actions = step(rules, state, message)
        for action in actions:
            act(state, action)
    if failure is not None:
        raise failure
    return state


def _waiting_for(state: State) -> str:
    if state.training:
        return f"The trainer has been at step {state.num_done}."
    missing = len(state.pending)
    return f"{missing} groups are with the generator or the verifiers, {len(state.ready)} are ready."
