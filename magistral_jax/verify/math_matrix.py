"""Sums, products and multiples of matrices, as a matrix of expressions."""

from collections.abc import Callable

from magistral_jax.verify.math_exact import TooLargeError, exact_value
from magistral_jax.verify.math_tree import Call, Matrix, Num, Tree, is_scalar

_MAX_PRODUCT = 1_000  # scalar multiplications in one matrix product
_MAX_SYMBOLIC_FACTORS = 2  # entries with symbols grow with every product


def matrix_value(tree: Call) -> Matrix | None:
    """The matrix that an operation on matrices and scalars gives; None where it gives none."""
    if not all(isinstance(part, Matrix) or is_scalar(part) for part in tree.args):
        return None
    match tree:
        case Call(head="neg", args=(Matrix() as matrix,)):
            return _mapped(matrix, lambda entry: Call("neg", (entry,)))
        case Call(head="div", args=(Matrix() as matrix, divisor)) if is_scalar(divisor):
            return _mapped(matrix, lambda entry: Call("div", (entry, divisor)))
        case Call(head="add", args=terms):
            return _sum([term for term in terms if isinstance(term, Matrix)]) if _all_matrices(terms) else None
        case Call(head="mul", args=factors):
            return _product(factors)
    return None


def _all_matrices(parts: tuple[Tree, ...]) -> bool:
    return all(isinstance(part, Matrix) for part in parts)


def _mapped(matrix: Matrix, change: Callable[[Tree], Tree]) -> Matrix:
    return Matrix(tuple(tuple(change(entry) for entry in row) for row in matrix.rows))


def _sum(terms: list[Matrix]) -> Matrix | None:
    if len({tuple(len(row) for row in term.rows) for term in terms}) > 1:
        return None
    rows = zip(*(term.rows for term in terms), strict=True)
    return Matrix(tuple(tuple(Call("add", entries) for entries in zip(*row, strict=True)) for row in rows))


def _product(factors: tuple[Tree, ...]) -> Matrix | None:
    scalars = tuple(factor for factor in factors if not isinstance(factor, Matrix))
    matrices = [factor for factor in factors if isinstance(factor, Matrix)]
    result = matrices[0]
    for index, matrix in enumerate(matrices[1:], start=2):
        product = _product_of_two(result, matrix)
        if product is None:
            return None
        if index > _MAX_SYMBOLIC_FACTORS and any(not isinstance(entry, Num) for row in result.rows for entry in row):
            raise TooLargeError("matrices")
        result = product
    return _mapped(result, lambda entry: Call("mul", (*scalars, entry))) if scalars else result


def _product_of_two(left: Matrix, right: Matrix) -> Matrix | None:
    columns = list(zip(*right.rows, strict=False))
    if any(len(row) != len(right.rows) for row in left.rows) or len({len(row) for row in right.rows}) > 1:
        return None
    if len(left.rows) * len(columns) * len(right.rows) > _MAX_PRODUCT:
        raise TooLargeError("matrices")
    return Matrix(tuple(tuple(_dot(row, column) for column in columns) for row in left.rows))


def _dot(row: tuple[Tree, ...], column: tuple[Tree, ...]) -> Tree:
    entry = Call("add", tuple(Call("mul", pair) for pair in zip(row, column, strict=True)))
    try:
        value = exact_value(entry)
    except ZeroDivisionError:
        value = None
    return entry if value is None else Num(value)
