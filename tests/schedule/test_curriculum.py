"""A curriculum between the actions of a machine and the groups that end: who is in the pool, and what begins when."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from magistral_jax.data.config import CurriculumConfig
from magistral_jax.data.curriculum import Stage
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.pool import PromptPools, from_text
from magistral_jax.records import Graded, Problem, Prompt, Reward, Rollout, SamplingParams, Verdict
from magistral_jax.schedule.curriculum import Curriculum, Ended, is_over
from magistral_jax.schedule.holdings import Group
from magistral_jax.schedule.machine import Action, Discard, OpenPool, PoolDrawn, StageBegan, Train, Verify

STAGE = Stage("easy", max_length=8, length_cache=2, batch_size=4, minibatch_size=4, num_async=8)
HARD = dataclasses.replace(STAGE, name="hard", max_length=16, length_cache=4, difficulty=(0.0, 0.5))
NUM = 12


class Course:
    """A curriculum, the machine's part played by hand, and groups whose rewards are given."""

    def __init__(self, *stages: Stage, rates: Sequence[float | None] = (None,) * NUM, **settings: Any) -> None:
        ids = np.zeros(1, np.int32)
        self.prompts = [
            Prompt(Problem(f"p{i}", "s", "a", extra={"pass_rate": rate}), ids, "s") for i, rate in enumerate(rates)
        ]
        pools = PromptPools(PromptLoader(self.prompts, 0), [[(1.0, 0)]] * len(stages), 0)
        self.said: list[str] = []
        self.make = lambda **more: Curriculum(
            stages, pools, CurriculumConfig(**settings), SamplingParams(1.0, 1.0, 0, 99), self.said.append, **more
        )
        self.curriculum = self.make()
        self.held: dict[int, list[Graded]] = {}
        self.next_group = self.step = 0

    def problem(self, group_id: int) -> str:
        return self.curriculum.assign(group_id).prompt.problem.id

    def group(self, num_right: int, *, length: int = 5) -> int:
        """A group of four that has been graded."""
        group_id, self.next_group = self.next_group, self.next_group + 1
        ids = np.zeros(length, np.int32)
        self.held[group_id] = [
            Graded(
                Rollout(4 * group_id + i, ids, ids, ids.astype(np.float32), ids, truncated=False),
                Reward(Verdict.CORRECT if i < num_right else Verdict.WRONG, 0.1, 0.0, 0.0, 0.0, "", 0.0),
            )
            for i in range(4)
        ]
        return group_id

    def look(self, group_id: int) -> Group:
        return self.curriculum.assign(group_id).prompt, self.held[group_id]

    def follow(self, action: Action) -> StageBegan | PoolDrawn | None:
        return self.curriculum.follow(action, self.look)

    def train(self, *nums_right: int, length: int = 5) -> StageBegan | PoolDrawn | None:
        groups = tuple(self.group(num, length=length) for num in nums_right)
        self.step += 1
        return self.follow(Train(self.step - 1, groups))

    def open(self, event: StageBegan | PoolDrawn | None) -> None:
        """The machine's answer to an event, with the batch still in the trainer."""
        assert event is not None
        stage = event.stage if isinstance(event, StageBegan) else self.curriculum.stage
        assert self.follow(OpenPool(self.next_group, self.step, stage, event.pool)) is None

    def pool(self, event: StageBegan | PoolDrawn | None) -> set[str]:
        assert event is not None
        return {f"p{place}" for place in np.flatnonzero(from_text(event.pool, len(self.prompts)))}


def test_a_stage_ends_with_its_last_batch_and_the_next_groups_have_the_new_limits():
    course = Course(dataclasses.replace(STAGE, num_steps=2), HARD)
    assert course.train(2) is None
    began = course.train(2)
    assert isinstance(began, StageBegan)
    course.open(began)
    before, after = course.curriculum.assign(1), course.curriculum.assign(2)
    assert (before.sampling.max_new_tokens, before.length_cache) == (8, 2)
    assert (after.sampling.max_new_tokens, after.length_cache) == (16, 4)
    assert (after.sampling.temperature, after.sampling.top_p) == (1.0, 1.0)
    assert "stage 2 of 2, `hard`" in course.said[-1]
    assert [course.train(2) for _ in range(4)] == [None] * 4  # the last stage has no end


def test_solved_problems_leave_and_harder_ones_enter():
    rates = [1.0, 0.9, 0.3, 0.1, 0.0, None]
    narrow = dataclasses.replace(STAGE, difficulty=(0.2, 0.9), num_steps=3)
    course = Course(narrow, dataclasses.replace(HARD, difficulty=(0.05, 0.5)), rates=rates, refresh_steps=2)
    assert course.curriculum.metrics()["pool_size"] == 3  # p1, p2, p5
    assert course.curriculum.metrics()["pool_pass_rate"] == pytest.approx(0.6)
    by_problem = {course.problem(group_id): group_id for group_id in range(3)}
    assert set(by_problem) == {"p1", "p2", "p5"}
    # Filtered groups count as well: all of p1's completions are right, and half of its rate is the newest group's.
    course.next_group = by_problem["p1"]
    course.follow(Discard(course.group(4), "zero_variance"))
    course.next_group = by_problem["p5"]
    assert course.train(4) is None
    course.next_group = by_problem["p2"]
    drawn = course.train(3)
    assert isinstance(drawn, PoolDrawn)
    assert course.pool(drawn) == {"p2"}  # p1 at 0.95 and p5 at 1 are solved; p2 is at 0.525
    course.next_group = 3
    course.open(drawn)
    assert {course.problem(group_id) for group_id in range(3, 9)} == {"p2"}
    assert course.pool(course.train(2)) == {"p3"}  # of the next stage; p2 is at 0.5125


def test_a_pool_that_stays_the_same_is_no_event():
    course = Course(STAGE, refresh_steps=1)
    assert [course.train(4), course.train(0)] == [None, None]


def test_a_verifiers_failure_says_nothing_about_a_problem():
    course = Course(dataclasses.replace(STAGE, difficulty=(0.1, 0.9)), refresh_steps=1)
    course.follow(Discard(course.group(4), "verifier_failed"))
    course.follow(Verify(0))
    assert course.train(2) is None


def test_an_empty_window_takes_all_and_says_so():
    course = Course(dataclasses.replace(STAGE, difficulty=(0.4, 0.6)), rates=[0.0, 1.0])
    assert course.curriculum.metrics()["pool_size"] == 2
    (said,) = course.said
    assert said.startswith("warning: no problem of stage `easy` has a pass rate from 0.4 to 0.6; all 2 of its sources")


def test_groups_of_the_stage_before_do_not_end_the_next_one():
    solved = dataclasses.replace(STAGE, until_pass_rate=0.9, window=1)
    course = Course(dataclasses.replace(STAGE, num_steps=1), solved, HARD)
    straggler = course.group(4)
    course.open(course.train(2))
    course.step += 1
    assert course.follow(Train(1, (straggler,))) is None
    assert np.isnan(course.curriculum.metrics()["graded_pass_rate"])
    assert isinstance(course.train(4), StageBegan)


@pytest.mark.parametrize(
    ("rule", "pass_rates", "lengths", "expected"),
    [
        ({"num_steps": 3}, [0, 0, 0], [9, 9, 9], True),
        ({"num_steps": 4}, [0, 0, 0], [9, 9, 9], False),
        ({}, [4, 4, 4, 4], [9, 9, 9, 9], False),
        ({"until_pass_rate": 0.75}, [0, 0, 4, 2], [9] * 4, True),
        ({"until_pass_rate": 0.76}, [0, 0, 4, 2], [9] * 4, False),
        ({"until_pass_rate": 0.5}, [4], [9], False),  # a window is two steps
        ({"until_growth": 0.1}, [0] * 4, [10, 10, 10, 11], True),
        ({"until_growth": 0.1}, [0] * 4, [10, 10, 11, 11], False),
        ({"until_growth": 0.1}, [0] * 3, [10, 10, 10], False),
        ({"until_growth": 0.1, "until_pass_rate": 0.5}, [0] * 4, [9] * 4, False),
        ({"until_growth": 0.1, "until_pass_rate": 0.5}, [0, 0, 2, 2], [9] * 4, True),
    ],
)
def test_a_stage_is_over_by_its_rules(rule: dict[str, Any], pass_rates: list[int], lengths: list[int], expected: bool):
    stage = dataclasses.replace(STAGE, window=2, **rule)
    steps = [Ended(4, num, 4 * length) for num, length in zip(pass_rates, lengths, strict=True)]
    assert is_over(stage, len(steps), steps) is expected


def test_a_saved_curriculum_goes_on_with_the_same_pools_prompts_and_ends():
    window = dataclasses.replace(STAGE, difficulty=(0.0, 0.9), until_growth=0.2, window=2)

    def events(course: Course) -> list[Any]:
        found = []
        for nums in ((2, 3), (1, 4), (2, 2), (4, 1), (0, 3)):
            course.follow(Discard(course.group(4), "zero_variance"))
            begun = course.train(*nums)
            found.append(begun)
            if begun is not None:
                course.open(begun)
        return [*found, *(course.problem(group_id) for group_id in range(5, 60))]

    course = Course(window, HARD, refresh_steps=1)
    course.open(course.train(4, 4, 4))
    course.train(4, 2)
    saved = json.loads(json.dumps(course.curriculum.to_saved(oldest_group=4)))
    again = Course(window, HARD, refresh_steps=1)
    again.curriculum.load(saved)
    again.next_group, again.step, again.held = course.next_group, course.step, dict(course.held)
    assert again.curriculum.metrics() == course.curriculum.metrics()
    assert events(again) == events(course)


def test_a_stage_that_is_called_by_hand_begins_whatever_the_rules_say():
    first = dataclasses.replace(STAGE, num_steps=1)
    course = Course(first, dataclasses.replace(first, name="middle"), HARD)
    called = course.curriculum.call("hard")
    assert called is not None
    assert called.stage == 2
    assert course.train(2) is None  # though the first stage would be over
    course.open(called)
    assert course.curriculum.stage == 2
    assert course.curriculum.call("hard") is None
    assert Course(STAGE, HARD, begin="hard").curriculum.stage == 1


def test_a_replay_knows_what_will_be_opened():
    course = Course(dataclasses.replace(STAGE, num_steps=1), HARD)
    began = course.train(2)
    assert isinstance(began, StageBegan)
    opened = OpenPool(6, 1, 1, began.pool)
    ahead = course.make(known=[opened])
    assert ahead.assign(5).length_cache == 2
    assert ahead.assign(6).length_cache == 4
    assert ahead.stage == 0
    problem = ahead.assign(7).prompt.problem.id
    ahead.follow(opened, course.look)
    assert ahead.stage == 1
    assert ahead.assign(7).prompt.problem.id == problem
