"""Several ways to train, over several seeds, side by side."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one variant with one seed."""

    variant: str
    seed: int
    scores: Mapping[str, Any]
    """As `EvaluationSummary.to_dict` gives them."""
    seconds: float
    """That its own runs took; what it shares with other seeds is not in it."""

    def row(self) -> list[str]:
        """Cells of the table."""
        majority = _majority(self.scores)
        scores = [_with_interval(self.scores, name) for name in ("pass_at_1", majority)]
        return [
            self.variant,
            str(self.seed),
            *scores,
            f"{self.scores['format_rate']:.1%}",
            f"{self.scores['mean_completion_length']:.1f}",
            f"{self.seconds:.0f}",
        ]


def variant_table(results: Sequence[Result]) -> str:
    """Results as a Markdown table, and below those of a variant its means, with the least and the most of any seed.

    Args:
      results: Those of a variant stand together.

    Source: Magistral (arXiv:2506.10910), section 5.3, Table 3.
    """
    maj = _majority(results[0].scores).removeprefix("maj_at_")
    header = ["variant", "seed", "pass@1 (95 % interval)", f"maj@{maj} (95 % interval)", "format", "tokens", "seconds"]
    rows = [header, ["---"] * len(header)]
    for _, group in itertools.groupby(results, key=lambda result: result.variant):
        found = list(group)
        rows += [result.row() for result in found]
        if len(found) > 1:
            rows.append(_means(found))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _means(results: Sequence[Result]) -> list[str]:
    def mean(values: Sequence[float], form: str) -> str:
        return format(np.mean(values), form)

    def spread(name: str) -> str:
        values = [result.scores[name] for result in results]
        return f"{mean(values, '.3f')} (seeds: {min(values):.3f} to {max(values):.3f})"

    return [
        f"**{results[0].variant}**",
        "mean",
        spread("pass_at_1"),
        spread(_majority(results[0].scores)),
        mean([result.scores["format_rate"] for result in results], ".1%"),
        mean([result.scores["mean_completion_length"] for result in results], ".1f"),
        mean([result.seconds for result in results], ".0f"),
    ]


def _majority(scores: Mapping[str, Any]) -> str:
    """Name of the majority vote, which has its k in it."""
    return next(name for name in scores if name.startswith("maj_at_"))


def _with_interval(scores: Mapping[str, Any], name: str) -> str:
    low, high = scores["intervals"][name]
    return f"{scores[name]:.3f} ({low:.3f} to {high:.3f})"
