r"""Math answers as text: size caps, and one spelling for what means the same.

In: the content of a box, or a reference. Out: text for the grammars. No rule here needs a parse.
"""

import re
import unicodedata

MAX_CHARACTERS = 1000
"""Longest answer that is parsed."""
MAX_DIGITS = 400
"""Longest number literal."""
MAX_NESTING = 25
"""Deepest nesting of brackets."""

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "∗": "*",  # noqa: RUF001
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"\degree ", "º": r"\degree ",  # noqa: RUF001
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}",
    "²": "^2", "³": "^3", "ⁿ": "^n", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}",  # noqa: RUF001
    "、": ",", "∶": ":", "′": "'", "’": "'", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",  # noqa: RUF001
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", r"\\dollar "),
        (r"\$|\\[()]|(?<!\\)\\[\[\]]", " "),  # math delimiters
        (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\ "),  # extra row space
        (r"(?<!\\)\\[,:;!> ]|~|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|hfill)(?![A-Za-z])", " "),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}", r"\\\1 "),
        (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|vec|overrightarrow|mathcal)(?![A-Za-z])", " "),
        (r"\\(?:mathrm|mathop|rm|mbox|hbox|textbf|textit|textrm|textsf|textnormal|emph)(?![A-Za-z])", r"\\text"),
        (r"\\text\s*\{([^{}]*)\}\s*/\s*\\text\s*\{([^{}]*)\}", r"\\text{\1/\2}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\deg(?![A-Za-z])", r"\\degree "),
        (r"\\(?:leq|leqslant|le)(?![A-Za-z])", r"\\le "),
        (r"\\(?:geq|geqslant|ge)(?![A-Za-z])", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\(?:mid|vert)(?![A-Za-z])", "|"),
        (r"\\%", "%"),
        (r"\\[_#&](?![A-Za-z])", " "),
        (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\phi(?=\s*$)(?<=^\\phi)", r"\\emptyset "),
        (r"\s+", " "),
    )
)


def normalise(text: str) -> str:
    """One spelling for what is typeset the same: no dollar signs, sizes and spacing; ASCII or LaTeX for Unicode."""
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE_TABLE)).translate(_UNICODE_TABLE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text.endswith((".", ",", ";", ":")) and not text.endswith((r"\,", r"\;", r"\:", "...")):
        text = text[:-1].rstrip()
    return text


def string_key(text: str) -> str:
    """Normalised text without the spaces that mean nothing; a space between two letters or digits stays."""
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


def oversize(text: str) -> str | None:
    """Name of the cap that a normalised text breaks, or None. To be asked before any parse."""
    if len(text) > MAX_CHARACTERS:
        return "characters"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return "digits"
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            return "nesting"
    return None


_WORDS = re.compile(r"(?:\\text\s*\{[^{}\\]*\}|[^\\{}^_=<>0-9])+")


def words(text: str) -> str | None:
    r"""The text of an answer that is words, not a formula ("no solution", `\text{Monday}`), in lower case; or None.

    Capitals matter in short answers: choice C is not c, and segment AB is not the product ab. So a word of only
    capitals or of fewer than three letters keeps its case, unless it is a truth value.
    """
    if not _WORDS.fullmatch(text):
        return None
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    plain = " ".join(re.sub(r"[^\w]+", " ", plain).split())
    if not re.search(r"[^\W\d_]{2}", plain):
        return None
    folded = plain.casefold()
    if folded in {"yes", "no", "true", "false", "none"}:
        return folded
    return plain if plain.isupper() or len(plain) < 3 else folded
