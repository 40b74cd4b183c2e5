"""What a person sees while a command works: a bar for countable work, a line per step for training."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True)

# (heading, metric, format) of the line of a training step
_COLUMNS = (
    ("reward", "reward", "{:6.3f}"),
    ("pass", "pass_rate", "{:5.1%}"),
    ("length", "completion_length", "{:6.1f}"),
    ("entropy", "entropy", "{:7.3f}"),
    ("clip", "clip_fraction", "{:6.2%}"),
    ("stale", "staleness", "{:5.2f}"),
    ("tok/s", "tokens_per_second", "{:6.0f}"),
    ("idle", "generator_idle_share", "{:5.1%}"),
    ("flight", "in_flight", "{:6.0f}"),
    ("ready", "ready_groups", "{:5.0f}"),
)
_LINES_PER_HEADING = 20


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields `report(done, total)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Within this block the first Ctrl-C (or SIGTERM) asks for an orderly stop; the second ends the process."""

    def request(signum: int, frame: Any) -> None:
        console.print("stopping after the running step; press Ctrl-C again to give it up")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StepPrinter:
    """One line per training step, with a heading now and then."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_lines = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Print the line of `step`."""
        cells = [form.format(metrics.get(name, float("nan"))) for _, name, form in _COLUMNS]
        if self._num_lines % _LINES_PER_HEADING == 0:
            headings = [title.rjust(len(cell)) for (title, _, _), cell in zip(_COLUMNS, cells, strict=True)]
            console.print("     step " + "  ".join(headings), style="bold", highlight=False)
        self._num_lines += 1
        console.print(f"{step:4d}/{self._num_steps:<4d} " + "  ".join(cells), highlight=False)
