"""Solution sets of inequalities in one variable: `2x < 3` is (−∞, 3/2), `|x| > 1` is two intervals.

Linear inequalities and bounds on an absolute value only: what else an answer may hold is compared as it stands.
"""

import itertools
from fractions import Fraction

from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_tree import (
    INFINITY,
    Call,
    Group,
    Num,
    Series,
    Sym,
    Tree,
    integer,
    is_name,
    is_scalar,
    variables,
)

_MINUS_INFINITY = Call("neg", (INFINITY,))
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_Bound = tuple[Tree, str]  # a value, and "<" or "<="


def solution_set(operators: tuple[str, ...], sides: tuple[Tree, ...]) -> Tree | None:
    """The interval or intervals of a relation, None for one that is not solved here."""
    if not all(is_scalar(side) for side in sides):
        return None
    if operators == ("!=",):
        left, right = sides if is_name(sides[0]) else sides[::-1]
        return punctured_line(right) if is_name(left) and not variables(right) else None
    if operators[0] in (">", ">="):  # from the smaller to the larger
        operators, sides = tuple(_MIRRORED.get(operator, "?") for operator in reversed(operators)), sides[::-1]
    return _ascending(operators, sides) if set(operators) <= {"<", "<="} else None


def _ascending(operators: tuple[str, ...], sides: tuple[Tree, ...]) -> Tree | None:
    match operators, sides:
        case [first, second], [low, middle, high]:
            return _between((low, first), middle, (high, second))
        case [operator], [left, right] if is_name(right) or not variables(left):
            return _between((left, operator), right, (INFINITY, "<"))
        case [operator], [left, right]:
            if variables(right) and not is_name(left):  # all that varies to the left
                left, right = Call("add", (left, Call("neg", (right,)))), integer(0)
            return _between((_MINUS_INFINITY, "<"), left, (right, operator))
    return None


def punctured_line(points: Tree) -> Tree | None:
    """The real numbers without these points; None where their order is not known."""
    items = points.items if isinstance(points, Group | Series) else (points,)
    if len(items) > 1:
        values = [value for value in map(_rational, items) if value is not None]
        if len(values) < len(items):
            return None
        items = tuple(Num(value) for value in sorted(set(values)))
    ends = (_MINUS_INFINITY, *items, INFINITY)
    return Series(tuple(Group("(", pair, ")") for pair in itertools.pairwise(ends)))


def _between(low: _Bound, middle: Tree, high: _Bound) -> Tree | None:
    """The values of what varies in `middle` that put it between the bounds."""
    if variables(low[0]) & variables(middle) or variables(high[0]) & variables(middle):
        return None
    if isinstance(middle, Call) and middle.head == "abs" and is_name(middle.args[0]):
        return _distances(low, high)
    if is_name(middle):
        return _interval(low, high)
    names = variables(middle)
    line = _line(middle, Sym(min(names))) if len(names) == 1 else None
    if line is None or line[0] == 0:
        return None
    slope, rest = line
    ends = [(_solved(bound, slope, rest), operator) for bound, operator in (low, high)]
    return _interval(*ends) if slope > 0 else _interval(*reversed(ends))


def _interval(low: _Bound, high: _Bound) -> Group:
    return Group("(" if low[1] == "<" else "[", (low[0], high[0]), ")" if high[1] == "<" else "]")


def _distances(low: _Bound, high: _Bound) -> Tree | None:
    """The values whose absolute value lies between the bounds."""
    mirrored_low, mirrored_high = ((Call("neg", (value,)), operator) for value, operator in (low, high))
    if low[0] == _MINUS_INFINITY:
        return _interval(mirrored_high, high)
    smallest = _rational(low[0])
    if smallest is None or smallest < 0:
        return None
    if high[0] == INFINITY:
        mirrored_high = (_MINUS_INFINITY, "<")
    return Series((_interval(mirrored_high, mirrored_low), _interval(low, high)))


def _solved(bound: Tree, slope: Fraction, rest: Tree) -> Tree:
    if bound in (INFINITY, _MINUS_INFINITY):
        return bound if slope > 0 else (_MINUS_INFINITY if bound == INFINITY else INFINITY)
    return Call("div", (Call("add", (bound, Call("neg", (rest,)))), Num(slope)))


def _line(tree: Tree, variable: Sym) -> tuple[Fraction, Tree] | None:  # noqa: PLR0911 one return for each kind
    """(slope, rest) of slope · variable + rest with a rational slope; None where the tree is not of this form."""
    if variable.name not in variables(tree):
        return Fraction(0), tree
    match tree:
        case Sym():
            return Fraction(1), integer(0)
        case Call(head="neg", args=(inner,)):
            return _scaled(inner, Fraction(-1), variable)
        case Call(head="add", args=terms):
            lines = [_line(term, variable) for term in terms]
            known = [line for line in lines if line is not None]
            if len(known) < len(lines):
                return None
            return sum((slope for slope, _ in known), Fraction(0)), Call("add", tuple(rest for _, rest in known))
        case Call(head="mul", args=factors):
            varying = [factor for factor in factors if variable.name in variables(factor)]
            constant = _rational(Call("mul", tuple(factor for factor in factors if factor not in varying)))
            return _scaled(varying[0], constant, variable) if len(varying) == 1 and constant is not None else None
        case Call(head="div", args=(top, bottom)) if not variables(bottom):
            divisor = _rational(bottom)
            return _scaled(top, 1 / divisor, variable) if divisor else None
    return None


def _scaled(tree: Tree, factor: Fraction, variable: Sym) -> tuple[Fraction, Tree] | None:
    line = _line(tree, variable)
    return None if line is None else (factor * line[0], Call("mul", (Num(factor), line[1])))


def _rational(tree: Tree) -> Fraction | None:
    try:
        return exact_value(tree)
    except (ZeroDivisionError, TooLargeError):
        return None
