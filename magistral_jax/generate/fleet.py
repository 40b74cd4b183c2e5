"""Several generators in processes, behind one handle: a group goes to the least loaded one; a dead one is replaced.

What a dead one had not finished is given out again under the same request ids, so with the same random numbers. A
completion that came before the death is finished and never asked for again: nothing is lost or doubled.
"""

import dataclasses
import itertools
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from magistral_jax.generate.handle import GeneratorUsage, Notice, Reports
from magistral_jax.generate.launch import WorkerProcess, worker_environment
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorDiedError, GeneratorProcess, Limits
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.publish.plane import Sender
from magistral_jax.publish.planes import choose_plane, make_sender
from magistral_jax.records import MagistralError

_STOP_SECONDS = 10.0  # for running blocks when a stop comes; then the processes are killed


class GeneratorFleet:
    """A `Generator` made of processes.

    Args:
      make: Makes, but does not start, the process of a number, with the reports that it shall have.
      weights: The trainer's end of the plane: versions are written once for all processes. Closed by `stop`.
      reports: Where the fleet reports.
      num_generators: How many there are at all times.
      max_restarts: Replacements over the whole run; the death after that is the fleet's failure.
    """

    def __init__(
        self,
        make: Callable[[int, Reports], GeneratorProcess],
        weights: Sender,
        reports: Reports,
        *,
        num_generators: int,
        max_restarts: int,
    ) -> None:
        self._make, self._weights, self._reports = make, weights, reports
        self._max_restarts = max_restarts
        self._engines = itertools.count()  # a replacement is another engine
        self._lock = threading.RLock()  # of all below; a process may fail at any time
        self._members = {number: self._make_process(number) for number in range(num_generators)}
        self._backlog: list[Sequence[GenerationRequest]] = []  # groups that wait for a generator
        self._is_at_bound = self._is_stopping = False
        self._spent_by_lost = GeneratorUsage()

    @property
    def processes(self) -> tuple[GeneratorProcess, ...]:
        """Those that are there now, by number."""
        return tuple(self._members[number] for number in sorted(self._members))

    @property
    def is_at_bound(self) -> bool:
        """Whether admission allows no more work at the moment."""
        return self._is_at_bound

    @is_at_bound.setter
    def is_at_bound(self, value: bool) -> None:
        with self._lock:
            if value != self._is_at_bound:
                self._is_at_bound = value
                for process in self._members.values():
                    process.set_bound(value)

    def start(self) -> None:
        """Start the processes.

        Raises:
          MagistralError: The system refuses one.
        """
        try:
            for process in self.processes:
                process.start()
        except OSError as error:
            self.stop(0.0)
            raise MagistralError(f"A generator's process cannot be started: {error}.") from error

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Give a group to the generator that has least to do."""
        with self._lock:
            if self._accepts_work:
                min(self._members.values(), key=lambda process: process.num_unfinished).submit(requests)
            else:
                self._backlog.append(requests)

    @property
    def _accepts_work(self) -> bool:
        """Whether there is somebody to give a group to; until then it waits."""
        return bool(self._members)

    def set_weights(self, params: Any, version: int) -> None:
        """Write a version; returns when its bytes are in place, and waits for no generator.

        Raises:
          MagistralError: There is no memory for it.
        """
        self._weights.write(params, version)
        with self._lock:
            for process in self._members.values():
                process.send_weights()

    def usage(self) -> GeneratorUsage:
        """Mean seconds of a generator, all tokens, and how many were lost."""
        with self._lock:
            total = sum((process.usage() for process in self._members.values()), self._spent_by_lost)
            count = max(len(self._members), 1)
        seconds = {name: getattr(total, name) / count for name in ("busy", "idle", "idle_at_bound")}
        return dataclasses.replace(total, **seconds)

    def stop(self, deadline: float) -> None:
        """End all processes, by force if need be, and free what the weights took.

        Raises:
          TimeoutError: A process does not end even when it is killed.
        """
        with self._lock:
            self._is_stopping = True
            processes = self.processes
        for process in processes:
            process.ask_to_stop()
        end = time.monotonic() + min(deadline, _STOP_SECONDS)
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
        self._weights.close()

    # ---- when one fails ---------------------------------------------------------------------------------------------

    def _make_process(self, number: int) -> GeneratorProcess:
        engine, given = next(self._engines), self._reports
        reports = dataclasses.replace(
            given,
            on_failure=partial(self._on_failure, number),
            on_rollout=lambda rollout: given.on_rollout(dataclasses.replace(rollout, engine=engine)),
            on_intake=lambda intake: given.on_intake(dataclasses.replace(intake, engine=engine)),
        )
        return self._make(number, reports)

    def _on_failure(self, number: int, error: Exception) -> None:
        try:
            with self._lock:
                if self._is_stopping:
                    return
                may_restart = self._spent_by_lost.num_lost < self._max_restarts
                if not (may_restart and isinstance(error, GeneratorDiedError)):
                    raise error
                sentence = self._lose(number, error)
        except Exception as final:
            self._is_stopping = True  # one report is enough
            self._reports.on_failure(final)
        else:
            self._reports.on_notice(Notice("generator_lost", number, sentence))

    def _lose(self, number: int, error: Exception) -> str:
        """Give what a dead one had to do to others; returns the sentence that says so."""
        lost = self._members.pop(number)
        self._spent_by_lost += dataclasses.replace(lost.usage(), num_lost=1)
        remedy = self._fill(number)
        for group in lost.unfinished():
            self.submit(group)
        return (
            f"{error}. Its {lost.num_unfinished} unfinished completions are begun again, and {remedy} "
            f"({self._spent_by_lost.num_lost} of at most {self._max_restarts} times, generation.max_restarts)."
        )

    def _fill(self, number: int) -> str:
        """See to it that a place is taken again; returns what is done."""
        self._enlist(number, self._make_process(number))
        return "it is replaced"

    def _enlist(self, number: int, process: GeneratorProcess) -> None:
        """Start a process that comes later than the others."""
        process.send_weights()  # before any request
        process.set_bound(self._is_at_bound)
        process.start()
        self._members[number] = process


def make_fleet(settings: EngineSettings, reports: Reports, *, folder: pathlib.Path, deadline: float) -> GeneratorFleet:
    """As many generator processes as `settings.generation` says.

    Args:
      settings: Of the engines.
      reports: Where the fleet reports.
      folder: Where the processes' own output goes, to `generator_0.log` and so on.
      deadline: Seconds that a generator may take for a step, or to start.

    Raises:
      MagistralError: The system does not have what the plane of the weights needs.
    """
    generation = settings.generation
    weights = make_sender(choose_plane(generation.plane, generation.where))

    def make(number: int, reports: Reports) -> GeneratorProcess:
        log = folder / f"generator_{number}.log"
        environment = worker_environment(number, generation.num_generators, generation.devices, generation.tensor)
        return GeneratorProcess(
            number,
            settings,
            weights,
            reports,
            launch=lambda: WorkerProcess(log, environment),
            limits=Limits.of(generation, deadline),
        )

    return GeneratorFleet(
        make, weights, reports, num_generators=generation.num_generators, max_restarts=generation.max_restarts
    )
