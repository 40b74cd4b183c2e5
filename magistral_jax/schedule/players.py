"""The engines of a recorded session, each made to do again what it did.

in: the records of a session and the trainer's weights, version by version; out: the completions, as they are asked for.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

from magistral_jax.generate.handle import Intake, Reports
from magistral_jax.generate.held import HeldEngine
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.records import MagistralError, Rollout
from magistral_jax.schedule.event_log import Generated, Record, Took

_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.5  # between two looks at a Ctrl-C


@dataclasses.dataclass
class Script:
    """What one engine took, in order, and how many steps it is known to have made."""

    generator: int
    intakes: collections.deque[Took] = dataclasses.field(default_factory=collections.deque)
    num_steps: int = 0


def read_scripts(records: Iterable[Record]) -> dict[int, Script]:
    """The script of each engine from the records of one session."""
    scripts: dict[int, Script] = {}
    for record in records:
        if isinstance(record, Took):
            scripts.setdefault(record.engine, Script(record.generator)).intakes.append(record)
        if isinstance(record, Generated):
            script = scripts[record.engine]
            script.num_steps = max(script.num_steps, record.engine_step + 1)
    return scripts


class Players:
    """Engines with their scripts; a context manager, whose end is theirs.

    Each runs ahead of the schedule as far as it has the weights for, so they work side by side as they did.

    Args:
      scripts: By engine.
      make_engine: Makes, but does not start, the engine of a generator's number.
      make_request: A request by its id.
      deadline: Seconds without any report after which an engine is given up.
    """

    def __init__(
        self,
        scripts: dict[int, Script],
        make_engine: Callable[[int, Reports], HeldEngine],
        make_request: Callable[[int], GenerationRequest],
        *,
        deadline: float,
    ) -> None:
        self._scripts, self._make_engine, self._make_request = scripts, make_engine, make_request
        self._deadline = deadline
        self._engines: dict[int, HeldEngine] = {}
        self._changed = threading.Condition()
        self._rollouts: dict[tuple[int, int], Rollout] = {}  # by engine and request
        self._versions: dict[int, int] = {}  # the newest that each engine has
        self._failure: Exception | None = None

    def __enter__(self) -> "Players":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for engine in self._engines.values():
            engine.stop(_STOP_SECONDS)

    def publish(self, params: Any, version: int) -> None:
        """Give a version to the engines that took it, and to each what it took after that, up to the next version."""
        takers = [number for number, script in self._scripts.items() if _takes(script, version)]
        for number in takers:
            if number not in self._engines:
                self._start(number)
            self._feed(number, params, version)
        for number in takers:
            self._wait(lambda number=number: self._versions.get(number) == version, f"weights {version}", number)

    def rollout(self, engine: int, request_id: int) -> Rollout:
        """A completion of an engine.

        Raises:
          MagistralError: The engine has failed, or does not come to it.
        """
        key = (engine, request_id)
        self._wait(lambda: key in self._rollouts, f"completion {request_id}", engine)
        with self._changed:
            return self._rollouts.pop(key)

    def _start(self, number: int) -> None:
        reports = Reports(
            on_rollout=lambda rollout: self._on_rollout(number, rollout),
            on_weights=lambda receipt: None,
            on_failure=self._on_failure,
            on_intake=lambda intake: self._on_intake(number, intake),
        )
        engine = self._engines[number] = self._make_engine(self._scripts[number].generator, reports)
        engine.start()
        engine.hold()

    def _feed(self, number: int, params: Any, version: int) -> None:
        engine, script = self._engines[number], self._scripts[number]
        while script.intakes:
            took = script.intakes[0]
            if took.version is not None and took.version != version:
                engine.advance(took.engine_step)  # as far as it goes without those weights
                return
            script.intakes.popleft()
            engine.advance(took.engine_step)
            if took.version is None:
                engine.submit([self._make_request(request_id) for request_id in took.request_ids])
            else:
                engine.set_weights(params, version)
        engine.advance(script.num_steps)

    def _wait(self, is_reached: Callable[[], bool], what: str, engine: int) -> None:
        waited = 0.0
        with self._changed:
            while not is_reached():
                if self._failure is not None:
                    raise MagistralError(f"An engine failed in the replay: {self._failure}.") from self._failure
                waited = 0.0 if self._changed.wait(_POLL_SECONDS) else waited + _POLL_SECONDS
                if waited >= self._deadline:
                    raise MagistralError(
                        f"Engine {engine} did not come to {what} in the replay, and has said nothing for "
                        f"{self._deadline:g} s (schedule.role_deadline)."
                    )

    def _on_rollout(self, number: int, rollout: Rollout) -> None:
        with self._changed:
            self._rollouts[number, rollout.request_id] = rollout
            self._changed.notify_all()

    def _on_intake(self, number: int, intake: Intake) -> None:
        with self._changed:
            if intake.version is not None:
                self._versions[number] = intake.version
            self._changed.notify_all()

    def _on_failure(self, error: Exception) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()


def _takes(script: Script, version: int) -> bool:
    return any(took.version == version for took in script.intakes)
