r"""Equality of parsed answers: structure first (sets, intervals, equations), then scalars element by element."""

import collections
import dataclasses
from collections.abc import Sequence

from magistral_jax.verify.math_canonical import canonical
from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_probe import Agreement, probe, probe_ratio
from magistral_jax.verify.math_symbolic import symbolically_equal
from magistral_jax.verify.math_tree import (
    INFINITY,
    Call,
    Group,
    Matrix,
    Num,
    Relation,
    Series,
    Sym,
    Tree,
    is_scalar,
    walk,
)

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether two answers are equal, and the rule that decided."""

    is_equal: bool
    path: str


def compare(answer: Tree, reference: Tree) -> Comparison:
    """Compare two parsed answers.

    The order of a tuple counts, that of a set and of a list without brackets does not. `x = 5` is 5, an equation is any
    multiple of itself, an inequality in one variable is its interval.

    Raises:
      TooLargeError: Numbers in them are too large to be compared.
    """
    if answer == reference:
        return Comparison(True, "structure")
    return _compare(canonical(answer), canonical(reference))


def _compare(a: Tree, b: Tree) -> Comparison:  # noqa: PLR0911 one return for each kind
    """`compare` for canonical trees. `a` is the answer's part and `b` the reference's."""
    match a, b:
        case Series(), Series():
            return _in_any_order(a.items, b.items)
        case (Series() | Group(opening="{"), Series() | Group(opening="{")):
            return _as_sets(a.items, b.items)
        case Group(items=[item], opening="{"), _ if not isinstance(b, Group):
            return _compare(item, b)
        case _, Group(items=[item], opening="{") if not isinstance(a, Group):
            return _compare(a, item)
        case (Series(), Group(opening="(", closing=")")) | (Group(opening="(", closing=")"), Series()):
            return _in_order(a.items, b.items)
        case Group(), Group():
            same_brackets = (a.opening, a.closing) == (b.opening, b.closing)
            return _in_order(a.items, b.items) if same_brackets else Comparison(False, "brackets")
        case Matrix(), Matrix():
            return _matrices(a.rows, b.rows)
        case (Matrix(), Group()) | (Group(), Matrix()):
            return _in_order(_vector(a), _vector(b))
        case Relation(), Relation():
            return _relations(a, b)
        case Relation(), _:
            return _with_value(a, b, is_answer=True)
        case _, Relation():
            return _with_value(b, a, is_answer=False)
    if is_scalar(a) and is_scalar(b):
        return _scalars(a, b)
    return Comparison(False, "kind")


# ---- structures -----------------------------------------------------------------------------------------------------


def _in_order(a: Sequence[Tree], b: Sequence[Tree]) -> Comparison:
    if len(a) != len(b):
        return Comparison(False, "count")
    result = Comparison(True, "structure")
    for left, right in zip(a, b, strict=True):
        result = _compare(left, right)
        if not result.is_equal:
            break
    return result


def _in_any_order(a: Sequence[Tree], b: Sequence[Tree]) -> Comparison:
    """Equal with repetitions. Parts that are written alike are paired first, for the rest every pair is tried."""
    if len(a) != len(b):
        return Comparison(False, "count")
    only_a = list((collections.Counter(a) - collections.Counter(b)).elements())
    only_b = list((collections.Counter(b) - collections.Counter(a)).elements())
    result = Comparison(True, "structure")
    for left in only_a:
        for index, right in enumerate(only_b):
            result = _compare(left, right)
            if result.is_equal:
                del only_b[index]
                break
        else:
            return Comparison(False, result.path)
    return result


def _as_sets(a: Sequence[Tree], b: Sequence[Tree]) -> Comparison:
    """Equal without repetitions: each element has an equal one on the other side."""
    result = Comparison(not a and not b, "count")
    for these, others in ((a, b), (b, a)):
        for item in these:
            found = (_compare(item, other) if these is a else _compare(other, item) for other in others)
            result = next((comparison for comparison in found if comparison.is_equal), Comparison(False, "element"))
            if not result.is_equal:
                return result
    return result


def _matrices(a: Sequence[Sequence[Tree]], b: Sequence[Sequence[Tree]]) -> Comparison:
    if [len(row) for row in a] != [len(row) for row in b]:
        return Comparison(False, "count")
    return _in_order([entry for row in a for entry in row], [entry for row in b for entry in row])


def _vector(tree: Matrix | Group) -> tuple[Tree, ...]:
    """Entries of a tuple, or of a matrix that is one row or one column; of another matrix none."""
    if isinstance(tree, Group):
        return tree.items
    if len(tree.rows) == 1 or all(len(row) == 1 for row in tree.rows):
        return tuple(entry for row in tree.rows for entry in row)
    return ()


# ---- equations ------------------------------------------------------------------------------------------------------


def _relations(a: Relation, b: Relation) -> Comparison:
    result = Comparison(False, "operators")
    if a.operators == b.operators:
        result = _in_order(a.sides, b.sides)
    if not result.is_equal and a.operators == tuple(_MIRRORED.get(operator) for operator in reversed(b.operators)):
        result = _in_order(a.sides[::-1], b.sides)
    if result.is_equal or not (a.operators == b.operators == ("=",)):
        return result
    differences = [Call("add", (side.sides[0], Call("neg", (side.sides[1],)))) for side in (a, b)]
    if not all(is_scalar(difference) for difference in differences):
        return result
    return Comparison(probe_ratio(*differences) is Agreement.AGREE, "equation")


def _with_value(relation: Relation, value: Tree, *, is_answer: bool) -> Comparison:
    """An equation against a value. The left side has to be a name for it, or, in an answer, what was to be computed."""
    if set(relation.operators) != {"="}:
        return Comparison(False, "kind")
    left, right = relation.sides[0], relation.sides[-1]
    if not _is_name(left):
        names_it = is_answer and (_is_unknown(left) or _compare(left, right).is_equal)
        if not names_it:
            return Comparison(False, "kind")
    return _compare(right, value) if is_answer else _compare(value, right)


def _is_name(tree: Tree) -> bool:
    r"""`x`, `f(x)`, `\angle A`, `(x, y)`: symbols alone, side by side."""
    match tree:
        case Sym():
            return True
        case Call(head="mul", args=parts) | Group(items=parts):
            return all(_is_name(part) for part in parts)
    return False


def _is_unknown(tree: Tree) -> bool:
    """`x + y`, `x^2 + y^2`: an expression in variables with no numbers but exponents."""
    match tree:
        case Call(head="pow", args=(base, Num())):
            return _is_unknown(base)
        case Call(args=parts):
            return all(_is_unknown(part) for part in parts)
    return isinstance(tree, Sym)


# ---- scalars --------------------------------------------------------------------------------------------------------


def _scalars(a: Tree, b: Tree) -> Comparison:  # noqa: PLR0911 one return for each rule
    """Exact arithmetic where both are rational, else the probe, else SymPy."""
    if a == b:
        return Comparison(True, "structure")
    if _is_based(a) != _is_based(b):
        return _numerals(a, b)
    if any(node == INFINITY for tree in (a, b) for node in walk(tree)) and not _has_bounds(a) and not _has_bounds(b):
        return Comparison(False, "structure")
    is_huge = False
    try:
        exact_a, exact_b = exact_value(a), exact_value(b)
        if exact_a is not None and exact_b is not None:
            return Comparison(exact_a == exact_b, "rational")
    except TooLargeError:
        is_huge = True
    except ZeroDivisionError:
        return Comparison(False, "undefined")
    match probe(a, b):
        case Agreement.DIFFER:
            return Comparison(False, "probe")
        case Agreement.AGREE if not is_huge:
            return Comparison(True, "probe")
        case Agreement.UNKNOWN if not is_huge:
            return Comparison(symbolically_equal(a, b), "sympy")
    raise TooLargeError("magnitude")


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
