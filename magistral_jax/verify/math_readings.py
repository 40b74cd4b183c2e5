r"""The ways in which a normalised answer may be read: number formats, choice letters, units, both grammars.

In: normalised text. Out: `Reading`s, likeliest first. Which of them is meant need not be decided: an answer is right
where any reading of it equals any reading of the reference.
"""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

from magistral_jax.verify.math_latex import parse_latex
from magistral_jax.verify.math_plain import parse_plain
from magistral_jax.verify.math_text import words
from magistral_jax.verify.math_tokens import FUNCTIONS, SYMBOLS, ParseError
from magistral_jax.verify.math_tree import EMPTY_SET, MAX_DEPTH, REALS, Call, Num, Series, Sym, Tree, depth, integer
from magistral_jax.verify.math_units import DEGREES, Unit, compound_quantity, split_unit

_THOUSANDS = re.compile(
    r"(?<![\d.,{}])\d{1,3}(?:(?:(?:,|\{,\}|')\d{3})+|(?: \d{3})+)(?![\d,']|\.\d{3},)"  # 1,234,567 1'234 12 345
    r"|(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])"  # 12,34,567
)
_POINTED_THOUSANDS = re.compile(r"^-?\d{1,3}(?:\.\d{3}){2,}$|^-?\d{1,3}(?:[. ]\d{3})+(?=,\d+$)")  # 1.234.567 1.234,5
_DECIMAL_COMMA = re.compile(r"^(-?\d+)(?:,|\{,\})(?!0\D|0$)(\d+)(?=$|[^\d,])")  # `5,0` is two numbers
_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d)")
_WRAPPED = re.compile(r"^\\text\s*\{([^{}]*)\}$")
_CHOICE = re.compile(
    r"^(?:\\text\s*\{)?\s*(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-Z])\)|([A-Z])(?:[.:)]|\s*$))(?:\s*\}|\s|$)",
    re.IGNORECASE,
)
_LIST = re.compile(r"[,;]|\band\b|\bor\b")
_BARE_LETTER = re.compile(r"(?<![A-Za-z/\\{])[A-Za-z](?:\s*\^\s*\{?\d\}?)?$")
_TWO_WORDS = re.compile(r"(?<![A-Za-z])([A-Za-z]{3,})\s+([A-Za-z]{2,})|(?<![A-Za-z])([A-Za-z]{2,})\s+([A-Za-z]{3,})")
_NOT_PROSE = FUNCTIONS | SYMBOLS.keys() | {"and", "or", "in", "mod", "union", "sqrt", "cbrt"}
_NO_FACTOR = re.compile(r"\\text|\\dollar|[€£¥₹]")  # units that are never symbols in a product
_OF_AN_ANGLE = re.compile(r"sin|cos|tan|cot|sec|csc|cis")
_LETTERED_NUMERAL = re.compile(r"^\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*(1[1-6])\s*\}?$")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMERALS = (*_ONES, *(f"{ten} {one}".removesuffix(" zero") for ten in _TENS for one in _ONES[:10]))
_EMPTY = ("no solution", "no solutions", "no real solution", "no real solutions", "the empty set", "empty set")
_ALL = ("all real numbers", "all reals", "all real values", "the real numbers", "any real number")
_WORD_VALUES: dict[str, Tree] = {
    **{word: integer(value) for value, word in enumerate(_NUMERALS)},
    **dict.fromkeys(_EMPTY, EMPTY_SET),
    **dict.fromkeys(_ALL, REALS),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """A text as an expression tree, with the unit at its end if there is one."""

    spelling: str
    grammar: str
    tree: Tree
    unit: Unit | None = None
    may_be_symbol: bool = False
    """True where the unit is a bare letter: `5 m` may be five metres or five times m."""


def readings(text: str) -> Iterator[Reading]:
    """All ways to read a normalised text, none twice."""
    seen: set[tuple[Tree, Unit | None]] = set()
    for reading in _all_readings(text):
        if (reading.tree, reading.unit) not in seen:
            seen.add((reading.tree, reading.unit))
            yield reading


def _all_readings(text: str) -> Iterator[Reading]:
    if tree := _WORD_VALUES.get(words(text) or ""):
        yield Reading(text, "words", tree)
    if re.fullmatch("A?B?C?D?E?", text) and len(text) > 1:  # several choices
        yield Reading(text, "choices", Series(tuple(Sym(letter) for letter in text)))
    if numeral := _LETTERED_NUMERAL.match(text):
        yield from _numeral(text, *numeral.groups())
    if quantity := compound_quantity(text):
        yield Reading(text, "units", Num(quantity[0]), quantity[1])
    for spelling in dict.fromkeys(_spellings(text)):
        value, unit = split_unit(spelling)
        if value != spelling:
            if _LIST.search(value):  # 5 cm, 6 cm
                written = re.escape(spelling.removeprefix(value).strip())
                value = re.sub(rf"(?<=[\d)}}])\s*{written}(?=\s*(?:[,;]|and|or))", "", value)
            may_be_symbol = _BARE_LETTER.search(spelling) is not None
            if not (may_be_symbol and _has_letters(value)):
                yield from _parsed(value, unit, may_be_symbol)
        if value == spelling or not _NO_FACTOR.search(spelling):
            yield from _parsed(spelling, None)
        if "\\degree" in value and not _OF_AN_ANGLE.search(value):  # 360°/7
            yield from _parsed(value.replace("\\degree", " "), DEGREES)


def _has_letters(value: str) -> bool:
    """True for `3x - 12`, behind which a letter is another variable; not for `x = 5`."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value.rpartition("=")[2])) is not None


def _spellings(text: str) -> Iterator[str]:
    """The text without thousands separators, as it is, with a decimal comma, as a choice letter, unwrapped."""
    bare = text if _in_brackets(text) else _THOUSANDS.sub(_digits, text)
    yield bare
    yield text.replace("{,}", ",")
    if pointed := _POINTED_THOUSANDS.match(text):
        yield _DECIMAL_COMMA.sub(r"\1.\2", _digits(pointed) + text[pointed.end() :])
    if bare == text or text.startswith(("0,", "-0,")):
        yield _DECIMAL_COMMA.sub(r"\1.\2", text)
    if ";" in text:
        yield _COMMA_BETWEEN_DIGITS.sub(".", text)
    if choice := _CHOICE.match(text):
        letter = choice[1] or choice[2]
        if letter.isupper():
            yield letter
    if wrapped := _WRAPPED.match(text):
        yield wrapped[1]


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"[^\d-]", "", match[0])


def _in_brackets(text: str) -> bool:
    """True where commas stand between the items of a tuple, set or interval."""
    return re.match(r"^\s*(?:\\\{|[(\[]).*[)\]}]$", text) is not None


def _parsed(text: str, unit: Unit | None, may_be_symbol: bool = False) -> Iterator[Reading]:
    """What the grammars make of it: the first that can parse it, or both where braces mean different things to them."""
    if _is_prose(text):
        return
    grammars = {"latex": parse_latex} if "\\" in text else {"plain": parse_plain, "latex": parse_latex}
    for name, parse in grammars.items():
        try:
            tree = parse(text)
        except ParseError:
            continue
        if depth(tree) <= MAX_DEPTH:
            yield Reading(text, name, tree, unit, may_be_symbol)
            if "{" not in text:
                return


def _is_prose(text: str) -> bool:
    """True where words stand side by side: they are no product ("increasing when x < 3" is not the interval)."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+", "+", text)
    return any(_NOT_PROSE.isdisjoint(match.groups()) for match in _TWO_WORDS.finditer(bare))


def _numeral(text: str, digits: str, base: str) -> Iterator[Reading]:
    """A numeral with letters for digits, `3A_{16}`."""
    try:
        value = int(digits, int(base))
    except ValueError:
        return
    yield Reading(text, "numeral", Call("base", (Sym(digits.upper()), integer(int(base)), Num(Fraction(value)))))
