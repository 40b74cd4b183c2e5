"""Decoding: useful tokens a second of the engine, beside google-tunix's sampler and Hugging Face transformers.

    python benchmarks/decode.py [--tunix-python PYTHON] [--transformers-python PYTHON] [--cases full ragged ...]

Each side is a process of its own, under the interpreter that its flag names (an empty one leaves the side out), since
they hardly fit into one environment. All load one folder with the same random float32 weights and answer the same
prompts. One works at a time; rounds go in turn, so that all meet the same neighbours, and the fastest round counts.

  full       nothing stops: every completion has `new` tokens
  ragged     vocab/32 of the token ids stop a completion, so that each sampled token stops it with probability near
             1/32 (the random policy is nearly uniform), cut at `new` tokens
  group      as `full`, but 8 samples share each prompt
  long_tail  each request has its own limit, the same for every side: log-normal, mean 512, at most 4,096

Prefill counts, compilation does not. Only useful tokens count, stop token included: what a completion holds when it is
handed out. Who cannot refill a batch (Tunix, `generate`) decodes it until its longest row ends, and a finished row
yields nothing more; `generate` is told each row's limit, Tunix knows one limit a batch, its longest. Which tokens are
drawn differs between the sides (other random streams), so each is divided by its own count.

The floor is the least that the useful tokens need on this machine: matrix products at the peak of a large product, and
no decode step faster than its weights and KV cache are read at the bandwidth of a large copy, both measured here.
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Literal

import decode_work
import jax
import jax.numpy as jnp
import machine
import numpy as np
import tunix_peer
import tyro
from decode_work import Work
from rich.table import Table

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import save_folder
from magistral_jax.policy.transformer import forward, init_params, logits

Case = Literal["full", "ragged", "group", "long_tail"]


@dataclasses.dataclass(frozen=True)
class Args(tunix_peer.Sizes):
    """Sizes of the comparison; the defaults are those of the documented figures."""

    tunix_python: str = sys.executable
    """Interpreter of an environment with google-tunix; empty leaves it out, as does `--peer none`."""
    transformers_python: str = ""
    """Interpreter of an environment with transformers and torch; empty leaves both of its ways out."""
    cases: tuple[Case, ...] = ("full", "ragged", "group")
    """Which workloads; `long_tail` takes minutes a round, and tens of minutes on sides that cannot refill."""
    batch: int = 32
    """Sequences decoded at one time, on all sides."""
    num_batches: int = 4
    """Batches' worth of requests in one timed run."""
    prompt: int = 128
    """Tokens of a prompt."""
    new: int = 128
    """Most tokens of a completion."""
    mean_length: int = 32
    """Mean completion length of the ragged case before the cut: one token in so many stops."""
    long_mean: int = 512
    long_cap: int = 4096
    """Log-normal lengths of the long-tailed case."""
    group_size: int = 8
    """Completions of a prompt in the case `group`. The engine reads a prompt once for its group."""
    repeats: int = 5
    """Timed rounds of each side, after one that compiles; the fastest counts."""
    slow: float = 120.0
    """A side whose first round takes longer than this many seconds is not run again, and that round counts."""
    page_size: int = 16
    decode_block: int = 8
    prefill_rows: int = 8


class Side:
    """A process that decodes what it is told to."""

    def __init__(self, python: str, name: str, folder: pathlib.Path, args: Args) -> None:
        self.name = name
        settings = {n: getattr(args, n) for n in ("batch", "page_size", "decode_block", "prefill_rows")}
        script = pathlib.Path(__file__).with_name("decode_side.py")
        command = [python, str(script), name, str(folder), json.dumps(settings)]
        self._log = open(folder / f"{name}.log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def run(self, case: str) -> dict[str, Any]:
        """One round.

        Raises:
          SystemExit: The side failed; with its own words.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"case": case}) + "\n")
            stdin.flush()
            line = stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            self._log.seek(0)
            raise SystemExit(f"{self.name} failed in case {case}: {answer['error']}\n{self._log.read()[-3000:]}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def sides(args: Args, folder: pathlib.Path) -> Iterator[list[Side]]:
    """All that were asked for, ours first."""
    pythons = {"ours": sys.executable}
    if args.tunix_python:
        pythons["tunix"] = args.tunix_python
    if args.transformers_python:
        pythons |= {"transformers": args.transformers_python, "transformers-cb": args.transformers_python}
    with contextlib.ExitStack() as stack:
        started = []
        for name, python in pythons.items():
            started.append(Side(python, name, folder, args))
            stack.callback(started[-1].close)
        yield started


def write_model(folder: pathlib.Path, model: ModelConfig) -> None:
    """What all sides load: random weights, and logits of ours by which a side shows that it runs the same network."""
    params = init_params(model, jax.random.key(0))
    save_folder(folder, params, model, model_type="llama")
    (folder / "magistral_model.json").write_text(json.dumps(dataclasses.asdict(model)), encoding="utf-8")
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 1, model.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)
    hidden, _ = forward(params, model, tokens, positions, jnp.ones_like(tokens))
    decode_work.save_probe(folder, np.asarray(tokens), np.asarray(logits(params, model, hidden)))


def make_work(args: Args, case: Case) -> Work:
    """The requests of a case; the same in each run of this script."""
    rng = np.random.default_rng(0)
    num = args.batch * args.num_batches
    stops = tuple(int(i) for i in rng.permutation(args.vocab)[: args.vocab // args.mean_length])
    group = args.group_size if case == "group" else 1
    prompts = np.repeat(rng.integers(1, args.vocab, (num // group, args.prompt)).astype(np.int32), group, axis=0)
    limits = np.full(len(prompts), args.new)
    if case == "long_tail":
        limits = decode_work.long_tail(rng, num, args.long_mean, args.long_cap)
    return Work(prompts, limits, stops if case == "ragged" else ())


def measure_machine() -> dict[str, float]:
    """FLOP and bytes a second, of this moment."""
    peak = machine.gemm_peak()
    return {"flop_per_s": peak.wall, "flop_per_cpu_s": peak.cpu, "bytes_per_s": machine.memory_bandwidth()}


def measure(args: Args, case: Case, work: Work, contestants: list[Side]) -> dict[str, dict[str, Any]]:
    """Rounds in turn; the best of each side, with what it is of the floor and of us."""
    machine_speed = measure_machine()
    rounds: dict[str, list[dict[str, Any]]] = {}
    for side in contestants:
        rounds[side.name] = [side.run(case)]
        machine.console.print(f"{case}: {side.name} first round {rounds[side.name][0]['wall']:.1f} s")
    is_slow = {name: first["wall"] > args.slow for name, (first,) in rounds.items()}
    for _ in range(args.repeats):
        for side in contestants:
            if not is_slow[side.name]:
                rounds[side.name].append(side.run(case))
    again = measure_machine()
    speed = {name: max(value, again[name]) for name, value in machine_speed.items()}
    rows = {}
    for name, taken in rounds.items():
        timed = taken if is_slow[name] else taken[1:]
        # Which tokens are drawn differs from round to round: rates, not seconds, can be compared.
        wall = max(sum(one["lengths"]) / one["wall"] for one in timed)
        cpu = max(sum(one["lengths"]) / one["cpu"] for one in timed)
        least = decode_work.floor(args.model(), work, timed[-1]["lengths"], args.batch)
        at_best = sum(timed[-1]["lengths"]) / least.seconds(speed["flop_per_s"], speed["bytes_per_s"])
        rows[name] = {
            "tokens": sum(timed[-1]["lengths"]),
            "rounds": len(timed),
            "tok_per_s": round(wall, 1),
            "tok_per_cpu_s": round(cpu, 1),
            "floor_tok_per_s": round(at_best, 1),
            "share_of_floor": round(wall / at_best, 3),
        }
    for name, row in rows.items():
        row["ours_over_it"] = round(rows["ours"]["tok_per_s"] / row["tok_per_s"], 2)
        row["ours_over_it_cpu"] = round(rows["ours"]["tok_per_cpu_s"] / row["tok_per_cpu_s"], 2)
        machine.console.print(f"{case}: {name} {row}")
    return rows | {"machine": speed}


def show(cases: dict[str, dict[str, Any]], title: str) -> None:
    """The table."""
    table = Table(title=title, caption="tok/cpu-s counts the CPU seconds of all threads: steadier on a busy machine")
    for column in ("case", "side", "tok/s", "ours/it", "tok/cpu-s", "ours/it (cpu)", "of floor", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    for case, rows in cases.items():
        for name, row in rows.items():
            if name != "machine":
                speeds = f"{row['tok_per_s']:,.0f}", f"{row['ours_over_it']:.2f}", f"{row['tok_per_cpu_s']:,.0f}"
                shares = f"{row['ours_over_it_cpu']:.2f}", f"{row['share_of_floor']:.0%}", str(row["rounds"])
                table.add_row(case, name, *speeds, *shares)
    machine.console.print(table)


def main(args: Args) -> None:
    """Measure and print."""
    model = args.model()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        write_model(folder, model)
        cases: dict[str, dict[str, Any]] = {}
        with sides(args, folder) as contestants:
            for case in args.cases:
                work = make_work(args, case)
                work.save(folder / f"{case}.npz")
                cases[case] = measure(args, case, work, contestants)
    show(cases, f"decode: batch {args.batch}, {args.num_batches} batches, prompt {args.prompt}")
    setting = machine.setting(machine.gemm_peak())
    print(json.dumps({"benchmark": "decode", **setting, "sizes": dataclasses.asdict(args), **cases}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
