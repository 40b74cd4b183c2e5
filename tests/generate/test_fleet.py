"""The accounts of a fleet, with processes that are played: who gets what, and who takes over."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.fleet import GeneratorFleet
from magistral_jax.generate.handle import GeneratorUsage, Notice, Reports
from magistral_jax.generate.launch import Endpoint
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorDiedError, GeneratorProcess
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.policy.config import ModelConfig
from magistral_jax.publish.shared_memory import SharedWeights
from magistral_jax.records import MagistralError, Rollout, SamplingParams

SETTINGS = EngineSettings(ModelConfig(20, 16, 1, 2, 1, 8, 16), GenerationConfig(), (0,), 0, "float32")
SAMPLING = SamplingParams(1.0, 1.0, 0, 8)


def never() -> Endpoint:
    raise AssertionError("it is played")


class Played(GeneratorProcess):
    """Writes down its orders, and does what the test says."""

    def __init__(self, number: int, weights: SharedWeights, reports: Reports) -> None:
        super().__init__(number, SETTINGS, weights, reports, launch=never)
        self.orders: list[Any] = []
        self.meter = GeneratorUsage()
        self.is_refused = False

    def start(self) -> None:
        if self.is_refused:
            raise OSError("too many processes")
        self.orders.append("start")

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        super().submit(requests)
        self.orders.append([request.request_id for request in requests])

    def send_weights(self) -> None:
        self.orders.append("weights")

    def set_bound(self, is_at_bound: bool) -> None:
        self.orders.append(("bound", is_at_bound))

    def usage(self) -> GeneratorUsage:
        return self.meter

    def ask_to_stop(self) -> None:
        self.orders.append("stop")

    def join(self, deadline: float) -> None:
        self.orders.append("join")

    @property
    def groups(self) -> list[list[int]]:
        """Request ids that it was given."""
        return [order for order in self.orders if isinstance(order, list)]

    def finish(self, request_id: int) -> None:
        _, request = self._unfinished.pop(request_id)
        nothing = np.zeros(0, np.int32)
        self._reports.on_rollout(
            Rollout(request_id, request.prompt_ids, nothing, np.zeros(0, np.float32), nothing, truncated=False)
        )

    def die(self, error: Exception | None = None) -> None:
        self._reports.on_failure(error or GeneratorDiedError(f"Generator {self.number} was killed by SIGKILL"))


SCENES: list["Scene"] = []


@pytest.fixture(autouse=True)
def free_shared_memory() -> Iterator[None]:
    yield
    while SCENES:
        SCENES.pop().weights.close()


class Scene:
    """A fleet and all that it made and reported."""

    def __init__(self, num_generators: int = 2, max_restarts: int = 2) -> None:
        self.made: list[Played] = []
        self.rollouts: list[int] = []
        self.notices: list[Notice] = []
        self.failures: list[Exception] = []
        self.are_refused = False
        self.weights = weights = SharedWeights()
        SCENES.append(self)

        def make(number: int, reports: Reports) -> Played:
            self.made.append(Played(number, weights, reports))
            self.made[-1].is_refused = self.are_refused
            return self.made[-1]

        self.fleet = GeneratorFleet(
            make,
            weights,
            Reports(
                on_rollout=lambda rollout: self.rollouts.append(rollout.request_id),
                on_weights=lambda receipt: None,
                on_failure=self.failures.append,
                on_notice=self.notices.append,
            ),
            num_generators=num_generators,
            max_restarts=max_restarts,
        )
        self.fleet.set_weights({"w": jnp.zeros(3)}, 0)
        self.fleet.start()

    @property
    def now(self) -> list[Played]:
        """The processes that are there now, by number."""
        return [process for process in self.fleet.processes if isinstance(process, Played)]

    def submit(self, first: int, count: int = 2) -> None:
        prompt = np.array([first], np.int32)
        self.fleet.submit([GenerationRequest(first + i, prompt, SAMPLING) for i in range(count)])


def test_weights_come_before_the_start_and_go_to_all():
    scene = Scene(3)
    assert [process.orders for process in scene.made] == 3 * [["weights", "start"]]


def test_a_group_goes_whole_to_the_one_that_has_least_to_do():
    scene = Scene(2)
    for first in (0, 10, 20, 30):
        scene.submit(first)
    assert [process.groups for process in scene.made] == [[[0, 1], [20, 21]], [[10, 11], [30, 31]]]
    scene.made[1].finish(11)
    scene.submit(40, 4)
    assert scene.made[1].groups[-1] == [40, 41, 42, 43]
    scene.submit(50)
    assert scene.made[0].groups[-1] == [50, 51]


def test_what_a_dead_one_had_not_finished_is_begun_again_elsewhere():
    scene = Scene(2)
    for first in (0, 10, 20):
        scene.submit(first, 3)
    dead = scene.made[0]  # has groups 0 and 20
    dead.finish(1)
    dead.die()
    replacement = scene.now[0]
    assert scene.made == [dead, scene.made[1], replacement]
    assert replacement.number == 0
    # Whole groups as far as they are left, the weights before anything else.
    assert replacement.orders[:3] == ["weights", ("bound", False), "start"]
    assert replacement.groups == [[0, 2], [20, 21, 22]]  # the other has three to do already
    for process in scene.now:
        for group in list(process.groups):
            for request_id in group:
                process.finish(request_id)
    assert sorted(scene.rollouts) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert scene.failures == []


def test_a_loss_is_told_and_counted():
    scene = Scene(2)
    scene.submit(0, 3)
    scene.made[0].finish(1)
    scene.made[0].die()
    assert scene.notices == [
        Notice(
            "generator_lost",
            0,
            "Generator 0 was killed by SIGKILL. Its 2 unfinished completions are begun again, and it is replaced "
            "(1 of at most 2 times, generation.max_restarts).",
        )
    ]
    assert scene.fleet.usage().num_lost == 1


def test_replacements_are_bounded_and_the_last_death_is_the_failure():
    scene = Scene(1, max_restarts=2)
    scene.submit(0)
    for _ in range(3):
        assert scene.failures == []
        scene.now[0].die()
    assert [str(error) for error in scene.failures] == ["Generator 0 was killed by SIGKILL"]
    assert len(scene.made) == 3
    assert len(scene.notices) == 2
    scene.now[0].die()
    assert len(scene.failures) == 1


def test_one_that_others_would_repeat_is_a_failure_at_once():
    scene = Scene(2)
    mistake = MagistralError("Prompt of request 1 has 13 tokens")
    scene.made[0].die(mistake)
    assert scene.failures == [mistake]
    assert len(scene.made) == 2
    assert scene.notices == []


def test_a_replacement_that_cannot_be_started_is_a_failure():
    scene = Scene(2)
    scene.are_refused = True
    scene.made[0].die()
    assert [str(error) for error in scene.failures] == ["too many processes"]


def test_the_meter_is_that_of_the_mean_generator_and_forgets_nobody():
    scene = Scene(2)
    scene.made[0].meter = GeneratorUsage(busy=3.0, idle=1.0, idle_at_bound=0.5, num_tokens=10)
    scene.made[1].meter = GeneratorUsage(busy=1.0, idle=3.0, idle_at_bound=1.5, num_tokens=7)
    expected = GeneratorUsage(busy=2.0, idle=2.0, idle_at_bound=1.0, num_tokens=17)
    assert scene.fleet.usage() == expected
    scene.made[0].die()
    assert scene.fleet.usage() == dataclasses.replace(expected, num_lost=1)
    scene.now[0].meter = GeneratorUsage(busy=2.0, num_tokens=1)
    assert scene.fleet.usage() == GeneratorUsage(busy=3.0, idle=2.0, idle_at_bound=1.0, num_tokens=18, num_lost=1)


def test_the_bound_is_sent_when_it_changes_and_to_a_replacement():
    scene = Scene(2)
    for value in (False, True, True, False, True):
        scene.fleet.is_at_bound = value
    assert scene.fleet.is_at_bound
    bounds = [order for order in scene.made[1].orders if isinstance(order, tuple)]
    assert bounds == [("bound", True), ("bound", False), ("bound", True)]
    scene.made[1].die()
    assert ("bound", True) in scene.now[1].orders


def test_stopping_asks_all_before_it_waits_and_a_later_death_is_nothing():
    scene = Scene(2)
    scene.submit(0)
    order: list[str] = []
    for process in scene.made:
        process.ask_to_stop = lambda: order.append("ask")
        process.join = lambda deadline: order.append("join")
    scene.fleet.stop(5.0)
    assert order == ["ask", "ask", "join", "join"]
    scene.made[0].die()
    assert scene.failures == scene.notices == []
    assert len(scene.made) == 2
