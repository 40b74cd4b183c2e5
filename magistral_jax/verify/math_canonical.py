r"""One structure for answers that are written in different ways: `x > 3` is (3, ∞), `1 \pm 2` is the list 3, −1."""

import dataclasses

from magistral_jax.verify.math_matrix import matrix_value
from magistral_jax.verify.math_solve import punctured_line, solution_set
from magistral_jax.verify.math_tree import (
    INFINITY,
    REALS,
    Call,
    Group,
    Matrix,
    Relation,
    Series,
    Sym,
    Tree,
    is_name,
    mapped,
    renamed,
    walk,
)

_INTEGERS = Sym("mathbb Z")
_PARAMETER = Sym("n")
_MINUS_INFINITY = Call("neg", (INFINITY,))


def canonical(tree: Tree) -> Tree:
    """Rewrite plus-minus, memberships, chains, inequalities in one variable, unions and sums of matrices."""
    return _rewrite(_without_plus_minus(tree))


def _rewrite(tree: Tree) -> Tree:  # noqa: PLR0911 one return for each kind
    match tree:
        case Series(items=items):
            return _flat(tuple(_rewrite(item) for item in _without_parameter(items)))
        case Group(items=items):
            return _group(dataclasses.replace(tree, items=tuple(_rewrite(item) for item in items)))
        case Matrix(rows=rows) if all(len(row) == 1 and isinstance(row[0], Relation) for row in rows):
            return _rewrite(Series(tuple(row[0] for row in rows)))  # a system of equations
        case Matrix(rows=rows):
            return Matrix(tuple(tuple(_rewrite(entry) for entry in row) for row in rows))
        case Relation():
            return _relation(tree)
        case Call(head="union", args=parts):
            return _flat(tuple(_rewrite(part) for part in parts))
        case Call(head="setminus", args=(whole, points)) if whole == REALS:
            return punctured_line(points) or tree
        case Call(head="mul", args=(Sym(name=name), Group(opening="(") as point)) if len(name) == 1 and name.isupper():
            return _rewrite(point)  # the point A(1, 2)
        case Call(head="where", args=parts):
            return Call("where", tuple(_rewrite(part) for part in parts))
        case Call(args=parts) if any(isinstance(node, Matrix) for node in walk(tree)):
            tree = dataclasses.replace(tree, args=tuple(_rewrite(part) for part in parts))
            return matrix_value(tree) or tree
    return Group("(", (_MINUS_INFINITY, INFINITY), ")") if tree == REALS else tree


def _group(tree: Group) -> Group:
    """Intervals are open where they are infinite; in square brackets, one or three items are a tuple."""
    if tree.opening == "[" and len(tree.items) != 2:
        return Group("(", tree.items, ")")
    if len(tree.items) == 2 and tree.opening in ("(", "["):
        low, high = tree.items
        opening = "(" if low in (INFINITY, _MINUS_INFINITY) else tree.opening
        closing = ")" if high in (INFINITY, _MINUS_INFINITY) else tree.closing
        return Group(opening, tree.items, closing)
    return tree


# ---- relations ------------------------------------------------------------------------------------------------------


def _relation(tree: Relation) -> Tree:
    operators, sides = tree.operators, [_rewrite(side) for side in tree.sides]
    if operators[-1] == "approx" and len(sides) > 2:  # x = pi ≈ 3.14 says pi
        operators, sides = operators[:-1], sides[:-1]
    if operators == ("in",):
        return sides[1]
    if operators == ("approx",):
        return Relation(("=",) if is_name(sides[0]) else operators, tuple(sides))
    if set(operators) <= {"=", "approx"}:
        return _equation(sides)
    return solution_set(operators, tuple(sides)) or Relation(operators, tuple(sides))


def _equation(sides: list[Tree]) -> Tree:
    """A chain `x = 2 + 3 = 5` says what its name is at last; `(x, y) = (1, 2)` is x = 1 and y = 2."""
    names = [side for side in sides[:-1] if is_name(side)]
    if len(sides) > 2 and len(set(names)) <= 1:
        sides = [names[0] if names else sides[0], sides[-1]]
    match sides:
        case [Group(opening="(", items=names), Group(opening="(", items=values)] if len(names) == len(values):
            pairs = zip(names, values, strict=True)
            return Group("(", tuple(Relation(("=",), pair) for pair in pairs), ")")
        case [value, name] if is_name(name) and not is_name(value):
            sides = [name, value]
    return Relation(("=",) * (len(sides) - 1), tuple(sides))


# ---- lists ----------------------------------------------------------------------------------------------------------


def _flat(items: tuple[Tree, ...]) -> Tree:
    """A list without lists in it; a list of one is that one."""
    flat = tuple(part for item in items for part in (item.items if isinstance(item, Series) else (item,)))
    return flat[0] if len(flat) == 1 else Series(flat)


def _without_parameter(items: tuple[Tree, ...]) -> tuple[Tree, ...]:
    r"""`\pi + 2k\pi, k \in \mathbb{Z}`: the condition goes, and the parameter gets one name."""
    names = [
        item.sides[0]
        for item in items
        if isinstance(item, Relation) and item.operators == ("in",) and item.sides[1] == _INTEGERS
        if isinstance(item.sides[0], Sym)
    ]
    if len(names) != 1:
        return items
    rest = [item for item in items if not (isinstance(item, Relation) and item.sides[1:] == (_INTEGERS,))]
    return tuple(renamed(item, names[0], _PARAMETER) for item in rest)


# ---- plus-minus -----------------------------------------------------------------------------------------------------


def _without_plus_minus(tree: Tree) -> Tree:
    """The tree as a list of its two values, item by item in lists and sets."""
    match tree:
        case Series(items=items):
            return _flat(tuple(_without_plus_minus(item) for item in items))
        case Group(opening="{", items=items):
            flat = _flat(tuple(_without_plus_minus(item) for item in items))
            return dataclasses.replace(tree, items=flat.items if isinstance(flat, Series) else (flat,))
    if any(isinstance(node, Call) and node.head in ("pm", "mp") for node in walk(tree)):
        return Series((_with_sign(tree, 1), _with_sign(tree, -1)))
    return tree


def _with_sign(tree: Tree, sign: int) -> Tree:
    """The tree with every plus-minus read as plus and every minus-plus as minus, or the other way round."""
    tree = mapped(tree, lambda part: _with_sign(part, sign))
    match tree:
        case Call(head="pm" | "mp" as head, args=(left, right)):
            is_plus = (head == "pm") == (sign > 0)
            return Call("add", (left, right if is_plus else Call("neg", (right,))))
    return tree
