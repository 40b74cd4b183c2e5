r"""One structure for answers that are written in different ways: `x > 3` is (3, ∞), `1 \pm 2` is the list 3, −1."""

import dataclasses

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
    is_scalar,
    variables,
    walk,
)

_MINUS_INFINITY = Call("neg", (INFINITY,))
_ORDER = frozenset({"<", "<=", ">", ">="})
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def canonical(tree: Tree) -> Tree:
    """Rewrite plus-minus, memberships, inequalities in one variable and unions. The result has none of these."""
    if any(isinstance(node, Call) and node.head == "pm" for node in walk(tree)):
        tree = _flat((_with_sign(tree, "add"), _with_sign(tree, "sub")))
    return _rewrite(tree)


def _rewrite(tree: Tree) -> Tree:
    match tree:
        case Series(items=items):
            return _flat(tuple(_rewrite(item) for item in items))
        case Group(items=items):
            return dataclasses.replace(tree, items=tuple(_rewrite(item) for item in items))
        case Matrix(rows=rows):
            return Matrix(tuple(tuple(_rewrite(entry) for entry in row) for row in rows))
        case Relation():
            return _relation(tree)
        case Call(head="union", args=parts):
            return _flat(tuple(_rewrite(part) for part in parts))
    return Group("(", (_MINUS_INFINITY, INFINITY), ")") if tree == REALS else tree


def _relation(tree: Relation) -> Tree:
    sides, operators = tree.sides, tree.operators
    if operators[-1] == "approx" and len(sides) > 2:  # x = pi ≈ 3.14 says pi
        sides, operators = sides[:-1], operators[:-1]
    operators = tuple("=" if operator == "approx" else operator for operator in operators)
    match operators, sides:
        case ["in"], [_, collection]:
            return _rewrite(collection)
    return _interval(operators, sides) or Relation(operators, tuple(_rewrite(side) for side in sides))


def _interval(operators: tuple[str, ...], sides: tuple[Tree, ...]) -> Group | None:
    """The interval of `x < 2`, `2 > x` or `1 < x <= 2`; None for any other relation."""
    if not set(operators) <= _ORDER:
        return None
    if operators[0] in (">", ">="):  # from the smaller to the larger
        operators = tuple(_MIRRORED[operator] for operator in reversed(operators))
        sides = sides[::-1]
    match operators, sides:
        case [("<" | "<=") as left, ("<" | "<=") as right], [low, Sym(), high]:
            return _between(low, left, right, high)
        case ["<" | "<=" as right], [Sym() as variable, high] if variables(variable) and not variables(high):
            return _between(_MINUS_INFINITY, "<", right, high)
        case ["<" | "<=" as left], [low, Sym() as variable] if variables(variable) and not variables(low):
            return _between(low, left, "<", INFINITY)
    return None


def _between(low: Tree, left: str, right: str, high: Tree) -> Group | None:
    if not (is_scalar(low) and is_scalar(high)):
        return None
    return Group("(" if left == "<" else "[", (low, high), ")" if right == "<" else "]")


def _flat(items: tuple[Tree, ...]) -> Series:
    """A series without series in it."""
    return Series(tuple(part for item in items for part in (item.items if isinstance(item, Series) else (item,))))


def _with_sign(tree: Tree, head: str) -> Tree:
    """The tree with every plus-minus read as plus, or every one as minus."""
    match tree:
        case Call(head="pm", args=(left, right)):
            left, right = _with_sign(left, head), _with_sign(right, head)
            return Call("add", (left, right if head == "add" else Call("neg", (right,))))
        case Call(args=args):
            return dataclasses.replace(tree, args=tuple(_with_sign(arg, head) for arg in args))
        case Group(items=items) | Series(items=items):
            return dataclasses.replace(tree, items=tuple(_with_sign(item, head) for item in items))
        case Relation(sides=sides):
            return dataclasses.replace(tree, sides=tuple(_with_sign(side, head) for side in sides))
        case Matrix(rows=rows):
            return Matrix(tuple(tuple(_with_sign(entry, head) for entry in row) for row in rows))
    return tree
