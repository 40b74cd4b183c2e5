"""One gradient step: tokens a second and memory, beside google-tunix 0.1.7 and TRL's GRPOTrainer.

    python benchmarks/train_step.py --tunix-python /venv_tunix/bin/python --trl-python /venv_trl/bin/python

Each side runs in a process of its own, with the interpreter that is given for it ("" leaves it out; ours runs in
this one's): Tunix's needs google-tunix and magistral-jax, TRL's needs trl and torch. All start from the same
weights and make
one GRPO update without KL term on the same sequences: forward, backward, AdamW, ratios against given behaviour
log-probs, entropy for the metrics.

  full    every sequence has `tokens` tokens
  ragged  lengths uniform in `shortest` ... `tokens`; `step` holds the same figures under the name that the issue gives

We pack sequences into rows under a token budget, and the packing is timed. The peers get what their GRPO trainers make
by default: one batch, prompts on the left, completions padded on the right. Only real tokens count, prompt included.
Compilation does not count, neither in time nor in memory. `peak_mib` is what a side's process grew by from its imports
to the peak of its later steps: weights, optimizer state and activations; the programs themselves are in it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Literal

import jax
import machine
import numpy as np
import tunix_peer
import tyro
from rich.table import Table
from step_side import Workload

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import save_folder
from magistral_jax.policy.transformer import init_params

Case = Literal["full", "ragged"]


@dataclasses.dataclass(frozen=True)
class Args(tunix_peer.Sizes):
    """Sizes of the comparison; the defaults are those of the documented figures."""

    tunix_python: str = ""
    """Interpreter with google-tunix and magistral-jax."""
    trl_python: str = ""
    """Interpreter with trl and torch."""
    sequences: int = 32
    """Sequences of a step."""
    tokens: int = 256
    """Tokens of the longest sequence, prompt included."""
    shortest: int = 32
    """Tokens of the shortest sequence of the ragged case."""
    prompt: int = 16
    """Tokens of every prompt."""
    repeats: int = 5
    """Timed steps of each side, taken in turn; the fastest counts."""
    row_tokens: int = 256
    """Tokens of a packed row."""
    rows_per_microbatch: int = 2
    logprob_chunk: int = 512
    """Tokens of logits at one time; those of a microbatch, and they are not computed twice."""
    remat: Literal["none", "full", "dots", "dots_no_batch", "outputs"] = "none"
    unroll: int = 0
    """Layers in one turn of our loop over them; 0 is all."""
    cases: tuple[Case, ...] = ("full", "ragged")


def main(args: Args) -> None:
    """Measure and print."""
    cases = {name: measure(args, name) for name in args.cases}
    show(args, cases)
    if "ragged" in cases:
        cases["step"] = cases["ragged"]
    setting = machine.setting(machine.gemm_peak())
    print(json.dumps({"benchmark": "train_step", **setting, "sizes": dataclasses.asdict(args), **cases}), flush=True)


def measure(args: Args, case: Case) -> dict[str, Any]:
    """Tokens a second and peak memory of each side, and the share of the GEMM peak that our floor is."""
    rng = np.random.default_rng(0)
    shortest = args.tokens if case == "full" else args.shortest
    lengths = rng.integers(shortest, args.tokens + 1, args.sequences)
    with tempfile.TemporaryDirectory() as folder:
        sides, peak = run_sides(args, make_workload(args, pathlib.Path(folder), lengths, rng))
    count = int(lengths.sum())
    for side in sides.values():
        side |= {"tok_per_s": round(count / side["wall"], 1), "tok_per_cpu_s": round(count / side["cpu"], 1)}
    share = flops(args.model(), lengths) / sides["ours"]["cpu"] / peak
    peaks = {"gemm_gflop_per_cpu_s": round(peak / 1e9, 1), "ours_share_of_gemm_peak": round(share, 3)}
    return {"tokens": count, **peaks, **sides}


def make_workload(args: Args, folder: pathlib.Path, lengths: np.ndarray, rng: np.random.Generator) -> Workload:
    """Random tokens (never 0, the peers' pad id) with plausible behaviour log-probs, and random weights."""
    model = args.model()
    save_folder(folder / "model", jax.device_get(init_params(model, jax.random.key(0))), model, model_type="llama")
    place = np.arange(args.tokens)[None]
    is_real = place < lengths[:, None]
    names = ("prompt", "row_tokens", "rows_per_microbatch", "logprob_chunk", "remat", "unroll")
    work = Workload(
        folder,
        {"learning_rate": 1e-5, **{name: getattr(args, name) for name in names}},
        np.where(is_real, rng.integers(1, args.vocab, is_real.shape), 0).astype(np.int32),
        lengths.astype(np.int32),
        np.where(is_real & (place >= args.prompt), -np.log(args.vocab), 0).astype(np.float32),
        rng.normal(size=len(lengths)).astype(np.float32),
    )
    work.save()
    return work


def run_sides(args: Args, work: Workload) -> tuple[dict[str, dict[str, float]], float]:
    """Least seconds and peak memory of each side, and the most FLOP a CPU second that a matrix product made meanwhile.

    They take turns, so that all meet the same neighbours.
    """
    pythons = {"ours": sys.executable, "tunix": args.tunix_python, "trl": args.trl_python}
    with contextlib.ExitStack() as stack:
        processes = {
            side: stack.enter_context(start_side(python, side, work.folder))
            for side, python in pythons.items()
            if python
        }
        for side, process in processes.items():
            ask(process, "warm up", side)
        seconds: dict[str, list[dict[str, float]]] = {side: [] for side in processes}
        peak = 0.0
        for _ in range(args.repeats):
            peak = max(peak, machine.gemm_peak(repeats=2).cpu)
            for side, process in processes.items():
                seconds[side].append(ask(process, "step", side))
        least = {side: {key: min(found[key] for found in seconds[side]) for key in ("wall", "cpu")} for side in seconds}
        return {side: least[side] | ask(process, "", side) for side, process in processes.items()}, peak


@contextlib.contextmanager
def start_side(python: str, side: str, folder: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """A process of a side, gone in the end."""
    words = [python, str(pathlib.Path(__file__).with_name("step_side.py")), side, str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with (folder / f"{side}.log").open("w") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str], word: str, side: str) -> dict[str, float]:
    """Have a side do something; its answer."""
    to, back = _pipe(process.stdin), _pipe(process.stdout)
    with contextlib.suppress(BrokenPipeError):
        to.write(f"{word}\n")
        to.flush()
    answer = back.readline()
    if not answer:
        folder = pathlib.Path(process.args[-1])  # pyright: ignore[reportArgumentType, reportIndexIssue]
        raise SystemExit(f"{side} has failed:\n{(folder / f'{side}.log').read_text()[-3000:]}")
    return json.loads(answer)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def flops(model: ModelConfig, lengths: np.ndarray) -> float:
    """The floor of the step's work: forward and backward of real tokens, with causal attention, nothing recomputed."""
    heads = model.num_heads * model.head_dim
    layer = 2 * model.d_model * (heads + model.num_kv_heads * model.head_dim) + 3 * model.d_model * model.d_ff
    per_token = 2 * (model.num_layers * layer + model.d_model * model.vocab_size)
    attention = 4 * model.num_layers * heads * float((lengths.astype(float) ** 2).sum()) / 2
    return 3 * (float(lengths.sum()) * per_token + attention)


def show(args: Args, cases: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"train step: {args.sequences} sequences of up to {args.tokens} tokens")
    columns = ("case", "side", "tok/s", "ours/it", "tok/cpu-s", "ours/it", "MiB", "ours/it", "of peak")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    for name in args.cases:
        case, ours = cases[name], cases[name]["ours"]
        for side in ("ours", "tunix", "trl"):
            if side not in case:
                continue
            found = case[side]
            ratio = lambda key, found=found, ours=ours: f"{ours[key] / found[key]:.2f}"
            peak = f"{case['ours_share_of_gemm_peak']:.0%}" if side == "ours" else ""
            speeds = [f"{found[key]:,.0f}" for key in ("tok_per_s", "tok_per_cpu_s")]
            table.add_row(
                name, side, speeds[0], ratio("tok_per_s"), speeds[1], ratio("tok_per_cpu_s"),
                f"{found['peak_mib']:,.0f}", ratio("peak_mib"), peak,
            )  # fmt: skip
    machine.console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
