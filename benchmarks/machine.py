"""What every benchmark shares: side-by-side timing, the machine's own peak, the table, and the JSON line at the end."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

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


def compare(tokens: Mapping[str, float], timings: Mapping[str, Timing]) -> dict[str, float | None]:
    """Tokens a second of "ours" and, where it ran, "peer", with their ratio; the same per CPU second."""
    row: dict[str, float | None] = {}
    for suffix, read in (("s", lambda t: t.wall), ("cpu_s", lambda t: t.cpu)):
        for name in ("ours", "peer"):
            speed = tokens[name] / read(timings[name]) if name in timings else None
            row[f"{name}_tok_per_{suffix}"] = None if speed is None else round(speed, 1)
    ours, peer = row["ours_tok_per_s"], row["peer_tok_per_s"]
    ours_cpu, peer_cpu = row["ours_tok_per_cpu_s"], row["peer_tok_per_cpu_s"]
    row["ratio"] = round(ours / peer, 2) if ours and peer else None
    row["cpu_ratio"] = round(ours_cpu / peer_cpu, 2) if ours_cpu and peer_cpu else None
    return row


def report(title: str, cases: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """The table of the cases, the setting, and as the last line all of it as one JSON object."""
    table = Table(title=title, caption="tok/cpu-s counts the CPU seconds of all threads: steadier on a busy machine")
    for column in ("", "ours\ntok/s", "peer\ntok/s", "ratio", "ours\ntok/cpu-s", "peer\ntok/cpu-s", "ratio", "of peak"):
        table.add_column(column, justify="right" if column else "left")
    number = lambda figure, digits: "-" if figure is None else f"{figure:,.{digits}f}"
    for name, case in cases.items():
        wall = [number(case["ours_tok_per_s"], 0), number(case["peer_tok_per_s"], 0), number(case["ratio"], 2)]
        cpu = [number(case[key], 0) for key in ("ours_tok_per_cpu_s", "peer_tok_per_cpu_s")]
        share = f"{case['ours_share_of_gemm_peak']:.0%}"
        table.add_row(name, *wall, *cpu, number(case["cpu_ratio"], 2), share)
    console.print(table)
    console.print(
        f"{result['cores']} cores, load {result['load_average']}; matrix products reach "
        f"{result['gemm_gflop_per_s']} GFLOP/s here, {result['gemm_gflop_per_cpu_s']} per CPU second. "
        '"of peak" is the share of the latter that our useful tokens need at the least.'
    )
    print(json.dumps({**result, **cases}), flush=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
