r"""Formulas in a text: `$…$`, `$$…$$`, `\(…\)`, `\[…\]` and the environments of displayed equations.

In: text of any kind. Out: spans. One pass over the delimiters, so the time is linear in the text.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Span:
    """A formula or box in a text: where it starts and ends with its delimiters, and what is between them."""

    start: int
    end: int
    content: str


_DISPLAYS = r"\{(?:align|aligned|equation|gather|gathered|multline|eqnarray|split)\*?\}"
_DELIMITER = re.compile(rf"(?<!\\)(?:\$\$?|\\[\[\]()])|\\(?P<edge>begin|end){_DISPLAYS}")
_ALIGNED = re.compile(rf"\\(?:begin|end){_DISPLAYS}")
_CLOSING = {"$": "$", "$$": "$$", r"\[": r"\]", r"\(": r"\)", "begin": "end"}
_INLINE = ("$", r"\(")
_TWO_WORDS = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}")


def is_prose(text: str) -> bool:
    r"""True where two words stand side by side, other than in `\text{…}`."""
    return _TWO_WORDS.search(re.sub(r"\\text\s?\{[^{}]*\}|\\[A-Za-z]+", " ", text)) is not None


def find_formulas(text: str) -> Iterator[Span]:
    """All formulas in order. Inline ones stay on their line, and `$5 and then $` is none."""
    kind, start, content_start = "", 0, 0
    for delimiter in _DELIMITER.finditer(text):
        mark = delimiter["edge"] or delimiter[0]
        is_pair = kind == "$" and mark == "$$"  # of two inline formulas side by side
        if kind and (mark == _CLOSING[kind] or is_pair):
            content = text[content_start : delimiter.start()]
            if kind not in _INLINE or not ("\n" in content or is_prose(content)):
                if content.strip():
                    yield Span(start, delimiter.end() - is_pair, _last_row(content))
                kind = "$" if is_pair else ""
                start, content_start = delimiter.end() - 1, delimiter.end()
                continue
        if mark in _CLOSING and (not kind or kind in _INLINE):
            kind, start, content_start = mark, delimiter.start(), delimiter.end()


def _last_row(formula: str) -> str:
    """The last line of aligned equations, without its alignment marks; any other formula as it is."""
    formula = _ALIGNED.sub(" ", formula)
    if "&" not in formula or r"\begin" in formula:
        return formula.strip()
    rows = [row for row in formula.split(r"\\") if row.strip()]
    return rows[-1].replace("&", " ").strip()


def without_formulas(text: str) -> str:
    """The text with a blank for every formula."""
    pieces, position = [], 0
    for formula in find_formulas(text):
        pieces += [text[position : formula.start], " "]
        position = formula.end
    return "".join([*pieces, text[position:]])


# ---- several that are one answer ------------------------------------------------------------------------------------

_LONGEST_GAP = 150
_NO_WORDS = re.compile(r"[\s,;&+$]*")
_JOINT = re.compile(r"[^.?!:]{0,60}(?:\b(?:and|or|und|oder|et|ou|y|e|и|или)\b|[和或])[^.?!:]{0,60}")
_MARKUP = re.compile(r"\\(?:[()\[\]]|q?quad|text\s?(?=\{)|[,;!])|[{}$]")
_AFRESH = re.compile(r"\b(?:then|so|therefore|hence|thus|not|instead|but)\b")
_SUFFIX = re.compile(
    r"(?:\$|\\\)|\\\])?\s{0,3}(?:\$\s?)?(?:(?P<percent>\\?%|percent|per cent|pct)|(?P<degree>\^\{?\\circ\}?|°|degrees))"
)


def joined_to_last(text: str, spans: Sequence[Span]) -> str:
    r"""The last of the spans, and those before it as far back as a comma or "and" joins them: `$1$ and $2$` is a list.

    A percent or degree sign behind a span counts as its own: `\boxed{28}\%`, `$28$ percent`.
    """
    first = len(spans) - 1
    while first and are_joined(text, spans[first - 1], spans[first]):
        first -= 1
    return ", ".join(dict.fromkeys(_with_suffix(text, span) for span in spans[first:]))


def joined_to_first(text: str, spans: Sequence[Span]) -> str:
    """The first of the spans and those joined to it."""
    last = 0
    while last + 1 < len(spans) and are_joined(text, spans[last], spans[last + 1]):
        last += 1
    return joined_to_last(text, spans[: last + 1])


def are_joined(text: str, left: Span, right: Span) -> bool:
    """True where nothing but a comma, or a few words with "and" among them, stands between two spans."""
    gap = text[left.end : right.start]
    if len(gap) > _LONGEST_GAP or gap.count("\n") > 2:
        return False
    gap = _MARKUP.sub(" ", gap)
    if not gap.strip():
        return "\n" not in gap
    return bool(_NO_WORDS.fullmatch(gap) or _JOINT.fullmatch(gap)) and not _AFRESH.search(gap)


def _with_suffix(text: str, span: Span) -> str:
    suffix = _SUFFIX.match(text, span.end)
    if suffix is None:
        return span.content
    return span.content + (r"\%" if suffix["percent"] else r"^\circ")
