r"""Verdict on a math answer (report §2.2.2): the last box of a completion against the reference.

In: two texts. Out: a verdict and the rule that decided it. The rules, cheapest first:
  string    equal after normalisation;
  words     equal as words;
  size      too long, too deep or too many digits to be parsed;
  then both are parsed, by the LaTeX and the plain grammar, and compared: structure, rational, probe, sympy.
An answer is right where any reading of it equals any reading of the reference. Numbers are compared exactly: 0.333 is
not 1/3, and 22/7 is not 3.142857. Where a rounded number is meant, the caller has to say so.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from magistral_jax.records import Verdict
from magistral_jax.verify.cpu_limit import OutOfTimeError, cpu_limit
from magistral_jax.verify.format import last_boxed
from magistral_jax.verify.math_compare import Comparison, compare
from magistral_jax.verify.math_exact import TooLargeError
from magistral_jax.verify.math_readings import Reading, readings
from magistral_jax.verify.math_text import MAX_CHARACTERS, normalise, oversize, string_key, words
from magistral_jax.verify.math_tree import Call, Group, Num, Relation, Series, Tree
from magistral_jax.verify.math_units import DEGREES

_RAW_FACTOR = 4  # normalising may shorten a text, but hardly to a quarter
_MAX_SECONDS = 0.7  # of CPU time; honest answers take a thousandth
_PAIR = 2  # entries of a list that are a pair of solutions rather than a sequence


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of grading: what was looked at, and the verdict where this step decides."""

    name: str
    found: dict[str, Any]
    verdict: Verdict | None = None
    path: str = ""


def grade_math(
    answer: str, reference: str, *, is_ordered: bool | None = None, decimals: int | None = None
) -> tuple[Verdict, str]:
    """Compare the content of a box with the reference answer.

    Args:
      answer: What the completion has in its last box.
      reference: The known answer, with or without dollar signs or a box of its own.
      is_ordered: Whether the order of a list without brackets counts, `1, 2`. That of a tuple always counts. None where
        the question is not known: then that of three or more plain values counts, and two are a pair of solutions.
      decimals: Places that numbers are rounded to before they are compared; None compares them exactly.

    Returns:
      The verdict, and the name of the rule that decided it.

    Source: Magistral (arXiv:2506.10910), section 2.2.2.
    """
    last = grading_steps(answer, reference, is_ordered=is_ordered, decimals=decimals)[-1]
    assert last.verdict is not None
    return last.verdict, last.path


def grading_steps(
    answer: str, reference: str, *, is_ordered: bool | None = None, decimals: int | None = None
) -> list[Step]:
    """The steps of `grade_math`, as far as it had to go. The last one has the verdict."""
    steps: list[Step] = []
    try:
        with cpu_limit(_MAX_SECONDS):
            for step in _steps(answer, reference, is_ordered, decimals):
                steps.append(step)
    except OutOfTimeError:
        steps.append(Step("time", {"seconds": _MAX_SECONDS}, Verdict.TIMEOUT, "cpu"))
    return steps


_ASKS_FOR_ORDER = re.compile(
    r"\bin(?: \w+){0,3} order\b|\border(?:ed|ing)?\b|\brespectively\b|\bsequence\b|\barrange|\bsort(?:ed)?\b"
    r"|\bfrom (?:the )?(?:least|smallest|lowest|largest|greatest|highest)\b",
    re.IGNORECASE,
)


def asks_for_order(statement: str) -> bool | None:
    """Whether a question asks for its answers in an order; None where there is no question to look at."""
    return bool(_ASKS_FOR_ORDER.search(statement)) if statement.strip() else None


def is_parsable(text: str) -> bool:
    """Whether a text is an answer in one of the grammars."""
    text = normalise(text)
    return bool(text) and oversize(text) is None and next(readings(text), None) is not None


# ---- steps ----------------------------------------------------------------------------------------------------------


def _steps(answer: str, reference: str, is_ordered: bool | None, decimals: int | None) -> Iterator[Step]:
    """Texts first: most answers need no parse."""
    answer, reference = _unboxed(answer), _unboxed(reference)
    if max(len(answer), len(reference)) > _RAW_FACTOR * MAX_CHARACTERS:
        yield Step("size", {"characters": [len(answer), len(reference)]}, Verdict.TOO_LARGE, "characters")
        return
    answer, reference = normalise(answer), normalise(reference)
    yield Step("normalise", {"answer": answer, "reference": reference})
    if not answer:
        yield Step("empty", {}, Verdict.UNPARSABLE, "empty")
    elif string_key(answer) == string_key(reference):
        yield Step("string", {}, Verdict.CORRECT, "string")
    elif (cap := oversize(answer) or oversize(reference)) is not None:
        yield Step("size", {"too_large": cap}, Verdict.TOO_LARGE, cap)
    elif (expected := words(reference)) is not None and words(answer) == expected:
        yield Step("words", {"words": expected}, Verdict.CORRECT, "words")
    else:
        yield from _reading_steps(answer, reference, is_ordered, decimals)


def _reading_steps(answer: str, reference: str, is_ordered: bool | None, decimals: int | None) -> Iterator[Step]:
    yield Step("size", {"too_large": None})
    references, answers = list(_reference_readings(reference)), list(readings(answer))
    yield Step("readings", {"answer": answers, "reference": references})
    for name, text, found in (("reference", reference, references), ("answer", answer, answers)):
        if not found:
            # Words, or a notation that is not parsed: then only the text could have been right.
            verdict, path = (Verdict.WRONG, "words") if words(text) else (Verdict.UNPARSABLE, name)
            yield Step("unparsed", {"text": name}, verdict, path)
            return
    first_path, cap = "", None
    for left, right in itertools.product(answers, references):
        pair = {"answer": left.tree, "reference": right.tree}
        try:
            comparison = _compare_quantities(left, right, is_ordered, decimals)
        except TooLargeError as error:
            cap = cap or (Verdict.TOO_LARGE, str(error))
            yield Step("compare", {**pair, "too_large": str(error)})
            continue
        if comparison.is_equal:
            yield Step("compare", pair, Verdict.CORRECT, comparison.path)
            return
        yield Step("compare", {**pair, "differ": comparison.path})
        first_path = first_path or comparison.path
    verdict, path = cap or (Verdict.WRONG, first_path)
    yield Step("none_equal", {}, verdict, path)


@functools.lru_cache(maxsize=256)
def _reference_readings(reference: str) -> tuple[Reading, ...]:
    """A group of completions has one reference."""
    return tuple(readings(reference))


def _unboxed(text: str) -> str:
    r"""The content of a `\boxed` in the text; references have some, too."""
    return (last_boxed(text) or text) if "boxed" in text else text


def _compare_quantities(
    answer: Reading, reference: Reading, is_ordered: bool | None, decimals: int | None
) -> Comparison:
    """Values with their units; a unit on one side only is tolerated."""
    left, right = answer.tree, reference.tree
    if _is_sequence(left) and _is_sequence(right) if is_ordered is None else is_ordered:
        left, right = _as_tuple(left), _as_tuple(right)
    units = answer.unit, reference.unit
    if reference.may_be_symbol and answer.unit is None:
        return Comparison(False, "unit")
    if units[0] is not None and units[1] is not None and units[0] != units[1]:
        if units[0].dimensions != units[1].dimensions:
            return Comparison(False, "unit")
        left, right = (
            _changed(tree, lambda value, unit=unit: Call("mul", (value, Num(unit.factor))))
            for tree, unit in ((left, units[0]), (right, units[1]))
        )
    comparison = compare(left, right, decimals=decimals)
    if not comparison.is_equal and set(units) == {DEGREES, None}:  # against radians
        left, right = (
            _changed(tree, lambda value: Call("degree", (value,))) if unit else tree
            for tree, unit in zip((left, right), units, strict=True)
        )
        return compare(left, right, decimals=decimals)
    return comparison


def _changed(tree: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """The tree with its values changed: each item of a list, the right side of an equation."""
    match tree:
        case Series(items=items) | Group(items=items):
            return dataclasses.replace(tree, items=tuple(_changed(item, change) for item in items))
        case Relation(sides=(*names, value)):
            return dataclasses.replace(tree, sides=(*names, _changed(value, change)))
    return change(tree)


def _is_sequence(tree: Tree) -> bool:
    """Three or more plain values: `x = 4, -8` or `(1, 2), (2, 1)` are solutions, and so are two values."""
    return (
        isinstance(tree, Series)
        and len(tree.items) > _PAIR
        and not any(isinstance(item, Relation | Group) for item in tree.items)
    )


def _as_tuple(tree: Tree) -> Tree:
    return Group("(", tree.items, ")") if isinstance(tree, Series) else tree
