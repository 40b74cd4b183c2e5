"""How the schedule reaches generators, wherever they run: a handle to give work to, and reports that come back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.records import Rollout, WeightVersion


@dataclasses.dataclass(frozen=True)
class GeneratorUsage:
    """Seconds since the first weights, by what the engine was doing, and what came of it.

    Of several generators it is the seconds of the mean one, and the tokens of all.
    """

    busy: float = 0.0
    idle: float = 0.0
    idle_at_bound: float = 0.0  # the part of `idle` in which admission allowed no more work
    num_tokens: int = 0
    num_lost: int = 0  # generators that died and were replaced

    def __add__(self, other: "GeneratorUsage") -> "GeneratorUsage":
        """Both together."""
        return GeneratorUsage(*(a + b for a, b in zip(*map(dataclasses.astuple, (self, other)), strict=True)))

    def __sub__(self, earlier: "GeneratorUsage") -> "GeneratorUsage":
        """What happened between two readings."""
        return GeneratorUsage(*(a - b for a, b in zip(*map(dataclasses.astuple, (self, earlier)), strict=True)))


@dataclasses.dataclass(frozen=True)
class Notice:
    """A mishap that was dealt with: to be said and logged."""

    kind: str
    generator: int
    sentence: str


@dataclasses.dataclass(frozen=True)
class Intake:
    """What an engine was given, and before which of its steps: with its seed this decides all that it samples."""

    step: int
    request_ids: tuple[int, ...] = ()
    version: int | None = None  # of weights, in place of requests
    generator: int = 0
    engine: int = 0  # a generator's replacement is another engine


@dataclasses.dataclass(frozen=True)
class Reports:
    """Where a generator reports. All are called from threads of its own, and must return soon."""

    on_rollout: Callable[[Rollout], None]
    """Receives each finished completion."""
    on_weights: Callable[[WeightVersion], None]
    """Receives the receipt of each weight swap, computed from what the engine holds."""
    on_failure: Callable[[Exception], None]
    """Receives, once, the exception that ended it."""
    on_notice: Callable[[Notice], None] = lambda notice: None
    """Receives what went wrong and was dealt with."""
    on_intake: Callable[[Intake], None] = lambda intake: None
    """Receives what an engine took in, before anything that comes of it."""


@runtime_checkable
class Generator(Protocol):
    """One generator or several: in a thread, in processes, later on other hosts."""

    @property
    def is_at_bound(self) -> bool:
        """Whether admission allows no more work at the moment: the schedule says so, the meter counts it."""
        ...

    @is_at_bound.setter
    def is_at_bound(self, value: bool) -> None: ...

    def start(self) -> None:
        """Begin; returns at once."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests of one prompt; returns at once."""
        ...

    def set_weights(self, params: Any, version: int) -> None:
        """Hand over weights, which may be let go afterwards; what is submitted later is sampled from them or newer."""
        ...

    def usage(self) -> GeneratorUsage:
        """Reading of the meter."""
        ...

    def stop(self, deadline: float) -> None:
        """End, and give up what is unfinished. Raises `TimeoutError` where that takes more than `deadline` seconds."""
        ...
