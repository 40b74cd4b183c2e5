r"""Expression trees of math answers: what both grammars build and every comparison reads.

Nothing is evaluated when a tree is built, so a tree of `9^{9^{9^9}}` is as cheap as its text.
"""

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Num:
    """A number literal, exact: 0.1 is 1/10."""

    value: Fraction


@dataclasses.dataclass(frozen=True)
class Sym:
    r"""A variable or constant. `pi`, `e`, `i` and `oo` are the constants that they name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation or function: add, mul, div, neg, pow, pm, fact, percent, degree, base, root, sin, log and so on."""

    head: str
    args: tuple["Tree", ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Two or more items in brackets: tuple, point, interval; or a set, of any size, whose brackets are `{` and `}`."""

    opening: str
    items: tuple["Tree", ...]
    closing: str


@dataclasses.dataclass(frozen=True)
class Series:
    """Two or more answers without brackets: `1, 2`, `x = 1 or x = 2`. Whether their order counts, the question says."""

    items: tuple["Tree", ...]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A chain `a = b`, `1 < x <= 2`, `x in S`: one operator fewer than sides."""

    operators: tuple[str, ...]
    sides: tuple["Tree", ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Rows of a matrix, a column vector, or a `cases` block."""

    rows: tuple[tuple["Tree", ...], ...]


MAX_DEPTH = 100
"""Deepest tree that is compared: comparisons recurse."""

Tree = Num | Sym | Call | Group | Series | Relation | Matrix

PI, E, I, INFINITY = Sym("pi"), Sym("e"), Sym("i"), Sym("oo")
CONSTANTS = frozenset({PI, E, I, INFINITY})
REALS = Sym("reals")
EMPTY_SET = Group("{", (), "}")


def integer(value: int) -> Num:
    """An integer literal."""
    return Num(Fraction(value))


def children(tree: Tree) -> tuple[Tree, ...]:
    """The direct parts of a tree."""
    match tree:
        case Call(args=parts) | Group(items=parts) | Series(items=parts) | Relation(sides=parts):
            return parts
        case Matrix(rows=rows):
            return tuple(entry for row in rows for entry in row)
        case _:
            return ()


def walk(tree: Tree) -> Iterator[Tree]:
    """The tree and all its parts."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children(node))


def depth(tree: Tree) -> int:
    """Longest path from the root, 1 for a leaf."""
    deepest, level = 0, [tree]
    while level:
        deepest += 1
        level = [part for node in level for part in children(node)]
    return deepest


def variables(tree: Tree) -> frozenset[str]:
    """Names of the symbols that are not constants."""
    return frozenset(node.name for node in walk(tree) if isinstance(node, Sym) and node not in CONSTANTS)


def mapped(tree: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """The tree with its direct parts changed."""
    match tree:
        case Call(args=parts):
            return dataclasses.replace(tree, args=tuple(map(change, parts)))
        case Group(items=parts) | Series(items=parts):
            return dataclasses.replace(tree, items=tuple(map(change, parts)))
        case Relation(sides=parts):
            return dataclasses.replace(tree, sides=tuple(map(change, parts)))
        case Matrix(rows=rows):
            return Matrix(tuple(tuple(map(change, row)) for row in rows))
    return tree


def renamed(tree: Tree, old: Sym, new: Sym) -> Tree:
    """The tree with one symbol for another."""
    return new if tree == old else mapped(tree, lambda part: renamed(part, old, new))


def is_scalar(tree: Tree) -> bool:
    """True where the tree is built of numbers, symbols and operations alone."""
    return all(isinstance(node, Num | Sym | Call) for node in walk(tree))


_OF_A_NAME = frozenset({"abs", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "arcsin", "arccos", "arctan"})


def is_name(tree: Tree) -> bool:
    r"""What an equation gives a value to: `x`, `f(2)`, `\angle A`, `AB : CD`, `|z|`, `\sin A`, `(x, y)`."""
    match tree:
        case Sym():
            return tree not in (PI, INFINITY)
        case Call(head="mul", args=(first, *rest)):  # f(x) is read as a product; "maximum at" x is none
            is_text = any(isinstance(part, Sym) and part.name.startswith('"') for part in (first, *rest))
            return is_name(first) and not is_text and all(isinstance(p, Num | Relation) or is_name(p) for p in rest)
        case Call(head="pow", args=(Sym(), Call(head="neg", args=(Num(value=1),)))):  # f⁻¹
            return True
        case Call(head="div", args=parts) | Group(opening="(", items=parts):
            return all(is_name(part) for part in parts)
        case Call(head=head, args=(inner,)) if head in _OF_A_NAME:
            return is_name(inner)
    return False
