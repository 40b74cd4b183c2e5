"""A fleet of generators that join: what waits for whom, who takes over, and one real run over TCP."""

import dataclasses
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.handle import Notice, Reports
from magistral_jax.generate.messages import EngineSettings, requests_of
from magistral_jax.generate.remote import join
from magistral_jax.generate.remote_fleet import RemoteFleet, make_remote_fleet
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.records import MagistralError, Rollout, SamplingParams, WeightVersion

SETTINGS = EngineSettings(ModelConfig(20, 16, 1, 2, 1, 8, 16), GenerationConfig(where="remote"), (0,), 0, "float32")
SAMPLING = SamplingParams(1.0, 1.0, 0, 8)
DEADLINE = 120.0


class Scene:
    """A fleet with all that it reports."""

    def __init__(self, settings: EngineSettings, deadline: float = DEADLINE) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        put = self.said.put
        reports = Reports(on_rollout=put, on_weights=put, on_failure=put, on_notice=put)
        self.fleet: RemoteFleet = make_remote_fleet(settings, reports, deadline=deadline)

    def begin(self, params: Any) -> None:
        self.fleet.set_weights(params, 0)
        self.fleet.start()

    def submit(self, first: int, count: int = 2) -> None:
        self.fleet.submit([GenerationRequest(first + i, np.array([1], np.int32), SAMPLING) for i in range(count)])

    def get(self, kind: type) -> Any:
        """The next report of a kind; others are passed over."""
        while True:
            report = self.said.get(timeout=DEADLINE)
            if isinstance(report, kind):
                return report
            assert not isinstance(report, Exception), report


class Played:
    """A generator that joins, and does what the test says."""

    def __init__(self, address: str) -> None:
        self.channel: Channel = join(address, "")
        self.submitted: list[list[int]] = []

    def read(self, num_groups: int) -> list[str]:
        """Read until so many groups have been submitted in all; the kinds of frames that came on the way."""
        kinds = []
        while len(self.submitted) < num_groups:
            frame = self.channel.receive(DEADLINE)
            assert frame is not None
            kinds.append(frame.kind)
            if frame.kind == "hello":
                self.channel.send(Frame("ready"))
            elif frame.kind == "weights":
                self.channel.read_payload(memoryview(bytearray(frame.payload_size)))
                self.channel.send(Frame("loaded", {"version": 0}))
            elif frame.kind == "submit":
                self.submitted.append([request.request_id for request in requests_of(frame)])
        return kinds

    def finish(self, request_id: int) -> None:
        none, no_float = np.zeros(0, np.int32), np.zeros(0, np.float32)
        fields = {"id": request_id, "truncated": False, "step": 0, "usage": {}}
        self.channel.send(Frame("rollout", fields, [none, no_float, none]))

    def leave(self) -> None:
        self.channel.close()


@pytest.fixture
def scene() -> Iterator[Callable[..., Scene]]:
    scenes = []

    def make(num_generators: int = 1, deadline: float = DEADLINE, **changes: Any) -> Scene:
        generation = dataclasses.replace(SETTINGS.generation, num_generators=num_generators, **changes)
        scenes.append(Scene(dataclasses.replace(SETTINGS, generation=generation), deadline))
        scenes[-1].begin({"w": jnp.zeros(3)})
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.fleet.stop(0.1)


def test_work_waits_until_all_places_are_taken_and_weights_come_first(scene: Callable[..., Scene]):
    here = scene(2)
    here.submit(0)
    here.submit(10)
    first = Played(here.fleet.address)
    assert here.get(Notice).sentence.startswith("Generator 0 (")
    second = Played(here.fleet.address)
    for player in (first, second):
        assert player.read(1) == ["hello", "weights", "bound", "submit"]
    assert sorted(first.submitted + second.submitted) == [[0, 1], [10, 11]]
    with pytest.raises(MagistralError, match=r"all 2 places are taken \(generation.num_generators\)"):
        Played(here.fleet.address)
    first.leave()
    second.leave()


def test_what_a_lost_one_had_to_do_goes_to_the_others_and_its_place_is_free(scene: Callable[..., Scene]):
    here = scene(2)
    players = [Played(here.fleet.address)]
    here.get(Notice)
    players.append(Played(here.fleet.address))
    here.get(Notice)
    here.submit(0, 3)
    players[0].read(1)
    players[0].finish(1)
    assert here.get(Rollout).request_id == 1
    players[0].leave()
    sentence = here.get(Notice).sentence
    assert sentence.startswith("Generator 0 (")
    assert sentence.endswith(
        ") is gone: its connection has ended. Its 2 unfinished completions are begun again, and the others go on; "
        "another may join in its place (1 of at most 3 times, generation.max_restarts)."
    )
    players[1].read(1)
    assert players[1].submitted == [[0, 2]]
    late = Played(here.fleet.address)
    assert here.get(Notice).generator == 0
    here.submit(20)
    late.read(1)
    assert late.submitted == [[20, 21]]
    assert here.fleet.usage().num_lost == 1
    players[1].leave()
    late.leave()


def test_with_nobody_left_work_waits_for_a_join(scene: Callable[..., Scene]):
    here = scene(1)
    first = Played(here.fleet.address)
    here.submit(0)
    first.read(1)
    first.leave()
    while (notice := here.get(Notice)).kind != "generator_lost":
        pass
    assert "a generator that joins within 120 s takes its place" in notice.sentence
    here.submit(10)
    second = Played(here.fleet.address)
    second.read(2)
    assert sorted(second.submitted) == [[0, 1], [10, 11]]
    second.leave()


def test_nobody_for_too_long_is_the_end(scene: Callable[..., Scene]):
    here = scene(1, deadline=0.3)
    error = here.said.get(timeout=DEADLINE)
    assert isinstance(error, MagistralError)
    assert str(error) == f"No generator has joined at {here.fleet.address} for 0.3 s (schedule.role_deadline)"
    with pytest.raises(MagistralError, match="the run is ending"):
        Played(here.fleet.address)


def test_the_run_begins_with_those_that_are_there_when_the_wait_is_over(scene: Callable[..., Scene]):
    here = scene(2, deadline=3.0)
    here.submit(0)
    player = Played(here.fleet.address)
    player.read(1)
    while (notice := here.get(Notice)).kind == "generator_joined":
        pass
    assert notice.sentence == "Only 1 of 2 generators have joined; the run begins with them."
    player.leave()


def test_losses_are_bounded(scene: Callable[..., Scene]):
    here = scene(1, max_restarts=0)
    Played(here.fleet.address).leave()
    while not isinstance(report := here.said.get(timeout=DEADLINE), Exception):
        pass
    assert "is gone" in str(report)


# --- real ones -------------------------------------------------------------------------------------------------------


def start_generator(address: str, token: pathlib.Path, log: pathlib.Path) -> subprocess.Popen[bytes]:
    program = "from magistral_jax.main import main; main()"
    command = [sys.executable, "-c", program, "generator", address, "--token-file", str(token)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **compile_cache()})


def compile_cache() -> dict[str, str]:
    """What the trainer does not tell another host."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    return {f"JAX_{name.upper()}": str(jax.config.values[f"jax_{name}"]) for name in names}


def test_generators_join_over_tcp_one_is_killed_and_nothing_is_lost_or_doubled(tiny: Any, tmp_path: pathlib.Path):
    never = (1000, 1001, 1002)  # stop tokens that do not exist
    token = tmp_path / "token"
    token.write_text("open sesame\n")
    generation = dataclasses.replace(tiny.engine, where="remote", num_generators=2, token_file=str(token))
    scene = Scene(EngineSettings(tiny.model, generation, never, 0, "float32"))
    scene.begin(tiny.params(0))
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    processes = [start_generator(scene.fleet.address, token, log) for log in logs]
    wanted = [tiny.request(i, 1 + i % 8, prompt_seed=i // 2) for i in range(40)]
    for first in range(0, 40, 4):
        scene.fleet.submit(wanted[first : first + 4])
    rollouts: dict[int, Rollout] = {}

    def take(rollout: Rollout) -> None:
        assert rollout.request_id not in rollouts
        rollouts[rollout.request_id] = rollout

    take(scene.get(Rollout))
    processes[0].kill()  # whichever place it has
    while len(rollouts) < 40:
        take(scene.get(Rollout))
    expected = tiny.finish(tiny.batcher(stop_ids=never), wanted)
    for request in wanted:
        found = rollouts[request.request_id].completion_ids
        np.testing.assert_array_equal(found, expected[request.request_id].completion_ids)
    scene.fleet.set_weights(tiny.params(1), 1)
    while (receipt := scene.get(WeightVersion)).version != 1:
        pass
    assert receipt.fingerprint == fingerprint(tiny.params(1))
    scene.fleet.stop(DEADLINE)
    assert processes[1].wait(DEADLINE) == 0
    assert logs[1].read_text().splitlines()[-1] == "the run is over"
    processes[0].wait(DEADLINE)


def test_a_generator_whose_trainer_is_gone_says_so_and_ends(tiny: Any, tmp_path: pathlib.Path):
    generation = dataclasses.replace(tiny.engine, where="remote")
    token = tmp_path / "token"
    token.write_text("x")
    generation = dataclasses.replace(generation, token_file=str(token))
    scene = Scene(EngineSettings(tiny.model, generation, (), 0, "float32"))
    scene.begin(tiny.params(0))
    log = tmp_path / "log"
    process = start_generator(scene.fleet.address, token, log)
    scene.get(WeightVersion)
    for member in scene.fleet.processes:
        member.endpoint.connection.shutdown(2)
    assert process.wait(DEADLINE) == 2
    assert log.read_text().splitlines()[-1] == f"error: The trainer at {scene.fleet.address} is gone."
    scene.fleet.stop(0.1)
