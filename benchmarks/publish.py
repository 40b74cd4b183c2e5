"""Publishing: how long the trainer waits for it, how soon the generators have it, and what it costs their decoding.

    python benchmarks/publish.py [--num-layers 8] [--d-model 512] [--max-processes 2] ...

Each plane moves the same weights, while its generators decode as fast as they can:

  same process       a jitted copy, handed to the engine's thread by reference
  shared_memory n    the same copy, written once to memory that n generator processes map, check and load
  tcp n              written once as well, and sent to each over its connection (a Unix socket here)
  transfer n         pulled by each from the trainer's device, by jax.experimental.transfer
  cross_host         `device_put` between the two processes of a jax.distributed job; only the copy itself

Milliseconds, the least of the repeats: `convert` is the jitted copy (cast and unstacking), `fingerprint` the checksum
on the device that receipts are compared to, `hand over` what follows until the trainer goes on: for shared memory and
tcp one copy of all bytes, and their checksums. `acknowledged` is from the beginning of all that to the last receipt;
`delivered` is the bytes of one generator over the time from the hand-over to the last receipt: copies, checks, loading,
and the wait for the end of a block. `pause` is the longest time between the ends of two blocks around a swap less the
usual one (median over the repeats); completions are one decode block long, so that each block shows. On a CPU all
share the cores, so it also holds what conversion, copies and checksums take from the engine. `memcpy` moves
as many bytes from one warm place to another.
"""

import dataclasses
import json
import pathlib
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tyro
from rich.table import Table

from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.fleet import GeneratorFleet
from magistral_jax.generate.handle import Generator, Reports
from magistral_jax.generate.launch import WorkerProcess, worker_environment
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorProcess
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.transformer import init_params
from magistral_jax.publish.planes import make_sender
from magistral_jax.publish.same_process import make_publish
from magistral_jax.records import Rollout, SamplingParams, WeightVersion

DEADLINE = 300.0
Plane = Literal["auto", "shared_memory", "tcp", "transfer"]
PLANES: tuple[Plane, ...] = ("shared_memory", "tcp", "transfer")


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes; the defaults are those of the documented figures."""

    vocab: int = 8192
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    d_ff: int = 1536
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the published weights; the trainer's are float32."""
    max_processes: int = 2
    """Each plane is measured with 1, 2, ... generator processes up to this number."""
    slots: int = 8
    """Sequences that each generator decodes at one time."""
    decode_block: int = 4
    repeats: int = 7
    """Publishes of each plane; one more comes before them and is not counted."""

    def model(self) -> ModelConfig:
        """The policy."""
        return ModelConfig(
            vocab_size=self.vocab,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.d_model // self.num_heads,
            d_ff=self.d_ff,
        )

    def settings(self, plane: Plane = "auto") -> EngineSettings:
        """The engines."""
        generation = GenerationConfig(
            plane=plane,
            num_slots=self.slots,
            max_prompt_tokens=16,
            max_new_tokens=self.decode_block,
            decode_block=self.decode_block,
            kv_dtype="bfloat16" if self.dtype == "bfloat16" else "float32",
        )
        return EngineSettings(self.model(), generation, (), 0, self.dtype)


class Feed:
    """Keeps generators busy, and writes down when each of them finished something and what it acknowledged."""

    def __init__(self, args: Args, num_generators: int) -> None:
        self._args, self._num_generators = args, num_generators
        self._next_id = 0
        self.receipts: queue.SimpleQueue[WeightVersion | Exception] = queue.SimpleQueue()
        # For each generator, when the first completion of each of its blocks came.
        self.finished: list[dict[int, float]] = [{} for _ in range(num_generators)]
        self.generator: Generator | None = None

    def reports(self, number: int = 0) -> Reports:
        """Of one generator."""

        def on_rollout(rollout: Rollout) -> None:
            self.finished[number].setdefault(rollout.engine_step, time.perf_counter())
            if self.generator is not None:
                self.submit()

        return Reports(on_rollout=on_rollout, on_weights=self.receipts.put, on_failure=self.receipts.put)

    def begin(self, generator: Generator) -> None:
        """Start, with twice as many requests as there are slots."""
        generator.start()
        self.generator = generator
        for _ in range(2 * self._args.slots * self._num_generators):
            self.submit()

    def submit(self) -> None:
        """One more request, of a prompt of its own."""
        assert self.generator is not None
        self._next_id += 1
        prompt = np.asarray([self._next_id % self._args.vocab, 1 + self._next_id % 7], np.int32)
        sampling = SamplingParams(1.0, 1.0, 0, self._args.decode_block)
        self.generator.submit([GenerationRequest(self._next_id, prompt, sampling)])

    def await_receipts(self, version: int) -> None:
        """Wait until all hold the version."""
        holders = set()
        while len(holders) < self._num_generators:
            receipt = self.receipts.get(timeout=DEADLINE)
            if isinstance(receipt, Exception):
                raise receipt
            if receipt.version == version:
                holders.add(receipt.generator)

    def gaps(self, since: float, until: float) -> tuple[float, float]:
        """(median, longest) seconds between two ends of blocks of a generator, the longest over all of them."""
        medians, longest = [], []
        for times in self.finished:
            blocks = np.diff([t for t in list(times.values()) if since <= t <= until])
            if len(blocks):
                medians.append(float(np.median(blocks)))
                longest.append(float(blocks.max()))
        return (max(medians), max(longest)) if medians else (0.0, 0.0)


def main(args: Args) -> None:
    """Measure and print."""
    params = init_params(args.model(), jax.random.key(0))
    publish = make_publish(args.model(), jnp.dtype(args.dtype))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(publish(params)))
    peak = machine.gemm_peak()
    cases: dict[str, dict[str, Any]] = {"memcpy": measure_memcpy(args, size)}
    planes: dict[str, Callable[[pathlib.Path], tuple[Feed, Generator]]] = {
        "same process": lambda folder: make_thread(args)
    }
    for plane in PLANES:
        for count in range(1, args.max_processes + 1):
            planes[f"{plane} {count}"] = lambda folder, plane=plane, count=count: make_processes(
                args, plane, count, folder
            )
    for name, make in planes.items():
        with tempfile.TemporaryDirectory() as folder:
            feed, generator = make(pathlib.Path(folder))
            cases[name] = measure(args, feed, generator, lambda: publish(params), size)
    cases["cross_host"] = measure_cross_host(args, size)
    show(cases, {"benchmark": "publish", **machine.setting(peak), "bytes": size, "sizes": dataclasses.asdict(args)})


def make_thread(args: Args) -> tuple[Feed, Generator]:
    """An engine in a thread of this process."""
    settings, feed = args.settings(), Feed(args, 1)
    batcher = ContinuousBatcher(settings.model, settings.generation, settings.stop_ids, settings.seed)
    return feed, GeneratorThread(batcher, feed.reports())


def make_processes(args: Args, plane: Plane, count: int, folder: pathlib.Path) -> tuple[Feed, Generator]:
    """Engines in processes of their own."""
    feed, weights = Feed(args, count), make_sender(plane)

    def make(number: int, reports: Reports) -> GeneratorProcess:
        reports = dataclasses.replace(reports, on_rollout=feed.reports(number).on_rollout)
        environment = worker_environment(number, count, "")
        launch = lambda: WorkerProcess(folder / f"{number}.log", environment)
        return GeneratorProcess(number, args.settings(plane), weights, reports, launch=launch)

    return feed, GeneratorFleet(make, weights, feed.reports(), num_generators=count, max_restarts=0)


def measure(
    args: Args, feed: Feed, generator: Generator, publish: Callable[[], Any], size: int
) -> dict[str, float | None]:
    """Publish again and again while the generators decode."""
    rows: list[dict[str, float]] = []
    try:
        generator.set_weights(publish(), 0)
        feed.begin(generator)
        feed.await_receipts(0)
        rest = 1.0
        for version in range(1, args.repeats + 2):
            rows.append(dict(publish_once(feed, generator, publish, version, rest)))
            rest = max(12 * rows[-1]["block"], 2 * rows[-1]["acknowledged"])
    finally:
        generator.stop(DEADLINE)
    rows = rows[1:]  # the first compiles and allocates
    best = {
        name: 1e3 * min(row[name] for row in rows)
        for name in ("convert", "fingerprint", "hand_over", "delivered", "acknowledged")
    }
    middle = {name: 1e3 * float(np.median([row[name] for row in rows])) for name in ("block", "pause")}
    figures: dict[str, float | None] = {f"{name}_ms": round(value, 3) for name, value in (best | middle).items()}
    if isinstance(generator, GeneratorFleet):
        figures["delivered_gb_per_s"] = round(size / best["delivered"] / 1e6, 2)
    return figures


def publish_once(
    feed: Feed, generator: Generator, publish: Callable[[], Any], version: int, rest: float
) -> Iterator[tuple[str, float]]:
    """The times of one publish, by name, after `rest` seconds of undisturbed decoding."""
    time.sleep(rest)
    began = last = time.perf_counter()
    params = jax.block_until_ready(publish())
    yield "convert", (now := time.perf_counter()) - last
    last = now
    fingerprint(params)
    yield "fingerprint", (now := time.perf_counter()) - last
    last = now
    generator.set_weights(params, version)
    yield "hand_over", time.perf_counter() - last
    feed.await_receipts(version)
    yield "delivered", (now := time.perf_counter()) - last
    yield "acknowledged", now - began
    usual, _ = feed.gaps(began - rest, began)
    time.sleep(10 * usual)  # for the blocks that follow the swap
    _, longest = feed.gaps(began, now + 10 * usual)
    yield "block", usual
    yield "pause", max(longest - usual, 0.0)


def measure_memcpy(args: Args, size: int) -> dict[str, float]:
    """The floor of any copy."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    best = machine.time_side_by_side({"memcpy": lambda: np.copyto(target, source)}, args.repeats)["memcpy"].wall
    return {"delivered_ms": round(1e3 * best, 3), "delivered_gb_per_s": round(size / best / 1e9, 2)}


def measure_cross_host(args: Args, size: int) -> dict[str, float]:
    """The copy inside a job of two processes, which is a program of its own."""
    first = random.randrange(20_000, 32_000)  # below the ports that the system hands out by itself
    addresses = [f"127.0.0.1:{first + i}" for i in range(3)]
    program = pathlib.Path(__file__).with_name("publish_cross_host.py")
    words = [addresses[0], str(size), str(args.repeats)]
    processes = [
        subprocess.Popen([sys.executable, str(program), str(rank), addresses[1 + rank], *words], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=DEADLINE)[0].decode() for process in processes]
    best = float(next(line for line in outputs[1].splitlines() if line[:1].isdigit()))
    return {"delivered_ms": round(1e3 * best, 3), "delivered_gb_per_s": round(size / best / 1e9, 2)}


def show(cases: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    """The table, the setting, and as the last line all of it as one JSON object."""
    table = Table(title=f"publish: {result['bytes'] / 1e6:.0f} MB of {result['sizes']['dtype']} weights")
    headings = {
        "convert_ms": "convert\nms",
        "fingerprint_ms": "finger-\nprint ms",
        "hand_over_ms": "hand\nover ms",
        "delivered_ms": "deli-\nvered ms",
        "delivered_gb_per_s": "\nGB/s",
        "acknowledged_ms": "acknow-\nledged ms",
        "block_ms": "block\nms",
        "pause_ms": "pause\nms",
    }
    table.add_column("")
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for name, case in cases.items():
        figures = (case.get(key) for key in headings)
        table.add_row(name, *("-" if figure is None else f"{figure:,.1f}" for figure in figures))
    machine.console.print(table)
    machine.console.print(f"{result['cores']} cores, load {result['load_average']}, on {result['device']}")
    print(json.dumps({**result, **cases}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
