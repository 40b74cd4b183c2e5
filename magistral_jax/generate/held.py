"""Engines that step only as they are told: what a replay puts in the place of generators.

    set_weights and submit, each after `advance` to the step before which the recorded engine took them

An engine is deterministic in what it takes and when, so it makes the very completions again. It runs where the recorded
one ran, in a thread or in a process with as many cores: the last bits of a sum may depend on how many threads share it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from magistral_jax.generate.handle import Reports
from magistral_jax.generate.launch import WorkerProcess, worker_environment
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorProcess, Limits
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.publish.planes import make_sender


@runtime_checkable
class HeldEngine(Protocol):
    """One engine; all but `stop` return at once, and take effect in order. `GeneratorThread` is one as well."""

    def start(self) -> None:
        """Begin."""
        ...

    def hold(self) -> None:
        """From here on, and before any work, step only as `advance` says."""
        ...

    def advance(self, step: int) -> None:
        """Take as many steps, counted from the first one."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Take requests of one prompt."""
        ...

    def set_weights(self, params: Any, version: int) -> None:
        """Take weights."""
        ...

    def stop(self, deadline: float) -> None:
        """End. Raises `TimeoutError` where that takes more than `deadline` seconds."""
        ...


class HeldProcess:
    """A held engine in a process of its own.

    Args:
      settings: Of the engine.
      number: Place of its generator.
      reports: Where it reports.
      folder: Where the process's own output goes.
      deadline: Seconds that a step may take.

    Raises:
      MagistralError: The system has no anonymous shared memory.
    """

    def __init__(
        self, settings: EngineSettings, number: int, reports: Reports, *, folder: pathlib.Path, deadline: float
    ) -> None:
        generation = dataclasses.replace(settings.generation, where="process", plane="shared_memory")
        environment = worker_environment(number, generation.num_generators, generation.devices, generation.tensor)
        self._weights = make_sender("shared_memory")
        self._process = GeneratorProcess(
            number,
            dataclasses.replace(settings, generation=generation),
            self._weights,
            reports,
            launch=lambda: WorkerProcess(folder / f"generator_{number}.log", environment),
            limits=Limits.of(generation, deadline),
        )

    def start(self) -> None:
        """Start the process."""
        self._process.start()

    def hold(self) -> None:
        """See `HeldEngine`."""
        self._process.hold()

    def advance(self, step: int) -> None:
        """See `HeldEngine`."""
        self._process.advance(step)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """See `HeldEngine`."""
        self._process.submit(requests)

    def set_weights(self, params: Any, version: int) -> None:
        """See `HeldEngine`; the version before must have been taken, since the process fetches the newest."""
        self._weights.write(params, version)
        self._process.send_weights()

    def stop(self, deadline: float) -> None:
        """End the process, by force if it does not end by itself."""
        self._process.ask_to_stop()
        self._process.join(deadline)
        self._weights.close()
