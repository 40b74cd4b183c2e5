r"""The grammar that LaTeX and plain answers share: precedence, lists, relations, brackets.

    answer   = relation { ("," | ";" | "and" | "or") relation }
    relation = union { ("=" | "<" | …) union } [ "pmod" primary ]
    union    = sum ":" sum  |  sum { ("union" | "intersection" | "setminus") sum }
    sum      = product { ("+" | "-" | "pm") product }
    product  = unary { ["*" | "/" | "mod"] unary }        juxtaposition is multiplication
    unary    = { "+" | "-" | "pm" } power
    power    = postfix [ "^" exponent ]
    postfix  = primary { "!" | "%" | "degree" | "'" | "_" subscript }

A subclass brings the tokens, the primaries and what an exponent is. Parsing builds trees without evaluating them, in
time linear in the tokens, and ends in `ParseError` for whatever is not in the grammar.
"""

import abc
from fractions import Fraction

from magistral_jax.verify.math_tokens import END, INVERSES, Cursor, ParseError, Token
from magistral_jax.verify.math_tree import REALS, Call, Group, Num, Relation, Series, Sym, Tree, integer

_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_MINUS_ONE = Call("neg", (integer(1),))


class Grammar(Cursor, abc.ABC):
    """A recursive-descent parser over tokens that a subclass has made."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self._open_bars = 0  # inside |…|, where the next bar closes, and {… | …}
        self._open_brackets = 0  # inside (…) and […], where `[` may close an interval
        self._open_integrals = 0  # inside an integral, where `d x` ends the integrand

    # ---- lists and relations ----------------------------------------------------------------------------------------

    def parse(self) -> Tree:
        """The whole text as one answer. Where semicolons separate lists, `1, 2; 3, 4`, each of them is a tuple."""
        rows = [self._items(",", "and", "or")]
        while self.accept(";"):
            self.accept("and", "or")
            rows.append(self._items(",", "and", "or"))
        if self.peek() is not END:
            raise ParseError(f"unexpected {self.peek().value!r}")
        if len(rows) == 1:
            return rows[0][0] if len(rows[0]) == 1 else Series(tuple(rows[0]))
        return Series(tuple(row[0] if len(row) == 1 else Group("(", tuple(row), ")") for row in rows))

    def _items(self, *separators: str) -> list[Tree]:
        items = [self.relation()]
        while separator := self.accept(*separators):
            if separator in (",", ";"):
                self.accept("and", "or")  # "1, 2, and 3"
            items.append(self.relation())
        return items

    def relation(self) -> Tree:
        """A chain of relations, or a lone expression."""
        sides, operators = [self._union()], []
        while operator := self.accept("=", "<", ">", "<=", ">=", "!=", "in", "approx"):
            operators.append(operator)
            sides.append(self._union())
        if self.accept("pmod"):
            modulus = self.primary()
            sides[-1] = Group("mod", (Call("mod", (sides[-1], modulus)), modulus), "mod")
        return Relation(tuple(operators), tuple(sides)) if operators else sides[0]

    def _union(self) -> Tree:
        tree = self.sum()
        if not self._open_bars and self.accept(":"):
            return Call("div", (tree, self.sum()))
        while operator := self.accept("union", "intersection", "setminus"):
            tree = Call(operator, (tree, self.sum()))
        return tree

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def sum(self) -> Tree:
        """Terms with signs between them."""
        terms: list[Tree] = [self.product()]
        while operator := self.accept("+", "-", "pm", "mp"):
            term = self.product()
            if operator in ("pm", "mp"):
                terms = [Call(operator, (_joined("add", terms), term))]
            else:
                terms.append(Call("neg", (term,)) if operator == "-" else term)
        return _joined("add", terms)

    def product(self) -> Tree:
        """Factors, written side by side or with an operator between them."""
        factors: list[Tree] = [self._unary()]
        while True:
            if self.accept("*"):
                factors.append(self._unary())
            elif operator := self.accept("/", "mod"):
                head = "div" if operator == "/" else operator
                factors = [Call(head, (_joined("mul", factors), self._unary()))]
            elif self._starts_factor():
                if self.peek().kind == "number" and self.peek(-1).value not in (")", "]", "}", "!"):
                    raise ParseError("a number after a factor")
                factors.append(self.power())
            else:
                return _joined("mul", factors)

    def _unary(self) -> Tree:
        signs: list[str] = []
        while sign := self.accept("+", "-", "pm", "mp"):
            signs.append(sign)
        tree = self.power()
        for sign in reversed(signs):
            if sign == "-":
                tree = Call("neg", (tree,))
            elif sign != "+":
                tree = Call(sign, (integer(0), tree))
        return tree

    def power(self) -> Tree:
        """A primary with its exponent."""
        with self.nested():
            tree = self._postfix(self.primary())
            if self.accept("^"):
                tree = self._postfix(Call("pow", (tree, self.exponent())))
            return tree

    def _postfix(self, tree: Tree) -> Tree:
        while operator := self.accept("!", "%", "degree", "'", "_"):
            match operator:
                case "!":
                    tree = Call("fact", (tree,))
                case "%":
                    tree = Call("percent", (tree,))
                case "degree":
                    tree = Call("degree", (tree,))
                case "'":
                    tree = self._renamed(tree, "'")
                case _:
                    tree = self._with_subscript(tree)
        return tree

    def _with_subscript(self, tree: Tree) -> Tree:
        if isinstance(tree, Sym):
            return self._renamed(tree, "_" + self._written_group())
        subscript = self.subscript()
        if isinstance(tree, Num) and isinstance(subscript, Num):
            return Call("base", (tree, subscript))
        raise ParseError("only a symbol or a numeral has a subscript")

    def _written_group(self) -> str:
        """The next group or token as it is written."""
        pieces, depth = [], 0
        while not pieces or depth:
            token = self.next()
            if token is END:
                raise ParseError("a subscript is not closed")
            depth += (token.value in ("{", r"\{")) - (token.value in ("}", r"\}"))
            pieces.append(token.value)
        return "".join(pieces).strip("\\{}")

    def _renamed(self, tree: Tree, suffix: str) -> Tree:
        if not isinstance(tree, Sym):
            raise ParseError("only a symbol has a subscript or a prime")
        return Sym(tree.name + suffix)

    def _starts_factor(self) -> bool:
        token = self.peek()
        if self._open_integrals and token == Token("name", "d") and self.peek(1).kind == "name":
            return False
        if token.kind == "operator":
            if token.value == "|":
                return not self._open_bars
            return token.value in ("(", "{", r"\{") or (token.value == "[" and not self._open_brackets)
        return token.kind in ("number", "name", "function", "command", "text")

    # ---- parts for the primaries of the subclasses ------------------------------------------------------------------

    def primary(self) -> Tree:
        """A number, symbol, function or bracket."""
        with self.nested():
            return self.primary_from(self.next())

    @abc.abstractmethod
    def primary_from(self, token: Token) -> Tree:
        """The primary that starts with this token, which has been taken."""

    @abc.abstractmethod
    def exponent(self) -> Tree:
        """What follows `^`."""

    def subscript(self) -> Tree:
        """What follows `_`."""
        return self.exponent()

    def bracket(self, opening: str) -> Tree:
        r"""The rest of a bracket, after its opening.

        One item in round, square or grouping brackets is that item; several in grouping brackets are a list. Closing
        brackets may differ from the opening one (half-open intervals, also `[0, 1[`).
        """
        if opening == r"\{" and self.accept(r"\}"):
            return Group("{", (), "}")
        open_bars, self._open_bars = self._open_bars, int(opening == r"\{")
        self._open_brackets += 1
        items = self._items(",", ";", "and", "or")
        if opening == r"\{":
            tree = self._set_of(items)
        elif opening == "{":
            self.expect("}")
            tree = items[0] if len(items) == 1 else Series(tuple(items))
        else:
            closing = self.accept(")", "]", "[")
            if closing is None:
                raise ParseError(f"{opening!r} is not closed")
            tree = _interval_or_tuple(opening, items, closing)
        self._open_bars = open_bars
        self._open_brackets -= 1
        return tree

    def _set_of(self, items: list[Tree]) -> Tree:
        """The rest of a set. With a condition on bare variables, `{x | x > 2}`, it is its condition."""
        if not self.accept("|", ":"):
            self.expect(r"\}")
            return Group("{", tuple(items), "}")
        conditions = self._items(",", ";", "and", "or")
        self.expect(r"\}")
        if len(items) == 1 and len(conditions) == 1 and _is_variable(items[0]):
            return conditions[0]
        return Call("where", (*items, *conditions))

    def bars(self) -> Tree:
        """The rest of an absolute value."""
        self._open_bars += 1
        inner = self.sum()
        self._open_bars -= 1
        self.expect("|")
        return Call("abs", (inner,))

    def function(self, name: str) -> Tree:
        r"""The rest of a function: powers, base, argument. `\sin^2 x` squares, `\sin^{-1}` is the inverse."""
        power = base = None
        while operator := self.accept("^", "_"):
            if operator == "^":
                power = self.exponent()
            else:
                base = self.subscript()
        if power == _MINUS_ONE and name in INVERSES:
            name, power = INVERSES[name], None
        arguments = self._arguments()
        if name == "lg":
            name, base = "log", integer(10)
        tree = Call(name, arguments if base is None else (*arguments, base))
        return tree if power is None else Call("pow", (tree, power))

    def _arguments(self) -> tuple[Tree, ...]:
        if opening := self.accept("(", "{", r"\{"):
            open_bars, self._open_bars = self._open_bars, 0
            items = self._items(",", ";")
            self.expect(_CLOSING[opening])
            self._open_bars = open_bars
            return tuple(items)
        factors: list[Tree] = [self.power()]
        while self._starts_factor() and self.peek().kind != "function" and self.peek() != Token("operator", "("):
            factors.append(self.power())
        return (_joined("mul", factors),)


def _joined(head: str, parts: list[Tree]) -> Tree:
    return parts[0] if len(parts) == 1 else Call(head, tuple(parts))


def number(text: str) -> Num:
    """A literal as an exact number."""
    return Num(Fraction(text))


def _is_variable(tree: Tree) -> bool:
    r"""`x`, `x \in \mathbb{R}`, `(x, y)`."""
    match tree:
        case Relation(operators=("in",), sides=(Sym(), collection)):
            return collection == REALS
        case Group(opening="(", items=items):
            return all(isinstance(item, Sym) for item in items)
    return isinstance(tree, Sym)


def _interval_or_tuple(opening: str, items: list[Tree], closing: str) -> Tree:
    if len(items) == 1:
        return items[0]
    # ]a, b[ is the open interval.
    return Group("(" if opening == "]" else opening, tuple(items), ")" if closing == "[" else closing)
