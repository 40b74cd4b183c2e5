"""The plain grammar of answers: `2*x^2 + 1/3`, `sqrt(2)/2`, `3 1/2`, `1.5e-3`, `{1, 2}`, `x = pi or x = -pi`."""

import re

from magistral_jax.verify.math_grammar import Grammar, number
from magistral_jax.verify.math_tokens import FUNCTIONS, INVERSES, SYMBOLS, ParseError, Token, scan
from magistral_jax.verify.math_tree import Call, Sym, Tree, integer

_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<mixed>\d+ +\d+ */ *\d+(?![\d.!^]))"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\dA-Za-z]))?)"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|!=|==|\+/?-(?=\s*\d)|[-+*/^_()\[\]{}|=<>!%,;:'])"
    r")"
)
_OPERATORS = {"**": "^", "==": "=", "+-": "pm", "+/-": "pm", "{": r"\{", "}": r"\}"}
_WORD_OPERATORS = {
    "and": "and",
    "or": "or",
    "in": "in",
    "mod": "mod",
    "union": "union",
    "U": "union",
    "degrees": "degree",
}
_SAME_FUNCTION = {"ceiling": "ceil", "sign": "sgn"} | {"a" + name: inverse for name, inverse in INVERSES.items()}
_ROOTS = {"sqrt": 2, "cbrt": 3}
_LONGEST_PRODUCT = 3  # letters: `xyz` is a product, a longer word is a name


def parse_plain(text: str) -> Tree:
    """Parse a normalised answer. Raises `ParseError` where it is not an expression."""
    return _PlainGrammar(scan(text, _TOKEN, _tokens_of)).parse()


def _tokens_of(match: re.Match[str]) -> list[Token]:
    if match["word"]:
        return _tokens_of_word(match["word"])
    if match["operator"]:
        return [Token("operator", _OPERATORS.get(match["operator"], match["operator"]))]
    kind = "mixed" if match["mixed"] else "number"
    return [Token(kind, match[kind])]


def _tokens_of_word(word: str) -> list[Token]:
    word = _SAME_FUNCTION.get(word, word)
    if word in _WORD_OPERATORS:
        return [Token("operator", _WORD_OPERATORS[word])]
    if word in FUNCTIONS or word in _ROOTS:
        return [Token("function", word)]
    if word in SYMBOLS or len(word) > _LONGEST_PRODUCT:
        return [Token("name", word)]
    return [Token("name", letter) for letter in word]


class _PlainGrammar(Grammar):
    def primary_from(self, token: Token) -> Tree:  # noqa: PLR0911 one return for each kind
        """Numbers, names, functions and brackets."""
        match token.kind:
            case "number":
                return number(token.value)
            case "mixed":
                whole, top, bottom = (integer(int(digits)) for digits in re.findall(r"\d+", token.value))
                return Call("add", (whole, Call("div", (top, bottom))))
            case "name":
                return SYMBOLS.get(token.value) or Sym(token.value)
            case "function" if token.value in _ROOTS:
                return Call("root", (self.primary(), integer(_ROOTS[token.value])))
            case "function":
                return self.function(token.value)
            case "operator" if token.value == "|":
                return self.bars()
            case "operator" if token.value in ("(", "[", "]", r"\{"):
                return self.bracket(token.value)
        raise ParseError(f"unexpected {token.value!r}")

    def exponent(self) -> Tree:
        """A signed power, `2^-x^2` grouping from the right, or braces."""
        if self.accept(r"\{"):
            inner = self.sum()
            self.expect(r"\}")
            return inner
        if self.accept("-"):
            return Call("neg", (self.power(),))
        return self.power()
