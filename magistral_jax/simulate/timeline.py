"""A simulated schedule as a picture: generators above, verifiers and trainer below, a line for each publish.

After the report's Fig. 3 (Magistral, arXiv:2506.10910, section 3): a bar is a completion in its slot, its shade the
weight version that it began under.
"""

import dataclasses
import pathlib
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from magistral_jax.simulate.outcome import Outcome, Span

SHADES = ("#2456d6", "#7fa0ee", "#0f8f6b", "#7cc7b2", "#e07b00", "#f0b872")
INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
MAX_SLOTS = 12


@dataclasses.dataclass(frozen=True)
class Window:
    """Seconds that are shown."""

    begin: float
    end: float


def default_window(outcome: Outcome, num_steps: int = 4) -> Window:
    """The last steps of a run, when its queues have filled."""
    ends = [step.published for step in outcome.steps]
    begin = ends[-num_steps - 1] if len(ends) > num_steps else 0.0
    return Window(begin, ends[-1] if ends else 1.0)


def draw_timeline(outcome: Outcome, window: Window | None = None) -> Figure:
    """The schedule between two moments.

    Args:
      outcome: Of a simulation with `traced_generators` above 0.
      window: What is shown; the last four steps where none is given.
    """
    window = window or default_window(outcome)
    spans = [span for span in outcome.spans if span.ended > window.begin and span.began < window.end]
    generators = sorted({span.generator for span in spans if span.role == "generator"})
    heights = [2.0] * len(generators) + [0.5, 0.6]
    figure = Figure(figsize=(9.0, 0.9 + 0.62 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, generator in zip(rows, generators, strict=False):
        mine = [s for s in spans if s.role == "generator" and s.generator == generator and s.row < MAX_SLOTS]
        _draw_bars(axes, mine, gap=0.12)
        axes.set_ylabel(f"generator {generator}")
    verifiers, trainer = rows[-2], rows[-1]
    _draw_bars(verifiers, [span for span in spans if span.role == "verifier"], gap=0.0, color=MUTED)
    verifiers.set_ylabel("verifiers")
    steps = [span for span in spans if span.role == "trainer"]
    _draw_bars(trainer, steps, gap=0.1)
    for span in steps:
        middle = (max(span.began, window.begin) + min(span.ended, window.end)) / 2
        trainer.text(middle, 0.5, str(span.version + 1), ha="center", va="center", color="white", fontsize=8)
    trainer.set_ylabel("trainer")
    for axes in rows:
        _style(axes, window, [step.published for step in outcome.steps])
    rows[0].set_title("Simulated schedule: bars in the colour of their weights, lines where weights arrive")
    rows[-1].set_xlabel("seconds")
    return figure


def save_timeline(outcome: Outcome, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write `timeline.png` and `timeline.svg`."""
    figure = draw_timeline(outcome)
    paths = [folder / "timeline.png", folder / "timeline.svg"]
    for path in paths:
        figure.savefig(path, dpi=140)
    return paths


def _draw_bars(axes: Axes, spans: Iterable[Span], *, gap: float, color: str | None = None) -> None:
    boxes, colors = [], []
    for span in spans:
        low, high = span.row + gap, span.row + 1 - gap
        boxes.append([(span.began, low), (span.ended, low), (span.ended, high), (span.began, high)])
        colors.append(to_rgba(color or SHADES[span.version % len(SHADES)]))
    if boxes:
        axes.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=0.4))
        axes.set_ylim(0, max(box[2][1] for box in boxes) + gap)


def _style(axes: Axes, window: Window, publishes: Iterable[float]) -> None:
    axes.set_xlim(window.begin, window.end)
    axes.set_yticks([])
    axes.yaxis.label.set(rotation=0, ha="right", va="center", color=INK, fontsize=9)
    axes.xaxis.label.set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0)
    axes.title.set(fontsize=10, color=INK)
    for side in axes.spines.values():
        side.set_color(GRID)
    for time in publishes:
        if window.begin <= time <= window.end:
            axes.axvline(time, color=INK, linewidth=0.7, alpha=0.6)
