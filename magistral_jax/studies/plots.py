"""Curves of a run as PNG files: one small plot per question that a reader asks, drawn from `metrics.jsonl`.

in: the records of the metrics and of `summary.json`; out: files. A plot without any data is left out.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = ("#2456d6", "#e07b00", "#0f8f6b", "#b5317a")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.bottom": False,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
SMOOTHED_FROM = 20  # points; fewer are shown as they are


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: metrics of one unit, by name and by the label that a reader sees."""

    name: str
    title: str
    unit: str
    series: Mapping[str, str]
    is_share: bool = False


PANELS = (
    Panel("reward", "Reward", "mean of a batch", {"reward": "reward", "pass_rate": "pass rate"}),
    Panel(
        "reward_parts",
        "Parts of the reward",
        "mean of a batch",
        {
            "reward_correctness": "correctness",
            "reward_format": "format",
            "reward_language": "language",
            "reward_length": "length",
        },
    ),
    Panel("length", "Completion length", "tokens", {"completion_length": "length"}),
    Panel("truncated", "Cut at the limit", "share of completions", {"truncated_share": "cut"}, is_share=True),
    Panel("entropy", "Entropy of the policy", "nats per token", {"entropy": "entropy"}),
    Panel("clip_fraction", "Clipped tokens", "share of tokens", {"clip_fraction": "clipped"}, is_share=True),
    Panel(
        "ratio",
        "Policy against behaviour",
        "nats per token",
        {"log_ratio": "log-ratio", "logprob_gap": "engine to trainer"},
    ),
    Panel("grad_norm", "Gradient norm", "before clipping", {"grad_norm": "norm"}),
    Panel("staleness", "Staleness", "weight versions behind", {"staleness": "staleness"}),
    Panel(
        "asynchrony",
        "Asynchrony",
        "share",
        {"swapped_token_share": "tokens after a swap", "generator_idle_share": "generator idle"},
        is_share=True,
    ),
    Panel(
        "pool",
        "Difficulty of the problems",
        "pass rate",
        {"pool_pass_rate": "running, of the pool", "graded_pass_rate": "of all that was graded"},
    ),
    Panel("throughput", "Throughput", "tokens per second", {"tokens_per_second": "tokens/s"}),
    Panel("queues", "Queues", "groups", {"ready_groups": "ready", "filtered_groups": "filtered"}),
)


def write_plots(
    folder: pathlib.Path, metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, pathlib.Path]:
    """Draw everything that there is data for; returns title and file of each plot."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with rc_context(STYLE):
        figures = {"evaluation": ("Evaluation before and after", draw_evaluation(summary))}
        figures |= {panel.name: (panel.title, draw_panel(panel, metrics)) for panel in PANELS}
        for name, (title, figure) in figures.items():
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)  # of an earlier report
            if figure is not None:
                figure.savefig(path, dpi=140)
                paths[title] = path
    return paths


def draw_panel(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Curves over the steps; None where no metric of the panel was written."""
    columns = {label: _column(metrics, name) for name, label in panel.series.items()}
    columns = {label: values for label, values in columns.items() if np.isfinite(values).any()}
    if not columns:
        return None
    figure, axes = _new_figure(panel.title, panel.unit)
    steps = np.array([record["step"] for record in metrics])
    for color, (label, values) in zip(COLORS, columns.items(), strict=False):
        if len(steps) < SMOOTHED_FROM:
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.3)
            axes.plot(steps, _smooth(values), color=color, linewidth=1.9, label=label)
    for step in stage_changes(metrics):
        axes.axvline(step - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.12)
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(columns) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4, fontsize=8, handlelength=1.2)
        axes.set_title(panel.title, pad=24)
    return figure


def stage_changes(metrics: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first step of each stage of a curriculum, but for the first one."""
    return [now["step"] for before, now in itertools.pairwise(metrics) if before.get("stage") != now.get("stage")]


def draw_evaluation(summary: Mapping[str, Any]) -> Figure | None:
    """Bars of pass@1 and maj@k before and after, with their intervals; None without an evaluation."""
    evaluations = {
        label: summary[key]
        for key, label in (("eval_before", "before"), ("eval_after", "after"))
        if isinstance(summary.get(key), Mapping)
    }
    names = sorted(
        {n for e in evaluations.values() for n in e if n == "pass_at_1" or n.startswith("maj_at_")}, reverse=True
    )
    if not names:
        return None
    figure, axes = _new_figure("Held-out problems", "share solved")
    width = 0.34
    for i, (color, (label, scores)) in enumerate(zip(("#b8c4de", COLORS[0]), evaluations.items(), strict=False)):
        values = np.array([_number(scores.get(name)) for name in names])
        places = np.arange(len(names)) + (i - (len(evaluations) - 1) / 2) * (width + 0.03)
        intervals = scores.get("intervals") or {}
        bounds = np.array([intervals.get(name) or (value, value) for name, value in zip(names, values, strict=True)])
        doubt = np.maximum(np.abs(bounds.T - values), 0)
        axes.bar(places, values, width, color=color, label=label)
        axes.errorbar(places, values, yerr=doubt, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
        for x, value, high in zip(places, values, bounds[:, 1], strict=True):
            if math.isfinite(value):
                axes.annotate(f"{value:.0%}", (x, high), (0, 4), textcoords="offset points", ha="center", color=INK)
    axes.set_xticks(np.arange(len(names)), [name.replace("_at_", "@") for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, fontsize=8, handlelength=1.2)
    axes.set_title("Held-out problems, 95 % intervals", pad=24)
    return figure


def _new_figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel(unit)
    return figure, axes


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, " N"]:
    return np.array([_number(record.get(name)) for record in metrics], dtype=np.float64)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _smooth(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Running mean, a twentieth of the run to either side; gaps are passed over."""
    radius = max(1, len(values) // 20)
    windows = [values[max(0, i - radius) : i + radius + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else math.nan for w in windows])
