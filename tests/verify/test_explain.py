"""Explanations of the math grader: JSON that shows its own steps."""

import json

import pytest

from magistral_jax.verify.explain import explain_math
from magistral_jax.verify.math_answer import grade_math
from magistral_jax.verify.math_latex import parse_latex
from magistral_jax.verify.math_plain import parse_plain
from magistral_jax.verify.math_show import show

PAIRS = [
    ("7", "7"), ("14/2", "$7$"), (r"\sum_{k=1}^{3} k", "6"), (r"x = \frac{2}{4}\text{ m}", "50 cm"), ("", "5"),
    ("no", "yes"), ("(" * 50, "7"), ("1" * 5000, "7"), ("9^9^9^9", "7"), ("7!!!!!?", "7"), (r"\{1,2\}", "[1, 2)"),
    (r"1 \pm x", "3,4"), (r"\begin{pmatrix}1&2\end{pmatrix}", "x < 3"), (r"\int_0^1 x \sin(x) dx", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_an_explanation_is_json_and_says_what_grading_says(answer: str, reference: str):
    explanation = json.loads(json.dumps(explain_math(answer, reference)))
    verdict, path = grade_math(answer, reference)
    assert (explanation["verdict"], explanation["path"]) == (verdict.value, path)
    assert explanation["extracted"] == answer
    assert explanation["reference"] == reference
    assert explanation["steps"][-1]["verdict"] == verdict.value


def test_the_steps_are_shown():
    explanation = explain_math(r"x = \frac{2}{4}\text{ m}", "50 cm")
    normalised, size, readings, comparison = explanation["steps"]
    assert normalised == {"step": "normalise", "answer": r"x = \frac{2}{4}\text{ m}", "reference": "50 cm"}
    assert size == {"step": "size", "too_large": None}
    assert readings["answer"] == [
        {"text": r"x = \frac{2}{4}", "grammar": "latex", "tree": "x = (2 / 4)", "unit": "1 length^1"}
    ]
    assert {"text": "50", "grammar": "plain", "tree": "50", "unit": "1/100 length^1"} in readings["reference"]
    assert comparison == {
        "step": "compare", "answer": "x = (2 / 4)", "reference": "50", "verdict": "correct", "path": "rational",
    }  # fmt: skip


def test_each_comparison_says_where_it_failed():
    steps = explain_math("1,234", "1235")["steps"]
    comparisons = [(step["answer"], step["differ"]) for step in steps if step["step"] == "compare"]
    assert comparisons == [("1234", "rational"), ("list[1, 234]", "rational")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"\frac{x^2+1}{-3!}", "(((x ^ 2) + 1) / -fact(3))"),
        (r"(1, \sqrt{2}]", "(1, root(2, 2)]"),
        (r"\{1, 2\}", "{1, 2}"),
        ("1, 2", "list[1, 2]"),
        (r"1 < x \le \pi", "1 < x <= pi"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "matrix[[1, 2], [3, 4]]"),
        (r"\binom{n}{k}", "binom(n, k)"),
        ("0.25", "1/4"),
    ],
)
def test_trees_as_text(text: str, shown: str):
    assert show(parse_latex(text)) == shown


def test_a_tower_is_shown_unevaluated():
    assert show(parse_plain("9^9^9^9")) == "(9 ^ (9 ^ (9 ^ 9)))"
