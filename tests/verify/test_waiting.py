import itertools
import random
from collections.abc import Iterator

import pytest

from magistral_jax.records import Problem
from magistral_jax.verify.item import Task, VerifyItem
from magistral_jax.verify.ledger import Job
from magistral_jax.verify.waiting import AGE_TURN, WaitingLine

serials = itertools.count(1)


def job(group: int = -1, group_size: int = 0) -> Job:
    item = VerifyItem(0, Problem("p", "s", "a"), "", 1, 1, False, group=group, group_size=group_size)
    return Job(Task(item), "math", 1.0, print, None, serial=next(serials))


def line_of(*jobs: Job) -> WaitingLine:
    line = WaitingLine()
    for one in jobs:
        line.add(one)
    return line


def test_nobody_waits():
    line = WaitingLine()
    assert len(line) == 0
    assert line.take() is None


def test_without_groups_first_come_is_first_served():
    jobs = [job() for _ in range(20)]
    line = line_of(*jobs)
    assert len(line) == 20
    assert [line.take() for _ in jobs] == jobs


def test_the_group_that_is_nearest_to_its_end_goes_first():
    fresh, begun, nearly = [job(1, 4) for _ in range(2)], [job(2, 4) for _ in range(2)], [job(3, 4)]
    line = line_of(*fresh, *begun, *nearly)
    for group, num_graded in ((2, 1), (3, 3)):
        for _ in range(num_graded):
            line.graded(job(group, 4))
    assert [line.take() for _ in range(5)] == [*nearly, *begun, *fresh]


def test_a_grading_changes_the_order_of_those_that_wait():
    first, second = job(1, 3), job(2, 3)
    line = line_of(first, second)
    line.graded(job(2, 3))
    assert line.take() is second
    line.graded(job(2, 3))
    assert line.take() is first


def test_a_job_of_no_group_completes_by_itself():
    grouped, alone = job(1, 2), job()
    line = line_of(grouped, alone)
    assert line.take() is alone
    assert line.take() is grouped


def test_a_job_that_was_taken_before_goes_first():
    lost, other = job(1, 8), job()
    line = line_of(lost)
    assert line.take() is lost
    line.add(other)
    line.add_again(lost)
    assert len(line) == 2
    assert line.take() is lost


def test_a_complete_group_starts_anew():
    """The same group number, used again: nothing is remembered of the first."""
    line = WaitingLine()
    for _ in range(2):
        line.graded(job(1, 2))
    again, begun = job(1, 2), job(2, 3)
    line.add(begun)
    line.add(again)
    line.graded(job(2, 3))
    line.graded(job(2, 3))
    assert line.take() is begun


@pytest.mark.parametrize("num_before", [0, 5])
def test_nobody_is_overtaken_for_ever(num_before: int):
    """A group of which much is missing, against a stream of jobs that complete at once."""
    line = line_of(*[job(7, 1000) for _ in range(num_before)])
    patient = job(8, 1000)
    line.add(patient)

    def overtakers() -> Iterator[Job | None]:
        while True:
            line.add(job())
            yield line.take()

    assert patient in itertools.islice(overtakers(), AGE_TURN * (num_before + 1))


def test_every_job_comes_once_whatever_the_order():
    rng = random.Random(0)
    line = WaitingLine()
    expected, taken, again = set[Job](), list[Job](), 0
    for _ in range(3000):
        action = rng.random()
        if action < 0.5:
            new = job(rng.randrange(-1, 20), rng.randrange(0, 5))
            expected.add(new)
            line.add(new)
        elif action < 0.9 and (got := line.take()):
            if rng.random() < 0.1:
                line.add_again(got)
                again += 1
            else:
                taken.append(got)
                line.graded(got)
    while got := line.take():
        taken.append(got)
    assert again > 10
    assert len(taken) == len(set(taken))
    assert set(taken) == expected
