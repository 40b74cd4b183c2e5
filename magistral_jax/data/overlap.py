"""Problems that are too like others: duplicates within a set, and training problems that occur in an evaluation.

In: Problems; out: those that stay, and a `Removal` for each that does not. Texts are compared after Unicode
normalisation, without case, white space collapsed; first as a whole, then by their word n-grams.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence

from magistral_jax.records import Problem

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[-+*/^=<>!]")
_NUMBER = re.compile(r"\d+")
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)  # Asymptote's preludes are alike in all problems
_GRAM = 8  # words, of decontamination
_FEWEST_GRAMS = 8  # in common, unless the evaluation problem has fewer: a few are a turn of phrase
_SHINGLE = 4  # words, of near duplicates
_PERMUTATIONS = 128


@dataclasses.dataclass(frozen=True)
class Removal:
    """A problem that was taken out."""

    id: str
    reason: str
    """One word or two, for counting."""
    detail: str = ""
    """What it is like, or what is wrong with it."""


def decontaminated(
    train: Sequence[Problem], evaluation: Sequence[Problem], *, min_share: float
) -> tuple[list[Problem], list[Removal]]:
    """Training problems that are like no evaluation problem.

    Args:
      train: To be looked through.
      evaluation: What must not be among them.
      min_share: Share of the 8-word sequences of an evaluation problem from which a training problem that has them is
        taken for a copy; 0 compares whole statements only.

    Returns:
      Those that stay, in order, and the others with the ids of what they are like.
    """
    exact = {normalized(problem.statement): problem.id for problem in reversed(evaluation)}
    grams = [_grams(problem.statement, _GRAM) for problem in evaluation] if min_share else []
    owners = collections.defaultdict[tuple[str, ...], list[int]](list)
    for index, own in enumerate(grams):
        for gram in own:
            owners[gram].append(index)

    kept: list[Problem] = []
    removed: list[Removal] = []
    for problem in train:
        if (other := exact.get(normalized(problem.statement))) is not None:
            removed.append(Removal(problem.id, "in evaluation", f"same statement as {other}"))
            continue
        shared = collections.Counter(i for gram in _grams(problem.statement, _GRAM) for i in owners.get(gram, ()))
        copied = [
            (count / len(grams[i]), evaluation[i].id)
            for i, count in shared.items()
            if count >= max(min_share * len(grams[i]), min(_FEWEST_GRAMS, len(grams[i])))
        ]
        if copied:
            share, other = max(copied)
            removed.append(Removal(problem.id, "overlaps evaluation", f"{share:.0%} of {other}"))
        else:
            kept.append(problem)
    return kept, removed


def deduplicated(problems: Sequence[Problem], *, min_similarity: float) -> tuple[list[Problem], list[Removal]]:
    """The first of each set of problems that are alike.

    Near duplicates are found by MinHash and then measured exactly. Problems with other numbers in them are never near
    duplicates: most templates differ in nothing else.

    Args:
      problems: In the order in which the first one is to stay.
      min_similarity: Jaccard similarity of the sets of 4-word sequences from which two are near duplicates; 0 or 1
        removes equal statements only.

    Returns:
      Those that stay, in order, and the others with the ids of those that they repeat.
    """
    kept: list[Problem] = []
    removed: list[Removal] = []
    first: dict[str, str] = {}
    for problem in problems:
        text = normalized(problem.statement)
        if text in first:
            removed.append(Removal(problem.id, "duplicate", f"same statement as {first[text]}"))
        else:
            first[text] = problem.id
            kept.append(problem)
    if not 0 < min_similarity < 1:
        return kept, removed
    near = _near_duplicates(kept, min_similarity)
    removed += [Removal(problem_id, "near duplicate", detail) for problem_id, detail in near.items()]
    return [problem for problem in kept if problem.id not in near], removed


def _near_duplicates(problems: Sequence[Problem], min_similarity: float) -> dict[str, str]:
    """Ids of what repeats an earlier problem, each with what it repeats."""
    import datasketch

    index = datasketch.MinHashLSH(threshold=min_similarity, num_perm=_PERMUTATIONS)
    shingles: dict[int, frozenset[tuple[str, ...]]] = {}
    found: dict[str, str] = {}
    for place, problem in enumerate(problems):
        own = _grams(problem.statement, _SHINGLE)
        if not own:
            continue
        sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch([" ".join(gram).encode("utf-8", "surrogatepass") for gram in own])
        for other in sorted(int(str(key)) for key in index.query(sketch)):
            similarity = len(own & shingles[other]) / len(own | shingles[other])
            if similarity >= min_similarity and _numbers(problem) == _numbers(problems[other]):
                found[problem.id] = f"{similarity:.0%} like {problems[other].id}"
                break
        else:
            index.insert(place, sketch, check_duplication=False)
            shingles[place] = own
    return found


def normalized(statement: str) -> str:
    """A statement for comparison as a whole."""
    return " ".join(unicodedata.normalize("NFKC", statement).casefold().split())


def _grams(statement: str, size: int) -> frozenset[tuple[str, ...]]:
    words: list[str] = _WORD.findall(normalized(_DRAWING.sub(" ", statement)))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _numbers(problem: Problem) -> list[str]:
    return sorted(_NUMBER.findall(unicodedata.normalize("NFKC", problem.statement)))


def counted(removals: Iterable[Removal]) -> dict[str, int]:
    """How many were removed for each reason, the most frequent first."""
    return dict(collections.Counter(removal.reason for removal in removals).most_common())
