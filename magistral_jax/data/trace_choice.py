"""Which completions of a teacher become traces; in: Candidates, out: those that are chosen, in a fixed order.

A model that is trained on traces takes on their lengths and languages as well. So as many as wanted are taken in turn
from cells of one language and one length (a factor of two in tokens), and in each cell from as many problems as there
are.

Source: Magistral (arXiv:2506.10910), section 5.3, supervised fine-tuning on the traces of a larger model.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

from magistral_jax.records import Problem


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A completion that was found right, in the right format and of one language."""

    problem: Problem
    completion: str
    num_tokens: int
    language: str
    """ISO 639 code of the problem; empty where it has too few words."""


def choose_traces(candidates: Sequence[Candidate], *, max_per_problem: int, num: int) -> list[Candidate]:
    """Choose traces.

    Args:
      candidates: In a fixed order.
      max_per_problem: Most traces of one problem; completions of equal text count once.
      num: How many are wanted in all, balanced over languages and lengths; 0 takes all that are left.

    Returns:
      Chosen ones in the order of `candidates`.
    """
    allowed = _limited(_distinct(candidates), max_per_problem)
    if not 0 < num < len(allowed):
        return allowed
    cells: dict[tuple[str, int], list[Candidate]] = collections.defaultdict(list)
    for candidate in allowed:
        cells[candidate.language, length_class(candidate.num_tokens)].append(candidate)
    queues = [collections.deque(_one_problem_after_another(cell)) for _, cell in sorted(cells.items())]
    chosen: set[int] = set()
    while len(chosen) < num:
        for queue in queues:
            if queue and len(chosen) < num:
                chosen.add(id(queue.popleft()))
    return [candidate for candidate in allowed if id(candidate) in chosen]


def length_class(num_tokens: int) -> int:
    """Logarithm of a length, rounded down: 4 for 16 to 31 tokens."""
    return int(math.log2(max(num_tokens, 1)))


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of equal completions of a problem, white space aside."""
    first: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        first.setdefault((candidate.problem.id, " ".join(candidate.completion.split())), candidate)
    return list(first.values())


def _limited(candidates: Sequence[Candidate], max_per_problem: int) -> list[Candidate]:
    """At most so many of each problem, spread over its lengths from the shortest to the longest."""
    groups: dict[str, list[Candidate]] = collections.defaultdict(list)
    for candidate in candidates:
        groups[candidate.problem.id].append(candidate)
    chosen: set[int] = set()
    for group in groups.values():
        by_length = sorted(group, key=lambda candidate: candidate.num_tokens)
        chosen.update(id(by_length[place]) for place in _spread(len(by_length), max_per_problem))
    return [candidate for candidate in candidates if id(candidate) in chosen]


def _spread(size: int, num: int) -> list[int]:
    """`num` places of `size`, evenly apart; the middle one where it is one."""
    if num >= size:
        return list(range(size))
    return [(2 * place + 1) * size // (2 * num) for place in range(num)]


def _one_problem_after_another(cell: Sequence[Candidate]) -> list[Candidate]:
    """The first trace of each problem, then the second ones, and so on."""
    seen = collections.Counter[str]()
    turns: list[tuple[int, int]] = []
    for place, candidate in enumerate(cell):
        turns.append((seen[candidate.problem.id], place))
        seen[candidate.problem.id] += 1
    return [cell[place] for _, place in sorted(turns)]
