"""Answers of completions that keep to no format."""

import pytest

from magistral_jax.verify.extract import extract_answer
from magistral_jax.verify.formulas import find_formulas, is_prose, without_formulas


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # boxes
        (r"so \boxed{5}", "5"),
        (r"\boxed{5}, then \boxed{6}", "6"),
        (r"\boxed{1} and \boxed{-2}", "1, -2"),
        (r"\[ \boxed{(1, 2)}, \boxed{(2, 1)} \]", "(1, 2), (2, 1)"),
        (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "-2, 1"),
        (r"So \boxed{4}. Therefore \boxed{4}.", "4"),
        (r"\boxed{4} and again \boxed{4}", "4"),
        (r"\boxed{4}" + "\n\nLet me check:\n" + r"\boxed{5}", "5"),
        (r"\boxed{1} no no no no no \boxed{2}", "2"),
        (r"\boxed{\boxed{13}}", "13"),
        (r"\boxed{28}\%", r"28\%"),
        (r"$\boxed{28}$ percent", r"28\%"),
        (r"\boxed{90}^\circ", r"90^\circ"),
        (r"\\boxed{\\frac{1}{2}}", r"\frac{1}{2}"),
        (r"it is \boxed{15", "15"),
        (r"\boxed{200} so far. Final Answer: The final answer is $455$.", "455"),
        (r"\boxed{200}. The final answer is in the box.", "200"),
        # thoughts
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so 2", "2"),
        (r"<think>\boxed{1}</think>", None),
        (r"<think>\boxed{1}", "1"),
        # tags and announcements
        ("<answer> 7 </answer>", "7"),
        (r"<answer>\boxed{7}</answer> 8", "7"),
        ("So the answer is 42.", "42"),
        ("The answer is 42, since 6 times 7 is 42 and 43 is not.", "42"),
        ("The answer is (C).", "(C)"),
        ("The answer is for sure D, it can't be A or B", "D"),
        ("Answer: x^2 + 1", "x^2 + 1"),
        ("**Answer:** 5", "5"),
        ("Answer: $\\frac12$, as we saw.", "\\frac12"),
        ("The final answer is $12$ and $13$.", "12, 13"),
        ("Final Answer: The volume of $ABC$ is 120. I hope it is correct.", "120"),
        ("The answer is 3. The answer is 4.", "4"),
        ("48 + 24 = 72\n#### 72", "72"),
        ("#### 1,234", "1,234"),
        ("La réponse est 12,5.", "12,5"),
        ("La respuesta es 7.", "7"),
        ("La risposta è 7.", "7"),
        ("Die Antwort lautet 7,5.", "7,5"),
        ("Ответ: 12", "12"),
        ("所以答案是42。", "42"),
        ("答えは 8", "8"),
        # the whole text
        ("1/2", "1/2"),
        ("x = 5", "x = 5"),
        ("(1, 2)", "(1, 2)"),
        ("28 percent", "28 percent"),
        (r"\frac{10}{9}", r"\frac{10}{9}"),
        ("C", "C"),
        # formulas and numbers
        ("Therefore $x = 3$ for all $n$.", "x = 3"),
        ("$21,16$ or $11$", "21,16, 11"),
        (r"thus \(x=2\) and \(x=3\).", "x=2, x=3"),
        ("\\[\n 9 \n\\]", "9"),
        (r"\begin{align*} x &= 1+1 \\ &= 2 \end{align*}", "= 2"),
        (r"\[ \begin{align*} x &= 1+1 \\ &= 2 \end{align*} \]", "= 2"),
        ("We have $d = 90/n$. Therefore there are 12 of them.", "12"),
        ("we get 3 + 4 = 7 apples", "7"),
        ("it costs 1,000.99€ in all", "1,000.99"),
        ("increases by 100%.", "100%"),
        ("the probability of that is 2/3. <|im_end|>", "2/3"),
        ("It costs $5 and then $6 more", "$6"),
        ("so it is -3", "-3"),
        # words
        ("no solution", "no solution"),
        ("", None),
        ("   ", None),
        ("A long text in many words that says nothing at all about any result of anything.", None),
    ],
)
def test_where_the_answer_is_found(text: str, answer: str | None):
    assert extract_answer(text) == answer


def test_the_tag_is_a_setting():
    assert extract_answer(r"[T]\boxed{1}[/T] 2", "[/T]") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> 2", "[/T]") == "1"


def test_formulas_of_every_delimiter():
    text = r"$a$ $$b$$ \(c\) \[d\] \begin{equation}e\end{equation} $f$$g$ \$5 $ h $"
    assert [formula.content for formula in find_formulas(text)] == list("abcdefgh")
    assert without_formulas("a $b$ c") == "a   c"


@pytest.mark.parametrize("text", ["$5 and then $6", "$ \n 9 \n $", "$", "$$", r"\[ a", "$ $"])
def test_what_is_no_formula(text: str):
    assert list(find_formulas(text)) == []


def test_prose():
    assert is_prose("and then")
    assert not is_prose(r"x + \text{two words} + ab")
