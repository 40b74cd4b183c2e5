"""A generator that is killed before, while or after it fetches weights: named at once, and nobody else notices.

The processes and planes are real; in place of an engine the processes have a few lines that fetch and say so.
"""

import dataclasses
import pathlib
import queue
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.handle import Reports
from magistral_jax.generate.launch import WorkerProcess
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorDiedError, GeneratorProcess
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.publish.plane import Sender, wanted_params
from magistral_jax.publish.planes import make_sender
from magistral_jax.publish.shared_memory import SharedWeights
from magistral_jax.records import WeightVersion

DEADLINE = 120.0
# Large enough (33 MB) that a transfer can be cut in the middle, and of few shapes.
MODEL = ModelConfig(vocab_size=2**17, d_model=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, d_ff=32)

PLAYED = """
import os, signal, socket, sys, threading, time
import jax, jax.numpy as jnp
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.messages import delivery_of, settings_of
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.publish.plane import wanted_params
from magistral_jax.publish.planes import make_receiver

die = lambda: os.kill(os.getpid(), signal.SIGKILL)
moment = os.environ["DIES"]
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
hello = channel.receive()
jax.config.update("jax_platforms", "cpu")
settings = settings_of(hello)
receiver = make_receiver(settings.generation.plane, wanted_params(settings.model, jnp.dtype("float32")), 5.0)
channel.send(Frame("ready"))
def beat():
    while True:
        channel.send(Frame("heartbeat", {"seconds_in_round": 0.0, "usage": {}}))
        time.sleep(1.0)
threading.Thread(target=beat, daemon=True).start()
while (frame := channel.receive()) is not None:
    if frame.kind != "weights":
        os._exit(0)
    delivery = delivery_of(frame, channel, "the trainer")
    if moment == "before":
        die()
    if moment == "during":
        threading.Thread(target=receiver.receive, args=[delivery], daemon=True).start()
        time.sleep(0.005)
        die()
    params = receiver.receive(delivery)
    channel.send(Frame("loaded", {"version": delivery.manifest.version}))
    channel.send(Frame("receipt", {"version": delivery.manifest.version, "fingerprint": fingerprint(params)}))
    if moment == "after":
        die()
os._exit(0)
"""


def make_params(seed: int) -> Any:
    fill = lambda leaf: jnp.full(leaf.shape, float(seed), leaf.dtype)
    return jax.tree.map(fill, wanted_params(MODEL, jnp.dtype("float32")))


@dataclasses.dataclass(frozen=True)
class Scene:
    """The trainer's end of a plane, and generators that fetch from it."""

    plane: Literal["shared_memory", "tcp", "transfer"]
    sender: Sender
    folder: pathlib.Path

    def start(self, number: int, dies: str) -> tuple[GeneratorProcess, "queue.SimpleQueue[Any]"]:
        """A generator, with its reports."""
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reports = Reports(on_rollout=said.put, on_weights=said.put, on_failure=said.put, on_notice=said.put)
        settings = EngineSettings(MODEL, GenerationConfig(plane=self.plane), (), 0, "float32")
        log = self.folder / f"{number}.log"
        environment = {"DIES": dies, "PYTHONPATH": str(self.folder)}
        launch = lambda: WorkerProcess(log, environment, "played_receiver")
        process = GeneratorProcess(number, settings, self.sender, reports, launch=launch)
        process.send_weights()
        process.start()
        return process, said


@pytest.fixture(scope="module", params=["shared_memory", "tcp", "transfer"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "played_receiver.py").write_text(PLAYED)
    sender = make_sender(request.param)
    yield Scene(request.param, sender, folder)
    sender.close()


def test_a_killed_receiver_is_named_and_the_others_get_every_version(scene: Scene):
    sender = scene.sender
    sender.write(make_params(0), 0)
    survivor, said = scene.start(0, "never")
    victims = {moment: scene.start(number, moment) for number, moment in enumerate(("before", "during", "after"), 1)}
    assert said.get(timeout=DEADLINE) == WeightVersion(0, fingerprint(make_params(0)), 0)
    for moment, (victim, reports) in victims.items():
        error = reports.get(timeout=DEADLINE)
        if moment == "after":
            assert error.version == 0
            error = reports.get(timeout=DEADLINE)
        assert isinstance(error, GeneratorDiedError), error
        assert str(error) == f"Generator {victim.number} was killed by SIGKILL"
        assert reports.empty()
    sender.write(make_params(1), 1)
    survivor.send_weights()
    assert said.get(timeout=DEADLINE) == WeightVersion(1, fingerprint(make_params(1)), 0)
    if isinstance(sender, SharedWeights):  # what the dead ones held is free again
        assert sender.hold().content.num_readers == 1
        assert sender.num_segments <= 2
    survivor.ask_to_stop()
    survivor.join(DEADLINE)
