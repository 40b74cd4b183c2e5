"""Exact rational values of expression trees, within a bound on their size.

Every intermediate result is at most `MAX_BITS` long and is bounded before it is computed, so no tree can take long.
"""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from magistral_jax.verify.math_tree import Call, Num, Tree

MAX_BITS = 20_000
"""Longest numerator or denominator."""
_MAX_FACTORIAL = 2_000


class TooLargeError(ArithmeticError):
    """An exact value is too long to be computed."""


def exact_value(tree: Tree) -> Fraction | None:
    """The value where the tree is rational by construction, else None.

    Roots and logarithms count as irrational even where their value is an integer: comparing those takes other means.

    Raises:
      TooLargeError: The value would be longer than `MAX_BITS`.
      ZeroDivisionError: The tree divides by zero.
    """
    match tree:
        case Num(value=value):
            return _bounded(value)
        case Call(head="base", args=(_, _, value)):
            return exact_value(value)
        case Call(head=head, args=args):
            values = [exact_value(arg) for arg in args]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                return None
            return _apply(head, known)
    return None


def _apply(head: str, values: list[Fraction]) -> Fraction | None:
    if head in _OPERATIONS:
        return _bounded(Fraction(_OPERATIONS[head](*values)))
    if head == "pow":
        base, exponent = values
        return _power(base, int(exponent)) if exponent.denominator == 1 else None
    if all(value.denominator == 1 for value in values):
        return _integer_function(head, [int(value) for value in values])
    return None


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values),
    "neg": operator.neg,
    "mul": lambda *values: math.prod(values),
    "div": operator.truediv,
    "mod": operator.mod,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "percent": lambda value: value / 100,
}


def _integer_function(head: str, values: list[int]) -> Fraction | None:
    match head, values:
        case "gcd", _:
            return Fraction(math.gcd(*values))
        case "lcm", _:
            return _bounded(Fraction(math.lcm(*values)))
        case "fact", [n] if n >= 0:
            if n > _MAX_FACTORIAL:
                raise TooLargeError(head)
            return Fraction(math.factorial(n))
        case "binom", [n, k] if 0 <= k <= n:
            if min(k, n - k) * n.bit_length() > MAX_BITS:
                raise TooLargeError(head)
            return Fraction(math.comb(n, k))
        case "base", [numeral, base] if 2 <= base <= 36:
            digits = [int(digit) for digit in str(numeral)]
            if max(digits) < base:
                return Fraction(sum(digit * base**place for place, digit in enumerate(reversed(digits))))
    return None


def _power(base: Fraction, exponent: int) -> Fraction:
    if base in (1, -1):
        return base if exponent % 2 else Fraction(1)
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base != 0 and abs(exponent) * size > 2 * MAX_BITS:
        raise TooLargeError("power")
    return _bounded(base**exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError("bits")
    return value
