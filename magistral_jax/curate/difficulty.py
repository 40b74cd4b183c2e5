"""How hard a problem is for a sampler, and whether its reference is to be believed; in: graded samples, out: who stays.

Source: Magistral (arXiv:2506.10910), section 4.1, the two stages of difficulty filtering.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from magistral_jax.curate.config import CurateConfig
from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.math_text import MAX_CHARACTERS, normalise, string_key


@dataclasses.dataclass(frozen=True)
class GradedSample:
    """One completion of a problem."""

    answer: str | None
    """What stands in its box; None where the format has none."""
    verdict: Verdict
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Score:
    """What the samples of a problem say."""

    id: str
    num_samples: int
    num_graded: int
    """Without those that the verifier failed on."""
    num_correct: int
    top_answer: str
    """The most frequent answer, as its first author wrote it; empty where there is none."""
    num_top: int
    """Samples that gave it."""
    is_top_correct: bool
    mean_tokens: float

    @property
    def pass_rate(self) -> float:
        """Share of the graded samples that are correct."""
        return self.num_correct / self.num_graded if self.num_graded else 0.0


_CORRECT = "correct"


def rivals(samples: Sequence[GradedSample]) -> list[tuple[str, str]]:
    """Pairs of answers that the verifier has to compare: the most frequent wrong one and each other one."""
    answers, votes = _votes(samples)
    wrong = [key for key, _ in votes.most_common() if key != _CORRECT]
    return [(answers[wrong[0]], answers[key]) for key in wrong[1:]]


def score(problem_id: str, samples: Sequence[GradedSample], equal: Collection[tuple[str, str]] = ()) -> Score:
    """Sum up the samples of a problem.

    Answers that the verifier accepts are one answer, however they are written. Samples on which the verifier failed say
    nothing.

    Args:
      problem_id: Of the problem.
      samples: All of it.
      equal: Those of `rivals` that are one answer.
    """
    graded = [sample for sample in samples if not sample.verdict.is_infrastructure_failure]
    answers, votes = _votes(samples)
    keys = {answer: key for key, answer in answers.items() if key != _CORRECT}
    for answer, other in equal:
        votes[keys[answer]] += votes.pop(keys[other])
    top = max(votes, key=lambda key: votes[key], default="")
    return Score(
        id=problem_id,
        num_samples=len(samples),
        num_graded=len(graded),
        num_correct=sum(sample.verdict is Verdict.CORRECT for sample in graded),
        top_answer=answers.get(top, "")[:500],
        num_top=votes[top],
        is_top_correct=top == _CORRECT,
        mean_tokens=sum(sample.num_tokens for sample in samples) / max(len(samples), 1),
    )


def _votes(samples: Sequence[GradedSample]) -> tuple[dict[str, str], collections.Counter[str]]:
    """First spelling and number of each answer; what the verifier rejected is compared as normalised text."""
    answers: dict[str, str] = {}
    votes = collections.Counter[str]()
    for sample in samples:
        if sample.verdict is Verdict.CORRECT:
            key = _CORRECT
        elif sample.answer is None or len(sample.answer) > MAX_CHARACTERS or sample.verdict.is_infrastructure_failure:
            continue
        else:
            key = "text " + string_key(normalise(sample.answer))
        answers.setdefault(key, sample.answer or "")
        votes[key] += 1
    return answers, votes


def by_difficulty(problem: Problem, found: Score, config: CurateConfig) -> Problem | Removal:
    """The problem, or why it is removed: a wrong reference before all, since such a problem is never solved either."""
    rate = f"{found.num_correct} of {found.num_graded}"
    if not found.num_graded:
        return Removal(problem.id, "not graded", f"the verifier failed on all {found.num_samples} samples")
    if not found.is_top_correct and found.num_top > config.agreement * found.num_graded:
        votes = f"{found.num_top} of {found.num_graded} say {found.top_answer}, the reference {problem.answer}"
        return Removal(problem.id, "reference taken for wrong", votes)
    if found.pass_rate <= config.too_hard:
        return Removal(problem.id, "too hard", rate)
    if found.pass_rate >= config.too_easy:
        return Removal(problem.id, "too easy", rate)
    return problem


def with_score(problem: Problem, found: Score, stage: int) -> Problem:
    """The problem with what was found out as columns of its own."""
    columns: dict[str, Any] = {
        f"pass_rate_{stage}": found.pass_rate,
        f"num_graded_{stage}": found.num_graded,
        f"top_answer_{stage}": found.top_answer,
        f"top_share_{stage}": found.num_top / max(found.num_graded, 1),
        f"mean_tokens_{stage}": found.mean_tokens,
    }
    return dataclasses.replace(problem, extra={**problem.extra, **columns})
