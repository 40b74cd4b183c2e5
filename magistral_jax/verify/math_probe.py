"""Equality of expressions by evaluating both at random points, with 300 digits and a bound on the size of values.

Two expressions that differ as functions differ at almost every point, so one point where they differ decides. Several
points where they agree to 250 digits leave no practical doubt. What the probe cannot evaluate it says so.
"""

import enum
import math
import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import mpmath

from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_tree import INFINITY, PI, Call, E, I, Num, Sym, Tree, variables, walk

_DIGITS = 300
_AGREEMENT = 250
_MAX_MAGNITUDE = 400  # bits: values up to 2^400, so that agreement in 250 digits is agreement far behind the point
_MAX_OPERAND = 64  # bits of an exponent or a gamma argument
_NUM_POINTS = 6
_MIN_AGREEING = 3

_context = mpmath.mp.clone()  # precision of its own: the global one belongs to others
_context.dps = _DIGITS


class Agreement(enum.Enum):
    """What probing found."""

    DIFFER = "differ"
    AGREE = "agree"
    UNKNOWN = "unknown"
    TOO_LARGE = "too_large"


class _UndefinedError(ArithmeticError):
    """The expression has no value at this point, or not one of the kind that is asked for."""


class _UnsupportedError(Exception):
    """The probe does not know the operation."""


def probe(a: Tree, b: Tree) -> Agreement:
    """Compare two scalars as functions of their variables.

    They count as equal where they agree wherever both are real: √x·√y is √(xy), but √(x²) is not x. Expressions that
    are not both real at enough points are compared at positive integers ((−1)ⁿ is cos nπ), then as complex functions.
    """
    return _over_domains(lambda point, is_real: _same(_value(a, point, is_real), _value(b, point, is_real)), a, b)


def probe_ratio(a: Tree, b: Tree) -> Agreement:
    """Whether a = c·b for a constant c ≠ 0: then a = 0 and b = 0 are the same equation."""
    ratios: list[Any] = []

    def is_steady(point: Mapping[str, Any], is_real: bool) -> bool:
        x, y = _value(a, point, is_real), _value(b, point, is_real)
        if x == 0 or y == 0:
            return x == y
        ratios.append(x / y)
        return _same(ratios[0], ratios[-1])

    return _over_domains(is_steady, a, b)


def _over_domains(agrees: Callable[[dict[str, Any], bool], bool], a: Tree, b: Tree) -> Agreement:
    names = sorted(variables(a) | variables(b))
    has_i = any(node == I for tree in (a, b) for node in walk(tree))
    saw_large = False
    for domain in ("complex",) if has_i else ("real", "integer", "complex"):
        num_agreeing = 0
        for point in _points(names, domain):
            try:
                if not agrees(point, domain != "complex"):
                    return Agreement.DIFFER
            except TooLargeError:
                saw_large = True
            except _UnsupportedError:
                return Agreement.UNKNOWN
            except (ArithmeticError, ValueError, TypeError):  # no value here, also where mpmath cannot compare or bound
                continue
            else:
                num_agreeing += 1
        if num_agreeing >= (_MIN_AGREEING if names else 1):
            return Agreement.AGREE
    return Agreement.TOO_LARGE if saw_large else Agreement.UNKNOWN


def _points(names: list[str], domain: str) -> list[dict[str, Any]]:
    """The same points every time. The first real ones are all positive and all negative, the others mixed."""
    if not names:
        return [{}]
    rng = random.Random(2506_10910)
    points: list[dict[str, Any]] = []
    for index in range(_NUM_POINTS):
        signs = [1 if index == 0 else -1 if index == 1 else rng.choice((1, -1)) for _ in names]
        sizes = [rng.uniform(0.3, 1.7) for _ in names]
        match domain:
            case "real":
                values = [_context.mpf(sign * size) for sign, size in zip(signs, sizes, strict=True)]
            case "integer":
                values = [_context.mpf(index + 1 + rng.randrange(4) * (place > 0)) for place in range(len(names))]
            case _:
                values = [
                    _context.mpc(sign * size, rng.uniform(0.3, 1.2)) for sign, size in zip(signs, sizes, strict=True)
                ]
        points.append(dict(zip(names, values, strict=True)))
    return points


def _same(x: Any, y: Any) -> bool:
    for value in (x, y):
        if value != 0 and _context.mag(value) > _MAX_MAGNITUDE and _is_close(x, y):
            raise TooLargeError("magnitude")  # equal in the leading digits says nothing about the last
    return _is_close(x, y)


def _is_close(x: Any, y: Any) -> bool:
    scale = max(abs(x), abs(y))
    return abs(x - y) <= scale * _context.mpf(10) ** -_AGREEMENT or scale < _context.mpf(10) ** -_AGREEMENT


def _value(tree: Tree, point: Mapping[str, Any], is_real: bool) -> Any:
    match tree:
        case Num(value=value):
            return _context.mpf(value.numerator) / value.denominator
        case Sym():
            return _symbol(tree, point)
        case Call(head="root", args=(radicand, degree)):
            return _root(_value(radicand, point, is_real), _value(degree, point, is_real), is_real)
        case Call(head="pow", args=(base, exponent)):
            result = _power(_value(base, point, is_real), exponent, _value(exponent, point, is_real), is_real)
        case Call(head=head, args=args):
            result = _apply(head, [_value(arg, point, is_real) for arg in args])
        case _:
            raise _UnsupportedError
    if is_real and isinstance(result, _context.mpc):
        if result.imag != 0:
            raise _UndefinedError
        result = result.real
    if not _context.isfinite(result):
        raise _UndefinedError
    return result


def _symbol(tree: Sym, point: Mapping[str, Any]) -> Any:
    if tree == PI:
        return +_context.pi
    if tree == E:
        return +_context.e
    if tree == I:
        return _context.mpc(0, 1)
    if tree == INFINITY:
        raise _UnsupportedError
    return point[tree.name]


def _root(radicand: Any, degree: Any, is_real: bool) -> Any:
    """The real root of a negative number where the degree is odd, else the principal root."""
    if degree == 0:
        raise _UndefinedError
    is_odd = isinstance(degree, _context.mpf) and degree % 2 == 1
    if is_odd and isinstance(radicand, _context.mpf) and radicand < 0:
        return -_context.power(-radicand, 1 / degree)
    if is_real and isinstance(radicand, _context.mpf) and radicand < 0:
        raise _UndefinedError
    return _context.sqrt(radicand) if degree == 2 else _context.power(radicand, 1 / degree)


def _power(base: Any, exponent: Tree, value: Any, is_real: bool) -> Any:
    if value != 0 and _context.mag(value) > _MAX_OPERAND:
        raise TooLargeError("exponent")
    if base == 0 and (isinstance(value, _context.mpc) or value <= 0):
        if value == 0:
            return _context.mpf(1)
        raise _UndefinedError
    if is_real and base < 0 and value % 1 != 0:
        exact = exact_value(exponent)
        if exact is None or exact.denominator % 2 == 0:
            raise _UndefinedError
        return (-1) ** (exact.numerator % 2) * _context.power(-base, value)
    result = _context.power(base, value)
    if result != 0 and abs(_context.mag(result)) > 2**_MAX_OPERAND:
        raise TooLargeError("power")
    return result


def _apply(head: str, values: list[Any]) -> Any:
    if head in _BOUNDED and any(value != 0 and _context.mag(value) > _MAX_OPERAND for value in values):
        raise TooLargeError(head)
    if head not in _OPERATIONS:
        raise _UnsupportedError
    return _OPERATIONS[head](*values)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values), "mul": lambda *values: math.prod(values),
    "neg": operator.neg, "div": operator.truediv, "mod": operator.mod,
    "sin": _context.sin, "cos": _context.cos, "tan": _context.tan,
    "cot": _context.cot, "sec": _context.sec, "csc": _context.csc,
    "arcsin": _context.asin, "arccos": _context.acos, "arctan": _context.atan,
    "sinh": _context.sinh, "cosh": _context.cosh, "tanh": _context.tanh,
    "exp": _context.exp, "ln": _context.log, "log": _context.log,
    "floor": _context.floor, "ceil": _context.ceil, "abs": abs, "min": min, "max": max,
    "fact": _context.factorial, "binom": _context.binomial,
    "percent": lambda x: x / 100, "degree": lambda x: x * _context.pi / 180,
}  # fmt: skip
_BOUNDED = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "fact", "binom", "mod", "floor", "ceil",
})  # fmt: skip
