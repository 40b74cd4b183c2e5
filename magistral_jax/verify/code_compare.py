"""Does the output of a program agree with the expected one? In: two byte strings; out: the first difference, or None.

Every mode takes time linear in both outputs, which are hostile and long.
"""

import dataclasses
import re
from typing import Literal

ComparisonMode = Literal["tokens", "lines", "exact", "float"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the output of a program is compared with the expected one."""

    mode: ComparisonMode = "tokens"
    """`tokens`: what stands between white space, equal one by one, `yes`, `no`, `true` and `false` in any case. A token
    that is expected as a real number (with a point or an exponent) may be off by the tolerance; integers may not: 10^17
    is not 10^17 + 1, though their doubles are equal. `float`: as `tokens`, with the tolerance on integers too. `lines`:
    line by line, but for white space at the ends of lines and of the output. `exact`: byte by byte."""
    tolerance: float = 1e-6
    """Largest error of a real number, absolute or relative to the expected one, whichever is greater."""


def first_difference(printed: bytes, expected: bytes, comparison: Comparison) -> str | None:
    """Where `printed` first departs from `expected`, in words; None where they agree."""
    if printed == expected:
        return None
    if comparison.mode == "exact":
        return "bytes differ"
    if comparison.mode == "lines":
        return _compare_lists(_lines(printed), _lines(expected), "line", None)
    return _compare_lists(printed.split(), expected.split(), "token", comparison)


def _compare_lists(printed: list[bytes], expected: list[bytes], unit: str, comparison: Comparison | None) -> str | None:
    """First difference of two lists; without a comparison only equal items agree."""
    if printed == expected:
        return None
    for number, (got, wanted) in enumerate(zip(printed, expected, strict=False), 1):
        if got != wanted and (comparison is None or not _agree(got, wanted, comparison)):
            return f"{unit} {number} differs"
    if len(printed) != len(expected):
        return f"{len(printed)} {unit}s, expected {len(expected)}"
    return None


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


_ANSWER_WORDS = {b"yes", b"no", b"true", b"false"}
_LONGEST_NUMBER = 400  # characters: a double printed in full has up to 310 before the point
# ASCII digits only; no inf, nan, hexadecimals or underscores, which `float` would take.
_INTEGER = re.compile(rb"[+-]?\d+")
_NUMBER = re.compile(rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")


def _agree(got: bytes, wanted: bytes, comparison: Comparison) -> bool:
    """True where two different tokens mean the same."""
    if len(got) == len(wanted) and wanted.lower() in _ANSWER_WORDS:
        return got.lower() == wanted.lower()
    if max(len(got), len(wanted)) > _LONGEST_NUMBER or not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(wanted)):
        return False
    if comparison.mode == "tokens" and _INTEGER.fullmatch(wanted):
        return False
    value, reference = float(got), float(wanted)
    # An overflow to infinity fails: inf - inf is not a number, and inf <= inf would accept anything.
    return abs(value - reference) <= comparison.tolerance * max(1.0, abs(reference)) < float("inf")
