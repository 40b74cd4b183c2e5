"""A fleet of generators that join over the network, when they like, and leave when they die.

The first groups wait until all places are taken, or until the wait is over with some of them taken. A lost generator's
work goes to those that are left at once; its place is free for another to join. With nobody left, all work waits for a
join, and where none comes in time the fleet has failed.
"""

import threading
from collections.abc import Callable
from functools import partial

from magistral_jax.generate.address import parse_address
from magistral_jax.generate.fleet import GeneratorFleet
from magistral_jax.generate.handle import Notice, Reports
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorProcess, Limits
from magistral_jax.generate.remote import Listener, RemoteWorker, read_token
from magistral_jax.publish.plane import Sender
from magistral_jax.publish.planes import choose_plane, make_sender
from magistral_jax.records import MagistralError


class RemoteFleet(GeneratorFleet):
    """A `Generator` made of those that join.

    Args:
      settings: Of the engines.
      weights: The trainer's end of the plane; closed by `stop`.
      reports: Where the fleet reports.
      token: What a generator must know; may be empty on a loopback address.
      deadline: Seconds to wait for a join, and that a generator may take for a step.

    Raises:
      MagistralError: The address cannot be listened at.
    """

    def __init__(
        self, settings: EngineSettings, weights: Sender, reports: Reports, *, token: str, deadline: float
    ) -> None:
        generation = settings.generation
        self._settings, self._deadline = settings, deadline
        self._num_places, self._is_open = generation.num_generators, False
        self._joining: dict[int, RemoteWorker] = {}
        self._wait: threading.Timer | None = None
        super().__init__(self._make_member, weights, reports, num_generators=0, max_restarts=generation.max_restarts)
        self._listener = Listener(generation.listen, token, self._on_join)

    @property
    def address(self) -> str:
        """Where generators join."""
        return self._listener.address

    def start(self) -> None:
        """Let generators in."""
        with self._lock:
            self._wait_for_join()
        self._listener.start()

    def stop(self, deadline: float) -> None:
        """Let nobody in any more, and end all that there are; see `GeneratorFleet.stop`."""
        self._listener.close()
        with self._lock:
            self._end_wait()
        super().stop(deadline)

    @property
    def _accepts_work(self) -> bool:
        return self._is_open and bool(self._members)

    # ---- who comes and goes -----------------------------------------------------------------------------------------

    def _make_member(self, number: int, reports: Reports) -> GeneratorProcess:
        worker = self._joining[number]
        limits = Limits.of(self._settings.generation, self._deadline)
        return GeneratorProcess(number, self._settings, self._weights, reports, launch=lambda: worker, limits=limits)

    def _on_join(self, worker: RemoteWorker) -> Callable[[], None] | str:
        with self._lock:
            taken = self._members.keys() | self._joining.keys()
            free = [number for number in range(self._num_places) if number not in taken]
            if self._is_stopping:
                return "the run is ending"
            if not free:
                return f"all {self._num_places} places are taken (generation.num_generators)"
            self._joining[free[0]] = worker
            return partial(self._admit, free[0])

    def _admit(self, number: int) -> None:
        with self._lock:
            process = self._make_process(number)
            worker = self._joining.pop(number)
            if self._is_stopping:
                worker.kill()
                return
            self._enlist(number, process)
            if len(self._members) == self._num_places or self._is_open:
                self._open()
        self._reports.on_notice(Notice("generator_joined", number, f"Generator {number} ({worker.name}) has joined."))

    def _fill(self, number: int) -> str:
        if not self._members:
            self._wait_for_join()
            return f"a generator that joins within {self._deadline:g} s takes its place"
        return "the others go on; another may join in its place"

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Give out what waits."""
        self._end_wait()
        self._is_open = True
        groups, self._backlog = self._backlog, []
        for group in groups:
            self.submit(group)

    def _wait_for_join(self) -> None:
        self._end_wait()
        self._wait = threading.Timer(self._deadline, self._end_of_wait)
        self._wait.daemon = True
        self._wait.start()

    def _end_wait(self) -> None:
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None

    def _end_of_wait(self) -> None:
        with self._lock:
            if self._is_stopping or (self._is_open and self._members):
                return
            if self._members:
                self._open()
                count = len(self._members)
                sentence = f"Only {count} of {self._num_places} generators have joined; the run begins with them."
                self._reports.on_notice(Notice("generators_missing", count, sentence))
                return
            self._is_stopping = True  # one report is enough
        self._reports.on_failure(
            MagistralError(
                f"No generator has joined at {self.address} for {self._deadline:g} s (schedule.role_deadline)"
            )
        )


def make_remote_fleet(settings: EngineSettings, reports: Reports, *, deadline: float) -> RemoteFleet:
    """A fleet that listens where `settings.generation` says.

    Args:
      settings: Of the engines.
      reports: Where the fleet reports.
      deadline: Seconds to wait for a join, and that a generator may take for a step.

    Raises:
      MagistralError: The token cannot be read, or the address not be listened at.
    """
    generation = settings.generation
    token = read_token(generation.token_file)
    host, _ = parse_address(generation.listen)
    sender = make_sender(choose_plane(generation.plane, generation.where), host)
    return RemoteFleet(settings, sender, reports, token=token, deadline=deadline)
