"""What samples say about a policy: pass@k, maj@k, and how far to trust them.

in: for each problem, what became of its samples; out: an `EvaluationSummary`. Pure NumPy. Samples of one problem are
not independent of each other, so every interval resamples problems, never single samples.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from magistral_jax.records import MagistralError, Reward, Verdict


@dataclasses.dataclass(frozen=True)
class Sample:
    """One graded completion of an evaluation; `answer` in canonical form, None where none was found."""

    answer: str | None
    reward: Reward
    num_tokens: int
    truncated: bool


@dataclasses.dataclass(frozen=True)
class EvaluationSummary:
    """Scores in [0, 1], means over problems; an interval is (low, high) at 95 %."""

    num_problems: int
    num_samples: int
    num_ungraded: int  # the verifier failed, not the completion: in no score
    pass_at_k: Mapping[int, float]  # k = 1, 2, 4, … as far as every problem has samples
    maj_k: int
    maj_at_k: float
    intervals: Mapping[str, tuple[float, float]]
    mean_completion_length: float  # tokens
    format_rate: float
    truncated_share: float
    language_consistent_share: float
    parts: Mapping[str, "EvaluationSummary"] = dataclasses.field(default_factory=dict)
    """The same of some of the problems, by a value that those have in common."""

    def to_dict(self) -> dict[str, Any]:
        """Entries of `summary.json`; `maj_at_8` is named after its k, and parts come last, where there are any."""
        entries = dataclasses.asdict(self)
        maj_k, maj_at_k, passes = entries.pop("maj_k"), entries.pop("maj_at_k"), entries.pop("pass_at_k")
        del entries["parts"]
        return {
            "pass_at_1": passes[1],
            f"maj_at_{maj_k}": maj_at_k,
            "pass_at_k": {str(k): value for k, value in passes.items()},
            **entries,
            **({"parts": {value: part.to_dict() for value, part in self.parts.items()}} if self.parts else {}),
        }


def parts_table(summary: EvaluationSummary, column: str) -> str:
    """A Markdown table with a line for each part of an evaluation, and one for all problems."""
    heading = f"| {column} | problems | pass@1 | maj@{summary.maj_k} | format | one language | tokens |"
    lines = [heading, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, part in [*summary.parts.items(), ("all", summary)]:
        lines.append(
            f"| {name} | {part.num_problems} | {part.pass_at_k[1]:.3f} | {part.maj_at_k:.3f} | {part.format_rate:.1%} "
            f"| {part.language_consistent_share:.1%} | {part.mean_completion_length:.1f} |"
        )
    return "\n".join(lines) + "\n"


def pass_at_k(
    num_correct: Int[np.ndarray, " N"], num_samples: Int[np.ndarray, " N"], k: int
) -> Float[np.ndarray, " N"]:
    """Probability that at least one of k samples is correct, unbiased, for each problem.

        1 - C(n-c, k) / C(n, k) = 1 - ∏_{j<k} (n-c-j) / (n-j)

    The product is stable where the binomials overflow.

    Args:
      num_correct: c, correct samples of each problem.
      num_samples: n, all samples of each problem.
      k: Samples drawn without replacement.

    Raises:
      ValueError: k not in [1, min(n)].

    Source: Chen et al. (arXiv:2107.03374), Eq. 1.
    """
    if not 1 <= k <= num_samples.min():
        raise ValueError(f"pass@{k} needs 1 <= k <= samples of a problem, and one has {num_samples.min()}")
    drawn = np.arange(k)
    num_wrong = num_samples - num_correct
    return 1.0 - np.prod(np.maximum(num_wrong[:, None] - drawn, 0) / (num_samples[:, None] - drawn), axis=1)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Whether the most frequent of the first k answers of a problem is right.

    Samples without an answer do not vote; without any vote the result is 0. Among answers with equal votes one is
    drawn, so the value is the share of right ones among them. An answer is right if a sample that gave it was judged
    correct: another sample may have lost its verdict to the format. With fewer than k samples, all of them vote.

    Source: Magistral (arXiv:2506.10910), section 5.1, maj@64.
    """
    votes = [vote for vote in zip(answers[:k], correct[:k], strict=True) if vote[0] is not None]
    if not votes:
        return 0.0
    counts = collections.Counter(answer for answer, _ in votes)
    right = {answer for answer, is_correct in votes if is_correct}
    most = max(counts.values())
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in tied) / len(tied)


def bootstrap_interval(
    scores: Float[np.ndarray, " N"], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling problems.

    Where all scores are 0, or all 1, resampling shows no doubt at all; Wilson's bound for N problems stands in.

    Args:
      scores: One score in [0, 1] for each problem.
      num_resamples: Means drawn.
      seed: Of the resampling; the result is a function of the arguments.
    """
    n = len(scores)
    if np.ptp(scores) == 0 and scores[0] in (0, 1):
        doubt = 1.96**2 / (n + 1.96**2)
        return (0.0, doubt) if scores[0] == 0 else (1.0 - doubt, 1.0)
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    low, high = np.quantile(times_drawn @ scores / n, [0.025, 0.975])
    return float(low), float(high)


def summarize(samples_of_problems: Sequence[Sequence[Sample]], *, maj_k: int, seed: int = 0) -> EvaluationSummary:
    """Scores of an evaluation.

    A sample whose verifier failed is left out and counted; a problem left with none is left out as a whole.

    Args:
      samples_of_problems: Samples of each problem, in the order in which they were drawn.
      maj_k: Samples that vote.
      seed: Of the resampling behind the intervals.

    Raises:
      MagistralError: No sample was graded.
    """
    graded = [
        [sample for sample in samples if not sample.reward.verdict.is_infrastructure_failure]
        for samples in samples_of_problems
    ]
    graded = [samples for samples in graded if samples]
    if not graded:
        raise MagistralError(
            f"The verifier failed on each of the {sum(map(len, samples_of_problems))} completions: "
            "there is nothing to sum up."
        )
    correct = [[sample.reward.verdict is Verdict.CORRECT for sample in samples] for samples in graded]
    num_samples = np.array([len(row) for row in correct])
    num_correct = np.array([sum(row) for row in correct])

    passes = {2**i: pass_at_k(num_correct, num_samples, 2**i) for i in range(int(num_samples.min()).bit_length())}
    majorities = np.array(
        [
            maj_at_k([sample.answer for sample in samples], row, maj_k)
            for samples, row in zip(graded, correct, strict=True)
        ]
    )
    scores = {**{f"pass_at_{k}": values for k, values in passes.items()}, f"maj_at_{maj_k}": majorities}
    flat = [sample for samples in graded for sample in samples]
    return EvaluationSummary(
        num_problems=len(graded),
        num_samples=len(flat),
        num_ungraded=sum(map(len, samples_of_problems)) - len(flat),
        pass_at_k={k: float(values.mean()) for k, values in passes.items()},
        maj_k=maj_k,
        maj_at_k=float(majorities.mean()),
        intervals={name: bootstrap_interval(values, seed=seed) for name, values in scores.items()},
        mean_completion_length=float(np.mean([sample.num_tokens for sample in flat])),
        format_rate=float(np.mean([sample.reward.verdict is not Verdict.BAD_FORMAT for sample in flat])),
        truncated_share=float(np.mean([sample.truncated for sample in flat])),
        language_consistent_share=float(np.mean([sample.reward.language > 0 for sample in flat])),
    )
