r"""What a translator must not touch, behind marks; in: a text, out: the text with marks, and what they stand for.

Formulas, code, addresses, numbers and single letters are masked, so that what a translation has to keep can be told by
looking at the marks: each is there exactly once, in any order, and no digit has come beside them. The marks are plain
ASCII, `[[7]]`, of characters that tokenizers know and that no language's typography rewrites.
"""

import collections
import dataclasses
import enum
import re

# Bounded repeats: an unclosed opener costs at most 2000 steps. A dollar before a price opens no formula: as in Pandoc's
# Markdown, no space stands inside of the dollars and no digit behind them, unless there are signs of formulas between.
# Nor are LaTeX's ``quotes'' code, and `$\$$5` is a price.
_KEPT = re.compile(
    r"```.*?(?:```|\Z)"
    r"|\[asy\].{0,9000}?\[/asy\]"
    r"|(?<!`)`(?!`)[^`\n]{1,500}`(?!`)"
    r"|\$\$.{1,2000}?\$\$"
    r"|\$\\\$\$\d+(?:[.,]\d+)*"
    r"|(?<!\\)\$(?!\s)(?:[^$\\]|\\.){1,500}?(?<!\s)\$(?!\d)"
    r"|(?<!\\)\$[^$=^_\\\n]{0,200}(?:[=^_]|\\.)(?:[^$\\\n]|\\.){0,300}?\$(?!\d)"
    r"|\\\[.{0,2000}?\\\]"
    r"|\\\(.{0,2000}?\\\)"
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\bhttps?://[^\s)>\]]*[^\s)>\].,;:?!]"
    r"|(?:\\?[$€£¥])?\d+(?:[.,:/]\d+)*(?:\\?%)?"
    r"|\\[A-Za-z]+(?:\s*\{[^{}]{0,200}\}){0,2}|\\."
    r"|(?<![\w'\u2019-])(?<!\w\.)[b-hj-zB-HJ-Z](?![\w'\u2019-])(?!\.\w)",  # a variable; `a`, `A` and `I` are words
    re.DOTALL,
)
_MARK = re.compile(r"\[\[\s*(\d+)\s*\]\]")
_DIGIT = re.compile(r"\d")


class Loss(enum.Enum):
    """What became of the marks in a translation that is of no use."""

    LOST = "placeholder lost"
    REPEATED = "placeholder repeated"
    ADDED = "number added"


@dataclasses.dataclass(frozen=True)
class Masked:
    """A text with marks, and what stood in the places of the marks, in order."""

    text: str
    kept: tuple[str, ...]


def mask(text: str) -> Masked:
    """Put a mark in the place of everything that a translation has to keep."""
    kept: list[str] = []

    def mark(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"[[{len(kept)}]]"

    return Masked(_KEPT.sub(mark, text), tuple(kept))


def unmask(translation: str, masked: Masked) -> str | Loss:
    """The translation with what was masked in the places of the marks, or why it cannot be had."""
    counts = collections.Counter(int(number) for number in _MARK.findall(translation))
    expected = range(1, len(masked.kept) + 1)
    if any(number not in counts for number in expected):
        return Loss.LOST
    if any(counts[number] > 1 for number in expected):
        return Loss.REPEATED
    if len(counts) > len(masked.kept) or _DIGIT.search(_MARK.sub("", translation)):
        return Loss.ADDED
    return _MARK.sub(lambda found: masked.kept[int(found[1]) - 1], translation)
