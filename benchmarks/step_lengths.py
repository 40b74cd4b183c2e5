"""Tokens a second and memory of a train step against the length of its sequences, 256 to 8,192 tokens.

    python benchmarks/step_lengths.py
    python benchmarks/step_lengths.py --step.tunix-python /venv_tunix/bin/python --peers-up-to 1024

Every step has the same number of tokens, cut into ever fewer and longer sequences of one length, each a row of its own.
Sides, settings and columns are those of `train_step.py`; peers hold every layer's [T, T] scores, so they join up to a
length only. The share of the GEMM peak counts causal attention, whose part of the work grows with the length.
"""

import dataclasses
import json
from typing import Any

import machine
import train_step
import tyro
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure; the defaults are those of the documented figures."""

    step: train_step.Args = dataclasses.field(default_factory=lambda: train_step.Args(repeats=3))
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Tokens of the sequences of each row of the table."""
    tokens: int = 8192
    """Tokens of a step."""
    microbatch: int = 512
    """Tokens of a microbatch, and of logits at one time; longer sequences are a microbatch each."""
    peers_up_to: int = 1024
    """The longest sequences that the peers get."""


def main(args: Args) -> None:
    """Measure and print."""
    rows = {}
    for length in args.lengths:
        rows[length] = train_step.measure(sized(args, length), "full")
        machine.console.print(f"{length}: {rows[length]}")
    show(args, rows)
    setting = machine.setting(machine.gemm_peak())
    print(json.dumps({"benchmark": "step_lengths", **setting, "sizes": dataclasses.asdict(args), "rows": rows}))


def sized(args: Args, length: int) -> train_step.Args:
    """The step with sequences of one length."""
    has_peers = length <= args.peers_up_to
    return dataclasses.replace(
        args.step,
        sequences=args.tokens // length,
        tokens=length,
        row_tokens=length,
        rows_per_microbatch=max(1, args.microbatch // length),
        logprob_chunk=args.microbatch,
        tunix_python=args.step.tunix_python if has_peers else "",
        trl_python=args.step.trl_python if has_peers else "",
    )


def show(args: Args, rows: dict[int, dict[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"train step on {args.tokens:,} tokens, by length of the sequences")
    for column in ("length", "side", "tok/s", "tok/cpu-s", "peak MiB", "of GEMM peak"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for length, row in rows.items():
        for side in ("ours", "tunix", "trl"):
            if side not in row:
                continue
            share = f"{row['ours_share_of_gemm_peak']:.0%}" if side == "ours" else ""
            speeds = [f"{row[side][name]:,.0f}" for name in ("tok_per_s", "tok_per_cpu_s", "peak_mib")]
            table.add_row(f"{length:,}", side, *speeds, share)
    machine.console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
