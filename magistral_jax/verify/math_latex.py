r"""The LaTeX grammar of answers: `\frac{\sqrt{3}}{2}`, `\left[0, \infty\right)`, matrices, sums."""

import re

from magistral_jax.verify.math_grammar import Grammar, number
from magistral_jax.verify.math_tokens import FUNCTIONS, SYMBOLS, ParseError, Token, scan
from magistral_jax.verify.math_tree import EMPTY_SET, REALS, Call, Group, I, Matrix, Num, Sym, Tree, integer, renamed

_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<text>\\text\s*\{(?P<content>[^{}]*)\})"
    r"|(?P<environment>\\(?P<edge>begin|end)\s*\{(?P<kind>[A-Za-z]+)\*?\}(?:\s*\{[clr|\s]*\})?)"
    r"|(?P<command>\\(?:[A-Za-z]+|[\\{}|]))"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<operator><=|>=|!=(?!=)|\*\*|[-+*/^_()\[\]{}|=<>!%,;:'&])"
    r")"
)
_OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "bmod": "mod", "pmod": "pmod", "mod": "pmod", "pm": "pm",
    "mp": "mp", "le": "<=", "ge": ">=", "ne": "!=", "equiv": "=", "approx": "approx", "in": "in", "cup": "union",
    "cap": "intersection", "setminus": "setminus", "degree": "degree", "prime": "'", "lor": "or", "land": "and",
    "{": r"\{", "}": r"\}", "|": "|", "\\": "row", "rfloor": "rfloor", "rceil": "rceil", "rangle": "rangle",
    "colon": ":",
}  # fmt: skip
_DOTS = frozenset({"ldots", "dots", "cdots", "dotsc", "dotsb", "vdots"})
_INDEX = Sym("index")
_MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "cases"})


def parse_latex(text: str) -> Tree:
    """Parse a normalised answer. Raises `ParseError` where it is not LaTeX mathematics."""
    return _LatexGrammar(scan(text, _TOKEN, _tokens_of)).parse()


def _tokens_of(match: re.Match[str]) -> list[Token]:  # noqa: PLR0911 one return for each kind
    if match["number"]:
        return [Token("number", match["number"])]
    if match["text"]:
        content = match["content"].strip()
        if re.fullmatch(r"\d+(?:\.\d+)?", content):
            return [Token("number", content)]
        if content.strip(" ,;") in ("and", "or"):
            return (
                [Token("operator", ","), Token("operator", "and")]
                if content[0] in ",;"
                else [Token("operator", content)]
            )
        return [Token("text", content)] if content else []
    if match["environment"]:
        return [Token("command" if match["edge"] == "begin" else "operator", f"{match['edge']} {match['kind']}")]
    if match["letters"]:
        word = match["letters"]
        if word in FUNCTIONS:  # written without its backslash
            return [Token("function", word)]
        if word == "sqrt":
            return [Token("command", word)]
        return [Token("operator", word)] if word in ("and", "or") else [Token("name", letter) for letter in word]
    if match["operator"]:
        return [Token("operator", "^" if match["operator"] == "**" else match["operator"])]
    name = match["command"][1:]
    if name in _OPERATORS:
        return [Token("operator", _OPERATORS[name])]
    if name in SYMBOLS:
        return [Token("name", name)]
    return [Token("function" if name in FUNCTIONS else "command", name)]


class _LatexGrammar(Grammar):
    def primary_from(self, token: Token) -> Tree:  # noqa: PLR0911 one return for each kind
        """Numbers, letters, commands and brackets."""
        match token.kind:
            case "number":
                return self._number(token.value)
            case "name":
                return SYMBOLS.get(token.value) or Sym(token.value)
            case "function":
                return self.function(token.value)
            case "text":
                return Sym(token.value if len(token.value) == 1 else f'"{token.value.casefold()}"')
            case "command":
                return self._command(token.value)
            case "operator" if token.value == "|":
                return self.bars()
            case "operator" if token.value in ("(", "[", "]", "{", r"\{"):
                return self.bracket(token.value)
        raise ParseError(f"unexpected {token.value!r}")

    def exponent(self) -> Tree:
        """A group, or one signed primary: people write `2^10` for `2^{10}`."""
        if self.accept("-"):
            return Call("neg", (self.primary(),))
        return self.primary()

    def _number(self, literal: str) -> Tree:
        tree = number(literal)
        if self.peek() != Token("command", "frac"):
            return tree
        start = self._position
        self.next()
        fraction = self._fraction()
        match fraction:
            case Call(args=(Num(value=top), Num(value=bottom))) if 0 < top < bottom:
                return Call("add", (tree, fraction))  # a mixed number
        self._position = start
        return tree

    def _command(self, name: str) -> Tree:  # noqa: PLR0911 one return for each kind
        match name:
            case "frac":
                return self._fraction()
            case "sqrt":
                return self._root()
            case "binom":
                return Call("binom", (self._argument(), self._argument()))
            case "lfloor" | "lceil":
                inner = self.sum()
                self.expect("r" + name[1:])
                return Call("floor" if name == "lfloor" else "ceil", (inner,))
            case "langle":
                items = self._items(",")
                self.expect("rangle")
                return Group("(", tuple(items), ")")
            case "emptyset":
                return EMPTY_SET
            case "mathbb":
                letter = self._argument()
                return REALS if letter == Sym("R") else Sym(f"mathbb {letter.name}" if isinstance(letter, Sym) else "")
            case "overline" | "bar" | "hat" | "widehat" | "tilde" | "dot" | "angle" | "triangle":
                return self._decorated(name)
            case "sum" | "prod":
                return self._big_operator(name)
            case "int":
                return self._integral()
            case "dollar":  # a unit, before or after its number
                return self.primary() if self.peek().kind == "number" else integer(1)
            case _ if name.startswith("begin "):
                return self._matrix(name.removeprefix("begin "))
        # A command that is not known is a symbol: it equals itself and nothing else.
        return Sym("…" if name in _DOTS else name)

    def _argument(self) -> Tree:
        r"""A group, or the next digit, letter or command: `\frac12` is one half."""
        token = self.peek()
        if token.kind == "number" and token.value[1:] and token.value[0] != ".":
            self._tokens[self._position] = Token("number", token.value[1:])
            return number(token.value[0])
        return self.primary()

    def _fraction(self) -> Tree:
        return Call("div", (self._argument(), self._argument()))

    def _root(self) -> Tree:
        degree: Tree = integer(2)
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
        return Call("root", (self.primary(), degree))

    def _decorated(self, name: str) -> Tree:
        start = self._position
        self._argument()
        return Sym(
            name
            + " "
            + "".join(token.value for token in self._tokens[start : self._position] if token.value not in "{}")
        )

    def _big_operator(self, name: str) -> Tree:
        self.expect("_")
        self.expect("{")
        index = self.primary()
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.exponent()
        body = self.product()
        if index == I:  # an index, not the imaginary unit
            index, body = _INDEX, renamed(body, I, _INDEX)
        return Call(name, (body, index, low, high))

    def _integral(self) -> Tree:
        self.expect("_")
        low = self.exponent()
        self.expect("^")
        high = self.exponent()
        self._open_integrals += 1
        body = integer(1) if self.peek() == Token("name", "d") else self.sum()
        self._open_integrals -= 1
        if self.next() != Token("name", "d"):
            raise ParseError("an integral ends with its differential")
        return Call("int", (body, self.primary(), low, high))

    def _matrix(self, kind: str) -> Tree:
        if kind not in _MATRICES:
            raise ParseError(f"the environment {kind!r} is not known")
        rows: list[tuple[Tree, ...]] = []
        while not self.accept(f"end {kind}"):
            row = [self.relation()]
            while self.accept("&", ","):
                row.append(self.relation())
            rows.append(tuple(row))
            if not self.accept("row") and self.peek() != Token("operator", f"end {kind}"):
                raise ParseError("a matrix row ends in \\\\")
        return Matrix(tuple(rows))
