r"""Word problems in seven languages, written from templates; in: a seed, out: Problems.

They come with reference thoughts in each of the languages, so that what a policy does with languages can be trained and
tested offline: thoughts and answers have words enough for a classifier to tell them apart. The texts are in
`templated.toml`; the forms of nouns and verbs agree with the numbers.
"""

import dataclasses
import functools
import importlib.resources
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.records import Problem

LANGUAGES = ("en", "fr", "es", "it", "de", "zh", "ru")
"""ISO 639 codes: English, and the six to which the report translates problems (§4)."""

_FORMS = re.compile(r"\[([^\[\]]+)\]")


@dataclasses.dataclass(frozen=True)
class _Story:
    """Sentences of one story, each with a place for a number."""

    opening: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    question: str


@dataclasses.dataclass(frozen=True)
class _Phrases:
    """All texts of one language."""

    stories: Mapping[str, _Story]
    plan: str
    add: str
    subtract: str
    guess: str
    answer: str
    joint: str
    """Between two sentences."""


def sums(
    num: int,
    seed: int,
    *,
    language: str | Sequence[str] = LANGUAGES,
    terms: int | Sequence[int] = (3, 5),
    largest: int = 9,
) -> list[Problem]:
    """Stories in which a number grows and shrinks, never below 0; what is left at the end is asked.

    Args:
      num: Problems.
      seed: Problem i is a function of it and of i.
      language: Codes out of `LANGUAGES`, which take turns.
      terms: Numbers in a story, or the fewest and the most of them; at least 2.
      largest: Largest number in a statement; the smallest is 1.

    Returns:
      Problems with the columns `language`, `story` and `terms`, the signed numbers of which the answer is the sum.

    Raises:
      ValueError: A language that there is not, or a number out of range.
    """
    languages = (language,) if isinstance(language, str) else tuple(language)
    lengths = (terms, terms) if isinstance(terms, int) else tuple(terms)
    if unknown := set(languages) - set(LANGUAGES):
        raise ValueError(f"there is no language {min(unknown)!r}, only {', '.join(LANGUAGES)}")
    if len(lengths) != 2 or not 2 <= lengths[0] <= lengths[1]:
        raise ValueError("terms is one number, or the fewest and the most, at least 2")
    if largest < 1:
        raise ValueError("largest is at least 1")
    return [_sum(seed, index, languages[index % len(languages)], lengths, largest) for index in range(num)]


def _sum(seed: int, index: int, language: str, lengths: tuple[int, ...], largest: int) -> Problem:
    rng = random.Random(f"sums:{seed}:{index}")  # the same numbers in every language
    phrases = _phrases()[language]
    name = rng.choice(sorted(phrases.stories))
    story = phrases.stories[name]
    terms = [rng.randint(1, largest)]
    sentences = [inflect(story.opening, terms[0], language)]
    for _ in range(rng.randint(*lengths) - 1):
        left = sum(terms)
        is_gain = left == 0 or rng.random() < 0.5
        number = rng.randint(1, largest if is_gain else min(left, largest))
        sentences.append(inflect(rng.choice(story.gains if is_gain else story.losses), number, language))
        terms.append(number if is_gain else -number)
    statement = phrases.joint.join([*sentences, story.question])
    extra = {"language": language, "story": name, "terms": terms}
    return Problem(f"sums:{language}:{seed}:{index}", statement, str(sum(terms)), extra=extra)


def inflect(sentence: str, number: int, language: str) -> str:
    """A sentence with `number` in the place of `{n}` and, of each `[one|other]` or `[one|few|many]`, the right form.

    Source: the plural rules of Unicode CLDR for whole numbers.
    """
    place = _plural_form(number, language)
    return _FORMS.sub(lambda found: found[1].split("|")[place], sentence).format(n=number)


def _plural_form(number: int, language: str) -> int:
    """Which of the forms of a noun stands beside a number."""
    if language == "ru":
        if number % 10 == 1 and number % 100 != 11:
            return 0
        return 1 if number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14) else 2
    return 0 if number == 1 or (language == "fr" and number == 0) else 1


# ---- thoughts and answers -------------------------------------------------------------------------------------------


def is_templated(problem: Problem) -> bool:
    """Whether a problem is one of `sums`, about which `completion_words` knows what to say."""
    return {"language", "story", "terms"} <= problem.extra.keys()


def completion_words(problem: Problem, result: int, language: str, *, is_thorough: bool) -> tuple[str, str]:
    r"""Thoughts and answer to a problem of `sums`.

    Args:
      problem: In any language.
      result: What the answer states, right or wrong.
      language: Of the thoughts and of the answer.
      is_thorough: Whether the thoughts go step by step ("Adding 3 to 4 gives 7.") or state the result only.

    Returns:
      The thoughts, and a sentence with the result in a `\boxed{}`.
    """
    phrases = _phrases()[language]
    thoughts = _steps(problem.extra["terms"], phrases) if is_thorough else phrases.guess.format(c=result)
    return thoughts, phrases.answer.format(box=f"\\boxed{{{result}}}")


def _steps(terms: Sequence[int], phrases: _Phrases) -> str:
    """The running result, a sentence for each step."""
    sentences, result = [phrases.plan], terms[0]
    for term in terms[1:]:
        step = phrases.add if term >= 0 else phrases.subtract
        sentences.append(step.format(a=result, b=abs(term), c=result + term))
        result += term
    return phrases.joint.join(sentences)


@functools.cache
def _phrases() -> Mapping[str, _Phrases]:
    """Texts of all languages."""
    text = (importlib.resources.files("magistral_jax.data") / "templated.toml").read_text(encoding="utf-8")
    return {
        language: _Phrases(**table | {"stories": _stories(table)}) for language, table in tomllib.loads(text).items()
    }


def _stories(table: Mapping[str, Any]) -> dict[str, _Story]:
    return {
        name: _Story(entry["opening"], tuple(entry["gains"]), tuple(entry["losses"]), entry["question"])
        for name, entry in table["stories"].items()
    }
