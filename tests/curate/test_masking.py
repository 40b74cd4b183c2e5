"""Marks for what a translation must keep: everything is found, comes back as it was, and no loss goes unnoticed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.curate.masking import Loss, Masked, mask, unmask


@pytest.mark.parametrize(
    ("text", "masked", "kept"),
    [
        ("Anna has 3 apples.", "Anna has [[1]] apples.", ("3",)),
        ("Let x and y be real, $x^2 + y = 3$.", "Let [[1]] and [[2]] be real, [[3]].", ("x", "y", "$x^2 + y = 3$")),
        (
            "A cat costs $5 and a dog $6.50, i.e. more.",
            "A cat costs [[1]] and a dog [[2]], i.e. more.",
            ("$5", "$6.50"),
        ),
        (r"It is \$1,200 or 20\% at 12:30.", "It is [[1]] or [[2]] at [[3]].", (r"\$1,200", r"20\%", "12:30")),
        (r"It pays $\$$47.60 or $ \$ 20$ a day.", "It pays [[1]] or [[2]] a day.", (r"$\$$47.60", r"$ \$ 20$")),
        (r"If $ a \times b = 20$, $ n=1 $.", "If [[1]], [[2]].", (r"$ a \times b = 20$", "$ n=1 $")),
        ("He costs $5 and $ 6, too.", "He costs [[1]] and $ [[2]], too.", ("$5", "6")),
        ("``One for me,'' says ``Pete.''", "``One for me,'' says ``Pete.''", ()),
        (r"Take \[a\]and\(b\)", "Take [[1]]and[[2]]", (r"\[a\]", r"\(b\)")),
        ("Anna's T-shirt, I say, is a gift.", "Anna's T-shirt, I say, is a gift.", ()),
        ("See https://a.b/c?d=1, then `f(2)`.", "See [[1]], then [[2]].", ("https://a.b/c?d=1", "`f(2)`")),
        ("Print it:\n```python\nprint(1)\n```\n", "Print it:\n[[1]]\n", ("```python\nprint(1)\n```",)),
        (r"\begin{align*}x&=1\\y&=2\end{align*} hold", "[[1]] hold", (r"\begin{align*}x&=1\\y&=2\end{align*}",)),
        (r"Simplify \frac{1}{2} of it", "Simplify [[1]] of it", (r"\frac{1}{2}",)),
        ("A row [[3]] of 4", "A row [[[[1]]]] of [[2]]", ("3", "4")),
    ],
)
def test_what_is_masked(text: str, masked: str, kept: tuple[str, ...]):
    assert mask(text) == Masked(masked, kept)
    assert unmask(masked, mask(text)) == text


@given(st.text(alphabet="ab x$\\[](){}`1.,\n'é数", max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_translation_that_changes_nothing_gives_the_text_back(text: str):
    assert unmask(mask(text).text, mask(text)) == text


def test_marks_may_change_places():
    assert unmask("[[ 2 ]] Tage kosten [[1]] Euro.", mask("It is 5 euros for 7 days.")) == "7 Tage kosten 5 Euro."


@pytest.mark.parametrize(
    ("translation", "loss"),
    [
        ("Es sind [[1]] Euro.", Loss.LOST),
        ("Es sind 5 Euro in 7 Tagen.", Loss.LOST),
        ("[[1]] Euro in [[2]] Tagen, also [[1]].", Loss.REPEATED),
        ("[[1]] Euro in [[2]] Tagen, [[3]].", Loss.ADDED),
        ("1. [[1]] Euro in [[2]] Tagen.", Loss.ADDED),
    ],
)
def test_a_translation_that_loses_or_adds_something_is_refused(translation: str, loss: Loss):
    assert unmask(translation, mask("It is 5 euros for 7 days.")) is loss
