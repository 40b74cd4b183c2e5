"""The labelled pairs of `math_cases.tsv`, kind by kind."""

import collections
import pathlib

import pytest

from magistral_jax.records import Verdict
from magistral_jax.verify.math_answer import grade_math

KINDS = (
    "integers", "decimals", "fractions", "mixed numbers", "thousands separators", "radicals", "percentages", "units",
    "degrees", "bases", "intervals", "sets", "tuples", "matrices", "equations", "inequalities", "complex numbers",
    "pi and e", "text", "multiple choice",
)  # fmt: skip


def read_cases():
    cases: dict[str, list[tuple[str, str, str]]] = collections.defaultdict(list)
    kind = ""
    for line in pathlib.Path(__file__).with_name("math_cases.tsv").read_text(encoding="utf-8").split("\n"):
        if line.startswith("# "):
            kind = line[2:]
        elif line and not line.startswith("## "):
            relation, answer, reference = line.split("\t")
            cases[kind].append((relation, answer, reference))
    return cases


CASES = read_cases()


@pytest.mark.parametrize("kind", CASES)
def test_labelled_pairs(kind: str):
    failures = []
    for relation, first, second in CASES[kind]:
        pairs = [(first, second), (second, first)] if relation in "=!" else [(first, second)]
        for answer, reference in pairs:
            verdict, path = grade_math(answer, reference)
            if (verdict is Verdict.CORRECT) != (relation in "=>"):
                failures.append((relation, answer, reference, verdict.value, path))
    assert failures == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_pairs(kind: str):
    relations = collections.Counter(relation for relation, _, _ in CASES[kind])
    assert relations.total() >= 15
    assert relations["="] >= 5
    assert relations["!"] >= 5


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("10", r"10\%"),
        ("10 cm", "10 m"),
        ("1/2^99", "1/2^98"),
        ("22/7", "3.142857"),
        ("c", "C"),
        ("(1,2,3)", "(3,2,1)"),
    ],
)
def test_what_must_never_count_as_equal(answer: str, reference: str):
    assert grade_math(answer, reference)[0] is Verdict.WRONG
    assert grade_math(reference, answer)[0] is Verdict.WRONG
    assert grade_math(rf"\text{{{answer}}}", reference)[0] is not Verdict.CORRECT
    assert grade_math(f"${answer}$", f"${reference}$")[0] is not Verdict.CORRECT


def test_the_order_of_a_list_counts_where_asked_for():
    assert grade_math("1,2,3", "3,2,1", is_ordered=False)[0] is Verdict.CORRECT
    assert grade_math("1,2,3", "3,2,1", is_ordered=True)[0] is Verdict.WRONG
    assert grade_math("1,2,4/2+1", "1,2,3", is_ordered=True)[0] is Verdict.CORRECT


def test_numbers_are_rounded_where_asked_for():
    assert grade_math("0.33", r"\frac13", decimals=2)[0] is Verdict.CORRECT
    assert grade_math("0.33", r"\frac13", decimals=3)[0] is Verdict.WRONG
    assert grade_math("(0.6, 2.6667]", r"(\frac35, \frac83]", decimals=2)[0] is Verdict.CORRECT
    assert grade_math(r"\begin{pmatrix}1.414\\x\end{pmatrix}", r"(\sqrt2, x)", decimals=3)[0] is Verdict.CORRECT
    assert grade_math("x = 3.14", r"\pi", decimals=2)[0] is Verdict.CORRECT
    assert grade_math("3.15", r"\pi", decimals=2)[0] is Verdict.WRONG
