"""What is generated: lengths of completions, prompts, and how many groups teach nothing.

A length is a pure function of a uniform random number and of the weight version at its dispatch, so that two schedules
with one seed meet the same completions.
"""

import dataclasses
import math
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from magistral_jax.metrics import METRICS_FILE, ROLLOUTS_FILE, read_json_lines
from magistral_jax.records import MagistralError

Lengths = Callable[[float, int], int]
"""(u in [0, 1), weight version) -> tokens of a completion."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the generators are asked for."""

    lengths: Lengths
    prompt_tokens: float = 256.0
    """Mean tokens of a prompt."""
    filtered_share: tuple[float, ...] = (0.0,)
    """Share of groups whose rewards are all equal, by the version at their dispatch; the last holds on."""

    def is_filtered(self, u: float, version: int) -> bool:
        """Whether the group that drew u teaches nothing."""
        return u < self.filtered_share[min(version, len(self.filtered_share) - 1)]


_PARAMETERS = {
    "lognormal": {"mean": 2000.0, "sigma": 1.0, "cap": math.inf, "growth": 0.0},
    "uniform": {"low": 1.0, "high": 2000.0, "growth": 0.0},
    "constant": {"tokens": 1000.0, "growth": 0.0},
}


def parse_lengths(text: str, longest: float = math.inf) -> Lengths:
    """Lengths from words such as `lognormal:mean=2000,sigma=1,cap=16384`.

    `lognormal` (mean, sigma, cap), `uniform` (low, high), `constant` (tokens); each takes `growth`, the relative growth
    per weight version. The mean is that before the cap; none is longer than `longest`.

    Raises:
      MagistralError: Another name, another parameter, or a value that is no positive number.
    """
    name, _, words = text.partition(":")
    if name not in _PARAMETERS:
        raise MagistralError(f"`lengths` is `{text}`; expected a run folder or one of {', '.join(_PARAMETERS)}.")
    values = dict(_PARAMETERS[name])
    for word in filter(None, words.split(",")):
        key, _, value = word.partition("=")
        if key not in values:
            raise MagistralError(f"`lengths` of `{name}` has no `{key}`; there are {', '.join(values)}.")
        values[key] = _positive(key, value)
    quantile = _quantile(name, values)
    growth, cap = values["growth"], min(values.get("cap", math.inf), longest)

    def lengths(u: float, version: int) -> int:
        return max(1, round(min(quantile(u) * (1 + growth) ** version, cap)))

    return lengths


def _quantile(name: str, values: dict[str, float]) -> Callable[[float], float]:
    match name:
        case "lognormal":
            if not values["mean"]:
                raise MagistralError("`mean` of `lengths` must be above 0.")
            sigma = values["sigma"]
            mu = math.log(values["mean"]) - sigma**2 / 2
            inverse = statistics.NormalDist().inv_cdf
            return lambda u: math.exp(mu + sigma * inverse(min(max(u, 1e-12), 1 - 1e-12)))
        case "uniform":
            low, high = values["low"], values["high"]
            return lambda u: low + u * (high - low)
        case _:
            return lambda u: values["tokens"]


def _positive(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise MagistralError(f"`{key}` of `lengths` must be a number of at least 0, not `{value}`.")
    return number


def workload_of_run(folder: pathlib.Path) -> Workload:
    """What a run met, step by step: lengths as they were trained, the mean prompt, and the share that was filtered.

    What a step trained on is taken for what the version before it was asked for; filtered completions are as long as
    those that were trained.

    Raises:
      MagistralError: The folder holds no rollouts.
    """
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    prompts: list[int] = []
    for row in read_json_lines(folder / ROLLOUTS_FILE):
        lengths[row["step"]].append(row["completion_tokens"])
        prompts.append(row["prompt_tokens"])
    if not lengths:
        raise MagistralError(f"{folder}: {ROLLOUTS_FILE} holds no rollouts to take lengths from.")
    by_version = [sorted(lengths[step]) for step in sorted(lengths)]
    shares = [
        filtered / max(filtered + trained, 1.0)
        for filtered, trained in _ended_by_step(folder, [len(rows) for rows in by_version])
    ]
    return Workload(_empirical(by_version), statistics.fmean(prompts), tuple(shares) or (0.0,))


def _empirical(by_version: Sequence[Sequence[int]]) -> Lengths:
    def lengths(u: float, version: int) -> int:
        rows = by_version[min(version, len(by_version) - 1)]
        return rows[int(u * len(rows))]

    return lengths


def _ended_by_step(folder: pathlib.Path, num_trained: Sequence[int]) -> list[tuple[float, float]]:
    """Sequences that were filtered while each batch came together, and that it had."""
    before, ended = 0.0, []
    for record, trained in zip(read_json_lines(folder / METRICS_FILE), num_trained, strict=False):
        filtered = record.get("total_zero_variance", before)
        ended.append((filtered - before, float(trained)))
        before = filtered
    return ended
