r"""Equality of parsed answers: structure first (sets, intervals, equations), then scalars element by element."""

import collections
from collections.abc import Iterable, Sequence

from magistral_jax.verify.math_canonical import canonical
from magistral_jax.verify.math_numeric import rounded
from magistral_jax.verify.math_probe import probe_ratio
from magistral_jax.verify.math_scalars import Comparison, compare_scalars
from magistral_jax.verify.math_tree import Call, Group, Matrix, Num, Relation, Series, Sym, Tree, is_name, is_scalar

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def compare(answer: Tree, reference: Tree, *, decimals: int | None = None) -> Comparison:
    """Compare two parsed answers.

    The order of a tuple counts, that of a set and of a list without brackets does not. `x = 5` is 5, an equation is any
    multiple of itself, an inequality in one variable is its interval.

    Args:
      answer: What is graded.
      reference: What is right.
      decimals: Places that numbers are rounded to before they are compared; None compares them exactly.

    Raises:
      TooLargeError: Numbers in them are too large to be compared.
    """
    if answer == reference:
        return Comparison(True, "structure")
    answer, reference = canonical(answer), canonical(reference)
    if decimals is not None:
        answer, reference = rounded(answer, decimals), rounded(reference, decimals)
    return _compare(answer, reference)


def _compare(a: Tree, b: Tree) -> Comparison:  # noqa: PLR0911, PLR0912 one return for each kind
    """`compare` for canonical trees. `a` is the answer's part and `b` the reference's."""
    match a, b:
        case Series(), Series():
            return _in_any_order(_once(a.items), _once(b.items))
        case (Series() | Group(opening="{"), Series() | Group(opening="{")):
            return _as_sets(a.items, b.items)
        case Group(items=[item], opening="{"), _ if not isinstance(b, Group):
            return _compare(item, b)
        case _, Group(items=[item], opening="{") if not isinstance(a, Group):
            return _compare(a, item)
        case (Series() | Group(opening="("), Series() | Group(opening="(")) if _is_assignment(a) and _is_assignment(b):
            return _in_any_order(a.items, b.items)
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
        case Series(items=items), _ if is_scalar(b) and len(set(items)) == len(items):  # 3/4 or 0.75
            return _all(_compare(item, b) for item in items)
        case _, Series(items=items) if is_scalar(a) and len(set(items)) == len(items):
            return _all(_compare(a, item) for item in items)
        case Relation(), _:
            return _with_value(a, b, is_answer=True)
        case _, Relation():
            return _with_value(b, a, is_answer=False)
        case Group(opening="mod", items=[residue, _]), _:
            return _compare(residue, b)
        case _, Group(opening="mod", items=[residue, _]):
            return _compare(a, residue)
        case Call(head="where"), Call(head="where"):
            return _in_order(a.args, b.args)
    if is_scalar(a) and is_scalar(b):
        return compare_scalars(a, b)
    return Comparison(False, "kind")


# ---- structures -----------------------------------------------------------------------------------------------------


def _in_order(a: Sequence[Tree], b: Sequence[Tree]) -> Comparison:
    if len(a) != len(b):
        return Comparison(False, "count")
    return _all(_compare(left, right) for left, right in zip(a, b, strict=True))


def _all(comparisons: Iterable[Comparison]) -> Comparison:
    """The first that differs, or the last."""
    result = Comparison(True, "structure")
    for result in comparisons:
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


def _once(items: Sequence[Tree]) -> Sequence[Tree]:
    """Without repeated tuples: the same solution twice is one. A number may be listed as often as it is a root."""
    return list(dict.fromkeys(items)) if all(isinstance(item, Group) for item in items) else items


def _is_assignment(tree: Series | Group) -> bool:
    return all(
        isinstance(item, Relation) and item.operators == ("=",) and is_name(item.sides[0]) for item in tree.items
    )


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
    if len(a.sides) != 2 or len(b.sides) != 2:
        return _chains(a, b)
    (left, right), (other_left, other_right) = a.sides, b.sides
    if a.operators == b.operators == ("=",) and _same_name(left, other_left):
        return _compare(right, other_right)
    result = _chains(a, b)
    if result.is_equal or a.operators[0] not in _MIRRORED or b.operators[0] not in _MIRRORED:
        return result
    differences = [Call("add", (side.sides[0], Call("neg", (side.sides[1],)))) for side in (a, b)]
    if not all(is_scalar(difference) for difference in differences):
        return result
    sign = probe_ratio(*differences)
    operator = b.operators[0] if sign > 0 else _MIRRORED[b.operators[0]]
    return Comparison(sign != 0 and a.operators[0] == operator, "equation")


def _chains(a: Relation, b: Relation) -> Comparison:
    """The same sides with the same operators between them, from the left or from the right."""
    result = Comparison(False, "operators")
    if a.operators == b.operators:
        result = _in_order(a.sides, b.sides)
    if not result.is_equal and a.operators == tuple(_MIRRORED.get(operator) for operator in reversed(b.operators)):
        result = _in_order(a.sides[::-1], b.sides)
    return result


def _same_name(a: Tree, b: Tree) -> bool:
    """Equal, or values of one function whose argument has another name: `f(x)` and `f(t)`."""
    match a, b:
        case Call(head="mul", args=(Sym() as f, Sym())), Call(head="mul", args=(Sym() as g, Sym())):
            return f == g
        case (Sym("y"), Call(head="mul", args=(Sym(), Sym()))) | (Call(head="mul", args=(Sym(), Sym())), Sym("y")):
            return True
    return a == b and is_name(a)


def _with_value(relation: Relation, value: Tree, *, is_answer: bool) -> Comparison:
    """An equation against a value. The left side has to be a name for it, or, in an answer, what was to be computed."""
    left, right = relation.sides[0], relation.sides[-1]
    sides = {"approx": (left, right), "=": (right,)}.get(relation.operators[-1], ())
    if relation.operators == ("=",) and not is_name(left):
        names_it = is_answer and (_is_unknown(left) or _compare(left, right).is_equal)
        sides = (right,) if names_it else ()
    result = Comparison(False, "kind")
    for side in sides:  # pi ≈ 3.14 is both
        result = _compare(side, value) if is_answer else _compare(value, side)
        if result.is_equal:
            break
    return result


def _is_unknown(tree: Tree) -> bool:
    """`x + y`, `x^2 + y^2`: an expression in variables with no numbers but exponents."""
    match tree:
        case Call(head="pow", args=(base, Num())):
            return _is_unknown(base)
        case Call(args=parts):
            return all(_is_unknown(part) for part in parts)
    return isinstance(tree, Sym)
