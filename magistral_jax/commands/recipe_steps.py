"""One step of a recipe: begun, gone on with, or done already."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

from magistral_jax.commands.setup import open_run
from magistral_jax.commands.sft import sft
from magistral_jax.commands.traces import TRACES_FILE, traces
from magistral_jax.commands.train import train
from magistral_jax.config import Config
from magistral_jax.metrics import replace_text
from magistral_jax.records import MagistralError

_MARK_FILE = "step.json"


class StepStoppedError(Exception):
    """A step was asked to stop, and has saved what it had."""


_COMMANDS: Mapping[str, tuple[Callable[[Config], None], str]] = {
    "traces": (traces, TRACES_FILE),
    "sft": (sft, "policy"),
    "train": (train, "summary.json"),
}
"""Each with what it writes last into its folder."""


@dataclasses.dataclass
class _Mark:
    """What a recipe notes in the folder of a step."""

    began: float  # seconds since 1970, as is `finished`, which is None until the step is done
    seconds: float = 0.0  # that it took, all sessions together; of one that was killed nothing is known
    finished: float | None = None


def do_step(command: str, config: Config, folder: pathlib.Path, *, needs: Sequence[pathlib.Path]) -> None:
    """Begin a step, go on with it, or see that it is done.

    Args:
      command: One of a recipe.
      config: Its settings.
      folder: Of the step.
      needs: Folders of the steps that it was or is made from.

    Raises:
      MagistralError: It was done with other settings, or one that it needs was done again since.
      StepStoppedError: Ctrl-C; it goes on when it is called again.
    """
    mark = _read_mark(folder) or _Mark(began=time.time())
    for need in needs:
        before = _read_mark(need)
        if before and before.finished and before.finished > mark.began:
            raise MagistralError(f"{folder} was made from what {need} held before; delete it to have it made again.")
    is_begun = (folder / "config.json").exists()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=is_begun))
    if mark.finished:
        open_run(config)  # refuses other settings than those that it was done with
        return
    run, result = _COMMANDS[command]
    folder.mkdir(parents=True, exist_ok=True)
    _write_mark(folder, mark)
    session = time.monotonic()
    try:
        run(config)
        if not (folder / result).exists():
            raise StepStoppedError
        mark.finished = time.time()
    finally:
        mark.seconds += time.monotonic() - session
        _write_mark(folder, mark)
        if not (folder / "config.json").exists():  # a mistake in the settings leaves nothing behind
            (folder / _MARK_FILE).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()


def seconds_of(folder: pathlib.Path) -> float:
    """What a step took, all its sessions together; one that was killed is not in it."""
    mark = _read_mark(folder)
    return mark.seconds if mark else 0.0


def _read_mark(folder: pathlib.Path) -> _Mark | None:
    path = folder / _MARK_FILE
    return _Mark(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _write_mark(folder: pathlib.Path, mark: _Mark) -> None:
    replace_text(folder / _MARK_FILE, json.dumps(dataclasses.asdict(mark)) + "\n")
