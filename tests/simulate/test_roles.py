from hypothesis import given
from hypothesis import strategies as st

from magistral_jax.simulate.roles import LeastLoaded, Trainer, Verifiers


def test_completions_wait_for_a_free_worker():
    verifiers = Verifiers(2)
    assert [verifiers.grade(now, 4.0) for now in (0.0, 1.0, 2.0, 20.0)] == [4.0, 5.0, 8.0, 24.0]
    assert (verifiers.busy_seconds, verifiers.queue_seconds) == (16.0, 2.0)


def test_a_trainer_that_is_slowed_down_for_a_while():
    trainer = Trainer()
    trainer.begin(10.0, 4.0)
    assert trainer.end() == 14.0
    trainer.advance(11.0)
    trainer.slowdown = 2.0
    assert trainer.end() == 17.0
    trainer.advance(13.0)  # one second's worth in two
    trainer.slowdown = 1.0
    assert trainer.end() == 15.0
    trainer.advance(15.0)
    assert not trainer.is_busy
    assert trainer.busy_seconds == 5.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 6)), max_size=60))
def test_the_least_loaded_is_one_of_those_with_the_least(changes: list[tuple[int, int]]):
    tracked = LeastLoaded()
    known: dict[int, int] = {}
    for member, load in changes:
        if load < 0:
            tracked.remove(member)
            known.pop(member, None)
        else:
            tracked.set(member, load)
            known[member] = load
        least = tracked.least()
        assert (least is None) == (not known)
        assert least is None or known[least] == min(known.values())
