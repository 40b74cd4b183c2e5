"""Soak of the verifier pool: hangs, crashes, memory hogs, and workers that are killed from outside.

    python benchmarks/soak_verify.py [--num-items 10000] [--kill-every 4] [--workers 2] ...

The same mixed items are graded twice: calmly, and in a storm, in which every `kill_every` seconds a worker of each
pool, now and then a box, and now and then the process that all workers are forked from, is killed. Two pools share the
machine: one grades math and code, the other calls a reward function that hangs, crashes and eats memory as its
completion says. What has to come out, and is printed as one JSON object in the last line:

  lost, doubled   items without a reward, with more than one: 0
  differing       items whose verdict in the storm is another than in the calm: 0. An item is retried once, so where
                  the storm hits it twice (`hit_twice`) its verdict is `sandbox_error`; that is counted apart, and rare
                  while `kill_every` is longer than an item takes
  memory          resident MiB of this process and of the zygotes, and open files, in the first and the last quarter
  left_running    processes below this one when both pools are closed: 0
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from magistral_jax.records import Problem, Reward
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.pool import VerifierPool, VerifyItem

console = Console(stderr=True)
WORDS = "We look at what is asked, work it out step by step, and write the answer down. "


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes; the defaults are those of the documented run."""

    num_items: int = 10_000
    workers: int = 2
    """Of each pool."""
    kill_every: float = 4.0
    """Seconds between two kills in a pool."""
    mechanism: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto"
    seed: int = 0


# ---- items ----------------------------------------------------------------------------------------------------------

FUNCTION = """
import ctypes, os, time

def score(thoughts, answer):
    if thoughts == "hang":
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass
    if thoughts == "crash":
        ctypes.string_at(0)
    if thoughts == "exit":
        os._exit(1)
    if thoughts == "hog":
        hog = [bytes(2**20) for _ in range(4096)]
    if thoughts == "raise":
        raise KeyError("a bug")
    return float(thoughts == answer)
"""
DEEDS = ("hang", "crash", "exit", "hog", "raise")
TESTS = [{"input": f"{number} {number + 1}\n", "output": f"{2 * number + 1}\n"} for number in range(8)]
PROGRAMS = {
    "right": ("python", "print(sum(map(int, input().split())))"),
    "wrong": ("python", "print(sum(map(int, input().split())) // 4)"),
    "hang": ("python", "while True: pass"),
    "crash": ("python", "import ctypes\nctypes.string_at(0)"),
    "hog": ("python", "hog = bytearray(2**30)"),
    "flood": ("python", "while True: print('x' * 1000)"),
    "cpp": ("cpp", "#include <bits/stdc++.h>\nint main() { long long a, b; std::cin >> a >> b; std::cout << a + b; }"),
    "segv": ("cpp", "int main() { volatile int *p = nullptr; return *p; }"),
    "refused": ("cpp", "int main() { return }"),
}
HOSTILE = ("9^{9^{9^{9}}}", "(10^7)!", "\\sum_{k=1}^{10000000} \\frac{1}{k^3+k+1}", "{" * 5000, "\\binom{10^9}{10^8}")


def make_item(number: int, seed: int) -> tuple[str, VerifyItem]:
    """An item and the pool that it is for: "verifiers" or "function"."""
    rng = random.Random(f"{seed}:{number}")
    draw = rng.random()
    verify = functools.partial(VerifyItem, number, num_tokens=1, max_length=1, truncated=False)
    member = functools.partial(verify, group=number // 8, group_size=8)
    if draw < 0.40:
        deed = rng.choice(DEEDS) if draw < 0.01 else str(rng.randrange(3))
        completion = f"<think>{deed}</think>done"
        return "function", verify(Problem("f", WORDS, "1"), completion)
    if draw < 0.55:
        language, source = PROGRAMS[rng.choice(tuple(PROGRAMS)) if draw < 0.42 else rng.choice(("right", "wrong"))]
        problem = Problem("c", WORDS, "", kind="code", extra={"tests": TESTS})
        completion = f"<think>{WORDS}</think>{WORDS}\n```{language}\n{source}\n```\n"
        return "verifiers", member(problem, completion)
    c = rng.randrange(1, 50)
    answer = rng.choice(HOSTILE) if draw < 0.58 else f"\\frac{{{2 * c}}}{{{rng.choice((6, 8))}}}"
    completion = f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}"
    return "verifiers", member(Problem("m", WORDS, f"{c}/3"), completion)


# ---- a run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What came of all items."""

    rewards: dict[int, list[Reward]]
    samples: list[dict[str, float]] = dataclasses.field(default_factory=list)
    num_kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_running: int = 0


def grade(args: Args, *, kill_every: float, title: str) -> Run:
    """Grade all items; `kill_every` 0 is calm."""
    run = Run(collections.defaultdict(list))
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(folder, "soak_rewards.py").write_text(FUNCTION)
        sys.path.insert(0, folder)
        stack.callback(sys.path.remove, folder)
        on_result = lambda number, reward: run.rewards[number].append(reward)
        pools = {name: stack.enter_context(pool) for name, pool in make_pools(args, on_result).items()}
        stop = threading.Event()
        threads = [threading.Thread(target=watch, args=(pools, run, stop, args), kwargs={"kill_every": kill_every})]
        threads += [threading.Thread(target=feed, args=(pool, name, args)) for name, pool in pools.items()]
        for thread in threads:
            thread.start()
        await_all(run, args.num_items, title)
        time.sleep(1.0)  # for rewards that nobody waits for
        stop.set()
        for thread in threads:
            thread.join()
        run.metrics = {name: dataclasses.asdict(pool.metrics()) for name, pool in pools.items()}
    run.seconds = time.monotonic() - start
    time.sleep(1.0)
    run.left_running = len(offspring(os.getpid()))
    return run


def make_pools(args: Args, on_result: Callable[[int, Reward], None]) -> dict[str, VerifierPool]:
    """The pool of the verifiers and that of the function."""
    sizes = {"num_workers": args.workers, "max_pending": 64 * args.workers, "recycle_after": 500}
    shared = {
        "code": CodeConfig(num_tests=5, cpu_seconds=1.0, wall_seconds=20.0),
        "sandbox": SandboxConfig(args.mechanism),
    }
    return {
        "verifiers": VerifierPool(RewardConfig(), PoolConfig(**sizes, deadline=20.0), on_result, **shared),
        "function": VerifierPool(
            RewardConfig(function="soak_rewards:score"), PoolConfig(**sizes, deadline=2.0), on_result, **shared
        ),
    }


def feed(pool: VerifierPool, name: str, args: Args) -> None:
    """Submit the items of a pool, which makes this wait for room."""
    for number in range(args.num_items):
        wanted, item = make_item(number, args.seed)
        if wanted == name:
            pool.submit(item)


def await_all(run: Run, num_items: int, title: str) -> None:
    """Wait until every item has a reward, or none has come for five minutes."""
    with Progress(console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(title, total=num_items)
        changed, before = time.monotonic(), 0
        while len(run.rewards) < num_items and time.monotonic() - changed < 300:
            if len(run.rewards) > before:
                changed, before = time.monotonic(), len(run.rewards)
            progress.update(task, completed=before)
            time.sleep(0.2)


def watch(pools: dict[str, VerifierPool], run: Run, stop: threading.Event, args: Args, *, kill_every: float) -> None:
    """Sample memory, and kill what is to be killed."""
    rng = random.Random(args.seed)
    next_kill = time.monotonic() + kill_every
    while not stop.wait(0.25):
        pids = {name: pool.metrics().worker_pids for name, pool in pools.items()}
        zygotes = {parent_of(pid) for workers in pids.values() for pid in workers} - {0, os.getpid()}
        run.samples.append(
            {
                "parent_mib": resident_mib(os.getpid()),
                "zygote_mib": max(map(resident_mib, zygotes), default=0.0),
                "open_files": float(len(os.listdir("/proc/self/fd"))),
            }
        )
        if kill_every and time.monotonic() >= next_kill:
            next_kill = time.monotonic() + kill_every
            for workers in pids.values():
                strike(workers, rng, run)


def strike(workers: Iterable[int], rng: random.Random, run: Run) -> None:
    """Kill one of the workers, one process of its boxes, or the zygote."""
    living = [pid for pid in workers if parent_of(pid)]
    if not living:
        return
    worker = rng.choice(living)
    victims = {"worker": worker, "zygote": parent_of(worker)}
    if boxes := offspring(worker):
        victims["box"] = rng.choice(sorted(boxes))
    what = rng.choices(tuple(victims), [8, 1, 4][: len(victims)])[0]
    with contextlib.suppress(ProcessLookupError):
        os.kill(victims[what], signal.SIGKILL)
        run.num_kills[what] += 1


# ---- processes ------------------------------------------------------------------------------------------------------


def parents() -> Iterator[tuple[int, int]]:
    """(process, parent) of every process that runs."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if state != "Z":
            yield int(path.parent.name), int(parent)


def parent_of(pid: int) -> int:
    """Parent of a process; 0 where it has ended."""
    return dict(parents()).get(pid, 0)


def offspring(pid: int) -> set[int]:
    """All processes below one."""
    all_parents, below = dict(parents()), {pid}
    while more := {child for child, parent in all_parents.items() if parent in below and child not in below}:
        below |= more
    return below - {pid}


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 where it has ended."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---- the comparison -------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Run both and print."""
    calm = grade(args, kill_every=0.0, title="calm")
    storm = grade(args, kill_every=args.kill_every, title="storm")
    print(json.dumps({"benchmark": "soak_verify", "sizes": dataclasses.asdict(args), **compare(args, calm, storm)}))


def compare(args: Args, calm: Run, storm: Run) -> dict[str, Any]:
    """The figures that the module's text explains."""
    numbers = range(args.num_items)
    verdict = lambda run, number: run.rewards[number][0].verdict.value if run.rewards.get(number) else "lost"
    path = lambda run, number: run.rewards[number][0].path if run.rewards.get(number) else "lost"
    changed = [number for number in numbers if verdict(calm, number) != verdict(storm, number)]
    hit_twice = [number for number in changed if verdict(storm, number) == "sandbox_error"]
    differing = [number for number in changed if number not in hit_twice]
    for number in changed[:20]:
        _, item = make_item(number, args.seed)
        before, after = (f"{verdict(run, number)} ({path(run, number)})" for run in (calm, storm))
        console.print(f"{number}: {before} in the calm, {after} in the storm: {item.completion[-60:]!r}", markup=False)
    return {
        "lost": sum(not run.rewards.get(number) for run in (calm, storm) for number in numbers),
        "doubled": sum(len(run.rewards.get(number, ())) > 1 for run in (calm, storm) for number in numbers),
        "differing": len(differing),
        "hit_twice": len(hit_twice),
        "left_running": calm.left_running + storm.left_running,
        "kills": dict(storm.num_kills),
        "verdicts": dict(collections.Counter(verdict(calm, number) for number in numbers)),
        "memory": {name: quarters(run.samples) for name, run in (("calm", calm), ("storm", storm))},
        "seconds": {"calm": round(calm.seconds, 1), "storm": round(storm.seconds, 1)},
        "pool": {pool: {name: metrics[name] for name in _COUNTS} for pool, metrics in storm.metrics.items()},
    }


_COUNTS = ("num_kills", "num_deaths", "num_retries", "num_recycles", "num_forks")


def quarters(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """The largest value of each measure in the first and in the last quarter of a run."""
    size = max(1, len(samples) // 4)
    largest = lambda part, name: round(max(sample[name] for sample in part), 1)
    return {name: [largest(samples[:size], name), largest(samples[-size:], name)] for name in samples[0]}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
