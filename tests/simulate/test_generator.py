"""A simulated generator against sums by hand and against a loop that moves every sequence in small steps."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.simulate.generator import Arrival, Generator, Request, Sample


def generator(
    num_slots: int = 2,
    *,
    seconds: tuple[float, float] = (1.0, 0.5),
    prefill: float = 0.0,
    swap: float = 0.0,
    on_publish: str = "in_place",
    arrivals: list[Arrival] | None = None,
) -> Generator:
    base, more = seconds
    return Generator(
        [base + more * n for n in range(num_slots + 1)],
        num_slots,
        prefill_seconds=prefill,
        swap_seconds=swap,
        on_publish=on_publish,  # pyright: ignore[reportArgumentType]
        arrivals=arrivals if arrivals is not None else [],
    )


def run(engine: Generator) -> list[tuple[float, Sample]]:
    """Everything that ends, and when."""
    ended = []
    while engine.is_busy:
        now = engine.next_end()
        ended += [(now, sample) for sample in engine.finish(now)]
    return ended


def times(engine: Generator) -> dict[int, float]:
    return {sample.request_id: now for now, sample in run(engine)}


def test_sequences_share_the_steps():
    # A step with two takes 2 s, with one 1.5 s. The short one ends after 4 steps at 8 s; the third takes its slot, and
    # both have 6 and 2 steps to go: 12 s for the third, then 4 steps alone.
    engine = generator()
    engine.submit(0.0, [Request(0, 10, 0.0), Request(1, 4, 0.0), Request(2, 2, 0.0)])
    assert engine.num_unfinished == 3
    assert times(engine) == {1: 8.0, 2: 12.0, 0: 18.0}
    assert engine.num_tokens == 16
    assert (engine.busy_seconds, engine.slot_seconds) == (18.0, 30.0)


def test_prompts_are_read_once_a_group_and_nobody_decodes_meanwhile():
    engine = generator(prefill=0.1)
    engine.submit(0.0, [Request(0, 1, 10.0), Request(1, 1, 10.0, reads_prompt=False)])
    assert times(engine) == {0: 3.0, 1: 3.0}  # one second of reading, one step of two
    assert engine.pause_seconds == 1.0


def test_a_swap_pauses_and_is_counted_in_tokens():
    arrivals = [Arrival(3.0, 1), Arrival(5.5, 2)]
    engine = generator(swap=1.0, arrivals=arrivals)
    engine.submit(0.0, [Request(0, 4, 0.0)])
    # Steps of 1.5 s: 2 before the first swap, a pause until 4, 1 until 5.5, a pause until 6.5, the last until 8.
    ((now, sample),) = run(engine)
    assert now == 8.0
    assert sample.first_version == 0
    assert sample.mean_version == pytest.approx((0 + 0 + 1 + 2) / 4)
    assert sample.tokens_after_swap == pytest.approx(2)


def test_recompute_reads_what_runs_again():
    engine = generator(prefill=0.1, on_publish="recompute", arrivals=[Arrival(3.0, 1)])
    engine.submit(0.0, [Request(0, 4, 10.0)])
    # Reading until 1, then steps of 1.5 s: 4/3 of them by 3, when 10 + 4/3 tokens are read again.
    ((now, sample),) = run(engine)
    assert now == pytest.approx(1.0 + 6.0 + (10 + 4 / 3) * 0.1)
    assert sample.tokens_after_swap == pytest.approx(4 - 4 / 3)


def test_drain_admits_nobody_until_the_running_have_ended():
    engine = generator(on_publish="drain", arrivals=[Arrival(1.0, 1)])
    engine.submit(0.0, [Request(0, 3, 0.0), Request(1, 1, 0.0), Request(2, 1, 0.0)])
    ended = {sample.request_id: (now, sample) for now, sample in run(engine)}
    assert [ended[i][0] for i in (1, 0, 2)] == [2.0, 5.0, 6.5]  # slot 1 is empty from 2 to 5
    assert [ended[i][1].first_version for i in (1, 0, 2)] == [0, 0, 1]
    assert ended[0][1].mean_version == 0


def test_weights_that_came_while_nothing_ran_are_there_for_the_next():
    engine = generator(on_publish="drain", arrivals=[Arrival(1.0, 1), Arrival(2.0, 2)])
    engine.submit(7.0, [Request(0, 1, 0.0)])
    ((now, sample),) = run(engine)
    assert (now, sample.first_version) == (8.5, 2)
    assert engine.busy_seconds == 1.5


def test_a_death_gives_back_what_was_unfinished_oldest_first():
    engine = generator()
    engine.submit(0.0, [Request(i, 9, 0.0) for i in range(4)])
    assert [request.id for request in engine.fail(2.0)] == [0, 1, 2, 3]
    assert engine.next_end() == math.inf
    engine.submit(5.0, [Request(9, 2, 0.0)])
    assert times(engine) == {9: 8.0}


def test_a_slower_device_is_slower_from_that_moment_on():
    engine = generator()
    engine.submit(0.0, [Request(0, 4, 0.0)])
    engine.advance(3.0)
    engine.slowdown = 2.0
    assert engine.next_end() == 9.0


def small_steps(requests: list[Request], num_slots: int, base: float, more: float) -> dict[int, float]:
    """The same by moving every running sequence from one end to the next."""
    waiting, running, now, ended = list(requests), {}, 0.0, {}
    while waiting or running:
        while waiting and len(running) < num_slots:
            request = waiting.pop(0)
            running[request.id] = float(request.length)
        left = min(running.values())
        now += left * (base + more * len(running))
        running = {i: rest - left for i, rest in running.items()}
        for i in [i for i, rest in running.items() if rest < 1e-9]:
            ended[i] = now
            del running[i]
    return ended


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    num_slots=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_it_equals_a_loop_over_all_sequences(lengths: list[int], num_slots: int, seed: int):
    base, more = random.Random(seed).random() + 0.01, random.Random(seed + 1).random()
    requests = [Request(i, length, 0.0) for i, length in enumerate(lengths)]
    engine = generator(num_slots, seconds=(base, more))
    engine.submit(0.0, requests)
    expected = small_steps(requests, num_slots, base, more)
    found = times(engine)
    assert found.keys() == expected.keys()
    for i, time in expected.items():
        assert found[i] == pytest.approx(time)
