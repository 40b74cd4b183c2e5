"""Pages of sequences: over random schedules none is lost, none has two owners unless it is shared, one alone fits."""

import collections

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.generate.sequences import GenerationRequest, Sequence, SequencePages
from magistral_jax.records import SamplingParams

SIZE, STEPS, LONGEST = 4, 3, 20
SMALLEST_POOL = LONGEST // SIZE + 1


def make_sequence(prompt_seed: int, length: int, num_new: int) -> Sequence:
    prompt = np.random.default_rng(prompt_seed).integers(0, 9, length).astype(np.int32)
    return Sequence(GenerationRequest(0, prompt, SamplingParams(1.0, 1.0, 0, num_new)))


def check_owners(pages: SequencePages, sequences: list[Sequence]):
    """Every page is owned by exactly those whose lists hold it; shared ones are full pages of a common prompt."""
    allocator = pages.allocator
    holders: dict[int, list[Sequence]] = collections.defaultdict(list)
    for sequence in sequences:
        assert len(set(sequence.pages)) == len(sequence.pages)
        for page in sequence.pages:
            holders[page].append(sequence)
    for page in range(allocator.num_pages):
        kept = allocator.num_owners(page) - len(holders[page])
        assert kept in (0, 1)  # a prefix that is not dropped yet holds it too
        if len(holders[page]) > 1:
            texts = {s.all_tokens()[: SIZE * (s.pages.index(page) + 1)].tobytes() for s in holders[page]}
            assert len(texts) == 1
    assert allocator.num_free == sum(allocator.num_owners(page) == 0 for page in range(allocator.num_pages))


@settings(max_examples=500, deadline=None)
@given(
    num_pages=st.integers(SMALLEST_POOL, 3 * SMALLEST_POOL),
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=8),
    choices=st.lists(st.integers(0, 99), min_size=1, max_size=60),
)
def test_random_schedules_keep_the_books(num_pages: int, arrivals: list[tuple[int, int, int]], choices: list[int]):
    pages = SequencePages(num_pages, SIZE, STEPS)
    waiting = [make_sequence(*arrival) for arrival in arrivals]
    inside: list[Sequence] = []
    for choice in choices:
        action, which = choice % 5, choice // 5
        if action == 0 and waiting and pages.open(waiting[0], num_reserved=len(inside)):
            inside.append(waiting.pop(0))
        elif action == 1:
            for prefix in pages.unread_prefixes()[:2]:
                prefix.num_written = min(prefix.num_written + 3, len(prefix.tokens))
        elif inside and action == 2:
            sequence = inside[which % len(inside)]
            if sequence.prefix is not None and sequence.prefix.is_complete:
                pages.start(sequence)
            if sequence.is_started and pages.extend(sequence):
                held, reached = len(sequence.pages) * SIZE, sequence.num_cached_after(STEPS)
                assert held >= reached  # what the next block writes has a place
                room = sequence.request.sampling.max_new_tokens - len(sequence.tokens)
                sequence.tokens += [7] * min(STEPS, room)
        elif inside and action == 3:
            sequence = inside.pop(which % len(inside))
            pages.close(sequence)
            if len(sequence.tokens) < sequence.request.sampling.max_new_tokens:
                waiting.insert(0, sequence)
        else:
            pages.drop_prefixes(keep_for=waiting[0] if waiting else None)
        check_owners(pages, inside)
    for sequence in inside:
        pages.close(sequence)
    pages.drop_prefixes()
    assert pages.allocator.num_free == num_pages
    # Whatever happened before, one alone can be served to its end.
    last = make_sequence(5, 12, 8)
    assert pages.open(last, num_reserved=0)
    assert last.prefix is not None
    last.prefix.num_written = len(last.prefix.tokens)
    pages.start(last)
    while len(last.tokens) < 8:
        pages.drop_prefixes()
        assert pages.extend(last)
        last.tokens += [7] * min(STEPS, 8 - len(last.tokens))
