r"""Verdict on a math answer (report §2.2.2): the last box of a completion against the reference.

In: two texts. Out: a verdict and the rule that decided it. The rules, cheapest first:
  string    equal after normalisation;
  words     equal as words;
  size      too long, too deep or too many digits to be parsed;
  then both are parsed, by the LaTeX and the plain grammar, and compared: structure, rational, probe, sympy.
An answer is right where any reading of it equals any reading of the reference. Numbers are compared exactly: 0.333 is
not 1/3, and 22/7 is not 3.142857. Where a rounded number is meant, problem and reference have to say so.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator

from magistral_jax.records import Verdict
from magistral_jax.verify.math_compare import Comparison, compare
from magistral_jax.verify.math_exact import TooLargeError
from magistral_jax.verify.math_latex import parse_latex
from magistral_jax.verify.math_plain import parse_plain
from magistral_jax.verify.math_text import MAX_CHARACTERS, normalise, oversize, string_key, words
from magistral_jax.verify.math_tokens import ParseError
from magistral_jax.verify.math_tree import MAX_DEPTH, Call, Num, Tree, depth
from magistral_jax.verify.math_units import Unit, split_unit

_RAW_FACTOR = 4  # normalising may shorten a text, but hardly to a quarter


def grade_math(answer: str, reference: str) -> tuple[Verdict, str]:
    """Compare the content of a box with the reference answer.

    Args:
      answer: What the completion has in its last box.
      reference: The known answer, with or without dollar signs.

    Returns:
      The verdict, and the name of the rule that decided it.

    Source: Magistral (arXiv:2506.10910), section 2.2.2.
    """
    if len(answer) > _RAW_FACTOR * MAX_CHARACTERS:
        return Verdict.TOO_LARGE, "characters"
    answer, reference = normalise(answer), normalise(reference)
    if not answer:
        return Verdict.UNPARSABLE, "empty"
    if string_key(answer) == string_key(reference):
        return Verdict.CORRECT, "string"
    if (cap := oversize(answer) or oversize(reference)) is not None:
        return Verdict.TOO_LARGE, cap
    if _same_words(answer, reference):
        return Verdict.CORRECT, "words"
    return _grade_readings(answer, reference)


def _grade_readings(answer: str, reference: str) -> tuple[Verdict, str]:
    references = list(_readings(reference))
    answers = list(_readings(answer, decimal_comma=True))
    if not references:
        # The reference is words, or in a notation that is not parsed: then only the text can be right.
        return (Verdict.WRONG, "words") if words(reference) else (Verdict.UNPARSABLE, "reference")
    if not answers:
        return (Verdict.WRONG, "words") if words(answer) else (Verdict.UNPARSABLE, "answer")
    first_path, cap = "", ""
    for left, right in itertools.product(answers, references):
        try:
            comparison = _quantities(left, right)
        except TooLargeError as error:
            cap = str(error)
            continue
        if comparison.is_equal:
            return Verdict.CORRECT, comparison.path
        first_path = first_path or comparison.path
    return (Verdict.TOO_LARGE, cap) if cap else (Verdict.WRONG, first_path)


# ---- readings -------------------------------------------------------------------------------------------------------

_Quantity = tuple[Tree, Unit | None]

_THOUSANDS = re.compile(r"(?<![\d.,{}])\d{1,3}(?:(?:,|\{,\}|(?<=\d) (?=\d{3}))\d{3})+(?![\d,]|\.\d{3},)")
_DECIMAL_COMMA = re.compile(r"^(-?\d+)(?:,|\{,\})(\d+)(?=$|[^\d,])")
_WRAPPED = re.compile(r"^\\text\s*\{([^{}]*)\}$")
_CHOICE = re.compile(r"^(?:\\text\s*\{)?\s*(?:\(([A-Z])\)|([A-Z])[.:)])(?:\s*\}|\s|$)")


def _readings(text: str, *, decimal_comma: bool = False) -> Iterator[_Quantity]:
    """The ways to read a normalised text, likeliest first."""
    for spelling in dict.fromkeys(_spellings(text, decimal_comma)):
        value, unit = split_unit(spelling)
        if value != spelling and (tree := _parse(value)) is not None:
            yield tree, unit
        if (value == spelling or "\\text" not in spelling) and (tree := _parse(spelling)) is not None:
            yield tree, None


def _spellings(text: str, decimal_comma: bool) -> Iterator[str]:
    """The text without thousands separators, as it is, with a decimal comma, as a choice letter, unwrapped."""
    yield _THOUSANDS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text) if _outside_brackets(text) else text
    yield text.replace("{,}", ",")
    if decimal_comma:
        yield _DECIMAL_COMMA.sub(r"\1.\2", text)
    if choice := _CHOICE.match(text):
        yield choice[1] or choice[2]
    if wrapped := _WRAPPED.match(text):
        yield wrapped[1]


def _outside_brackets(text: str) -> bool:
    """False where commas stand between the items of a tuple, set or interval."""
    return not re.match(r"^\s*(?:\\\{|[(\[]).*[)\]}]$", text)


def _parse(text: str) -> Tree | None:
    for parser in (parse_latex,) if "\\" in text else (parse_plain, parse_latex):
        with contextlib.suppress(ParseError):
            tree = parser(text)
            return tree if depth(tree) <= MAX_DEPTH else None
    return None


# ---- comparison -----------------------------------------------------------------------------------------------------


def _quantities(answer: _Quantity, reference: _Quantity) -> Comparison:
    """Values with their units; a unit on one side only is tolerated."""
    (left, left_unit), (right, right_unit) = answer, reference
    if left_unit is None or right_unit is None or left_unit == right_unit:
        comparison = compare(left, right)
        if not comparison.is_equal and left_unit != right_unit:
            return _as_radians(left, left_unit, right, right_unit, comparison)
        return comparison
    if left_unit.dimensions != right_unit.dimensions:
        return Comparison(False, "unit")
    return compare(_scaled(left, left_unit), _scaled(right, right_unit))


def _as_radians(
    left: Tree, left_unit: Unit | None, right: Tree, right_unit: Unit | None, otherwise: Comparison
) -> Comparison:
    """Degrees on one side against radians on the other."""
    if {unit.dimensions for unit in (left_unit, right_unit) if unit} != {(("angle", 1),)}:
        return otherwise
    in_radians = [Call("degree", (tree,)) if unit else tree for tree, unit in ((left, left_unit), (right, right_unit))]
    return compare(*in_radians)


def _scaled(tree: Tree, unit: Unit) -> Tree:
    return Call("mul", (tree, Num(unit.factor)))


def _same_words(answer: str, reference: str) -> bool:
    expected = words(reference)
    return expected is not None and words(answer) == expected
