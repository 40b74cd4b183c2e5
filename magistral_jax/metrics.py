"""What a run says about itself: means over a step, metrics and rollouts as JSON lines, TensorBoard and W&B.

in: sums with their weights, graded rollouts; out: files in the run folder. Every line is written when it is complete,
so that a kill loses at most the line in the making; a resumed run first drops that half line and all lines of steps
that it is about to do again, so that nothing appears twice. A value that is no finite number is `null`.
"""

import base64
import importlib
import itertools
import json
import math
import os
import pathlib
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from magistral_jax.records import Graded, MagistralError, Prompt, Reward, Rollout, Verdict

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


class Means:
    """Weighted means by name: (sum, weight) pairs add up in any order, and one division comes last."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: Any, weight: Any = 1.0) -> None:
        """Count `total`, a sum of `weight` values; a scalar of any library will do."""
        pair = self._sums[name]
        pair[0] += float(total)
        pair[1] += float(weight)

    def result(self) -> dict[str, float]:
        """Mean of each name; NaN where all weights were 0."""
        return {name: total / weight if weight else math.nan for name, (total, weight) in self._sums.items()}


class MetricsWriter:
    """One line per step to `metrics.jsonl`, and the same numbers to TensorBoard and W&B where they are asked for.

    `resumed_step` is the last step that stands (that of the checkpoint); lines of later steps are dropped. None starts
    anew, and then it is an error if the folder has metrics already.
    """

    def __init__(
        self, folder: pathlib.Path, *, tensorboard: bool = False, wandb: bool = False, resumed_step: int | None = None
    ) -> None:
        """Open the files; raises MagistralError where `wandb` is asked for and not installed."""
        wandb_module = _import_wandb() if wandb else None
        self._lines = _JsonLines(folder / METRICS_FILE, resumed_step)
        self._wandb = _start_wandb(wandb_module, folder) if wandb_module else None
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge_step = None if resumed_step is None else resumed_step + 1
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of one step."""
        scalars = {name: float(value) for name, value in metrics.items()}
        self._lines.write({"step": step, "time": time.time(), **scalars})
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close all of them."""
        self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class RolloutWriter:
    """One line per trained completion to `rollouts.jsonl`; `resumed_step` as for metrics.

    It is there for people, and, bit by bit, for `replay`: ids and log-probs of the tokens are little-endian numbers of
    32 bits in base 64, the versions of their weights are runs, `[[version, count], …]`.
    """

    def __init__(self, folder: pathlib.Path, *, resumed_step: int | None = None) -> None:
        self._lines = _JsonLines(folder / ROLLOUTS_FILE, resumed_step)

    def write(
        self,
        step: int,
        prompt: Prompt,
        graded: Graded,
        *,
        completion: str,
        answer: str | None = None,
        advantage: Any = math.nan,
    ) -> None:
        """Write one completion.

        Args:
          step: The step that trained on it.
          prompt: What was asked.
          graded: Tokens and reward.
          completion: Text of the completion, for people.
          answer: What the verifier took for the answer; None where it found none.
          advantage: As it entered the loss.
        """
        rollout, reward = graded.rollout, graded.reward
        versions = rollout.weight_version.tolist()
        self._lines.write(
            {
                "step": step,
                "request": rollout.request_id,
                "problem": prompt.problem.id,
                "prompt": prompt.text,
                "completion": completion,
                "answer": answer,
                "reference": prompt.problem.answer,
                "verdict": reward.verdict.value,
                "reward": reward.total,
                "reward_format": reward.format,
                "reward_correctness": reward.correctness,
                "reward_length": reward.length,
                "reward_language": reward.language,
                "sandbox": reward.sandbox,
                "advantage": float(advantage),
                "version_min": min(versions, default=None),
                "version_max": max(versions, default=None),
                "prompt_tokens": len(rollout.prompt_ids),
                "completion_tokens": len(rollout.completion_ids),
                "truncated": rollout.truncated,
                "completion_ids": _to_base64(rollout.completion_ids, "<i4"),
                "behavior_logprob": _to_base64(rollout.behavior_logprob, "<f4"),
                "weight_versions": _runs(versions),
            }
        )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def graded_of(line: Mapping[str, Any], prompt_ids: Int32[np.ndarray, " T"]) -> Graded:
    """The completion of a line that `RolloutWriter` wrote, as it was trained; the prompt's ids are not in it."""
    rollout = Rollout(
        line["request"],
        prompt_ids,
        _from_base64(line["completion_ids"], "<i4"),
        _from_base64(line["behavior_logprob"], "<f4"),
        np.concatenate([np.full(count, version, np.int32) for version, count in line["weight_versions"]]),
        line["truncated"],
    )
    parts = (line[f"reward_{part}"] for part in ("format", "correctness", "length", "language"))
    return Graded(rollout, Reward(Verdict(line["verdict"]), *parts, path="recorded", seconds=0.0))


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one move: whoever is killed meanwhile leaves the old one, or none, but never half a one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def read_json_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, one at a time; a missing file has none, and a broken line is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


class _JsonLines:
    """An append-only file of JSON objects that carry a step."""

    def __init__(self, path: pathlib.Path, resumed_step: int | None) -> None:
        if resumed_step is not None:
            _drop_later_steps(path, resumed_step)
        elif path.exists():
            raise MagistralError(f"{path}: the folder holds a run already: use --resume, or another --run.folder.")
        # backslashreplace: a lone surrogate of an undecodable byte becomes \udcXX, which is its JSON escape.
        self._file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def _drop_later_steps(path: pathlib.Path, last_step: int) -> None:
    """Keep the whole lines up to `last_step`, in a new file that takes the old one's place in one move."""
    if not path.exists():
        return
    kept = path.with_suffix(".kept")
    with path.open("rb") as old, kept.open("wb") as new:
        for line in old:
            record = _parse(line) if line.endswith(b"\n") else None
            if record is not None and record["step"] <= last_step:
                new.write(line)
    os.replace(kept, path)


def _parse(line: str | bytes) -> dict[str, Any] | None:
    """The object of a line, or None where it is no whole object with a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _to_base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def _from_base64(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).astype(np.dtype(dtype).newbyteorder("="))


def _runs(values: list[int]) -> list[list[int]]:
    return [[value, len(list(run))] for value, run in itertools.groupby(values)]


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise MagistralError("run.wandb needs the package wandb, which is not installed: pip install wandb") from error


def _start_wandb(wandb: Any, folder: pathlib.Path) -> Any:
    """Start or go on with the W&B run of this folder; its id is kept there."""
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(project="magistral_jax", name=folder.name, id=id_file.read_text(), dir=folder, resume="allow")
