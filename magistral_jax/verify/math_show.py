"""Expression trees as text for people. Our own trees only: printing a SymPy object can hang."""

from magistral_jax.verify.math_tree import Call, Group, Matrix, Num, Relation, Series, Sym, Tree

_INFIX = {"add": " + ", "mul": " · ", "div": " / ", "pow": " ^ ", "union": " ∪ ", "pm": " ± "}  # noqa: RUF001


def show(tree: Tree) -> str:  # noqa: PLR0911 one return for each kind
    """The tree with all its brackets: `((x ^ 2) + 1)`. A list without brackets is `list[…]`."""
    match tree:
        case Num(value=value):
            return str(value)
        case Sym(name=name):
            return name
        case Call(head="neg", args=(inner,)):
            return f"-{show(inner)}"
        case Call(head=head, args=parts) if head in _INFIX:
            return f"({_INFIX[head].join(map(show, parts))})"
        case Call(head=head, args=parts):
            return f"{head}({_joined(parts)})"
        case Group(opening=opening, items=items, closing=closing):
            return f"{opening}{_joined(items)}{closing}"
        case Series(items=items):
            return f"list[{_joined(items)}]"
        case Relation(operators=operators, sides=sides):
            pairs = zip(operators, map(show, sides[1:]), strict=True)
            return show(sides[0]) + "".join(f" {operator} {side}" for operator, side in pairs)
        case Matrix(rows=rows):
            return f"matrix[{', '.join(f'[{_joined(row)}]' for row in rows)}]"


def _joined(parts: tuple[Tree, ...]) -> str:
    return ", ".join(map(show, parts))
