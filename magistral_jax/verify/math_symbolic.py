"""Equality of expressions by SymPy, for what neither exact arithmetic nor probing decides: sums, products, integrals.

This is the only place that builds SymPy objects. They are built from our own trees, never parsed from text (SymPy's
parsers execute Python), and never printed (printing alone can hang). Simplifying has no bound of its own: who calls it
sets a `cpu_limit`.
"""

import functools
from collections.abc import Callable
from typing import Any

from magistral_jax.verify.cpu_limit import without_limit
from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_tokens import INVERSES
from magistral_jax.verify.math_tree import Call, Num, Sym, Tree, walk

_MAX_EXPONENT = 1_000


def symbolically_equal(a: Tree, b: Tree) -> bool:
    """True where SymPy proves that the difference is zero; false also where it can say nothing.

    Raises:
      TooLargeError: An exponent or a number in the trees is so large that evaluating it is not worth trying.
    """
    for tree in (a, b):
        _check_size(tree)
    sympy = _load_sympy()
    try:
        difference = (_build(a, sympy) - _build(b, sympy)).doit()
        return bool(difference == 0 or sympy.simplify(difference) == 0)
    except (ArithmeticError, ValueError, TypeError, AttributeError, KeyError, RuntimeError):
        return False  # SymPy gave up, in one of its many ways; recursion and "no algorithm" are among RuntimeError


@functools.cache
def _load_sympy() -> Any:
    """The module, with what it imports on first use, at nobody's expense."""
    with without_limit():
        import sympy

        n, k, x = sympy.symbols("n k x")
        sympy.simplify(sympy.Sum(k, (k, 1, n)).doit() + sympy.Integral(x, (x, 0, n)).doit())
    return sympy


def _check_size(tree: Tree) -> None:
    for node in walk(tree):
        if not isinstance(node, Call):
            continue
        try:
            exact_value(node)
            exponent = exact_value(node.args[1]) if node.head == "pow" else None
        except ZeroDivisionError:
            continue
        if exponent is not None and abs(exponent) > _MAX_EXPONENT:
            raise TooLargeError("exponent")


def _build(tree: Tree, sympy: Any) -> Any:
    match tree:
        case Num(value=value):
            return sympy.Rational(value.numerator, value.denominator)
        case Sym(name=name):
            constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
            return constants.get(name) or sympy.Symbol(name)
        case Call(head=head, args=args):
            return _apply(head, [_build(arg, sympy) for arg in args], sympy)
    raise ValueError("no scalar")


def _apply(head: str, args: list[Any], sympy: Any) -> Any:
    if head in _OPERATIONS:
        return _OPERATIONS[head](sympy, *args)
    name = _NAMES.get(head, head)
    if name not in _FUNCTIONS:
        raise ValueError(f"{head} is not known")
    return getattr(sympy, name)(*args)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda sympy, *terms: sympy.Add(*terms),
    "neg": lambda _, x: -x,
    "mul": lambda sympy, *factors: sympy.Mul(*factors),
    "div": lambda _, x, y: x / y,
    "pow": lambda _, x, y: x**y,
    "percent": lambda _, x: x / 100,
    "degree": lambda sympy, x: x * sympy.pi / 180,
    "sum": lambda sympy, body, index, low, high: sympy.Sum(body, (index, low, high)),
    "prod": lambda sympy, body, index, low, high: sympy.Product(body, (index, low, high)),
    "int": lambda sympy, body, variable, low, high: sympy.Integral(body, (variable, low, high)),
}
_NAMES = {
    "abs": "Abs", "fact": "factorial", "binom": "binomial", "ceil": "ceiling", "ln": "log", "min": "Min", "max": "Max",
    "mod": "Mod", "sgn": "sign",
} | {inverse: "a" + name for name, inverse in INVERSES.items()}  # fmt: skip
_FUNCTIONS = frozenset({
    *INVERSES, *("a" + name for name in INVERSES), "exp", "log", "root", "Abs", "sign", "floor", "ceiling", "factorial",
    "binomial", "gcd", "lcm", "Min", "Max", "Mod",
})  # fmt: skip
