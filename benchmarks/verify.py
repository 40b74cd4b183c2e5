"""Verification: verdicts and solutions a second and core, beside math-verify and beside programs without a sandbox.

    python benchmarks/verify.py [--peer math-verify|none] [--data FILE.jsonl] [--num-answers 2000] ...

Math, `num_answers` answers through a pool of `workers` processes, on each side:

  honest   right answers in another notation than the reference, and wrong ones; from `data` (its column `answer`), or
           generated
  hostile  the same, but `hostile_share` of them are such as hang a grader: towers, factorials, endless sums

The peer is math-verify as its users run it: parse and verify in a process pool, with its own time limits, which are
those of our pool here. Our side does more: format gate, language of problem, thoughts and answer.

Code, `num_solutions` different solutions with 20 tests each, one after another on one core: ours in boxes; the floor is
`subprocess.run` of compiler and programs without any sandbox, precompiled header or preloaded interpreter.

"/cpu-s" counts CPU seconds of all processes, which a busy machine changes less than the clock. Starting is not counted.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.code_grade import CodeGrader
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.format import CodeBlock
from magistral_jax.verify.pool import VerifierPool, VerifyItem
from magistral_jax.verify.sandbox.mechanism import choose_mechanism

console = Console()
WORDS = "We look at what is asked, work it out step by step, and write the answer down. "


@dataclasses.dataclass(frozen=True)
class Args:
    """Sizes; the defaults are those of the documented figures."""

    peer: Literal["math-verify", "none"] = "none"
    """math-verify with an ANTLR runtime has to be installed to be the peer."""
    data: str = ""
    """JSONL file with a column `answer`; empty: generated answers."""
    num_answers: int = 2000
    """Answers of a math case; 0 leaves math out."""
    hostile_share: float = 0.01
    """Share of answers that are made to hang a grader."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes of a pool, on both sides."""
    deadline: float = 5.0
    """Seconds that both sides allow for an answer."""
    repeats: int = 3
    """Runs of each side of a math case, taken in turn; the least seconds count."""
    num_solutions: int = 20
    """Solutions of a language; 0 leaves code out."""
    mechanism: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto"
    """Sandbox of our side."""
    seed: int = 0


Pair = tuple[str, str]  # answer, reference


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run took."""

    count: int
    wall: float
    cpu: float
    num_right: int

    def row(self, cores: int) -> dict[str, float | int]:
        """Figures for the table and the JSON line."""
        return {
            "per_s_and_core": round(self.count / self.wall / cores, 1),
            "per_cpu_s": round(self.count / self.cpu, 1),
            "cpu_s_each": round(self.cpu / self.count, 4),
            "right": self.num_right,
        }


def main(args: Args) -> None:
    """Measure and print."""
    result: dict[str, Any] = {"benchmark": "verify", **setting(args), "sizes": dataclasses.asdict(args)}
    if args.num_answers:
        honest = honest_pairs(args)
        cases = {"honest": honest, "hostile": with_hostile(honest, args)}
        result["math"] = {name: measure_math(pairs, args) for name, pairs in cases.items()}
        show(f"math: {args.num_answers} answers, {args.workers} workers", result["math"], "verdicts")
    result["spawn_ms"] = round(spawn_floor() * 1000, 2)
    if args.num_solutions:
        result["code"] = {language: measure_code(language, args) for language in ("cpp", "python")}
        show(f"code: {args.num_solutions} solutions with {NUM_TESTS} tests, one core", result["code"], "solutions")
    console.print(
        f"{result['cores']} cores, load {result['load_average']}, {result['sandbox']}; fork and exec of a process and "
        f"waiting for it take {result['spawn_ms']} ms at the least"
    )
    print(json.dumps(result), flush=True)


# ---- math -----------------------------------------------------------------------------------------------------------


def honest_pairs(args: Args) -> list[Pair]:
    """Answers with references: two in three right and written in another way, where they are generated."""
    rng = random.Random(args.seed)
    if args.data:
        lines = pathlib.Path(args.data).read_text(encoding="utf-8").splitlines()
        answers = [str(json.loads(line)["answer"]) for line in lines if line.strip()]
        draw = lambda: (rng.choice(answers), rng.choice(answers))
        pairs = [draw() for _ in range(args.num_answers)]
        return [(reference if rng.random() < 2 / 3 else other, reference) for other, reference in pairs]
    return [generate_pair(rng) for _ in range(args.num_answers)]


def generate_pair(rng: random.Random) -> Pair:
    """A small answer of one of many kinds."""
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    right = rng.random() < 2 / 3
    d = c if right else c + 1
    kinds: Sequence[Pair] = (
        (f"{a * 1000 + d}", f"{a},{c:03d}"),
        (f"\\frac{{{d * a}}}{{{b * a}}}", f"{c}/{b}"),
        (f"{d / 4}", f"\\frac{{{c}}}{{4}}"),
        (f"{a}\\sqrt{{{d}}}", f"\\sqrt{{{a * a * c}}}"),
        (f"{10 * d}\\%", f"{c / 10}"),
        (f"({a}, {d})", f"({a},{c})"),
        (f"\\{{{d}, {a + 10}\\}}", f"\\{{{a + 10}, {c}\\}}"),
        (f"[{a}, {a + d})", f"\\left[{a}, {a + c}\\right)"),
        (f"(x+{a})(x+{d})", f"x^2+{a + c}x+{a * c}"),
        (f"x={d}", f"{c}"),
        (f"\\frac{{{d}\\pi}}{{{b}}}", f"{c}\\pi/{b}"),
        (f"{a} + {d}i", f"{c}i+{a}"),
        (f"{d}^{{{b}}}", f"{c**b}"),
        (f"{a}^\\circ" if right else f"{d}^\\circ", f"{a} \\text{{ degrees}}"),
        (f"\\begin{{pmatrix}} {a} \\\\ {d} \\end{{pmatrix}}", f"\\begin{{pmatrix}}{a}\\\\{c}\\end{{pmatrix}}"),
        ("\\text{no solution}" if right else "\\text{one}", "no solution"),
    )
    return rng.choice(kinds)


HOSTILE = (
    "9^{9^{9^{9}}}",
    "(10^7)!",
    "\\sum_{k=1}^{10000000} \\frac{1}{k^3+k+1}",
    "\\binom{1000000000}{500000000}",
    "(1+i)^{(1+i)^{(1+i)^{(1+i)^{(1+i)}}}}",
    "\\prod_{k=1}^{1000000} (1 + \\frac{1}{k^2})",
)


def with_hostile(pairs: Sequence[Pair], args: Args) -> list[Pair]:
    """The pairs with some answers replaced, spread evenly."""
    step = max(1, round(1 / args.hostile_share)) if args.hostile_share else len(pairs) + 1
    hostile = lambda index: HOSTILE[index // step % len(HOSTILE)]
    return [
        (hostile(index), reference) if index % step == step - 1 else (answer, reference)
        for index, (answer, reference) in enumerate(pairs)
    ]


def measure_math(pairs: Sequence[Pair], args: Args) -> dict[str, Any]:
    """Our figures and the peer's."""
    sides = {"ours": grade_ours}
    if args.peer != "none":
        sides["peer"] = grade_peer
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, grade in sides.items():
            costs[side].append(grade(pairs, args))
    return {side: least(runs).row(args.workers) for side, runs in costs.items()}


def least(runs: Sequence[Cost]) -> Cost:
    """The run that was disturbed least, by the clock and by CPU seconds."""
    return dataclasses.replace(runs[0], wall=min(run.wall for run in runs), cpu=min(run.cpu for run in runs))


def grade_ours(pairs: Sequence[Pair], args: Args) -> Cost:
    """All pairs through a warm pool; its CPU seconds less those of a pool that only starts."""

    def run(pairs: Sequence[Pair]) -> tuple[float, int]:
        pool = PoolConfig(num_workers=args.workers, deadline=args.deadline)
        items = [as_item(answer, reference) for answer, reference in pairs]
        with VerifierPool(RewardConfig(), pool, sandbox=SandboxConfig(args.mechanism)) as verifiers:
            verifiers.grade_all(items[: 4 * args.workers])
            start = time.perf_counter()
            rewards = verifiers.grade_all(items)
            return time.perf_counter() - start, sum(reward.verdict is Verdict.CORRECT for reward in rewards)

    _, start_cpu = with_children_cpu(lambda: run(pairs[: 4 * args.workers]))
    (wall, num_right), cpu = with_children_cpu(lambda: run(pairs))
    return Cost(len(pairs), wall, cpu - start_cpu, num_right)


def as_item(answer: str, reference: str) -> VerifyItem:
    completion = f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}"
    return VerifyItem(0, Problem("p", WORDS, reference), completion, 1, 1, False)


def grade_peer(pairs: Sequence[Pair], args: Args) -> Cost:
    """All pairs through math-verify in a warm pool of processes."""

    def run(pairs: Sequence[Pair]) -> tuple[float, int]:
        tasks = [(answer, reference, round(args.deadline)) for answer, reference in pairs]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.workers, context) as pool:
            list(pool.map(ask_peer, tasks[: 4 * args.workers]))
            start = time.perf_counter()
            verdicts = list(pool.map(ask_peer, tasks))
            return time.perf_counter() - start, sum(verdicts)

    _, start_cpu = with_children_cpu(lambda: run(pairs[: 4 * args.workers]))
    (wall, num_right), cpu = with_children_cpu(lambda: run(pairs))
    return Cost(len(pairs), wall, cpu - start_cpu, num_right)


def ask_peer(task: tuple[str, str, int]) -> bool:
    """One answer, as math-verify's documentation has it."""
    import math_verify  # pyright: ignore[reportMissingImports]

    answer, reference, seconds = task
    gold = math_verify.parse(f"${reference}$", parsing_timeout=seconds)
    return math_verify.verify(
        gold, math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds), timeout_seconds=seconds
    )


# ---- code -----------------------------------------------------------------------------------------------------------

NUM_TESTS = 20
CPP = """#include <bits/stdc++.h>
using namespace std;
// solution NUMBER
int main() {
    int n;
    cin >> n;
    vector<long long> a(n);
    for (auto &x : a) cin >> x;
    sort(a.begin(), a.end());
    map<long long, int> count;
    for (auto x : a) ++count[x];
    long long sum = accumulate(a.begin(), a.end(), 0LL);
    cout << sum << ' ' << count.size() << endl;
}
"""
PYTHON = """# solution NUMBER
from collections import Counter
n = int(input())
a = sorted(map(int, input().split()))
print(sum(a), len(Counter(a)))
"""
SOURCES = {"cpp": CPP, "python": PYTHON}


def measure_code(language: str, args: Args) -> dict[str, Any]:
    """Our figures and those of a plain loop."""
    rng = random.Random(args.seed)
    nonce = time.time_ns()  # so that no cache of an earlier run has them
    sources = [SOURCES[language].replace("NUMBER", f"{nonce} {index}") for index in range(args.num_solutions)]
    lists = [[rng.randrange(10**6) for _ in range(100)] for _ in range(NUM_TESTS)]
    tests = [
        {"input": f"{len(numbers)}\n{' '.join(map(str, numbers))}\n", "output": f"{sum(numbers)} {len(set(numbers))}\n"}
        for numbers in lists
    ]
    return {
        "ours": run_ours(language, sources, tests, args).row(1),
        "floor": run_plainly(language, sources, tests).row(1),
    }


def run_ours(language: str, sources: Sequence[str], tests: Sequence[dict[str, str]], args: Args) -> Cost:
    """Solutions in boxes that are up."""
    config = CodeConfig(num_tests=NUM_TESTS)
    selected = select_tests(Problem("p", "", "", kind="code", extra={"tests": list(tests)}), config, 0)
    mechanism = choose_mechanism(args.mechanism)
    grade = lambda grader, source: grader.grade(CodeBlock(language, source), selected).verdict is Verdict.CORRECT

    with CodeGrader(mechanism, config) as grader:
        grade(grader, SOURCES[language])  # starts the boxes
        start, start_cpu = time.perf_counter(), family_cpu()
        num_right = sum(grade(grader, source) for source in sources)
        return Cost(len(sources), time.perf_counter() - start, family_cpu() - start_cpu, num_right)


def run_plainly(language: str, sources: Sequence[str], tests: Sequence[dict[str, str]]) -> Cost:
    """A loop of `subprocess.run`, as a first verifier is written."""

    def passes(source: str, folder: pathlib.Path) -> bool:
        if language == "python":
            (folder / "main.py").write_text(source)
            command = [sys.executable, "-I", str(folder / "main.py")]
        else:
            (folder / "main.cpp").write_text(source)
            command = [str(folder / "main")]
            subprocess.run(["g++", "-std=c++20", "-O2", "-o", *command, str(folder / "main.cpp")], check=True)
        run = lambda test: subprocess.run(command, input=test["input"], capture_output=True, text=True, check=False)
        return all(run(test).stdout.split() == test["output"].split() for test in tests)

    def run_all() -> tuple[float, int]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            num_right = sum(passes(source, pathlib.Path(folder)) for source in sources)
        return time.perf_counter() - start, num_right

    own = time.process_time()
    (wall, num_right), cpu = with_children_cpu(run_all)
    return Cost(len(sources), wall, cpu + time.process_time() - own, num_right)


def spawn_floor(repeats: int = 200) -> float:
    """Seconds from spawning a process that does nothing to its end, at the least."""

    def spawn() -> float:
        start = time.perf_counter()
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        return time.perf_counter() - start

    return min(spawn() for _ in range(repeats))


# ---- what they share ------------------------------------------------------------------------------------------------


def with_children_cpu(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the CPU seconds of all processes that began and ended meanwhile."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    result = run()
    return result, spent() - before


def family_cpu() -> float:
    """CPU seconds of this process, of all below it that live, and of those that they have waited for."""
    fields: dict[int, list[str]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
    family = {os.getpid()}
    while more := {pid for pid, stat in fields.items() if int(stat[1]) in family and pid not in family}:
        family |= more
    ticks = sum(int(tick) for pid in family for tick in fields[pid][11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def setting(args: Args) -> dict[str, Any]:
    """Versions, cores and load: what a figure means nothing without."""
    versions = {"python": platform.python_version()}
    for name in ("magistral-jax", "sympy", "math-verify", "latex2sympy2-extended"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "sandbox": choose_mechanism(args.mechanism).value,
    }


def show(title: str, cases: dict[str, dict[str, Any]], what: str) -> None:
    """A table of both sides of each case."""
    table = Table(title=title)
    columns = ("", "", f"{what}\n/s/core", f"{what}\n/cpu-s", "cpu-s\neach", "right")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 1 else "left")
    for name, sides in cases.items():
        for side, row in sides.items():
            table.add_row(
                name,
                side,
                f"{row['per_s_and_core']:,.1f}",
                f"{row['per_cpu_s']:,.1f}",
                f"{row['cpu_s_each']:.4f}",
                str(row["right"]),
            )
    console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(tyro.cli(Args, description=__doc__))
