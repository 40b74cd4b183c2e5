"""Rates of a run that was made: costs read off its metrics, and its speed to hold a prediction against.

What the metrics cannot tell apart is folded together: prefill into the decode rate, the trainer's slowdown into its
rate where the two roles never ran alone. Steps in which something was compiled are left out, of rates and of speeds.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from magistral_jax.metrics import METRICS_FILE, read_json_lines
from magistral_jax.records import MagistralError
from magistral_jax.simulate.costs import Costs
from magistral_jax.simulate.outcome import Outcome
from magistral_jax.simulate.world import Cluster

BASE_SHARE = 0.4
"""Part of a full decode step that is taken not to depend on the batch: a run at one batch size does not tell."""
_COMPILED = 2.5  # times the median of a step's train seconds: XLA was at work


@dataclasses.dataclass(frozen=True)
class Measured:
    """Steps of a run in which nothing was compiled: their indices from 0, and seconds."""

    steps: tuple[int, ...]
    seconds: float

    @property
    def steps_per_hour(self) -> float:
        """Speed of the run."""
        return 3600 * len(self.steps) / max(self.seconds, 1e-12)

    def predicted(self, outcome: Outcome) -> float:
        """Steps per hour of the same steps in a simulation."""
        ends = [0.0, *(step.published for step in outcome.steps)]
        known = [k for k in self.steps if k < len(outcome.steps)]
        return 3600 * len(known) / max(sum(ends[k + 1] - ends[k] for k in known), 1e-12)


def measured_steps(folder: pathlib.Path) -> Measured:
    """Which steps of a run tell about its speed, and how long they took.

    Raises:
      MagistralError: The folder holds too few steps.
    """
    rows = _rows(folder)
    steady = _steady(rows)
    return Measured(tuple(steady), sum(rows[k]["step_seconds"] for k in steady))


def costs_of_run(folder: pathlib.Path, cluster: Cluster) -> Costs:
    """Costs of a run's own machine.

    Args:
      folder: The run.
      cluster: As the run had it.

    Raises:
      MagistralError: The folder holds too few steps, or nothing was sampled in them.
    """
    rows = _rows(folder)
    rows = [rows[k] for k in _steady(rows)]
    column = lambda name: np.array([float(row.get(name) or 0.0) for row in rows])
    step, train = column("step_seconds"), column("train_seconds")
    sampled = column("sampled_tokens_per_second") * step
    trained = column("tokens_per_second") * step
    idle = column("generator_idle_share") * step
    # The generators are idle at a bound, and they are at a bound while the trainer works.
    together = np.maximum(train - idle, 0.0)
    alone_rate, slowdown = _generator_rate(step - idle - together, together, sampled)
    per_token, trainer_slowdown = _trainer_rate(trained, train, together / np.maximum(train, 1e-9))
    if not alone_rate > 0 or not per_token > 0:
        raise MagistralError(f"{folder}: {METRICS_FILE} has no step in which tokens were sampled and trained on.")
    running = min(cluster.num_slots, max(float(np.mean(column("in_flight"))) / cluster.num_generators, 1.0))
    full = running * cluster.num_generators / alone_rate
    return Costs(
        decode_seconds=BASE_SHARE * full,
        decode_seconds_per_sequence=(1 - BASE_SHARE) * full / running,
        prefill_seconds_per_token=0.0,
        verify_seconds=float(np.mean(column("verify_seconds"))),
        train_seconds=0.0,
        train_seconds_per_token=per_token,
        publish_seconds=float(np.min(np.maximum(step - train, 0.0))),
        generator_slowdown=slowdown,
        trainer_slowdown=trainer_slowdown,
    )


def _generator_rate(
    alone: Float[np.ndarray, " N"], together: Float[np.ndarray, " N"], tokens: Float[np.ndarray, " N"]
) -> tuple[float, float]:
    """Tokens a second while the trainer rests, and how many times slower it goes while the trainer works."""
    design = np.stack([alone, together], axis=1)
    (free, shared), *_ = np.linalg.lstsq(design, tokens, rcond=None)
    if np.linalg.matrix_rank(design) == 2 and free > shared > 0:
        return float(free), float(free / shared)
    return float(np.sum(tokens) / max(np.sum(alone + together), 1e-9)), 1.0


def _trainer_rate(
    tokens: Float[np.ndarray, " N"], seconds: Float[np.ndarray, " N"], shared: Float[np.ndarray, " N"]
) -> tuple[float, float]:
    """Seconds a token alone, and the slowdown beside a generator; one figure where the share of both hardly varies."""
    if np.std(shared) > 0.2:
        design = np.stack([tokens, tokens * shared], axis=1)
        (alone, more), *_ = np.linalg.lstsq(design, seconds, rcond=None)
        if alone > 0 and more > 0:
            return float(alone), float(1 + more / alone)
    return float(np.sum(seconds) / max(np.sum(tokens), 1e-9)), 1.0


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    rows = [row for row in read_json_lines(folder / METRICS_FILE) if "step_seconds" in row and "train_seconds" in row]
    if len(rows) < 3:
        raise MagistralError(f"{folder}: {METRICS_FILE} holds {len(rows)} steps; at least 3 are needed for rates.")
    return rows


def _steady(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    limit = _COMPILED * float(np.median([row["train_seconds"] for row in rows]))
    return [k for k, row in enumerate(rows) if k > 0 and row["train_seconds"] <= limit]
