"""Tokens of math answers, and the cursor that a grammar reads them with."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator

from magistral_jax.verify.math_tree import INFINITY, Sym

_INVERTIBLE = (
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch",
)  # fmt: skip
INVERSES = {name: "arc" + name for name in _INVERTIBLE}
"""What a function to the power of −1 is."""
FUNCTIONS = frozenset({
    *INVERSES, *INVERSES.values(), "exp", "ln", "log", "lg", "cis", "abs", "sgn", "floor", "ceil", "gcd", "lcm", "min",
    "max",
})  # fmt: skip
"""Names that take arguments."""
_INFINITY_NAMES = ("infty", "infinity", "inf", "oo")
_GREEK_NAMES = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "varepsilon", "varphi", "vartheta",
)  # fmt: skip
SYMBOLS = dict.fromkeys(_INFINITY_NAMES, INFINITY) | {name: Sym(name) for name in _GREEK_NAMES}
"""Words that are symbols, whether written with a backslash or not."""


class ParseError(ValueError):
    """The text is not in the grammar."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A piece of the text.

    Kinds: number, name (a symbol), function, command (a LaTeX command that takes arguments), text, operator, end.
    """

    kind: str
    value: str


def scan(text: str, pattern: re.Pattern[str], read: Callable[[re.Match[str]], Iterable[Token]]) -> list[Token]:
    """The tokens of a text: one match of the pattern behind the other, each read as any number of tokens.

    Raises:
      ParseError: The pattern does not match somewhere.
    """
    tokens: list[Token] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            raise ParseError(f"{text[position]!r} is not in the grammar")
        tokens.extend(read(match))
        position = match.end()
    return tokens


END = Token("end", "")
"""What follows the last token."""
_MAX_DEPTH = 50  # two for each pair of brackets


class Cursor:
    """A position in a list of tokens, and the depth of the recursion that reads them."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    def peek(self, ahead: int = 0) -> Token:
        """The next token, or one at a distance from it."""
        index = self._position + ahead
        return self._tokens[index] if index < len(self._tokens) else END

    def next(self) -> Token:
        """Take the next token."""
        token = self.peek()
        self._position += 1
        return token

    def accept(self, *values: str) -> str | None:
        """Take the next token where it is one of these operators, and say which."""
        token = self.peek()
        if token.kind == "operator" and token.value in values:
            self._position += 1
            return token.value
        return None

    def expect(self, value: str) -> None:
        """Take this operator."""
        if self.accept(value) is None:
            raise ParseError(f"{value!r} expected")

    @contextlib.contextmanager
    def nested(self) -> Iterator[None]:
        """One level deeper in the recursion, which has a bound of its own so that Python's is never met."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ParseError("nested too deeply")
        yield
        self._depth -= 1
