"""What each piece of work costs: the cost model of a simulation, as a record and as a TOML file."""

import bisect
import dataclasses
import itertools
import math
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.records import MagistralError
from magistral_jax.toml_file import read_toml


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of everything. The defaults are round numbers of no particular machine: measure, or write a file.

    All times are those of the devices that `num_generators` generators and `trainer_devices` devices stand for.
    """

    decode_seconds: float = 0.02
    """Part of a decode step that does not depend on how many sequences run."""
    decode_seconds_per_sequence: float = 0.0002
    """Growth of a decode step with each running sequence."""
    decode_table: tuple[tuple[float, float], ...] = ()
    """(running sequences, seconds of a decode step), rising, read between its points; in the place of both above."""
    prefill_seconds_per_token: float = 0.00002
    """Reading one prompt token; a generator that reads does not decode. The prompt is read once for a group."""
    verify_seconds: float = 0.1
    """Mean time of grading one completion in one worker."""
    verify_spread: float = 1.0
    """Part of `verify_seconds` that is exponentially distributed; the rest is constant."""
    verifier_failure_rate: float = 0.0
    """Share of completions whose grading fails for good; their groups are dropped."""
    train_seconds: float = 1.0
    """Part of a batch that does not depend on its tokens."""
    train_seconds_per_update: float = 0.0
    """Optimizer step, once for each minibatch."""
    train_seconds_per_token: float = 0.00001
    """Forward and backward pass, by token of prompt and completion, on all `trainer_devices` together."""
    publish_seconds: float = 0.5
    """From the end of a batch until the generators have its weights; the trainer waits, the generators do not."""
    swap_seconds: float = 0.0
    """Pause of each generator when weights arrive."""
    generator_mtbf: float = 0.0
    """Mean seconds that a generator lives; 0 is for ever. What it had not finished is begun again elsewhere."""
    restart_seconds: float = 60.0
    """From the death of a generator to its replacement."""
    generator_slowdown: float = 1.0
    """Decoding takes so many times as long while the trainer works: above 1 where they share cores or a device."""
    trainer_slowdown: float = 1.0
    """Training takes so many times as long while any generator works."""
    devices_per_generator: int = 1
    """Devices of one generator; only a sweep over splits asks for it."""
    trainer_devices: int = 1
    """Devices that the train seconds were measured on; only a sweep asks for it."""
    trainer_scaling: float = 1.0
    """Exponent with which the trainer's speed grows with its devices; 1 is linear."""

    def step_seconds(self, num_slots: int) -> list[float]:
        """Seconds of a decode step by the number of running sequences, 0 to `num_slots`."""
        if not self.decode_table:
            return [self.decode_seconds + n * self.decode_seconds_per_sequence for n in range(num_slots + 1)]
        return [_interpolate(self.decode_table, float(n)) for n in range(num_slots + 1)]

    def on_trainer_devices(self, num_devices: int) -> "Costs":
        """The same with a trainer of another size."""
        factor = (self.trainer_devices / num_devices) ** self.trainer_scaling
        scaled = {
            name: getattr(self, name) * factor
            for name in ("train_seconds", "train_seconds_per_update", "train_seconds_per_token")
        }
        return dataclasses.replace(self, trainer_devices=num_devices, **scaled)


def load_costs(path: pathlib.Path) -> Costs:
    """Costs from a TOML file; what it does not name keeps its default.

    Raises:
      MagistralError: No such file, broken TOML, an unknown name, or a value that cannot be.
    """
    return costs_from(read_toml(path, "rates"), str(path))


def costs_from(table: Mapping[str, Any], origin: str, costs: Costs | None = None) -> Costs:
    """Costs with some values replaced.

    Args:
      table: New values by name.
      origin: Where they stand, for the message.
      costs: What keeps the others; the defaults where none is given.

    Raises:
      MagistralError: An unknown name, or a value of the wrong kind or out of range.
    """
    kinds = typing.get_type_hints(Costs)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in kinds:
            raise MagistralError(f"{origin}: unknown rate `{name}`; there are {', '.join(kinds)}.")
        values[name] = _table(name, value, origin) if name == "decode_table" else _number(name, value, origin, kinds)
    return dataclasses.replace(costs or Costs(), **values)


_LOWEST = {
    "generator_slowdown": 1.0,
    "trainer_slowdown": 1.0,
    "devices_per_generator": 1,
    "trainer_devices": 1,
}
_HIGHEST = {"verify_spread": 1.0, "verifier_failure_rate": 1.0, "trainer_scaling": 1.0}


def _number(name: str, value: Any, origin: str, kinds: Mapping[str, Any]) -> float | int:
    low, high = _LOWEST.get(name, 0.0), _HIGHEST.get(name, math.inf)
    is_whole = kinds[name] is int
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        kind = "a whole number" if is_whole else "a number"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise MagistralError(f"{origin}: `{name}` must be {kind} of at least {low:g}{most}, not `{value}`.")
    return value if is_whole else float(value)


def _table(name: str, value: Any, origin: str) -> tuple[tuple[float, float], ...]:
    try:
        points = tuple((float(n), float(seconds)) for n, seconds in value)
    except (TypeError, ValueError):
        points = ()
    is_rising = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not points or not is_rising or any(seconds <= 0 for _, seconds in points):
        raise MagistralError(
            f"{origin}: `{name}` must be a list of [running sequences, seconds of a decode step] with rising numbers."
        )
    return points


def _interpolate(points: Sequence[tuple[float, float]], n: float) -> float:
    """Value at n: on the line between its neighbours, level before the first, as the last two rise behind the last."""
    if len(points) == 1 or n <= points[0][0]:
        return points[0][1]
    place = min(bisect.bisect_left(points, (n, 0.0)), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (n - x0) * (y1 - y0) / (x1 - x0)
