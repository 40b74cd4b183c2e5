"""Equality of expressions by evaluating both at random points, with 300 digits and a bound on the size of values.

Two expressions that differ as functions differ at almost every point, so one point where they differ decides. Several
points where they agree to 250 digits leave no practical doubt. What the probe cannot evaluate it says so.
"""

import enum
import random
from collections.abc import Callable, Mapping
from typing import Any

from magistral_jax.verify.math_exact import TooLargeError
from magistral_jax.verify.math_numeric import UndefinedError, UnsupportedError, context, numeric_value
from magistral_jax.verify.math_tree import I, Tree, variables, walk

_TOLERANCE = context.mpf(10) ** -250
_MAX_MAGNITUDE = 400  # bits: values up to 2^400, so that agreement in 250 digits is agreement far behind the point
_NUM_POINTS = 6
_MIN_AGREEING = 3


class Agreement(enum.Enum):
    """What probing found."""

    DIFFER = "differ"
    AGREE = "agree"
    UNKNOWN = "unknown"
    TOO_LARGE = "too_large"


def probe(a: Tree, b: Tree) -> Agreement:
    """Compare two scalars as functions of their variables.

    They count as equal where they agree wherever both are real: √x·√y is √(xy), but √(x²) is not x. Expressions that
    are not both real at enough points are compared at positive integers ((−1)ⁿ is cos nπ), then as complex functions.
    """

    def agrees(point: Mapping[str, Any], is_real: bool) -> bool:
        return _same(numeric_value(a, point, is_real), numeric_value(b, point, is_real))

    return _over_domains(agrees, a, b)


def probe_ratio(a: Tree, b: Tree) -> int:
    """The sign of c where a = c·b for a constant c, and 0 where there is none.

    With a c, a = 0 and b = 0 are one equation. Expressions without variables, or 0 everywhere, have no ratio.
    """
    if not (variables(a) and variables(b)):
        return 0
    ratios: list[Any] = []

    def is_steady(point: Mapping[str, Any], is_real: bool) -> bool:
        x, y = numeric_value(a, point, is_real), numeric_value(b, point, is_real)
        if _is_zero(x) or _is_zero(y):
            return _is_zero(x) and _is_zero(y)
        ratios.append(x / y)
        return _same(ratios[0], ratios[-1])

    if _over_domains(is_steady, a, b) is not Agreement.AGREE or not ratios:
        return 0
    return -1 if context.re(ratios[0]) < 0 else 1


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
            except UnsupportedError:
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
                values = [context.mpf(sign * size) for sign, size in zip(signs, sizes, strict=True)]
            case "integer":
                values = [context.mpf(index + 1 + rng.randrange(4) * (place > 0)) for place in range(len(names))]
            case _:
                values = [
                    context.mpc(sign * size, rng.uniform(0.3, 1.2)) for sign, size in zip(signs, sizes, strict=True)
                ]
        points.append(dict(zip(names, values, strict=True)))
    return points


def _same(x: Any, y: Any) -> bool:
    """Equal to 250 digits. What nearly cancels is zero beside a zero, and tells nothing beside another of its kind."""
    scale = max(abs(x), abs(y))
    if scale < _TOLERANCE:
        if x and y:
            raise UndefinedError
        return True
    is_close = abs(x - y) <= scale * _TOLERANCE
    if is_close and context.mag(scale) > _MAX_MAGNITUDE:
        raise TooLargeError("magnitude")  # equal in the leading digits says nothing about the last
    return is_close


def _is_zero(x: Any) -> bool:
    return abs(x) < _TOLERANCE
