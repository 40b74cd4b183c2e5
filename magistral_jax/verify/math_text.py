r"""Math answers as text: size caps, and one spelling for what is typeset or meant the same.

In: the content of a box, or a reference. Out: text for the grammars. No rule here needs a parse.
"""

import re
import unicodedata
from fractions import Fraction

MAX_CHARACTERS = 1000
"""Longest answer that is parsed."""
MAX_DIGITS = 400
"""Longest number literal."""
MAX_NESTING = 25
"""Deepest nesting of brackets."""

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "•": r"\cdot ", "÷": r"\div ",  # noqa: RUF001
    "∗": "*", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",  # noqa: RUF001
    "∓": r"\mp ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",  # noqa: RUF001
    "∅": r"\emptyset ", "∖": r"\setminus ", "°": r"\degree ", "º": r"\degree ", "∠": r"\angle ", "△": r"\triangle ",  # noqa: RUF001
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}", "⁄": "/",  # noqa: RUF001
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",  # noqa: RUF001
    "、": ",", "。": ".", "∶": ":", "′": "'", "″": "''", "’": "'", "“": '"', "”": '"', "…": r"\ldots ",  # noqa: RUF001
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")

_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
               "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16"}  # fmt: skip

_PREAMBLE = (
    r"^\s*(?:\\text\s*\{[^{}]*[:,]\s*\}"
    r"|(?i:(?:\\text\s*\{)?\s*(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|[:=])|about|approximately|roughly)(?![A-Za-z])\s*\}?))"
)

_LATEX_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\$\s*\n\s*\$", ", "),  # a formula a line
        (
            r"\\begin\{(aligned|align\*?|gathered|split)\}([^\x00]*?)\\end\{\1\}",
            lambda match: match[2].strip().removesuffix(r"\\").replace("&", " ").replace(r"\\", ", "),
        ),
        (r"\\text\s*\{\s*\\\$\s*\}|\\\$", r"\\dollar "),
        (r"\$|\\[()]|(?<!\\)\\[\[\]]", " "),  # math delimiters
        (r"(?<!\\)\\+\s*$", ""),  # a backslash left over at the end
        (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\ "),  # extra row space
        (r"(?<!\\)\\!\s*|\\(?:tag|label|color|textcolor|phantom|hspace|vspace)\s*\{[^{}]*\}", ""),
        (r"[,;]?\s*(?:\\q?quad\s*)+(?=[A-Za-z][\w{}()'\\]{0,15}\s*(?:=|\\equiv))", ", "),  # x = 1 \quad y = 2
        (r"(?<!\\)\\[,:;> ]|\\q?quad|\\(?:thinspace|enspace|hfill|nonumber|notag)(?![A-Za-z])", " "),
        (r"\\(?:left|right)\s*\.", " "),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", " "),
        (r"\\(?:[dtcs]|nice|flat)frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (
            r"(?:\{|^)([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)(?:\}|$)",
            lambda match: _infix_fraction(*match.groups()),
        ),
        (r"^.*\\(?:Rightarrow|Longrightarrow|implies|therefore)(?![A-Za-z])", " "),  # what follows is the answer
        (r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}", r"\\\1 "),
        (r"\\math(?:bf|rm)\s*\{\s*([RZNQC])\s*\}", r"\\mathbb{\1}"),
        (r"\\mathrm\s*\{\s*([eid])\s*\}", r"\1 "),
        (r"\{\s*\\(?:rm|bf|it|tt|cal)(?![A-Za-z])([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:rm|bf|it|tt|cal)(?![A-Za-z])", " "),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|vec|overrightarrow|mathcal|underline)(?![A-Za-z])", " "),
        (r"\\(?:mathrm|mathop|mbox|hbox|textbf|textit|textrm|textsf|textnormal|texttt|emph)(?![A-Za-z])", r"\\text"),
        (r"\\text\s*\{([^{}]*)\}\s*/\s*\\text\s*\{([^{}]*)\}", r"\\text{\1/\2}"),
        (r"\\text\s*\{([^{}]*)\}\s*(?:-|\\cdot)?\s*\\text\s*\{([^{}]*)\}", r"\\text{\1 \2}"),
        (r"\\text\s*\{\s*\}", " "),
        (r"\\text\s*\{\s*(?:per\s?cent|percentage|pct)\.?\s*\}|\{\s*\\%\s*\}|\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\deg(?![A-Za-z])", r"\\degree "),
        (
            r"(\d+)\s*\\degree\s*(\d+)\s*(?:'|\^\s*\{?\s*\\prime\s*\}?)(?:\s*(\d+)\s*(?:''|\^\s*\{\s*\\prime\s*\\prime\s*\}))?",
            lambda match: rf"({match[1]}+{match[2]}/60+{match[3] or 0}/3600)\degree ",
        ),  # minutes and seconds of arc
        (r"\\(?:leq|leqslant|leqq|le)(?![A-Za-z])", r"\\le "),
        (r"\\(?:geq|geqslant|geqq|ge)(?![A-Za-z])", r"\\ge "),
        (r"\\not\s*=|\\(?:neq|ne)(?![A-Za-z])", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:lbrace(?![A-Za-z])|\{)", r"\\{"),
        (r"\\(?:rbrace(?![A-Za-z])|\})", r"\\}"),
        (r"\\[_#&](?![A-Za-z])", " "),
        (r"\\(?:varnothing|emptyset)(?![A-Za-z])|^\\(?:phi|Phi)\s*$", r"\\emptyset "),
    )
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\$|~", " "),
        (_PREAMBLE, ""),
        (":=", "="),
        (r"(?<=[\d\s)}])(?:per\s?cent|percentage|pct)(?![A-Za-z])\.?", "%"),
        (r"(?<=[\d)\]}])(and|or)(?![a-z])", r" \1 "),  # "(1,2)or(2,1)"
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 3 x 10^8
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
        (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", "{,}"),
        (r"\(\s*mod\s+([^()]*)\)", r"\\pmod{\1}"),
        (r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?", lambda match: _repeating(*match.groups())),
        (r"(\d+)\.()\((\d+)\)", lambda match: _repeating(*match.groups())),
        (r"(?<!\d)(\d{1,20})\.(\d{3,40})\s*(?:\.\.\.|\\l?dots)", lambda match: _continued(*match.groups()) or match[0]),
        (r"\\sqrt\s+(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"\.\.\.|…", r"\\ldots "),
        (rf"(?<=[\dA-F)])\s*_\s*\{{?\s*(?:\\text\s*)?\{{?\s*({'|'.join(_BASE_NAMES)})\s*\}}*",
         lambda match: f"_{{{_BASE_NAMES[match[1]]}}}"),
        (r"\s+", " "),
    )
)  # fmt: skip


def normalise(text: str) -> str:
    """One spelling for what is typeset the same: no dollar signs, sizes and spacing; ASCII or LaTeX for Unicode."""
    if not text.isascii():
        text = _RAISED.sub(_raised, text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE_TABLE)).translate(_UNICODE_TABLE)
    if "\\" in text:
        text = single_backslashes(text)
        for pattern, replacement in _LATEX_REWRITES:
            text = pattern.sub(replacement, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip(' "*').removeprefix("=").removeprefix(r"\approx").lstrip()
    if text.endswith((".", ",", ";", ":")) and not text.endswith((r"\,", r"\;", r"\:", "...")):
        text = text[:-1].rstrip()
    return text


def _raised(match: re.Match[str]) -> str:
    if match[0][0] in "₀₁₂₃₄₅₆₇₈₉₊₋ₙ":
        return f"_{{{match[0].translate(_SUBSCRIPTS)}}}"
    return f"^{{{match[0].translate(_SUPERSCRIPTS)}}}"


def _repeating(whole: str, start: str, period: str) -> str:
    """A repeating decimal as a fraction."""
    ones = 10 ** len(start)
    value = Fraction(int(whole + start), ones) + Fraction(int(period), (10 ** len(period) - 1) * ones)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_PERIOD = re.compile(r"(\d*?)(\d+?)\2{2,}")


def _continued(whole: str, digits: str) -> str | None:
    """`0.333...` as a fraction, where the end of the digits repeats at least three times."""
    period = _PERIOD.fullmatch(digits)
    return _repeating(whole, period[1], period[2]) if period else None


def _infix_fraction(top: str, command: str, bottom: str) -> str:
    return rf"\{'frac' if command == 'over' else 'binom'}{{{top}}}{{{bottom}}}"


_COMMANDS = (
    "boxed|fbox|[dtc]?frac|sqrt|text|textbf|textit|mathrm|mathbf|mathbb|left|right|begin|end|pi|cdot|times|div|pm|"
    "leq?|geq?|neq?|infty|in|cup|cap|theta|alpha|beta|circ|q?quad|overline|langle|rangle|ldots|dots|displaystyle"
)
_DOUBLED = re.compile(rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))")


def single_backslashes(text: str) -> str:
    r"""Undo the escaping of a JSON or Python string: `\\frac` becomes `\frac`. A row break `\\` elsewhere stays."""
    return _DOUBLED.sub(r"\\", text)


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


_WORDS = re.compile(r"(?:\\text\s*\{[^{}\\]*\}|[^\\{}^_=<>])+")
_LONG_WORD = re.compile(r"[^\W\d_]{4}")


def words(text: str) -> str | None:
    r"""The text of an answer that is words, not a formula ("no solution", `\text{Monday}`), in lower case; or None.

    Capitals matter in short answers: choice C is not c, and segment AB is not the product ab. So a word of only
    capitals or of fewer than three letters keeps its case, unless it is a truth value. Beside digits there has to be a
    word of some length ("Quadrant 4").
    """
    if not _WORDS.fullmatch(text):
        return None
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    plain = " ".join(re.sub(r"[^\w.]+|\.(?!\d)", " ", plain).split())
    if not re.search(r"[^\W\d_]{2}", plain) or (re.search(r"\d", plain) and not _LONG_WORD.search(plain)):
        return None
    folded = plain.casefold()
    if folded in {"yes", "no", "true", "false", "none"}:
        return folded
    return plain if plain.isupper() or len(plain) < 3 else folded
