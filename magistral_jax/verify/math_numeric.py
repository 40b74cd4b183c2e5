"""Numeric values of expression trees, with 300 digits and a bound on their size."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_tree import (
    INFINITY,
    PI,
    Call,
    E,
    Group,
    I,
    Matrix,
    Num,
    Relation,
    Series,
    Sym,
    Tree,
    variables,
)

_DIGITS = 300
_MAX_OPERAND = 64  # bits of an exponent or a gamma argument

context = mpmath.mp.clone()
"""Arithmetic with a precision of its own: the global one belongs to others."""
context.dps = _DIGITS


class UndefinedError(ArithmeticError):
    """The expression has no value at this point, or not one of the kind that is asked for."""


class UnsupportedError(Exception):
    """The probe does not know the operation."""


NO_VALUE = (TooLargeError, UnsupportedError, ArithmeticError, ValueError, TypeError)
"""What `numeric_value` raises, mpmath's own errors included."""


def numeric_value(tree: Tree, point: Mapping[str, Any], is_real: bool) -> Any:
    """The value where the variables have these values.

    Args:
      tree: An expression.
      point: Values of its variables.
      is_real: Whether every part of it has to be real.

    Raises:
      UndefinedError: There is no value at this point, or not one of the kind that is asked for.
      UnsupportedError: An operation is not known here.
      TooLargeError: An operand is too large.
    """
    match tree:
        case Num(value=value):
            return context.mpf(value.numerator) / value.denominator
        case Sym():
            return _symbol(tree, point)
        case Call(head="root", args=(radicand, degree)):
            return _root(numeric_value(radicand, point, is_real), numeric_value(degree, point, is_real), is_real)
        case Call(head="pow", args=(base, exponent)):
            value = numeric_value(exponent, point, is_real)
            result = _power(numeric_value(base, point, is_real), exponent, value, is_real)
        case Call(head=head, args=args):
            result = _apply(head, [numeric_value(arg, point, is_real) for arg in args])
        case _:
            raise UnsupportedError
    if is_real and isinstance(result, context.mpc):
        if result.imag != 0:
            raise UndefinedError
        result = result.real
    if not context.isfinite(result):
        raise UndefinedError
    return result


def is_near(a: Tree, b: Tree, distance: Fraction) -> bool:
    """Whether two constants differ by less than this."""
    try:
        gap = abs(numeric_value(a, {}, True) - numeric_value(b, {}, True))
        return gap < context.mpf(distance.numerator) / distance.denominator
    except NO_VALUE:
        return False


def rounded(tree: Tree, decimals: int) -> Tree:
    """The tree with every real constant in it, sums and roots as a whole, rounded to so many places."""
    match tree:
        case Series(items=parts) | Group(items=parts):
            return dataclasses.replace(tree, items=tuple(rounded(part, decimals) for part in parts))
        case Relation(sides=parts):
            return dataclasses.replace(tree, sides=tuple(rounded(part, decimals) for part in parts))
        case Matrix(rows=rows):
            return Matrix(tuple(tuple(rounded(entry, decimals) for entry in row) for row in rows))
        case Call() | Num() | Sym() if not variables(tree):
            try:
                return Num(Fraction(int(context.nint(numeric_value(tree, {}, True) * 10**decimals)), 10**decimals))
            except NO_VALUE:
                return tree
    return tree


def _symbol(tree: Sym, point: Mapping[str, Any]) -> Any:
    if tree == PI:
        return +context.pi
    if tree == E:
        return +context.e
    if tree == I:
        return context.mpc(0, 1)
    if tree == INFINITY:
        raise UnsupportedError
    return point[tree.name]


def _root(radicand: Any, degree: Any, is_real: bool) -> Any:
    """The real root of a negative number where the degree is odd, else the principal root."""
    if degree == 0:
        raise UndefinedError
    is_odd = isinstance(degree, context.mpf) and degree % 2 == 1
    if is_odd and isinstance(radicand, context.mpf) and radicand < 0:
        return -context.power(-radicand, 1 / degree)
    if is_real and isinstance(radicand, context.mpf) and radicand < 0:
        raise UndefinedError
    return context.sqrt(radicand) if degree == 2 else context.power(radicand, 1 / degree)


def _power(base: Any, exponent: Tree, value: Any, is_real: bool) -> Any:
    if value != 0 and context.mag(value) > _MAX_OPERAND:
        raise TooLargeError("exponent")
    if base == 0 and (isinstance(value, context.mpc) or value <= 0):
        if value == 0:
            return context.mpf(1)
        raise UndefinedError
    if is_real and base < 0 and value % 1 != 0:
        exact = exact_value(exponent)
        if exact is None or exact.denominator % 2 == 0:
            raise UndefinedError
        return (-1) ** (exact.numerator % 2) * context.power(-base, value)
    result = context.power(base, value)
    if result != 0 and abs(context.mag(result)) > 2**_MAX_OPERAND:
        raise TooLargeError("power")
    return result


def _apply(head: str, values: list[Any]) -> Any:
    if head in _BOUNDED and any(value != 0 and context.mag(value) > _MAX_OPERAND for value in values):
        raise TooLargeError(head)
    if head not in _OPERATIONS:
        raise UnsupportedError
    return _OPERATIONS[head](*values)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values), "mul": lambda *values: math.prod(values),
    "neg": operator.neg, "div": operator.truediv, "mod": operator.mod,
    "sin": context.sin, "cos": context.cos, "tan": context.tan,
    "cot": context.cot, "sec": context.sec, "csc": context.csc,
    "arcsin": context.asin, "arccos": context.acos, "arctan": context.atan,
    "arccot": context.acot, "arcsec": context.asec, "arccsc": context.acsc,
    "sinh": context.sinh, "cosh": context.cosh, "tanh": context.tanh,
    "coth": context.coth, "sech": context.sech, "csch": context.csch,
    "arcsinh": context.asinh, "arccosh": context.acosh, "arctanh": context.atanh,
    "arccoth": context.acoth, "arcsech": context.asech, "arccsch": context.acsch,
    "cis": context.expj, "sgn": context.sign,
    "exp": context.exp, "ln": context.log, "log": context.log,
    "floor": context.floor, "ceil": context.ceil, "abs": abs, "min": min, "max": max,
    "fact": context.factorial, "binom": context.binomial,
    "percent": lambda x: x / 100, "degree": lambda x: x * context.pi / 180,
}  # fmt: skip
_BOUNDED = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "cis", "sinh", "cosh", "tanh", "coth", "sech", "csch", "exp", "fact",
    "binom", "mod", "floor", "ceil",
})  # fmt: skip
