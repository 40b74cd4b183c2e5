"""What curation did, step by step: how many problems went in, how many came out, and why the others did not."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from magistral_jax.data.overlap import Removal, counted
from magistral_jax.records import Problem


@dataclasses.dataclass(frozen=True)
class Step:
    """One row of the table (report Table 1)."""

    name: str
    num_in: int
    num_out: int
    removed: tuple[Removal, ...]


def filter_step(
    name: str, problems: Sequence[Problem], judge: Callable[[Problem], Problem | Removal]
) -> tuple[list[Problem], Step]:
    """Judge each problem for itself: it stays, perhaps changed, or is removed."""
    return split_step(name, [judge(problem) for problem in problems])


def split_step(name: str, judged: Iterable[Problem | Removal]) -> tuple[list[Problem], Step]:
    """Problems that stay and the account of the others."""
    judged = list(judged)
    kept = [item for item in judged if isinstance(item, Problem)]
    removed = tuple(item for item in judged if isinstance(item, Removal))
    return kept, Step(name, len(judged), len(kept), removed)


def table(steps: Sequence[Step]) -> str:
    """The steps as a Markdown table.

    Source: Magistral (arXiv:2506.10910), section 4, Table 1.
    """
    lines = ["| step | in | out | removed, and why |", "| --- | ---: | ---: | --- |"]
    for step in steps:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counted(step.removed).items())
        lines.append(f"| {step.name} | {step.num_in} | {step.num_out} | {reasons or '-'} |")
    return "\n".join(lines) + "\n"


def summary(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The same for a program to read."""
    return [
        {"step": step.name, "in": step.num_in, "out": step.num_out, "removed": counted(step.removed)} for step in steps
    ]
