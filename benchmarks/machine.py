"""What every benchmark shares: side-by-side timing, the machine's own peak, and what a figure means nothing without."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console

console = Console()


class Timing(NamedTuple):
    """Least wall and process CPU seconds (all threads) over the repeats of one contestant."""

    wall: float
    cpu: float


def time_side_by_side(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Run all contestants once to compile, then in turn, `repeats` times.

    Taking turns exposes all to the same neighbours, and the minimum is the run that was disturbed least. Each must
    return only once its work is done.
    """
    for run in contestants.values():
        run()
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(min(t.wall for t in ts), min(t.cpu for t in ts)) for name, ts in timings.items()}


def gemm_peak(repeats: int = 10) -> Timing:
    """FLOP a second, and FLOP a CPU second, of a float32 matrix product of 1024 x 1024 x 1024: the floor's measure."""
    a = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(lambda x: x @ x)
    best = time_side_by_side({"gemm": lambda: jax.block_until_ready([product(a) for _ in range(8)])}, repeats)["gemm"]
    work = 8 * 2 * 1024**3
    return Timing(work / best.wall, work / best.cpu)


def memory_bandwidth(repeats: int = 5) -> float:
    """Bytes a second, read and written, of copying 256 MiB: the measure of what is bound by memory."""
    x = jax.numpy.ones(2**26, jax.numpy.float32)
    negate = jax.jit(jax.numpy.negative)
    best = time_side_by_side({"copy": lambda: jax.block_until_ready(negate(x))}, repeats)["copy"]
    return 2 * x.nbytes / best.wall


def setting(peak: Timing) -> dict[str, Any]:
    """Versions, cores and load: what a figure means nothing without."""
    names = ("magistral-jax", "jax", "jaxlib", "flax", "optax", "numpy", "google-tunix")
    versions = {name: _version(name) for name in names} | {"python": platform.python_version()}
    return {
        "versions": {name: version for name, version in versions.items() if version},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "device": jax.devices()[0].device_kind,
        "gemm_gflop_per_s": round(peak.wall / 1e9, 1),
        "gemm_gflop_per_cpu_s": round(peak.cpu / 1e9, 1),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
