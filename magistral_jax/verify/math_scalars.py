r"""Equality of scalar expressions: exact arithmetic, then numeric probing, then SymPy."""

import dataclasses
from fractions import Fraction

from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_numeric import is_near
from magistral_jax.verify.math_probe import Agreement, probe
from magistral_jax.verify.math_symbolic import symbolically_equal
from magistral_jax.verify.math_tree import INFINITY, Call, Num, Tree, variables, walk

_MACHINE_DIGITS = 12
"""Digits from which a decimal is taken for the exact number that a machine has printed."""

_MOST_PLACES = 40


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether two answers are equal, and the rule that decided."""

    is_equal: bool
    path: str


def compare_scalars(a: Tree, b: Tree) -> Comparison:  # noqa: PLR0911 one return for each rule
    """Compare two expressions that are built of numbers, symbols and operations alone.

    Raises:
      TooLargeError: Their values are too large to be compared.
    """
    if a == b:
        return Comparison(True, "structure")
    if any(node == INFINITY for tree in (a, b) for node in walk(tree)) and not _has_bounds(a) and not _has_bounds(b):
        return Comparison(False, "structure")
    is_huge = False
    try:
        if _is_based(a) != _is_based(b):
            return _numerals(a, b)
        exact_a, exact_b = exact_value(a), exact_value(b)
        if exact_a is not None and exact_b is not None:
            is_equal = exact_a == exact_b or _is_printed(a, exact_b) or _is_printed(b, exact_a)
            return Comparison(is_equal, "rational")
    except TooLargeError:
        is_huge = True
    except ZeroDivisionError:
        return Comparison(False, "undefined")
    match probe(a, b):
        case Agreement.DIFFER:
            return Comparison(_is_printed(a, b) or _is_printed(b, a), "probe")
        case Agreement.AGREE if not is_huge:
            return Comparison(True, "probe")
        case Agreement.UNKNOWN if not is_huge:
            return Comparison(symbolically_equal(a, b), "sympy")
    raise TooLargeError("magnitude")


def _is_printed(decimal: Tree, value: Tree | Fraction) -> bool:
    """True for a long decimal, 0.333333333333, that is the value rounded or cut to its places. 0.3333 is not 1/3."""
    is_negative = isinstance(decimal, Call) and decimal.head == "neg"
    literal = decimal.args[0] if isinstance(decimal, Call) and is_negative else decimal
    if not isinstance(literal, Num):
        return False
    places = 0
    while (literal.value * 10**places).denominator > 1 and places < _MOST_PLACES:
        places += 1
    if places == 0 or literal.value * 10**places < 10 ** (_MACHINE_DIGITS - 1):
        return False
    step = Fraction(1, 10**places)
    if isinstance(value, Fraction):
        return abs((-literal.value if is_negative else literal.value) - value) < step
    return not variables(value) and is_near(decimal, value, step)


def _is_based(tree: Tree) -> bool:
    return isinstance(tree, Call) and tree.head == "base"


def _numerals(a: Tree, b: Tree) -> Comparison:
    """`1011_2` against a number without a base: the same digits (the problem names the base), or the same value."""
    based, other = (a, b) if _is_based(a) else (b, a)
    assert isinstance(based, Call)
    equals = exact_value(other) is not None and exact_value(other) in (exact_value(based), exact_value(based.args[0]))
    return Comparison(equals, "numeral")


def _has_bounds(tree: Tree) -> bool:
    """True for sums, products and integrals, whose bounds may be infinite."""
    return any(isinstance(node, Call) and node.head in ("sum", "prod", "int") for node in walk(tree))
