"""A generator in its own process: as a thread would do it, and clear about every way in which it may fail.

One real process serves all tests that leave it alive; those that fail in their own ways are played by small programs.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.handle import Notice, Reports
from magistral_jax.generate.launch import WorkerProcess, worker_environment
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorDiedError, GeneratorProcess, Limits
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.sharding import generator_shardings, make_generator_mesh
from magistral_jax.publish.plane import Order, Published
from magistral_jax.publish.planes import make_sender
from magistral_jax.publish.shared_memory import SharedWeights
from magistral_jax.records import MagistralError, Rollout, WeightVersion

DEADLINE = 120.0  # seconds; a machine with other work may start and compile slowly
NEVER = (1000, 1001, 1002)  # stop tokens that do not exist


PLANES = ("shared_memory", "tcp", "transfer")


class Weights:
    """The trainer's end of a plane, which can be told to play foul with a version."""

    def __init__(self, plane: str) -> None:
        self.plane, self.sender = plane, make_sender(plane)
        self.spoiled: int | None = None
        self.misdirected: int | None = None
        self.release, self.close = self.sender.release, self.sender.close

    def write(self, params: Any, version: int) -> None:
        self.sender.write(params, version)
        if version == self.spoiled:  # after it was summed up
            content = self.sender.hold().content
            if self.plane == "transfer":
                content[0] = content[0].at[0].add(1e-3)
            else:
                content.memory[3] ^= 1

    def hold(self) -> Published:
        return self.sender.hold()

    def order(self, published: Published) -> Order:
        order = self.sender.order(published)
        if published.manifest.version != self.misdirected:
            return order
        with socket.create_server(("127.0.0.1", 0)) as dead:
            address = f"127.0.0.1:{dead.getsockname()[1]}"
        return Order({**order.fields, "address": address})

    @property
    def num_segments(self) -> int:
        """Copies in memory; a plane from device to device makes none."""
        return self.sender.num_segments if isinstance(self.sender, SharedWeights) else 0


class Remote:
    """A generator process with everything that it reports, in order."""

    def __init__(
        self,
        folder: pathlib.Path,
        tiny: Any,
        *,
        plane: str = "shared_memory",
        model: ModelConfig | None = None,
        tensor: int = 1,
        on_weights: Callable[[WeightVersion], None] | None = None,
        environment: Mapping[str, str] = {},
        **options: Any,
    ) -> None:
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.weights = Weights(plane)
        self.log = folder / "generator_3.log"
        generation = dataclasses.replace(tiny.engine, plane=plane, tensor=tensor)
        settings = EngineSettings(model or tiny.model, generation, NEVER, 0, "float32")
        put = self.reports.put
        reports = Reports(on_rollout=put, on_weights=on_weights or put, on_failure=put, on_notice=put)
        launch = lambda: WorkerProcess(self.log, environment)
        self.process = GeneratorProcess(3, settings, self.weights, reports, launch=launch, **options)
        self._versions = itertools.count()

    @property
    def pid(self) -> int:
        endpoint = self.process.endpoint
        assert isinstance(endpoint, WorkerProcess)
        return endpoint.process.pid

    def publish(self, params: Any) -> int:
        version = next(self._versions)
        self.weights.write(params, version)
        self.process.send_weights()
        return version

    def get(self, kind: type) -> Any:
        """The next report, which must be of this kind."""
        report = self.reports.get(timeout=DEADLINE)
        assert isinstance(report, kind), report
        return report

    def collect(self, num_rollouts: int) -> dict[int, Rollout]:
        rollouts: dict[int, Rollout] = {}
        while len(rollouts) < num_rollouts:
            report = self.reports.get(timeout=DEADLINE)
            assert isinstance(report, Rollout | WeightVersion), report
            if isinstance(report, Rollout):
                assert report.request_id not in rollouts
                rollouts[report.request_id] = report
        return rollouts

    def close(self) -> None:
        self.process.ask_to_stop()
        self.process.join(DEADLINE)
        self.weights.close()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def shared_memory_held() -> tuple[int, int]:
    """Descriptors and mappings of segments in this process."""
    descriptors = sum("magistral-weights" in _target(name) for name in os.listdir("/proc/self/fd"))
    return descriptors, pathlib.Path("/proc/self/maps").read_text().count("magistral-weights")


def requests(tiny: Any, first: int, count: int, **options: Any) -> list[GenerationRequest]:
    return [tiny.request(first + i, 1 + i % 8, prompt_seed=i // 2, **options) for i in range(count)]


# --- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PLANES)
def real(tiny: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """With stop tokens that never come: completions are long enough to see a swap."""
    remote = Remote(tmp_path_factory.mktemp("real"), tiny, plane=request.param)
    remote.process.start()
    yield remote
    pid = remote.pid
    remote.close()
    assert not is_alive(pid)
    assert shared_memory_held() == (0, 0)


def _target(descriptor: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return ""


def test_it_samples_what_a_thread_would_sample(tiny: Any, real: Remote):
    wanted = requests(tiny, 0, 8)
    real.publish(tiny.params(0))
    real.process.submit(wanted[:4])
    real.process.submit(wanted[4:])
    found = real.collect(8)
    expected = tiny.finish(tiny.batcher(stop_ids=NEVER), wanted)
    version = found[0].weight_version[0]
    for request in wanted:
        ours, theirs = expected[request.request_id], found[request.request_id]
        np.testing.assert_array_equal(theirs.prompt_ids, request.prompt_ids)
        np.testing.assert_array_equal(theirs.completion_ids, ours.completion_ids)
        np.testing.assert_allclose(theirs.behavior_logprob, ours.behavior_logprob, atol=1e-5)
        assert set(theirs.weight_version.tolist()) == {version}
        assert theirs.truncated == ours.truncated
    assert real.process.num_unfinished == 0
    num_tokens = sum(len(r.completion_ids) for r in found.values())
    end = time.monotonic() + 60.0
    while real.process.usage().num_tokens < num_tokens:  # the meter comes with the next heartbeat
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_receipt_says_what_the_engine_holds(tiny: Any, real: Remote):
    for seed in (1, 2):
        version = real.publish(tiny.params(seed))
        assert real.get(WeightVersion) == WeightVersion(version, fingerprint(tiny.params(seed)), 3)


def test_weights_are_swapped_while_completions_run(tiny: Any, real: Remote):
    first = real.publish(tiny.params(0))
    real.process.submit(requests(tiny, 100, 120))
    rollouts = real.collect(20)
    second = real.publish(tiny.params(1))
    rollouts |= real.collect(100)
    versions = [rollout.weight_version.tolist() for rollout in rollouts.values()]
    assert all(v == sorted(v) and set(v) <= {first, second} for v in versions)
    assert any(len(set(v)) == 2 for v in versions)  # in the middle of a completion
    assert versions[-1][-1] == second


def test_what_is_submitted_after_a_publish_is_sampled_from_it_or_a_newer_one(tiny: Any, real: Remote):
    """However fast versions follow each other; those that are too old when their turn comes are skipped."""
    oldest = {}
    for turn in range(12):
        version = real.publish(tiny.params(turn % 2))
        wanted = requests(tiny, 1000 + 10 * turn, 2)
        oldest |= {request.request_id: version for request in wanted}
        real.process.submit(wanted)
    rollouts = real.collect(24)
    for request_id, rollout in rollouts.items():
        assert rollout.weight_version[0] >= oldest[request_id]
    assert real.weights.num_segments <= 3


def test_spoiled_bytes_are_named_and_the_version_before_is_served(tiny: Any, real: Remote):
    before = real.publish(tiny.params(0))
    assert real.get(WeightVersion).version == before
    real.weights.spoiled = before + 1
    real.publish(tiny.params(1))
    real.process.submit(requests(tiny, 2000, 2))
    notices, rollouts = [], []
    while len(notices) + len(rollouts) < 4:
        report = real.reports.get(timeout=DEADLINE)
        (notices if isinstance(report, Notice) else rollouts).append(report)
    sentence = rf"Generator 3 refused weights of version {before + 1}: the (bytes|elements) of leaf \['embed'\].* have "
    for notice in notices:  # it was tried again, once
        assert (notice.kind, notice.generator) == ("weights_refused", 3)
        assert re.match(sentence, notice.sentence)
    assert all(set(rollout.weight_version.tolist()) == {before} for rollout in rollouts)
    good = real.publish(tiny.params(1))
    assert real.get(WeightVersion) == WeightVersion(good, fingerprint(tiny.params(1)), 3)


@pytest.mark.parametrize("real", ["transfer"], indirect=True)  # with the others, bytes come as the order does
def test_a_dead_address_is_named_and_the_version_before_is_served(tiny: Any, real: Remote):
    before = real.publish(tiny.params(0))
    assert real.get(WeightVersion).version == before
    real.weights.misdirected = before + 1
    real.publish(tiny.params(1))
    for _ in range(2):
        notice = real.get(Notice)
        sentence = rf"Generator 3 refused weights of version {before + 1} from 127\.0\.0\.1:\d+ \(the trainer\): "
        assert re.match(sentence + "nobody answers there", notice.sentence)
    real.process.submit(requests(tiny, 2100, 2))
    assert all(set(rollout.weight_version.tolist()) == {before} for rollout in real.collect(2).values())


def test_weights_of_another_model_are_named(tiny: Any, real: Remote):
    before = real.publish(tiny.params(0))
    assert real.get(WeightVersion).version == before
    other = jax.tree.map(lambda leaf: leaf, tiny.params(0))
    other["head"]["kernel"] = jnp.zeros((3, 5))
    real.publish(other)
    for _ in range(2):
        assert "leaf ['head']['kernel'] is float32[3, 5], expected float32[32, 70]" in real.get(Notice).sentence
    good = real.publish(tiny.params(1))
    assert real.get(WeightVersion).version == good


def test_time_without_work_is_metered_and_so_is_the_bound(tiny: Any, real: Remote):
    real.publish(tiny.params(0))
    real.get(WeightVersion)
    before = real.process.usage()
    real.process.set_bound(True)
    end = time.monotonic() + DEADLINE
    while real.process.usage().idle_at_bound == before.idle_at_bound:
        assert time.monotonic() < end
        time.sleep(0.01)
    real.process.set_bound(False)
    spent = real.process.usage() - before
    assert 0 < spent.idle_at_bound <= spent.idle


# --- an engine on several devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["shared_memory", "transfer"])
def test_an_engine_on_several_devices_samples_what_a_thread_on_one_would(tiny: Any, plane: str, tmp_path: pathlib.Path):
    """Whole weights of one device come by bytes; from device to device they are cut here as they are there."""
    model = dataclasses.replace(tiny.model, vocab_size=72)
    weights = [tiny.params(seed, model) for seed in (0, 1)]
    mesh = make_generator_mesh(2, num_taken=4)
    split = lambda params: jax.device_put(params, generator_shardings(model, mesh))
    wanted = requests(tiny, 0, 6)
    environment = worker_environment(0, 1, "", 2)
    remote = Remote(tmp_path, tiny, plane=plane, model=model, tensor=2, environment=environment)
    remote.process.start()
    try:
        for version, params in enumerate(weights):  # the second comes beside the first, which is in use
            assert remote.publish(split(params) if plane == "transfer" else params) == version
            assert remote.get(WeightVersion) == WeightVersion(version, fingerprint(params), 3)
        remote.process.submit(wanted)
        found = remote.collect(6)
    finally:
        remote.close()
    batcher = ContinuousBatcher(model, tiny.engine, NEVER, 0)
    batcher.set_weights(weights[1], 0)
    for request_id, ours in tiny.finish(batcher, wanted).items():
        np.testing.assert_array_equal(found[request_id].completion_ids, ours.completion_ids)
        np.testing.assert_allclose(found[request_id].behavior_logprob, ours.behavior_logprob, atol=1e-5)


# --- the end of one side ---------------------------------------------------------------------------------------------

PARENT = """
import os, pathlib, signal, sys
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.launch import WorkerProcess
worker = WorkerProcess(pathlib.Path(sys.argv[1]), {})
channel = Channel(worker.connection)
channel.send(Frame("hello", {"jax": {}, "engine": ENGINE}))
while channel.receive().kind != "ready":
    pass
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_whose_trainer_was_killed_ends_by_itself(tiny: Any, tmp_path: pathlib.Path):
    settings = EngineSettings(tiny.model, GenerationConfig(**vars(tiny.engine)), NEVER, 0, "float32")
    program = PARENT.replace("ENGINE", repr(dataclasses.asdict(settings)))
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    parent = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    end = time.monotonic() + DEADLINE
    while is_alive(int(parent.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


# --- played ones -----------------------------------------------------------------------------------------------------

PLAY = """
import json, os, signal, socket, struct, sys, time
peer = socket.socket(fileno=int(sys.argv[1]))
def send(kind, **fields):
    head = json.dumps({"kind": kind, "fields": fields, "arrays": [], "has_descriptor": False}).encode()
    peer.sendall(struct.pack("<IQ", len(head), 0) + head)
def beat(seconds):
    send("heartbeat", seconds_in_round=seconds, usage={})
def drain():
    while peer.recv(65536):
        pass
"""


@pytest.fixture
def play(tiny: Any, tmp_path: pathlib.Path) -> Iterator[Callable[..., Remote]]:
    """Starts a process that runs a few lines in place of the worker."""
    remotes = []

    def start(
        lines: str, *, first: Sequence[GenerationRequest] = (), on_weights: Any = None, **limits: float
    ) -> Remote:
        package = tmp_path / "magistral_jax" / "generate"
        package.mkdir(parents=True)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        (package / "worker.py").write_text(PLAY + textwrap.dedent(lines))
        environment = {"PYTHONPATH": str(tmp_path)}
        remotes.append(Remote(tmp_path, tiny, on_weights=on_weights, limits=Limits(**limits), environment=environment))
        if first:
            remotes[-1].process.submit(first)
        remotes[-1].publish(tiny.params(0))
        remotes[-1].process.start()
        return remotes[-1]

    yield start
    for remote in remotes:
        remote.close()
        assert not is_alive(remote.pid)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            "raise OSError('libcuda.so.1: not found')",
            "ended with exit code 1; its last words: OSError: libcuda.so.1: n",
        ),
        ("send('ready'); os._exit(7)", "ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("send('failure', text='RuntimeError(5)', is_mistake=False); sys.exit('x')", "failed: RuntimeError(5)"),
        ("send('ready'); peer.sendall(bytes(12)); drain()", "sent a frame that cannot be read"),
        ("send('hum'); drain()", "sent an unknown message, 'hum'"),
        ("send('rollout', id=5, truncated=True, usage={}); drain()", "sent completion 5, which nobody waits for"),
        ("send('refused', reason='weights of version 0: so'); drain()", "refused weights of version 0: so"),
        ("beat(100.0); drain()", "has not finished a step for 100 s"),
    ],
)
def test_each_way_to_fail_is_one_sentence(play: Callable[..., Remote], lines: str, sentence: str):
    remote = play(lines, step=50.0)
    error = remote.get(GeneratorDiedError)
    assert str(error).startswith(f"Generator 3 {sentence}")
    assert "\n" not in str(error)
    assert remote.reports.empty()


def test_silence_is_an_end_even_without_one(play: Callable[..., Remote]):
    remote = play("send('ready'); time.sleep(1000)", sign_of_life=2.0)
    assert str(remote.get(GeneratorDiedError)) == "Generator 3 sent no sign of life for 2 s"


def test_one_that_never_gets_ready_is_given_up(play: Callable[..., Remote]):
    remote = play("time.sleep(1000)", step=2.0, sign_of_life=1.0)
    assert str(remote.get(GeneratorDiedError)) == "Generator 3 sent no sign of life for 2 s"


@pytest.mark.parametrize(
    ("start", "limits"),
    [("send('ready')", {"answer": 1.0, "step": 1000.0}), ("", {"answer": 0.0, "step": 2.0})],
    ids=["soon once it is ready", "until then it has the time of a start"],
)
def test_one_that_lives_but_never_answers_to_weights_is_given_up(
    play: Callable[..., Remote], start: str, limits: dict[str, float]
):
    remote = play(f"{start}\nwhile True: beat(0.0); time.sleep(0.25)", **limits)
    found = re.fullmatch(
        r"Generator 3 has not answered to weights of version 0 for (\d+) s", str(remote.get(GeneratorDiedError))
    )
    assert found
    assert int(found[1]) >= (limits["answer"] if start else limits["step"])


def test_a_slow_start_is_no_silence(play: Callable[..., Remote]):
    remote = play("time.sleep(2.5); os._exit(4)", step=50.0, sign_of_life=1.0)
    assert str(remote.get(GeneratorDiedError)) == "Generator 3 ended with exit code 4"


def test_a_users_mistake_stays_one(play: Callable[..., Remote]):
    remote = play("send('failure', text='Prompt of request 1 is too long.', is_mistake=True)")
    assert str(remote.get(MagistralError)) == "Prompt of request 1 is too long."


def test_a_listener_that_fails_is_not_taken_for_the_generator(play: Callable[..., Remote]):
    def refuse(receipt: WeightVersion) -> None:
        raise RuntimeError(f"no room for {receipt.version}")

    remote = play("send('receipt', version=6, fingerprint=0); drain()", on_weights=refuse)
    assert str(remote.get(RuntimeError)) == "no room for 6"


def test_what_was_not_finished_is_known_after_the_end_by_groups(tiny: Any, play: Callable[..., Remote]):
    remote = play("drain()", first=requests(tiny, 10, 3))
    remote.process.submit(requests(tiny, 20, 2))
    os.kill(remote.pid, signal.SIGKILL)
    assert str(remote.get(GeneratorDiedError)) == "Generator 3 was killed by SIGKILL"
    assert [[r.request_id for r in group] for group in remote.process.unfinished()] == [[10, 11, 12], [20, 21]]


def test_one_that_does_not_read_holds_nobody_up_and_is_killed_at_the_end(tiny: Any, play: Callable[..., Remote]):
    remote = play("send('ready')\nwhile True: beat(0.0); time.sleep(0.2)")
    wanted = requests(tiny, 0, 6000)
    for turn in range(30):  # far more than the socket takes
        remote.process.submit(wanted[200 * turn : 200 * (turn + 1)])
        remote.publish(tiny.params(0))
    assert remote.process.num_unfinished == 6000
    assert remote.weights.num_segments <= 3
    remote.process.ask_to_stop()
    remote.process.join(0.5)
    assert not is_alive(remote.pid)
    assert remote.reports.empty()


def test_a_segment_that_is_read_by_a_dead_process_is_free_again(tiny: Any, play: Callable[..., Remote]):
    remote = play("peer.recv(100); time.sleep(0.5); os._exit(0)")
    remote.get(GeneratorDiedError)
    published = remote.weights.hold()
    assert published.content.num_readers == 1
    remote.weights.release(published, was_taken=True)
