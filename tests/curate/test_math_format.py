r"""Which problems are open questions with an answer that can be verified, and how the others are told."""

import dataclasses

import pytest

from magistral_jax.curate.math_format import find_options, is_verifiable, open_format
from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem


def judged(statement: str, answer: str = "3") -> Problem | Removal:
    return open_format(Problem("p", statement, answer, extra={"level": 2}))


@pytest.mark.parametrize(
    "statement",
    [
        "What is $1+2$?",
        "In what year will the census show that there are 3 wrens?",
        "It can be shown that $n$ is prime. What is $n$?",
        "Find all $n$ such that: (1) $n$ is prime. (2) $n$ is less than 5. (3) $n$ is odd.",
        "For how many $a$ is it true that:\n(a) $a$ is positive\n(b) the equation has two integer solutions?",
        "Let $f(a) = 1$ and $f(b) = 2$. What is $f(a) + f(b)$?",
        "Points are drawn.\n[asy]\nlabel((A)); label((B)); label((C)); // (a) What? (b) How?\n[/asy]\nHow many?",
    ],
)
def test_an_open_question_stays_as_it_is(statement: str):
    assert judged(statement) == Problem("p", statement, "3", extra={"level": 2})


@pytest.mark.parametrize(
    "statement",
    [
        "Prove that there are infinitely many primes.",
        "Let $n$ be even. Show that $n^2$ is even.",
        "Determine all solutions and prove that there are no more.",
        "Montrer que $n^2$ est pair.",
        "Докажите, что $n$ чётно.",
        "求证：$n$ 是偶数。",  # noqa: RUF001
    ],
)
def test_a_proof_is_removed(statement: str):
    removal = judged(statement)
    assert isinstance(removal, Removal)
    assert removal.reason == "proof"


@pytest.mark.parametrize(
    "statement",
    [
        "A ball falls. (a) How fast is it? (b) When does it land?",
        "Let $f(x)=x$.\n(i) Find $f(1)$.\n(ii) Hence find $f(2)$.",
        "A ball falls.\n1) What is its speed?\n2) What is its mass?",
        "Part A: find $x$. Part B: find $y$.",
    ],
)
def test_several_parts_are_removed(statement: str):
    removal = judged(statement)
    assert isinstance(removal, Removal)
    assert removal.reason == "several parts"


@pytest.mark.parametrize(
    ("options", "letter", "answer"),
    [
        (r"$\textbf{(A)}\ 2128 \qquad\textbf{(B)}\ 2148 \qquad\textbf{(C)}\ 2160$", "B", "2148"),
        (r"$\mathrm{(A) \ } 277\qquad \mathrm{(B) \ } 311\qquad \mathrm{(C) \ }  405$", r"\text{(C)}", "405"),
        (
            r"$\mathrm{\textbf{(A)} \ }226\qquad \mathrm{\textbf{(B)} \ } 243 \qquad \mathrm{\textbf{(C)} \ } 27$",
            "A",
            "226",
        ),
        (r"(A) $-2^{50}$ (B) $-2^{49}$ (C) 0", "(B)", "-2^{49}"),
        ("(A) circle\n(B) parabola\n(C) ellipse\n\nEnter the letter of the correct option.", r"\text{(C)}", "ellipse"),
        ("A. $x+1$\nB. $x+2$\nC. $x+3$", "b", "x+2"),
        ("(a) ${1}$\n\n(b) ${\\{2,3\\}}$\n\n(c) ${4}$", "B", r"{\{2,3\}}"),
    ],
)
def test_multiple_choice_becomes_an_open_question(options: str, letter: str, answer: str):
    opened = judged(f"What is the number of sides?\n{options}\n", letter)
    assert isinstance(opened, Problem)
    assert (opened.statement, opened.answer) == ("What is the number of sides?", answer)
    assert opened.extra == {"level": 2, "was_multiple_choice": True}


def test_a_reference_that_is_no_letter_stays():
    opened = judged(r"How many? $\textbf{(A)}\ 1 \qquad\textbf{(B)}\ 2 \qquad\textbf{(C)}\ 3$", "3")
    assert isinstance(opened, Problem)
    assert (opened.statement, opened.answer) == ("How many?", "3")


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Which of the following is prime?", "B", "needs its options"),
        ("The sum is closest to", "B", "needs its options"),
        ("What is the sum?", "E", "answer is no option"),
        ("What is the sum?", "A, C", "several options are right"),
    ],
)
def test_a_question_that_needs_its_options_is_removed(question: str, answer: str, reason: str):
    removal = judged(question + " (A) 1 (B) 2 (C) 4", answer)
    assert isinstance(removal, Removal)
    assert removal.reason == reason


def test_two_letters_in_brackets_are_no_options():
    assert find_options("The sides (A) and (B) are equal. How long is (A)?") is None


@pytest.mark.parametrize(
    "answer", ["3", r"\frac{1}{2}", "$x^2+1$", "[0, 1)", r"\{1,2\}", "yes", r"\text{Monday}", "12 cm", "(1,2)", "x = 4"]
)
def test_what_the_grader_reads_is_verifiable(answer: str):
    assert is_verifiable(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  ",
        r"\frac{1}{",
        "the function is linear and its slope is an arbitrary positive integer",
        "9" * 20_000,
        "(" * 5000,
        "base radius = 7, slant = 10",
    ],
)
def test_what_it_does_not_read_is_not(answer: str):
    assert not is_verifiable(answer)
    removal = judged("How long?", answer)
    assert isinstance(removal, Removal)
    assert removal.reason == ("answer cannot be verified" if answer.strip() else "no answer")


def test_programs_are_not_math():
    removal = open_format(dataclasses.replace(Problem("p", "Print 1.", ""), kind="code"))
    assert removal == Removal("p", "not math", "code")
