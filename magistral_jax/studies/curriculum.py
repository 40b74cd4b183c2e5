"""The stages of a run as they went, and whether the report's three invariants held (§5.2), for the page of the run.

in: `stages.json`, and of the metrics `stage`, `pool_size`, `pool_pass_rate` and `graded_pass_rate`; out: HTML.
"""

import html
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from magistral_jax.data.curriculum import STAGES_FILE, Stage

Record = Mapping[str, Any]
NUM_STEPS = 5  # before and after a change, over which pass rates are compared


def read_stage_table(run_folder: pathlib.Path) -> list[Stage]:
    """Stages of a run; none where it has no curriculum, or none that can be read."""
    try:
        table: list[dict[str, Any]] = json.loads((run_folder / STAGES_FILE).read_text(encoding="utf-8"))
        return [_stage(row) for row in table]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _stage(row: dict[str, Any]) -> Stage:
    row["difficulty"], row["mixture"] = tuple(row["difficulty"]), tuple(row["mixture"])
    return Stage(**row)


def stage_spans(stages: Sequence[Stage], metrics: Sequence[Record]) -> list[tuple[Stage, list[Record]]]:
    """Each stretch of steps of one stage, in order; a stage that was called again has several."""
    staged = [record for record in metrics if isinstance(record.get("stage"), int | float)]
    spans = [(int(number) - 1, list(steps)) for number, steps in itertools.groupby(staged, lambda step: step["stage"])]
    return [(stages[number], steps) for number, steps in spans if 0 <= number < len(stages)]


def invariants(spans: Sequence[tuple[Stage, Sequence[Record]]]) -> list[tuple[bool | None, str]]:
    """Whether each of the three held, with a sentence about it; None where nothing can be said.

    Source: Magistral (arXiv:2506.10910), section 5.2.
    """
    changes = list(itertools.pairwise(spans))
    rates = [(_pass_rate(before[-NUM_STEPS:]), _pass_rate(after[:NUM_STEPS])) for (_, before), (_, after) in changes]
    lengths = [(before.free_length, after.free_length) for (before, _), (after, _) in changes]
    sizes = [[(s.batch_size, s.minibatch_size) for s in (before, after)] for (before, _), (after, _) in changes]
    is_measured = not any(math.isnan(rate) for pair in rates for rate in pair)
    is_harder = all(now < then for then, now in rates) if is_measured else None
    found = [
        (
            is_harder,
            f"data gets harder (share of right completions among all graded ones, {NUM_STEPS} steps before and after)",
            [f"{then:.2f} → {now:.2f}" for then, now in rates],
        ),
        (
            all(now > then for then, now in lengths),
            "l_max − l_cache grows (tokens without a length penalty)",
            [f"{then} → {now}" for then, now in lengths],
        ),
        (
            all(now[0] < then[0] and now[1] <= then[1] for then, now in sizes),
            "batches shrink (batch / minibatch, sequences)",
            [f"{then[0]} / {then[1]} → {now[0]} / {now[1]}" for then, now in sizes],
        ),
    ]
    words = {True: "Kept", False: "Violated", None: "Unknown"}
    return [(is_kept, f"{words[is_kept]}: {what}: {', '.join(values)}.") for is_kept, what, values in found if changes]


def curriculum_html(run_folder: pathlib.Path, metrics: Sequence[Record]) -> str:
    """Table of stages and the invariants; empty where there is no curriculum."""
    spans = stage_spans(read_stage_table(run_folder), metrics)
    if not spans:
        return ""
    head = "".join(f"<th scope=col>{name}</th>" for name in _COLUMNS)
    rows = [
        "".join(f"<td>{html.escape(column(stage, steps))}</td>" for column in _COLUMNS.values())
        for stage, steps in spans
    ]
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    said = "".join(f"<li>{html.escape(sentence)}</li>" for _, sentence in invariants(spans))
    return f"<table class=numbers><tr>{head}</tr>{table}</table><ul>{said}</ul>"


_COLUMNS: Mapping[str, Callable[[Stage, Sequence[Record]], str]] = {
    "stage": lambda stage, steps: stage.name,
    "steps": lambda stage, steps: f"{steps[0]['step']} to {steps[-1]['step']}",
    "problems in the pool": lambda stage, steps: _change(steps, "pool_size", "{:.0f}"),
    "pass rate of the pool": lambda stage, steps: _change(steps, "pool_pass_rate", "{:.2f}"),
    "of what was graded": lambda stage, steps: _change(steps, "graded_pass_rate", "{:.2f}"),
    "l_max − l_cache": lambda stage, steps: f"{stage.max_length} − {stage.length_cache} = {stage.free_length}",
    "batch / minibatch": lambda stage, steps: f"{stage.batch_size} / {stage.minibatch_size}",
}


def _pass_rate(steps: Sequence[Record]) -> float:
    values = _finite(steps, "graded_pass_rate")
    return sum(values) / len(values) if values else math.nan


def _finite(steps: Sequence[Record], name: str) -> list[float]:
    values = [step.get(name) for step in steps]
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _change(steps: Sequence[Record], name: str, form: str) -> str:
    values = _finite(steps, name)
    return " → ".join(form.format(value) for value in (values[0], values[-1])) if values else "—"
