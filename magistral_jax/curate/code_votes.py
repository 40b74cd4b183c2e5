"""What known solutions say about tests; in: their outputs, out: which tests stay, with which expected outputs.

Neither the solutions nor the expected outputs are taken for right: each is believed where enough of the others agree.

Source: Magistral (arXiv:2506.10910), section 4.2.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

Outputs = Sequence[Sequence[str | None]]
"""Of each solution, its output on each test; None where it failed."""

_TRUSTED_SHARE = 0.5
"""Share of the tests on which a solution has to agree with the expected output or with most of the others."""
_SPLIT_SHARE = 0.5
"""Share of the tests without a majority from which a problem is taken to have several answers."""
_FEWEST_VOTES = 2
"""Solutions that it takes to overrule an expected output, or to make a new one."""

_SEVERAL_ANSWERS = re.compile(
    r"\b(?:print|output|return|find|report|choose)\s+any\s+(?:one\s+)?(?:of\s+)?(?:them|these|valid|such|correct|possible)\b"
    r"|\bany of (?:them|these|the (?:valid|correct|possible|optimal))\b.{0,30}\b(?:accept|ok|fine)"
    r"|\b(?:multiple|several|many|more than one) (?:possible |valid |correct |optimal )?(?:answers?|solutions?)\b"
    r"|\b(?:answer|them|order|output) in any order\b",
    re.IGNORECASE,
)
"""A statement that says that more than one answer is right."""


@dataclasses.dataclass(frozen=True)
class Votes:
    """The decision on a problem's tests."""

    trusted: tuple[int, ...]
    """Solutions that are believed."""
    expected: tuple[str | None, ...]
    """Of each test, its output from now on; None where it is dropped."""
    num_repaired: int
    is_split: bool
    """Whether the solutions disagree as on a problem with several right answers."""


def vote(outputs: Outputs, expected: Sequence[str], agree: Callable[[str, str], bool]) -> Votes:
    """Decide on the tests of a problem.

    A test stays where most trusted solutions agree with its output. Where they agree with each other and not with it,
    two or more of them overrule it. It is dropped where there is no majority, and where the only solution is against
    it: then nobody knows which of the two is wrong.

    Args:
      outputs: Of each solution, on each test.
      expected: Outputs that came with the tests.
      agree: Whether two outputs are one answer.
    """
    everyone = range(len(outputs))
    tops = [_largest(_column(outputs, everyone, test), agree) for test in range(len(expected))]
    trusted = tuple(
        solution
        for solution in everyone
        if max(
            sum(_is(output, want, agree) for output, want in zip(outputs[solution], expected, strict=True)),
            sum(
                size >= _FEWEST_VOTES and _is(output, top, agree)
                for output, (top, size) in zip(outputs[solution], tops, strict=True)
            ),
        )
        >= _TRUSTED_SHARE * len(expected)
    )
    decided: list[str | None] = []
    num_repaired = num_split = 0
    for test, want in enumerate(expected):
        top, size = _largest(_column(outputs, trusted, test), agree)
        if top is None or 2 * size <= len(trusted):
            decided.append(None)
            num_split += 1
        elif agree(top, want):
            decided.append(want)
        elif size >= _FEWEST_VOTES:
            decided.append(top)
            num_repaired += 1
        else:
            decided.append(None)
    is_split = len(outputs) > _FEWEST_VOTES <= len(trusted) and num_split > _SPLIT_SHARE * len(expected)
    return Votes(trusted, tuple(decided), num_repaired, is_split)


def unanimous(outputs: Sequence[str | None], agree: Callable[[str, str], bool]) -> str | None:
    """The output of a new test: two or more trusted solutions, all of one opinion, none failed; else None."""
    first = outputs[0] if len(outputs) >= _FEWEST_VOTES else None
    if first is None or not all(_is(output, first, agree) for output in outputs):
        return None
    return first


def says_several_answers(statement: str) -> bool:
    """Whether a statement says that more than one answer is right."""
    return _SEVERAL_ANSWERS.search(" ".join(statement.split())) is not None


def _column(outputs: Outputs, solutions: Sequence[int], test: int) -> list[str | None]:
    return [outputs[solution][test] for solution in solutions]


def _is(output: str | None, other: str | None, agree: Callable[[str, str], bool]) -> bool:
    return output is not None and other is not None and agree(output, other)


def _largest(outputs: Sequence[str | None], agree: Callable[[str, str], bool]) -> tuple[str | None, int]:
    """The most frequent answer and how many gave it."""
    groups: list[tuple[str, int]] = []
    for output in outputs:
        if output is None:
            continue
        for place, (answer, size) in enumerate(groups):
            if agree(output, answer):
                groups[place] = (answer, size + 1)
                break
        else:
            groups.append((output, 1))
    return max(groups, key=lambda group: group[1], default=(None, 0))
