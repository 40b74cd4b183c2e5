r"""Units of measure at the end of an answer: `5\text{ cm}^2`, `\$12.50`, `90^\circ`, `3 hours`, `60 km/h`, `12 元`.

Two answers with units are compared as quantities: 1 m is 100 cm, and 10 cm is not 10 m. A unit that only one side names
is tolerated: problems state the unit, references often leave it out, and the number is what was asked for.
"""

import collections
import dataclasses
import re
from fractions import Fraction

from magistral_jax.verify.math_tokens import FUNCTIONS, SYMBOLS


@dataclasses.dataclass(frozen=True)
class Unit:
    """Powers of base dimensions, sorted, and the size of the unit in those."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


DEGREES = Unit((("angle", 1),), Fraction(1))

_SIZES = {
    "length": {"mm": "0.001", "cm": "0.01", "dm": "0.1", "m": "1", "km": "1000", "in": "0.0254", "ft": "0.3048",
               "yd": "0.9144", "mi": "1609.344"},
    "mass": {"mg": "0.000001", "g": "0.001", "kg": "1", "t": "1000", "lb": "0.45359237", "oz": "0.028349523125"},
    "time": {"ms": "0.001", "s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "volume": {"ml": "0.001", "l": "1"},
    "energy": {"J": "1", "kJ": "1000"},
    "power": {"W": "1", "kW": "1000"},
    "money": {"cent": "0.01", "dollar": "1"},
    "angle": {"degree": "1"},
}  # fmt: skip
_BY_NAME = {name: (dimension, Fraction(size)) for dimension, sizes in _SIZES.items() for name, size in sizes.items()}
_SPELLINGS: dict[str, str] = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "tonne": "t", "pound": "lb", "lbs": "lb", "ounce": "oz",
    "second": "s", "sec": "s", "minute": "min", "mins": "min", "hour": "h", "hr": "h", "hrs": "h",
    "mL": "ml", "milliliter": "ml", "millilitre": "ml", "L": "l", "liter": "l", "litre": "l",
    "joule": "J", "watt": "W", "deg": "degree", "mph": "mi/h", "kph": "km/h", "buck": "dollar", "USD": "dollar",
    "metro": "m", "mètre": "m", "centimètre": "cm", "kilomètre": "km", "heure": "h", "hora": "h", "stunde": "h",
    "stunden": "h", "segundo": "s", "seconde": "s", "sekunde": "s", "sekunden": "s", "minuto": "min", "minuten": "min",
    "мм": "mm", "см": "cm", "м": "m", "км": "km", "г": "g", "кг": "kg", "с": "s", "мин": "min", "ч": "h",  # noqa: RUF001
    "毫米": "mm", "厘米": "cm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "克": "g", "千克": "kg",
    "公斤": "kg", "吨": "t", "毫升": "ml", "升": "l", "秒": "s", "分钟": "min", "小时": "h", "天": "day",
    "度": "degree",
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_NO_UNITS = frozenset({"unit", "of", "the"})
_CURRENCIES = {r"\dollar": "dollar", "€": "euro", "£": "sterling", "¥": "yuan", "元": "yuan", "₹": "rupee"}
_NO_WORDS_OF_UNITS = FUNCTIONS | SYMBOLS.keys() | {"and", "or", "sqrt", "cbrt", "if", "for", "union", "mod"}
_LONG_WORD = 4  # letters; `12 apples` counts apples, `2 ab` is a product

_EXPONENT = r"(?:(?:\s*\^\s*\{?\s*|(?<=m))(?P<exponent>-?\d)\s*\}?)?"
_WORD = r"[^\W\d_]+\.?"
_TEXT_UNIT = re.compile(rf"\s*\\text\s*\{{(?P<unit>[^{{}}]*)\}}{_EXPONENT}$")
_WORD_UNIT = re.compile(rf"(?<=[\d)}}])\s*(?P<unit>{_WORD}(?:(?:\s*/\s*|\s+){_WORD}){{0,3}}){_EXPONENT}$")
_DEGREES = re.compile(r"\s*\\degree\s*(?P<scale>[CF]|\\text\s*\{[CF]\})?$")
_SIGN = "|".join(map(re.escape, _CURRENCIES))
_MONEY = re.compile(rf"^(?P<sign>-?)\s*(?P<first>{_SIGN})\s*(?P<amount>.+)$|^(?P<before>.+?)\s*(?P<last>{_SIGN})\s*$")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """Cut the unit off the end of a normalised answer (a currency sign also off its start)."""
    if match := _MONEY.match(text):
        currency = _CURRENCIES[match["first"] or match["last"]]
        return (match["before"] or match["sign"] + match["amount"]), _unit_of(currency, 1)
    if match := _DEGREES.search(text):
        scale = (match["scale"] or "")[-2:].strip("}")
        return text[: match.start()], _unit_of(f"degree{scale}", 1)
    match = _TEXT_UNIT.search(text)
    if match is None:
        match = _WORD_UNIT.search(text)
        if match and not (_names_only_units(match["unit"]) or _names_things(match["unit"])):
            match = None
    if match is None or not text[: match.start()].strip() or match["unit"].strip() in ("and", "or"):
        return text, None
    return text[: match.start()].strip(), _unit_of(match["unit"], int(match["exponent"] or 1))


_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*(?:,|and)?\s*")


def compound_quantity(text: str) -> tuple[Fraction, Unit] | None:
    """`5 feet 6 inches`, `2 hours and 30 minutes`: the sum in base units; None for any other text."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    parts = list(_QUANTITY.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text or not all(_names_only_units(p[2]) for p in parts):
        return None
    units = [_unit_of(part[2], 1) for part in parts]
    known = [unit for unit in units if unit is not None]
    if len(known) < len(units) or len({unit.dimensions for unit in known}) > 1:
        return None
    total = sum((Fraction(part[1]) * unit.factor for part, unit in zip(parts, known, strict=True)), Fraction(0))
    return total, Unit(known[0].dimensions, Fraction(1))


def _unit_of(words: str, exponent: int) -> Unit | None:
    """The unit that words name; one that is not in the table is a dimension of its own. None for "units".

    The exponent, which stands at the end, is that of the last name.
    """
    powers: collections.Counter[str] = collections.Counter()
    factor = Fraction(1)
    sign, power = 1, 1
    names = _names(words)
    last = max((index for index, name in enumerate(names) if name not in ("/", "per")), default=-1)
    for index, name in enumerate(names):
        if name in ("/", "per"):
            sign = -1
        elif name in _POWERS:
            power = _POWERS[name]
        elif name not in _NO_UNITS:
            power *= exponent if index == last else 1
            dimension, size = _BY_NAME.get(name, (name, Fraction(1)))
            powers[dimension] += sign * power
            factor *= size ** (sign * power)
            power = 1
    dimensions = tuple(sorted((name, count) for name, count in powers.items() if count))
    return Unit(dimensions, factor) if dimensions else None


def _names(words: str) -> list[str]:
    words = words.replace("平方", " square ").replace("立方", " cubic ").replace("每", "/")
    names: list[str] = []
    for word in re.findall(r"[^\W\d_]+|/", words):
        spelled = word if len(word) < 3 else word.casefold()
        singular = spelled.removesuffix("s")
        name: str = next((name for name in (word, spelled) if name in _SPELLINGS or name in _BY_NAME), singular)
        names.extend(re.findall(r"\w+|/", _SPELLINGS.get(name, name)))
    return names


def _names_only_units(words: str) -> bool:
    known = {"/", "per", "unit", *_POWERS}
    return all(name in known or name in _BY_NAME for name in _names(words))


def _names_things(words: str) -> bool:
    """Words, at least one of them long or not Latin, and none of them of mathematics."""
    parts = re.findall(r"[^\W\d_]+", words)
    is_word = any(len(part) >= _LONG_WORD or not part.isascii() for part in parts)
    return is_word and _NO_WORDS_OF_UNITS.isdisjoint(parts)
