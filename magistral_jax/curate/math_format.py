r"""Which math problems have an answer that can be verified, told by their texts; in: a Problem, out: it or why not.

Dropped are proofs, problems of several parts, and references that the grader cannot read. Multiple choice becomes an
open question: the options go, and the letter of the reference becomes what stands beside it. Rules of the words of
seven languages: they let some proofs through and take a few good problems out, and they cost nothing.

Source: Magistral (arXiv:2506.10910), section 4.1.
"""

import dataclasses
import re

from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem
from magistral_jax.verify.cpu_limit import OutOfTimeError, cpu_limit
from magistral_jax.verify.math_compare import compare
from magistral_jax.verify.math_exact import TooLargeError
from magistral_jax.verify.math_readings import readings
from magistral_jax.verify.math_text import MAX_CHARACTERS, normalise, oversize, words

_MAX_SECONDS = 1.0  # of CPU time for one reference
_MAX_WORDS = 4  # of a reference in words: a longer one would have to be met word by word

_PROOF = re.compile(
    r"(?:^|[.;:!?,\n$)\]]\s*|\b(?:then|and|please|hence|to)\s+)"
    r"(?:prove\b|disprove\b|show that\b|show,|demonstrate that\b|verify that\b|give a proof\b"
    r"|montrer\b|montrez\b|prouver\b|prouvez\b|démontrer\b|démontrez\b|demuestr[ae]n?\b|pruebe\b|prueba que\b"
    r"|dimostrare\b|dimostra\b|dimostrate\b|beweise\b|beweisen sie\b|zeige\b|zeigen sie\b|докажите\b|доказать\b)"
    r"|证明|求证",
    re.IGNORECASE,
)
_PART = re.compile(r"(?:^|\n|[.?!;:]\s)\s*(?:\*\*|\\textbf\{|\\item\s*)?\(?(?:[a-h]|i{1,3}|iv|v|[1-6])\)[\s*}:]")
_REQUEST = re.compile(
    r"\?|^\W*(?:find|what|how|which|where|who|determine|calculate|compute|evaluate|solve|state|write|give|list|prove|show"
    r"|draw|sketch|hence|explain|express|simplify|factor)\b",
    re.IGNORECASE,
)
_NAMED_PART = re.compile(r"\bpart\s+(?:\(?[a12i]\)?|one)\b.*\bpart\s+(?:\(?(?:[b2]|ii)\)?|two)\b", re.I | re.DOTALL)


def open_format(problem: Problem) -> Problem | Removal:  # noqa: PLR0911 one return for each reason
    """The problem with an open answer that can be verified, or why it is removed."""
    if problem.kind != "math":
        return Removal(problem.id, "not math", problem.kind)
    if match := _PROOF.search(problem.statement):
        return Removal(problem.id, "proof", match[0].strip())
    if _has_parts(problem.statement):
        return Removal(problem.id, "several parts")
    opened = _without_options(problem)
    if isinstance(opened, Removal):
        return opened
    if not opened.answer.strip():
        return Removal(problem.id, "no answer")
    if not is_verifiable(opened.answer):
        return Removal(problem.id, "answer cannot be verified", opened.answer[:200])
    return opened


def is_verifiable(answer: str) -> bool:
    """Whether the grader reads the answer, and finds what it read equal to itself; or it is a few words."""
    if len(answer) > MAX_CHARACTERS:
        return False
    try:
        with cpu_limit(_MAX_SECONDS):
            text = normalise(answer)
            if not text or oversize(text) is not None:
                return False
            said = words(text)
            if said is not None and len(said.split()) <= _MAX_WORDS:
                return True
            return any(compare(reading.tree, reading.tree).is_equal for reading in readings(text))
    except (OutOfTimeError, TooLargeError, RecursionError):
        return False


def _has_parts(statement: str) -> bool:
    """Whether at least two labelled parts ask for something; a list of conditions has one question at its end."""
    parts = _PART.split(_without_drawings(statement))[1:]
    return sum(bool(_REQUEST.search(part)) for part in parts) > 1 or bool(_NAMED_PART.search(statement))


_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)


def _without_drawings(statement: str) -> str:
    """Drawings blanked out, everything else at its place: a point (A) in Asymptote is no option."""
    return _DRAWING.sub(lambda match: " " * len(match[0]), statement)


# ---- multiple choice ------------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGH"
_FEWEST_OPTIONS = 3
_BRACKETED = re.compile(
    r"(?:\$?\s*(?:\\(?:textbf|text|mathrm|mathbf|rm|bf|textrm)\s*\{?\s*)+|(?<![A-Za-z0-9_^]))"
    r"\((?P<letter>[A-H])\s*\)?(?:\s*\\?\s*~?\}|\s*\\ )*(?:\))?"
)
_LISTED = re.compile(r"(?:^|\n)[ \t*]*\(?(?P<letter>[A-Ha-h])[.):][ \t*]+")
_LETTER = re.compile(r"\W*(?:\\(?:textbf|text|mathrm|mathbf)\s*\{)?\W*(?P<letter>[A-Ha-h])\W*")
_SPACING = re.compile(r"\\q?quad\b|\\hspace\{[^{}]*\}|\\[ ,;:!]|\\\\|~|\$")
_NEEDS_OPTIONS = re.compile(
    r"\bof (?:the following|these)\b|\bfollowing (?:is|are|could|must|statements?|options?|choices?|expressions?)\b"
    r"|\bwhich (?:one|choice|option|statement|answer)\b|\bthe letters?\b"
    r"|\b(?:answer|options?) choices?\b|\bclosest to\b|\bis the correct\b",
    re.IGNORECASE,
)


def _without_options(problem: Problem) -> Problem | Removal:
    """A problem with options as an open question; any other as it is."""
    found = find_options(problem.statement)
    if found is None:
        return problem
    statement, options = found
    if _NEEDS_OPTIONS.search(statement):
        return Removal(problem.id, "needs its options")
    answer = problem.answer
    if (letter := _LETTER.fullmatch(answer)) is not None:
        if letter["letter"].upper() not in options:
            return Removal(problem.id, "answer is no option", answer)
        answer = options[letter["letter"].upper()]
    elif re.fullmatch(r"[\W_]*(?:\\text\s*\{)?(?:\(?[A-H]\)?(?:,|\band\b|\s|\})*){2,}", answer):
        return Removal(problem.id, "several options are right", answer)
    extra = {**problem.extra, "was_multiple_choice": True}
    return dataclasses.replace(problem, statement=statement, answer=answer, extra=extra)


def find_options(statement: str) -> tuple[str, dict[str, str]] | None:
    """The question without its options, and these by letter; None where there are none."""
    for label in (_BRACKETED, _LISTED):
        run: list[re.Match[str]] = []
        for match in label.finditer(_without_drawings(statement)):
            letter = match["letter"].upper()
            if letter == "A":
                run = [match]
            elif run and letter == _LETTERS[len(run) % len(_LETTERS)]:
                run.append(match)
        if len(run) < _FEWEST_OPTIONS:
            continue
        ends = [*(match.start() for match in run[1:]), len(statement)]
        texts = [statement[match.end() : end] for match, end in zip(run, ends, strict=True)]
        options = {match["letter"].upper(): _cleaned(text) for match, text in zip(run, texts, strict=True)}
        question = statement[: run[0].start()].rstrip()
        if question.count("$") % 2:
            question = question.rstrip("$").rstrip()
        if question and all(options.values()):
            return question, options
    return None


def _cleaned(option: str) -> str:
    """An option without what sets it off from the next one."""
    option = option.partition("\n\n")[0]
    text = _SPACING.sub(" ", option).strip().removesuffix("and").removesuffix("or").strip().rstrip(",;.").strip()
    return text.removeprefix("{").strip() if text.count("{") > text.count("}") else text
