"""One side of `train_step.py`, in a process and with an interpreter of its own: loads the workload, steps when told to.

    PYTHON step_side.py ours|tunix|trl FOLDER

Reads a line, makes one update, writes one JSON line with its wall and CPU seconds (all threads). The first one
compiles. An empty line ends it: the last JSON line then holds the memory that the steps took.
"""

import argparse
import ctypes
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Workload(NamedTuple):
    """What all sides train on: settings, and sequences as padded arrays with their lengths."""

    folder: pathlib.Path
    """Holds the model as a Hugging Face folder, `model`."""
    settings: dict[str, Any]
    tokens: np.ndarray
    """[N, T], prompt and completion one after the other; 0 behind the end and nowhere else."""
    lengths: np.ndarray
    behavior_logprob: np.ndarray
    """[N, T], 0 outside completions."""
    advantage: np.ndarray

    def save(self) -> None:
        """Write it for the sides."""
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        np.savez(self.folder / "sequences.npz", **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Workload":
        """Read what `save` wrote."""
        arrays = np.load(folder / "sequences.npz")
        settings = json.loads((folder / "settings.json").read_text())
        return cls(folder, settings, **{name: arrays[name] for name in _ARRAYS})


_ARRAYS = ("tokens", "lengths", "behavior_logprob", "advantage")
_MODULES = {"ours": "step_ours", "tunix": "step_tunix", "trl": "step_trl"}


def memory_mib(field: str) -> float:
    """A field of this process's memory, such as VmRSS."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Answer line by line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=_MODULES)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    module = importlib.import_module(_MODULES[args.side])  # with all that it imports
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    before = memory_mib("VmRSS")
    step: Callable[[], object] = module.make_step(Workload.load(args.folder))
    is_first = True
    while sys.stdin.readline().strip():
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(seconds), file=answers, flush=True)
        if is_first:  # what compiling took is given back, and not counted
            ctypes.CDLL(None).malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            is_first = False
    print(json.dumps({"peak_mib": round(memory_mib("VmHWM") - before, 1)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
