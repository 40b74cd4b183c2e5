"""Agreement of outputs: what common programs print is accepted, what is merely near is not, and the laws hold."""

import decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.verify.code_compare import Comparison, first_difference

TOKENS = Comparison()


def agrees(printed: str | bytes, expected: str | bytes, comparison: Comparison = TOKENS) -> bool:
    printed, expected = (text.encode() if isinstance(text, str) else text for text in (printed, expected))
    return first_difference(printed, expected, comparison) is None


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("1 2 3\n", "1 2 3"),
        ("1 2 3  \n\n", "1 2 3\n"),
        ("1\n2\n3", "1 2 3"),
        ("1\r\n2\r\n", "1\n2\n"),
        ("\n 1", "1"),
        ("", "\n"),
        ("YES", "Yes"),
        ("yes\nno", "YES\nNO"),
        ("True", "true"),
        ("0.5", "0.500000"),
        ("0.500000", "0.5"),
        (".5", "0.5"),
        ("0.3333333", "0.33333333333"),
        ("3", "3.0"),
        ("3.0000001", "3.0"),
        ("-0.0", "0.0"),
        ("1000000.4", "1000000.0"),
        ("1e-7", "0.0"),
        ("100000", "1e5"),
        ("1e+09", "1000000000.0"),
        ("0." + "3" * 100, "0.3333333333"),
        (b"caf\xc3\xa9 \xff", b"caf\xc3\xa9 \xff\n"),
    ],
)
def test_what_says_the_same_is_accepted(printed: Any, expected: Any):
    assert agrees(printed, expected)


@pytest.mark.parametrize(
    ("printed", "expected", "difference"),
    [
        ("1 2", "1 2 3", "2 tokens, expected 3"),
        ("1 2 3", "1 2", "3 tokens, expected 2"),
        ("", "1", "0 tokens, expected 1"),
        ("1", "", "1 tokens, expected 0"),
        ("1 3 3", "1 2 3 4", "token 2 differs"),
        ("100000000000000001", "100000000000000000", "token 1 differs"),
        ("100000000000000000.0", "100000000000000001", "token 1 differs"),
        ("3.0", "3", "token 1 differs"),
        ("007", "7", "token 1 differs"),
        ("0.33", "0.33333333333", "token 1 differs"),
        ("1000002.0", "1000000.0", "token 1 differs"),
        ("abc", "ABC", "token 1 differs"),
        ("YES", "NO", "token 1 differs"),
        ("yess", "yes", "token 1 differs"),
        ("nan", "1.0", "token 1 differs"),
        ("inf", "1.0", "token 1 differs"),
        ("1e400", "1.0", "token 1 differs"),
        ("1e400", "2e400", "token 1 differs"),
        ("1_000.0", "1000.0", "token 1 differs"),
        ("0x1p3", "8.0", "token 1 differs"),
        ("\uff11.0", "1.0", "token 1 differs"),
        ("1\x000", "10", "token 1 differs"),
        ("1,2", "1 2", "token 1 differs"),
        ("1.0" + "0" * 400, "1.0", "token 1 differs"),
    ],
)
def test_what_says_something_else_is_not(printed: str, expected: str, difference: str):
    assert first_difference(printed.encode(), expected.encode(), TOKENS) == difference


def test_a_tolerance_that_was_asked_for():
    wide = Comparison("float", 1e-2)
    assert agrees("3.005", "3", wide)
    assert agrees("1009", "1000", wide)
    assert not agrees("1011", "1000", wide)
    assert not agrees("3.04", "3", wide)
    assert agrees("YES 0.101", "yes 0.1", wide)
    assert not agrees("0.1000001", "0.1", Comparison("float", 0.0))
    assert agrees("0.10", "0.1", Comparison("tokens", 0.0))
    assert not agrees("abd", "abc", Comparison("float", 1e9))


def test_lines():
    lines = Comparison("lines")
    assert agrees("a b  \r\nc\n\n", "a b\nc", lines)
    assert first_difference(b"a b c", b"a b\nc", lines) == "line 1 differs"
    assert first_difference(b"a\nb\nc", b"a\nb", lines) == "3 lines, expected 2"
    assert not agrees("a  b", "a b", lines)
    assert not agrees("\na", "a", lines)
    assert not agrees("yes", "YES", lines)
    assert not agrees("0.5", "0.50", lines)


def test_exact():
    assert agrees("a \n", "a \n", Comparison("exact"))
    assert first_difference(b"a\n", b"a", Comparison("exact")) == "bytes differ"


# --- laws ------------------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-(10**18), 10**18).map(str),
    st.floats(-1e6, 1e6).map(repr),
    st.sampled_from(["YES", "no", "True", "a", "-", "1e5", "."]),
)
OUTPUTS = st.lists(WORDS, max_size=6)
COMPARISONS = st.builds(
    Comparison, st.sampled_from(["tokens", "lines", "exact", "float"]), st.sampled_from([0.0, 1e-9, 1e-6, 0.1])
)


@given(st.binary(max_size=40), COMPARISONS)
@settings(deadline=None)
def test_every_output_agrees_with_itself(output: bytes, comparison: Comparison):
    assert agrees(output, output, comparison)


@given(st.binary(max_size=40), st.binary(max_size=40), st.floats(0, 1))
@settings(deadline=None)
def test_the_modes_are_ordered(printed: bytes, expected: bytes, tolerance: float):
    verdicts = [
        agrees(printed, expected, Comparison(mode, tolerance)) for mode in ("exact", "lines", "tokens", "float")
    ]
    assert verdicts == sorted(verdicts), "what a stricter mode accepts, a looser one accepts too"


@given(OUTPUTS, st.lists(st.sampled_from([" ", "\n", "\t", "\r\n", "  "]), min_size=8, max_size=8), COMPARISONS)
@settings(deadline=None)
def test_white_space_between_tokens_is_free(words: list[str], gaps: list[str], comparison: Comparison):
    spaced = "".join(gap + word for gap, word in zip(gaps, words, strict=False)) + gaps[-1]
    if comparison.mode in ("tokens", "float"):
        assert agrees(spaced, " ".join(words), comparison)


@given(OUTPUTS, OUTPUTS, COMPARISONS)
@settings(deadline=None)
def test_a_changed_number_of_tokens_is_a_difference(words: list[str], more: list[str], comparison: Comparison):
    assert agrees(" ".join(words + more), " ".join(words), comparison) == (not more)


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
@settings(deadline=None)
def test_integers_agree_only_when_equal(a: int, b: int):
    assert agrees(str(a), str(b)) == (a == b)
    assert agrees(str(a), str(a))


@given(st.decimals(-1000, 1000, places=4), st.decimals(-1, 1, places=8), st.sampled_from(["1e-3", "1e-5", "0.5"]))
@settings(deadline=None, max_examples=300)
def test_the_tolerance_is_absolute_or_relative(reference: decimal.Decimal, error: decimal.Decimal, tolerance: str):
    bound = decimal.Decimal(tolerance) * max(decimal.Decimal(1), abs(reference))
    printed = f"{reference + error:f}"
    if abs(abs(error) - bound) > decimal.Decimal("1e-10"):  # at the bound itself, rounding decides
        assert agrees(printed, f"{reference:f}", Comparison("float", float(tolerance))) == (abs(error) <= bound)


@pytest.mark.parametrize("token", [b"9", b"1.", b"1e", b"-", b"1e5e5", b"y"])
def test_long_hostile_outputs_are_compared(token: bytes):
    """A million tokens and one token of a million characters: linear, so the suite does not stop here."""
    many, long = (token + b" ") * 10**6, token * 10**6
    assert first_difference(many, many + b"x", TOKENS) == "1000000 tokens, expected 1000001"
    assert first_difference(long, b"1.0", TOKENS) == "token 1 differs"
    assert first_difference(b"1.0", long, Comparison("float")) == "token 1 differs"
