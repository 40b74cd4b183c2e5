r"""The answer of a completion that keeps to no format, wherever it stands.

In: the text of a completion. Out: the answer as text for the grader, or None. Looked for, in this order, after the last
closing tag of the thoughts where there is one:

  1. boxes: the last `\boxed`, and with it boxes joined to it by a comma or "and" ("\boxed{1} and \boxed{2}"); what is
     announced as the final answer behind it goes before;
  2. the last `<answer>…</answer>`;
  3. what an announcement names, the last one: "the answer is …", "Answer: …", "#### …", in several languages;
  4. the text as a whole where it reads as an answer: `1/2`, `28 percent`;
  5. the last formula (`$…$`, `\[…\]`, align) with those joined to it, or the last number in the prose behind it;
  6. a text of a few words: `No solution`.

All scans take time linear in the text.
"""

import re

from magistral_jax.verify.format import find_boxes
from magistral_jax.verify.formulas import (
    Span,
    find_formulas,
    is_prose,
    joined_to_first,
    joined_to_last,
    without_formulas,
)
from magistral_jax.verify.math_answer import is_parsable
from magistral_jax.verify.math_text import single_backslashes

_MAX_CLAUSE = 300
_MAX_WORDS = 60
_CONTROL_TOKEN = re.compile(r"<\|[^<>|\n]{1,40}\|>")


def extract_answer(text: str, think_close: str = "</think>") -> str | None:
    r"""Find the answer in a completion of any form.

    Args:
      text: The completion. Where the closing tag occurs, what stands before the last one does not count.
      think_close: Tag that closes the thoughts.

    Returns:
      The answer without its box or dollar signs, or None where nothing looks like one.
    """
    text = single_backslashes(text.rpartition(think_close)[2])
    text = _CONTROL_TOKEN.sub(" ", text)
    for find in (_boxed, _tagged, _announced, _whole, _formula_or_number, _words):
        answer = find(text)
        if answer is not None:
            return answer
    return None


# ---- boxes and tags -------------------------------------------------------------------------------------------------

_UNCLOSED_BOX = re.compile(r"\\boxed\s*\{([^\n]{1,300})")
_ANSWER_TAG = re.compile(r"<answer>([^<]{0,2000})</answer>", re.IGNORECASE)


def _boxed(text: str) -> str | None:
    """The last boxes, or else a box that is never closed, up to the end of its line."""
    boxes: list[Span] = []
    for box in find_boxes(text):
        if not boxes or box.start > boxes[-1].start:  # of nested boxes the inner one, which comes first
            boxes.append(Span(box.start, box.end, box.content))
    if not boxes:
        unclosed = _UNCLOSED_BOX.search(text)
        return unclosed[1] if unclosed else None
    final = _FINAL.search(text, boxes[-1].end)
    said = _announced(text[final.start() :]) if final else None
    return said if said and re.search(r"\d", said) else joined_to_last(text, boxes)


def _tagged(text: str) -> str | None:
    tags = _ANSWER_TAG.findall(text)
    return (_boxed(tags[-1]) or _unquoted(tags[-1])) if tags else None


# ---- announcements --------------------------------------------------------------------------------------------------

_FINAL = re.compile(r"\bfinal answer\b", re.IGNORECASE)
_ANNOUNCEMENT = re.compile(
    r"(?:\b(?:answer|réponse|respuesta|risposta|resposta|antwort|endergebnis|ergebnis|ответ)\b|答案|答え|정답|답)"
    r"(?P<link>[\s*_]*(?:is|are|est|es|è|é|ist|lautet|равен|[:：=—]|是|为|は)?[\s*_:：]*)"  # noqa: RUF001
    r"|####",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"[.?!](?=\s|\*|$)|[。！？\n]|;\s|,\s+(?=[^\W\d_]{2,})|\s(?:because|since|which|where|for|so|if)\b"  # noqa: RUF001
)
_SENTENCE_END = re.compile(r"[.?!](?=\s|$)|[。！？\n]")  # noqa: RUF001
_CHOICE = re.compile(r"\b[A-J]\b")


def _announced(text: str) -> str | None:
    """What the last announcement names that names something."""
    for announcement in reversed(list(_ANNOUNCEMENT.finditer(text))):
        if announcement[0] == "####" or announcement["link"].strip(" *_\n"):
            rest = text[announcement.end() : announcement.end() + _MAX_CLAUSE].lstrip()
            if answer := _first_of(rest):
                return answer
    return None


def _first_of(text: str) -> str:
    """The answer at the start of a text: a formula, a clause, or the first number or choice in the sentence."""
    formulas = list(find_formulas(text))
    if formulas and not text[: formulas[0].start].strip(' *_"\\'):
        return joined_to_first(text, formulas)
    clause = _unquoted(_CLAUSE_END.split(text, maxsplit=1)[0])
    if _reads_as_answer(clause):
        return clause
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    found = _NUMBER.search(without_formulas(sentence)) or _CHOICE.search(clause)
    return found[0].strip() if found else clause


# ---- the whole text, formulas, numbers ------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?<![\w.,\\])[-−+]?\s?(?:[$€£]\s?)?"
    r"(?:\\[dtc]?frac\s?\{[^{}\n]{1,20}\}\s?\{[^{}\n]{1,20}\}"
    r"|(?:\d[\d.,]{0,500}\d|\d)(?:[ \u00a0\u202f]\d{3})*(?:\s?/\s?\d+)?|\.\d+)"
    r"(?:\s?\\?%|\s?percent\b|\s?pct\b)?(?![\d_])"
)
_ONE_LETTER = re.compile(r"[\s,]*\\?[A-Za-z]+[\s,]*")


def _whole(text: str) -> str | None:
    text = _unquoted(text)
    return text if _reads_as_answer(text) and next(find_formulas(text), None) is None else None


def _formula_or_number(text: str) -> str | None:
    """The last formula or the last number behind it. A formula of one letter, "for all $n$", is a last resort."""
    formulas = list(find_formulas(text))
    telling = [formula for formula in formulas if not _ONE_LETTER.fullmatch(formula.content)]
    prose = text[telling[-1].end :] if telling else text
    if number := _last_number(without_formulas(prose)):
        return number
    return joined_to_last(text, telling or formulas) if formulas else None


def _last_number(text: str) -> str | None:
    number = None
    for match in _NUMBER.finditer(text):
        number = match[0].strip()
    return number


def _words(text: str) -> str | None:
    text = _unquoted(text)
    return text if text and len(text) <= _MAX_WORDS and "\n" not in text else None


def _unquoted(text: str) -> str:
    return text.strip().strip('*_"“”`').strip()


def _reads_as_answer(text: str) -> bool:
    return 0 < len(text) <= _MAX_CLAUSE and not is_prose(text) and is_parsable(text)
