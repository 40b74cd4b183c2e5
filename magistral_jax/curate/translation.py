"""Which problems are translated into what, how it is asked for, and which answers are taken.

in: Problems and what an endpoint says; out: rows. What cannot be translated stays in English, for a counted reason.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.curate.masking import Loss, mask, unmask
from magistral_jax.data.overlap import Removal
from magistral_jax.records import MagistralError, Problem
from magistral_jax.verify.language import classify, strip_notation

LANGUAGE_NAMES: Mapping[str, str] = {
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "de": "German",
    "zh": "Chinese",
    "ru": "Russian",
}
"""Languages of the report by their ISO 639 codes."""

EMPTY, CUT, WRONG_LANGUAGE = "empty", "cut off", "wrong language"
"""Reasons, beside those of `Loss`, for which an answer is not taken."""

_INSTRUCTION = (
    "You are a translator of mathematics and programming problems. Translate the user's text from English into "
    "{language}. Marks such as [[1]] stand for numbers and formulas: copy every mark exactly once, as it is, to where "
    "it belongs in the translation. Write no other numbers. Do not solve the problem and do not comment on it: your "
    "whole reply is the translation."
)
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclasses.dataclass(frozen=True)
class Order:
    """A problem that is to be translated."""

    problem: Problem
    language: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The request as a conversation."""
        instruction = _INSTRUCTION.format(language=LANGUAGE_NAMES[self.language])
        return [
            {"role": "system", "content": instruction},
            {"role": "user", "content": mask(self.problem.statement).text},
        ]

    def seed(self, attempt: int, run_seed: int) -> int:
        """Of the sample: another one for each attempt, and the same after a resume."""
        digest = hashlib.sha256(f"{run_seed}:{self.problem.id}:{attempt}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def accept(self, reply: str) -> tuple[str, str]:
        """(statement in the language, "") where a reply is a sound translation, else ("", reason)."""
        text = reply.rpartition("</think>")[2].strip()
        if not text:
            return "", EMPTY
        statement = unmask(text, mask(self.problem.statement))
        if isinstance(statement, Loss):
            return "", statement.value
        return (statement, "") if classify(statement) == self.language else ("", WRONG_LANGUAGE)


def choose_orders(
    problems: Sequence[Problem], *, share: float, languages: Sequence[str], seed: int
) -> tuple[list[Order], list[Removal]]:
    """Draw the problems to translate, as many for each language.

    Args:
      problems: Of any languages.
      share: Of the English problems that can be translated, in [0, 1].
      languages: Codes out of `LANGUAGE_NAMES`.
      seed: Of the draw.

    Returns:
      Orders in the order of `problems`, and those that are not to be chosen, with reasons.

    Raises:
      MagistralError: A language that there is not.

    Source: Magistral (arXiv:2506.10910), section 4: 10 % of the English problems, into six languages.
    """
    if unknown := [language for language in languages if language not in LANGUAGE_NAMES]:
        raise MagistralError(f"`translate.languages` has `{unknown[0]}`; expected some of {', '.join(LANGUAGE_NAMES)}.")
    reasons = [_obstacle(problem) for problem in problems]
    candidates = [place for place, reason in enumerate(reasons) if not reason]
    random.Random(f"translate:{seed}").shuffle(candidates)
    chosen = {
        place: languages[turn % len(languages)]
        for turn, place in enumerate(candidates[: round(share * len(candidates))])
    }
    orders = [Order(problems[place], chosen[place]) for place in sorted(chosen)]
    return orders, [Removal(problem.id, why) for problem, why in zip(problems, reasons, strict=True) if why]


def _obstacle(problem: Problem) -> str:
    """Why a problem is not to be translated; empty where it is."""
    language = problem.extra.get("language") or classify(problem.statement)
    if language is None:
        return "too few words"
    if language != "en":
        return "not in English"
    # A right answer in another language would be compared with a reference in this one.
    return "answer in words" if _WORD.search(strip_notation(problem.answer)) else ""


def translated(problem: Problem, found: Mapping[str, Any] | None) -> Problem:
    """A problem with the columns `language` and `original_id`.

    Args:
      problem: As it was.
      found: Its record with `language` and `statement`; None, or an empty statement, where it stays as it is.
    """
    if not (found and found["statement"]):
        language = problem.extra.get("language") or classify(problem.statement)
        return dataclasses.replace(problem, extra={**problem.extra, "language": language, "original_id": None})
    extra = {**problem.extra, "language": found["language"], "original_id": problem.id}
    new_id = f"{problem.id}:{found['language']}"
    return dataclasses.replace(problem, id=new_id, statement=found["statement"], extra=extra)
