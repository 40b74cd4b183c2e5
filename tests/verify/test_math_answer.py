import os
import pathlib
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.records import Verdict
from magistral_jax.verify.math_answer import asks_for_order, grade_math

EQUAL = [
    # integers, decimals, fractions
    ("7", "7.0"), ("+7", "7"), ("007", "7"), (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac12"),
    (r"\frac1{3}", r"\tfrac{2}{6}"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"), ("3 1/2", "3.5"), (r"3\frac{1}{2}", "7/2"), (r"-3\frac12", "-3.5"),
    (r"0.\overline{36}", r"\frac{4}{11}"), (r"0.1\overline{6}", "1/6"), (r"1.5\times10^5", "150000"),
    ("1.5e-3", "0.0015"),
    ("$12$", "12"), (r"\(12\)", "12"), (r"12.", "12"), ("−3", "-3"), ("½", "0.5"), (r"\text{113}", "113"),
    (r"\frac{1}{2^{99}}", "2^{-99}"), ("5!", "120"), ("3:4", "6 : 8"), (r"\binom{10}{3}", "120"),
    # thousands separators and the decimal comma
    ("1,234,567", "1234567"), (r"1{,}234", "1234"), (r"12\,345\,678", "12345678"), ("12 345", "12345"),
    ("3,14", "3.14"),
    # radicals, constants, complex numbers
    (r"\sqrt{8}", r"2\sqrt2"), ("2*sqrt(2)", r"2\sqrt{2}"), ("√2", r"\sqrt2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\sqrt[3]{-8}", "-2"), ("16^{3/4}", "8"), ("pi/4", r"\frac{\pi}{4}"),
    (r"e^{i\pi}", "-1"), ("2+3i", "3i + 2"), (r"\frac{1}{i}", "-i"), (r"\log_2 8", "3"), (r"\ln e^2", "2"),
    (r"\sin 30^\circ", r"\frac12"), (r"\cos\frac{\pi}{3}", "0.5"), (r"\tan^{-1}(1)", r"\pi/4"),
    (r"\sqrt{10^{16}+1}-10^8", r"\frac{1}{\sqrt{10^{16}+1}+10^8}"),
    # percentages, units, money, degrees
    (r"10\%", "0.1"), (r"10\%", "10 %"), (r"10\text{ cm}", "10"), ("10", r"10\text{ cm}"), ("100 cm", "1 m"),
    ("60 km/h", r"60\text{ km/h}"), (r"8\sqrt{3}\text{ square units}", r"8\sqrt3"),
    (r"5\text{ cm}^2", r"5\text{ square cm}"),
    (r"\$12.50", "12.5"), ("12.50 dollars", r"\$12.50"), ("50 cents", r"\$0.50"), (r"90^\circ", "90"),
    (r"90^\circ", r"\frac{\pi}{2}"), (r"5\text{ m}/\text{s}", "5 m/s"), ("2 hours", r"120\text{ minutes}"),
    # expressions
    ("(x-1)(x+1)", "x^2-1"), (r"\frac{x}{y}", "xy^{-1}"), (r"\frac{a}{b}+c", "c + a/b"), ("n!", "n(n-1)!"),
    (r"\sin^2 x + \cos^2 x", "1"), (r"\sqrt{xy}", r"\sqrt{x}\sqrt{y}"), ("(-1)^n", r"\cos(n\pi)"),
    ("x_1+x_2", "x_2 + x_1"),
    ("(n-2) 2^{n}+1", "n*2^n - 2^(n+1) + 1"), ("2^10", "1024"), ("2**10", "1024"), (r"|x-1|", r"\lvert 1-x \rvert"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"), (r"\int_0^1 x^2 dx", r"\frac13"), ("AB", "BA"),
    # intervals, sets, tuples, lists, matrices
    (r"\left[0, 1\right)", "[0,1)"), ("]0, 1[", "(0,1)"), ("x < 3", r"(-\infty, 3)"), (r"-2 \le x < 1", "[-2, 1)"),
    (r"x \in (3, \infty)", "x > 3"), (r"(3,5)\cup(1,2)", r"(1,2)\cup(3,5)"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\{x | -2 \leq x < 1\}", "[-2, 1)"), (r"\{1,2\}", r"\{2,1,1\}"), ("{1, 2}", r"\{2,1\}"), (r"\emptyset", r"\{\}"),
    (r"\{5\}", "5"), ("1, 2", "2, 1"), ("6 and 7", "6, 7"), ("1, 2", r"\{2, 1\}"), ("1, 2", "(1, 2)"),
    (r"1 \pm \sqrt2", r"1+\sqrt2, 1-\sqrt2"), (r"x = 1 \text{ or } x = 2", "1, 2"),
    ("(1/2, 0.25)", r"\left(\frac12, \frac14\right)"),
    (r"\langle 1, 2\rangle", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\ \frac42\end{bmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", "(1, 2)"),
    # equations
    ("x=5", "5"), ("5", "x = 5"), ("f(x) = x+1", "1+x"), ("y=2x+1", "2x-y+1=0"), ("x^2-4x-2=0", "-x^2+4x+2=0"),
    ("5 = x", "x = 5"),
    ("(x,y) = (1,2)", "(1,2)"), (r"x = \pi \approx 3.14", r"\pi"), ("x + y = 5", "5"), ("10/2 = 5", "5"),
    # words and choices
    ("(C)", "C"), (r"\text{(C)}", "C"), (r"\textbf{(C)} 12", "C"), ("C. 12", "C"), ("Yes", r"\text{yes}"),
    ("no solution", r"\text{No solution.}"), (r"\text{Monday}", "Monday"),
    # numeral systems
    ("2516_8", "2516"), ("1011_2", "11"), (r"(1011)_2", "1011_{2}"),
]  # fmt: skip

DIFFERENT = [
    ("22/7", "3.142857"), ("0.333", "1/3"), ("3.14", r"\pi"), ("1/2^99", "1/2^98"),
    ("12345678901234567890", "12345678901234567891"),
    (r"10\%", "10"), ("10", r"10\%"), ("10 cm", "10 m"), (r"10\text{ cm}", r"10 \text{ m}"),
    (r"5\text{ cm}^2", r"5\text{ cm}"),
    (r"5\text{ apples}", r"5\text{ pears}"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("(0,1)", r"\{0,1\}"),
    ("1, 2", "1, 2, 3"),
    ("1, 1, 2", "1, 2"), ("x=5", "y=5"), ("5", "x^2+y^2=5"), ("x > 3", r"x \ge 3"), ("c", "C"), ("B", "C"),
    ("(B) 12", "C"),
    ("5x", "5y"), (r"\sqrt{x^2}", "x"), ("|x|", "x"), ("2i", "-2i"), (r"\sqrt{-4}", "2"), (r"1+\sqrt2", r"1-\sqrt2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"), ("yes", "no"),
    ("1011_2", "1011_3"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"), ("1/0", "5"), (r"\infty", "5"), (r"\infty", r"-\infty"),
    ("x^2", "x^3"),
    ("(-1)^n", "(-1)^{n+1}"), ("12", "1 2"), ("1234", "1.234"), (r"10^{1000}+1", r"10^{1000}"), ("x=7=5", "7"),
    ("3:4", "4:3"), ("", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_answers(answer: str, reference: str):
    verdict, path = grade_math(answer, reference)
    assert verdict is Verdict.CORRECT, path


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_answers(answer: str, reference: str):
    verdict, path = grade_math(answer, reference)
    assert verdict in (Verdict.WRONG, Verdict.UNPARSABLE), path


@pytest.mark.parametrize(
    ("answer", "reference", "verdict", "path"),
    [
        ("7", "7", Verdict.CORRECT, "string"),
        ("14/2", "7", Verdict.CORRECT, "rational"),
        (r"\sqrt{49}", "7", Verdict.CORRECT, "probe"),
        (r"\sum_{k=1}^{3} k", "6", Verdict.CORRECT, "sympy"),
        ("7!!!!!?", "7", Verdict.UNPARSABLE, "answer"),
        ("7", "$$%$$", Verdict.UNPARSABLE, "reference"),
        ("many", "7", Verdict.WRONG, "probe"),
        ("who knows?", "7", Verdict.WRONG, "words"),
        ("1" + "!" * 101, "7", Verdict.UNPARSABLE, "answer"),
        ("1" * 401, "7", Verdict.TOO_LARGE, "digits"),
        ("1+" * 600 + "1", "7", Verdict.TOO_LARGE, "characters"),
        ("1" * 100_000, "7", Verdict.TOO_LARGE, "characters"),
        ("(" * 50 + "1" + ")" * 50, "7", Verdict.TOO_LARGE, "nesting"),
    ],
)
def test_the_verdict_names_its_rule(answer: str, reference: str, verdict: Verdict, path: str):
    assert grade_math(answer, reference) == (verdict, path)


HOSTILE = [
    "9^9^9^9", "9^{9^{9^{9}}}", "2^{10000000000}", "(((((5!)!)!)!)!)", "10000000!", r"\binom{10^9}{5 \cdot 10^8}",
    "1e999",
    "1e1000000000", "7^7^7^7 mod 10", r"e^{e^{e^{e^{e}}}}", "(1+i)^{(1+i)^{(1+i)^{99}}}", "2^2^2^2^2^2^2^2^2",
    "-" * 500 + "1",
    r"\sqrt" * 200 + "2", "x^{10^{10}}", "((x+1)^{1000})^{1000}", r"\frac" * 300, "{" * 900, "|" * 900,
    "1" + ",1" * 400,
    r"\begin{pmatrix}" * 60, r"\sin" * 300 + "x", "a_" * 300, "1!" + "!" * 500, "%" * 900, "\\text{" * 100,
    r"\pm" * 100 + "1",
    r"1\pm2" * 100, "\\" * 999, "=" * 900, "x<" * 450, "0^0", "0^{-1}", r"\log_1 5", r"\sqrt[0]{2}", r"\int_0^1",
    "\x00", "\ud800",
    r"2^{2^{2^{2^{2^2}}}} \bmod 7", r"\lfloor 10^{10^{10}} \rfloor", "٣", "²" * 300, r"\frac{" * 39 + "1" + "}{2}" * 39,
    r"\tan(10^{100})", r"\sin(2^{2^{100}})", "lcm(" + "97," * 200 + "89)", "1_1", "10_10", "9_2",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_end_soon_and_are_not_right(text: str):
    start = time.process_time()
    for answer, reference in ((text, "5"), ("5", text), (text, text + "+1")):
        verdict, _ = grade_math(answer, reference)
        assert verdict in (Verdict.WRONG, Verdict.UNPARSABLE, Verdict.TOO_LARGE, Verdict.TIMEOUT)
    assert time.process_time() - start < 10


def test_text_is_never_executed(tmp_path: pathlib.Path):
    trace = tmp_path / "executed"
    for code in (
        f"__import__('os').system('touch {trace}')",
        f"().__class__.__base__.__subclasses__() or open('{trace}', 'w')",
        f"exec(\"open('{trace}', 'w')\")",
        f"Symbol('x').__class__.__init__.__globals__ + open('{trace}','w')",
        rf"\text{{__import__('os').system('touch {trace}')}}",
        rf"\operatorname{{exec}}(open('{trace}','w'))",
    ):
        assert grade_math(code, "5")[0] is not Verdict.CORRECT
        assert grade_math("5", code)[0] is not Verdict.CORRECT
        assert not trace.exists()


@given(st.text(alphabet=r"0123456789abxyi+-*/^_(){}[]|=<>!%,.;: \fracsqrtpiexn&$'", max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_gets_a_verdict_and_equals_itself(text: str):
    assert grade_math(text, "5")[0] in Verdict
    if text.strip(" $.,:;"):
        assert grade_math(text, text)[0] in (Verdict.CORRECT, Verdict.UNPARSABLE)


fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=1000)


@given(fractions, fractions)
@settings(max_examples=50, deadline=None)
def test_fractions_are_equal_as_numbers(a: Fraction, b: Fraction):
    spellings = [f"{b.numerator}/{b.denominator}", rf"\frac{{{2 * b.numerator}}}{{{2 * b.denominator}}}", f"x = {b}"]
    for spelling in spellings:
        assert (grade_math(str(a), spelling)[0] is Verdict.CORRECT) == (a == b)


@given(st.integers(-(10**40), 10**40), st.integers(-2, 2))
@settings(max_examples=50, deadline=None)
def test_integers_are_equal_to_the_last_digit(value: int, offset: int):
    assert (grade_math(f"{value:,}", str(value + offset))[0] is Verdict.CORRECT) == (offset == 0)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_polynomials_are_equal_as_functions(coefficients: list[int]):
    expanded = "+".join(f"({c})x^{{{power}}}" for power, c in enumerate(coefficients))
    horner = ""
    for c in reversed(coefficients):
        horner = f"({horner})*x+({c})" if horner else f"({c})"
    assert grade_math(horner, expanded)[0] is Verdict.CORRECT
    assert grade_math(horner + "+1", expanded)[0] is Verdict.WRONG


@pytest.mark.parametrize(
    "name",
    ["basic_arithmetic", "fraction_simplification", "gcd", "decimal_arithmetic", "simple_equations", "chain_sum",
     "complex_arithmetic", "polynomial_multiplication", "simple_integration", "base_conversion"],
)  # fmt: skip
def test_gold_answers_agree_with_themselves(name: str):
    answers = [str(entry["answer"]).strip("$") for entry in reasoning_gym.create_dataset(name, size=10, seed=1)]
    for answer in answers:
        assert grade_math(answer, answer)[0] is Verdict.CORRECT
        assert grade_math(f"({answer}) + 0", answer)[0] in (Verdict.CORRECT, Verdict.UNPARSABLE)
        assert grade_math(f"{answer} + 1", answer)[0] in (Verdict.WRONG, Verdict.UNPARSABLE)


def test_grading_imports_no_jax():
    code = """if True:
        import sys
        from magistral_jax.verify import pool, zygote
        from magistral_jax.verify.math_answer import grade_math
        grade_math(r"\\sum_{k=1}^{3} k", "6")
        sys.exit(any(name in sys.modules for name in ("jax", "flax", "optax")))
    """
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_the_order_of_a_list_counts_where_the_question_asks_or_is_not_known():
    ordered = ("List the values in increasing order.", "Find $x, y$ and $z$, respectively.", "")
    assert [asks_for_order(statement) for statement in ordered] == [True, True, None]
    assert asks_for_order("Find all roots of the polynomial.") is False
    grade = lambda answer, reference, is_ordered: grade_math(answer, reference, is_ordered=is_ordered)[0]
    assert grade("1,2,3", "3,2,1", None) is Verdict.WRONG
    assert grade("1,2,3", "3,2,1", True) is Verdict.WRONG
    assert grade("1,2,3", "3,2,1", False) is Verdict.CORRECT
    assert grade("1,-2", "-2,1", None) is Verdict.CORRECT
    assert grade("1,-2", "-2,1", True) is Verdict.WRONG
