"""The process of one generator, on the trainer's host or, as `magistral-jax generator`, on another.

On its own host the trainer starts it as `python -m magistral_jax.generate.worker DESCRIPTOR`. The main thread reads
what the trainer sends, and loads weights while the engine's thread goes on decoding; a third one sends a heartbeat. It
ends when it is told to, when its engine fails, and when its trainer is gone, which the closed connection shows.
(PDEATHSIG would not do: it comes when the *thread* that started us ends.)
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.handle import GeneratorUsage, Reports
from magistral_jax.generate.messages import (
    BEAT_SECONDS,
    delivery_of,
    intake_frame,
    requests_of,
    rollout_frame,
    settings_of,
)
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.sharding import generator_shardings, make_generator_mesh
from magistral_jax.publish.manifest import WeightsRefusedError
from magistral_jax.publish.plane import wanted_params
from magistral_jax.publish.planes import choose_plane, make_receiver
from magistral_jax.records import MagistralError, Rollout, WeightVersion

_STOP_SECONDS = 5.0  # for the block that runs when the order to stop comes


class Worker:
    """One engine and its connection to the trainer's process.

    Args:
      channel: The connection.
      peer: The trainer, for messages.
    """

    def __init__(self, channel: Channel, peer: str = "the trainer") -> None:
        self._channel, self._peer = channel, peer
        self._engine: GeneratorThread | None = None
        self._began = time.monotonic()

    def run(self) -> bool:
        """Serve until the order to stop, which is True, or the end of the connection."""
        hello = self._channel.receive()
        if hello is None:
            return False
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        engine = self._build(hello)
        self._send(Frame("ready"))
        while (frame := self._channel.receive()) is not None:
            match frame.kind:
                case "submit":
                    engine.submit(requests_of(frame))
                case "weights":
                    try:
                        self._load(frame)
                    except ConnectionError:
                        return False
                case "bound":
                    engine.is_at_bound = frame.fields["value"]
                case "hold":
                    engine.hold()
                case "advance":
                    engine.advance(frame.fields["step"])
                case "stop":
                    self.close()
                    return True
        return False

    def close(self) -> None:
        """End the engine and the connection."""
        if self._engine is not None:
            with contextlib.suppress(TimeoutError):
                self._engine.stop(_STOP_SECONDS)
        self._channel.close()

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, and end: an engine that failed has nothing more to give."""
        traceback.print_exception(error)
        self.report(error)
        leave(1)

    def report(self, error: BaseException) -> None:
        """Tell the trainer why there will be nothing more."""
        is_mistake = isinstance(error, MagistralError)
        text = str(error) if is_mistake else repr(error)
        self._send(Frame("failure", {"text": text, "is_mistake": is_mistake}))

    def _build(self, hello: Frame) -> GeneratorThread:
        for name, value in hello.fields["jax"].items():
            jax.config.update(name, value)
        settings = settings_of(hello)
        generation, mesh, shardings = settings.generation, None, None
        if generation.tensor > 1:  # all devices that this process sees are its own
            mesh = make_generator_mesh(generation.tensor, num_taken=0)
            shardings = generator_shardings(settings.model, mesh)
        self._receiver = make_receiver(
            choose_plane(generation.plane, generation.where),
            wanted_params(settings.model, jnp.dtype(settings.dtype), shardings),
            generation.transfer_deadline,
        )
        batcher = ContinuousBatcher(settings.model, generation, settings.stop_ids, settings.seed, mesh)
        reports = Reports(
            on_rollout=self._send_rollout,
            on_weights=self._send_receipt,
            on_failure=self.fail,
            on_intake=lambda intake: self._send(intake_frame(intake)),
        )
        self._engine = GeneratorThread(batcher, reports)
        self._engine.start()
        return self._engine

    def _load(self, frame: Frame) -> None:
        """Take weights to the device, beside those that the engine uses until the next block is through."""
        assert self._engine is not None
        delivery = delivery_of(frame, self._channel, self._peer)
        version = delivery.manifest.version
        try:
            params = self._receiver.receive(delivery)
        except WeightsRefusedError as error:
            self._send(Frame("refused", {"version": version, "reason": str(error)}))
            return
        self._engine.set_weights(params, version, fingerprint(params))
        self._send(Frame("loaded", {"version": version}))

    def _send_rollout(self, rollout: Rollout) -> None:
        self._send(rollout_frame(rollout, self._usage()))

    def _send_receipt(self, receipt: WeightVersion) -> None:
        self._send(Frame("receipt", {"version": receipt.version, "fingerprint": receipt.fingerprint}))

    def _send(self, frame: Frame) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone, as the main thread sees
            self._channel.send(frame)

    def _usage(self) -> dict[str, Any]:
        return dataclasses.asdict(self._engine.usage() if self._engine else GeneratorUsage())

    def _beat(self) -> None:
        """Say that the process lives, and for how long the engine has been at the same thing."""
        with contextlib.suppress(OSError):  # the main thread sees the end of the connection, too
            while True:
                seconds = self._engine.seconds_in_round() if self._engine else time.monotonic() - self._began
                self._channel.send(Frame("heartbeat", {"seconds_in_round": seconds, "usage": self._usage()}))
                time.sleep(BEAT_SECONDS)


def main() -> None:
    """Run a worker over the socket whose descriptor is the argument."""
    worker = Worker(Channel(socket.socket(fileno=int(sys.argv[1]))))
    try:
        worker.run()
    except BaseException as error:
        worker.fail(error)
    leave(0)


def leave(code: int) -> NoReturn:
    """End at once: an engine in the middle of a block would hold up, or crash, the interpreter's own way out."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
