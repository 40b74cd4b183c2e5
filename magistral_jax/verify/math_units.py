r"""Units of measure at the end of an answer: `5\text{ cm}^2`, `\$12.50`, `90^\circ`, `3 hours`, `60 km/h`.

Two answers with units are compared as quantities: 1 m is 100 cm, and 10 cm is not 10 m. A unit that only one side names
is tolerated: problems state the unit, references often leave it out, and the number is what was asked for.
"""

import collections
import dataclasses
import re
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Unit:
    """Powers of base dimensions, sorted, and the size of the unit in those."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


_SIZES = {
    "length": {"mm": "0.001", "cm": "0.01", "dm": "0.1", "m": "1", "km": "1000", "in": "0.0254", "ft": "0.3048",
               "yd": "0.9144", "mi": "1609.344"},
    "mass": {"mg": "0.000001", "g": "0.001", "kg": "1", "lb": "0.45359237"},
    "time": {"ms": "0.001", "s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "volume": {"ml": "0.001", "l": "1"},
    "money": {"cent": "0.01", "dollar": "1"},
    "angle": {"degree": "1"},
}  # fmt: skip
_SPELLINGS: dict[str, str] = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "pound": "lb", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "mL": "ml", "milliliter": "ml", "millilitre": "ml", "L": "l", "liter": "l", "litre": "l",
    "deg": "degree", "mph": "mi/h", "kph": "km/h", "buck": "dollar", "USD": "dollar",
}  # fmt: skip
_BY_NAME = {name: (dimension, Fraction(size)) for dimension, sizes in _SIZES.items() for name, size in sizes.items()}
_NO_UNITS = frozenset({"unit", "of", "the"})

_EXPONENT = r"(?:\s*\^\s*\{?\s*(?P<exponent>-?\d)\s*\}?)?"
_TEXT_UNIT = re.compile(rf"\s*\\text\s*\{{(?P<unit>[^{{}}]*)\}}{_EXPONENT}$")
_WORD_UNIT = re.compile(rf"(?<=[\d)}}])\s*(?P<unit>[A-Za-z]+(?:(?:\s*/\s*|\s+)[A-Za-z]+){{0,3}}){_EXPONENT}$")
_DEGREES = re.compile(r"\s*\\degree\s*(?P<scale>[CF]|\\text\s*\{[CF]\})?$")
_MONEY = re.compile(r"^(?P<sign>-?)\s*\\dollar\s*(?P<amount>.+)$|^(?P<before>.+?)\s*\\dollar$")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """Cut the unit off the end of a normalised answer (a dollar sign also off its start)."""
    if match := _MONEY.match(text):
        return (match["before"] or match["sign"] + match["amount"]), _unit_of("dollar", 1)
    if match := _DEGREES.search(text):
        scale = (match["scale"] or "")[-2:].strip("}")
        return text[: match.start()], _unit_of(f"degree{scale}", 1)
    match = _TEXT_UNIT.search(text)
    if match is None:
        match = _WORD_UNIT.search(text)
        if match and not _names_only_units(match["unit"]):
            match = None
    if match is None or not text[: match.start()].strip() or match["unit"].strip() in ("and", "or"):
        return text, None
    return text[: match.start()].strip(), _unit_of(match["unit"], int(match["exponent"] or 1))


def _unit_of(words: str, exponent: int) -> Unit | None:
    """The unit that words name; one that is not in the table is a dimension of its own. None for "units"."""
    powers: collections.Counter[str] = collections.Counter()
    factor = Fraction(1)
    sign, power = 1, exponent
    for word in _names(words):
        match word:
            case "/" | "per":
                sign = -1
            case "square" | "sq":
                power = 2
            case "cubic" | "cu":
                power = 3
            case _ if word not in _NO_UNITS:
                dimension, size = _BY_NAME.get(word, (word, Fraction(1)))
                powers[dimension] += sign * power
                factor *= size ** (sign * power)
                power = 1
    dimensions = tuple(sorted((name, count) for name, count in powers.items() if count))
    return Unit(dimensions, factor) if dimensions else None


def _names(words: str) -> list[str]:
    names: list[str] = []
    for word in re.findall(r"[A-Za-z]+|/", words):
        spelled = word if len(word) < 3 else word.casefold()
        singular = spelled.removesuffix("s")
        name: str = next((name for name in (word, spelled) if name in _SPELLINGS or name in _BY_NAME), singular)
        names.extend(re.findall(r"\w+|/", _SPELLINGS.get(name, name)))
    return names


def _names_only_units(words: str) -> bool:
    known = {"/", "per", "square", "sq", "cubic", "cu", "unit"}
    return all(name in known or name in _BY_NAME for name in _names(words))
