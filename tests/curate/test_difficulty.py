"""Scores of problems from graded samples, and the rules that they are judged by."""

import pytest

from magistral_jax.curate.config import CurateConfig
from magistral_jax.curate.difficulty import GradedSample, Score, by_difficulty, rivals, score, with_score
from magistral_jax.curate.ledger import split_step, summary, table
from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem, Verdict

PROBLEM = Problem("p", "1+1", "2", extra={"level": 1})


def samples(**answers: int) -> list[GradedSample]:
    """`right=3` is three correct samples, `none=1` one without an answer, `lost=1` one that could not be graded."""
    verdicts = {"right": Verdict.CORRECT, "none": Verdict.BAD_FORMAT, "lost": Verdict.SANDBOX_ERROR}
    texts = {"right": "2", "none": None}
    return [
        GradedSample(texts.get(name, name), verdicts.get(name, Verdict.WRONG), 10)
        for name, count in answers.items()
        for _ in range(count)
    ]


def test_the_score_of_a_problem():
    # 3 of the 7 that were graded are right; the lost one counts nowhere.
    found = score("p", samples(right=3, x=2, y=1, none=1, lost=1))
    assert found == Score("p", 8, 7, 3, "2", 3, is_top_correct=True, mean_tokens=10.0)
    assert found.pass_rate == pytest.approx(3 / 7)


def test_spellings_of_one_answer_are_one_vote():
    texts = (r"\frac{1}{2}", "0.5", r"\frac{1}{2}", r"$\frac{1}{2}$", "1/2", "7")
    spelled = [GradedSample(text, Verdict.WRONG, 1) for text in texts]
    pairs = rivals(spelled)
    assert pairs == [(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "7")]
    assert score("p", spelled).num_top == 3  # without the verifier, only dollar signs are seen through
    found = score("p", spelled, pairs[:2])
    assert (found.top_answer, found.num_top, found.is_top_correct) == (r"\frac{1}{2}", 5, False)
    correct = [GradedSample(text, Verdict.CORRECT, 1) for text in ("0.5", "1/2", r"\frac{2}{4}")]
    assert score("p", correct).num_top == 3  # the verifier has said that they are equal


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (samples(right=1, x=7, none=8), None),
        (samples(right=15, x=1), None),
        (samples(right=16), "too easy"),
        (samples(x=8, y=8), "too hard"),  # half is no majority
        (samples(none=16), "too hard"),
        (samples(x=9, y=7), "reference taken for wrong"),
        (samples(x=9, right=7), "reference taken for wrong"),
        (samples(lost=16), "not graded"),
        (samples(right=1, x=1, lost=14), None),  # not 1 of 16
        (samples(x=2, lost=14), "reference taken for wrong"),
    ],
)
def test_who_stays(found: list[GradedSample], reason: str | None):
    judged = by_difficulty(PROBLEM, score("p", found), CurateConfig())
    assert (judged.reason if isinstance(judged, Removal) else None) == reason


def test_the_window_is_the_one_given():
    config = CurateConfig(too_hard=0.25, too_easy=0.75, agreement=0.9)
    kept = [
        isinstance(by_difficulty(PROBLEM, score("p", samples(right=n, x=8 - n)), config), Problem) for n in range(1, 9)
    ]
    assert kept == [False, False, True, True, True, False, False, False]


def test_the_columns_of_both_stages_stand_side_by_side():
    first = with_score(PROBLEM, score("p", samples(right=1, x=3)), 1)
    both = with_score(first, score("p", samples(right=3, y=1)), 2)
    assert both.extra["level"] == 1
    assert (both.extra["pass_rate_1"], both.extra["pass_rate_2"]) == (0.25, 0.75)
    assert (both.extra["top_answer_1"], both.extra["top_share_1"]) == ("x", 0.75)


def test_the_table():
    kept, step = split_step(
        "difficulty", [PROBLEM, Removal("a", "too easy"), Removal("b", "too hard"), Removal("c", "too easy")]
    )
    assert kept == [PROBLEM]
    assert table([step]).splitlines()[2] == "| difficulty | 4 | 1 | 2 too easy, 1 too hard |"
    assert summary([step]) == [{"step": "difficulty", "in": 4, "out": 1, "removed": {"too easy": 2, "too hard": 1}}]
