"""The process of one generator: `python -m magistral_jax.generate.worker DESCRIPTOR`, started by `generate.process`.

The main thread reads what the trainer's process sends, and loads weights while the engine's thread goes on decoding; a
third one sends a heartbeat. It ends when it is told to, when its engine fails, and when its trainer is gone, which the
closed connection shows. (PDEATHSIG would not do: it comes when the *thread* that started us ends.)
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
from magistral_jax.generate.messages import BEAT_SECONDS, requests_of, rollout_frame, settings_of
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.publish.manifest import Manifest, WeightsRefusedError
from magistral_jax.publish.shared_memory import WeightsReader
from magistral_jax.records import MagistralError, Rollout, WeightVersion

_STOP_SECONDS = 5.0  # for the block that runs when the order to stop comes


class Worker:
    """One engine and its connection to the trainer's process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: GeneratorThread | None = None
        self._began = time.monotonic()

    def run(self) -> None:
        """Serve until the end of the connection or the order to stop."""
        hello = self._channel.receive()
        if hello is None:
            return
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        engine = self._build(hello)
        self._channel.send(Frame("ready"))
        while (frame := self._channel.receive()) is not None:
            match frame.kind:
                case "submit":
                    engine.submit(requests_of(frame))
                case "weights":
                    self._load(frame)
                case "bound":
                    engine.is_at_bound = frame.fields["value"]
                case "stop":
                    with contextlib.suppress(TimeoutError):
                        engine.stop(_STOP_SECONDS)
                    return

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, and end: an engine that failed has nothing more to give."""
        traceback.print_exception(error)
        is_mistake = isinstance(error, MagistralError)
        with contextlib.suppress(OSError):
            text = str(error) if is_mistake else repr(error)
            self._channel.send(Frame("failure", {"text": text, "is_mistake": is_mistake}))
        _leave(1)

    def _build(self, hello: Frame) -> GeneratorThread:
        for name, value in hello.fields["jax"].items():
            jax.config.update(name, value)
        settings = settings_of(hello)
        self._reader = WeightsReader(settings.model, jnp.dtype(settings.dtype))
        batcher = ContinuousBatcher(settings.model, settings.generation, settings.stop_ids, settings.seed)
        reports = Reports(on_rollout=self._send_rollout, on_weights=self._send_receipt, on_failure=self.fail)
        self._engine = GeneratorThread(batcher, reports)
        self._engine.start()
        return self._engine

    def _load(self, frame: Frame) -> None:
        """Take weights to the device, beside those that the engine uses until the next block is through."""
        assert self._engine is not None
        assert frame.descriptor is not None
        manifest = Manifest.from_fields(frame.fields)
        try:
            params = self._reader.read(manifest, frame.descriptor)
        except WeightsRefusedError as error:
            self._channel.send(Frame("refused", {"version": manifest.version, "reason": str(error)}))
            return
        self._engine.set_weights(params, manifest.version, fingerprint(params))
        self._channel.send(Frame("loaded", {"version": manifest.version}))

    def _send_rollout(self, rollout: Rollout) -> None:
        self._channel.send(rollout_frame(rollout, self._usage()))

    def _send_receipt(self, receipt: WeightVersion) -> None:
        self._channel.send(Frame("receipt", {"version": receipt.version, "fingerprint": receipt.fingerprint}))

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
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End at once: an engine in the middle of a block would hold up, or crash, the interpreter's own way out."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
