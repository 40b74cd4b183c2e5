"""A generator in a process of its own, on this host or another, seen from the trainer's.

Two threads stand between them, so that nobody else ever waits: one sends what is queued, in order, the other takes
what comes. Weights are queued as the order "send the newest", so that a slow generator skips versions, and nothing
submitted after a publish overtakes its weights.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence

import jax

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.frames import Channel, Frame, ProtocolError
from magistral_jax.generate.handle import GeneratorUsage, Notice, Reports
from magistral_jax.generate.launch import Endpoint
from magistral_jax.generate.messages import (
    BEAT_SECONDS,
    EngineSettings,
    hello_frame,
    intake_of,
    rollout_of,
    submit_frame,
    weights_frame,
)
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.publish.plane import Published, Sender, allowance
from magistral_jax.records import MagistralError, WeightVersion

_MAX_REFUSALS = 3  # of weights, one after the other
_EXIT_SECONDS = 10.0  # from the end of the connection, or from SIGKILL, to that of the process
# How jax is set up here holds there: results must agree. On this host, what was compiled can be used as well.
_JAX_SETTINGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")
_JAX_SETTINGS_HERE = (
    "jax_platforms",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


class GeneratorDiedError(MagistralError):
    """A generator's process has ended, and not because it was told to; the message says which and how."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a generator may be silent, in seconds."""

    sign_of_life: float = 10.0
    """Between two messages; heartbeats come each second."""
    step: float = 600.0
    """From one step of the engine to the next, and from the start of the process until the engine stands."""
    answer: float = 30.0
    """From the order to fetch weights until the answer, beside the time of the bytes. It counts from when the engine
    stands; long before its end, the generator itself should have refused."""

    @classmethod
    def of(cls, generation: GenerationConfig, step: float) -> "Limits":
        """Those of a run; a transfer has three parts that may each take `generation.transfer_deadline`."""
        return cls(step=step, answer=3 * generation.transfer_deadline)


class GeneratorProcess:
    """One process with one engine.

    Args:
      number: Its place among the generators, for messages.
      settings: Of its engine.
      weights: The trainer's end of the plane; `send_weights` says that there is a new version.
      reports: Where it reports. `on_failure` gets a `GeneratorDiedError` where another process might do better.
      launch: Starts it, or takes up the connection of one that has come by itself.
      limits: When it is given up.
    """

    def __init__(
        self,
        number: int,
        settings: EngineSettings,
        weights: Sender,
        reports: Reports,
        *,
        launch: Callable[[], Endpoint],
        limits: Limits = Limits(),
    ) -> None:
        self.number = number
        self._settings, self._weights, self._reports = settings, weights, reports
        self._launch, self._limits = launch, limits
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._endpoint: Endpoint | None = None
        self._unfinished: dict[int, tuple[int, GenerationRequest]] = {}  # with the first id of its group
        self._usage = GeneratorUsage()
        self._is_ready = self._has_weights = self._is_stopping = self._is_gone = False
        self._end: str | Exception | None = None  # why it was given up
        self._transfer = threading.Condition()
        self._in_transfer: Published | None = None
        self._order_time = self._ready_time = 0.0
        self._sent_version: int | None = None
        self._num_refusals = 0

    # ---- from outside -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; it is ready some seconds later, and what is queued meanwhile waits.

        Raises:
          OSError: It cannot be started.
        """
        self._endpoint = self._launch()
        self._channel = Channel(self._endpoint.connection)
        self._writer = threading.Thread(target=self._write, name=f"generator-{self.number}-out", daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"generator-{self.number}-in", daemon=True)
        self._writer.start()
        self._reader.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where it runs."""
        assert self._endpoint is not None
        return self._endpoint

    @property
    def num_unfinished(self) -> int:
        """Completions that are asked for and have not come."""
        return len(self._unfinished)

    def unfinished(self) -> list[list[GenerationRequest]]:
        """They themselves, group by group; after its failure, what somebody else has to do."""
        groups: dict[int, list[GenerationRequest]] = {}
        for group, request in self._unfinished.values():
            groups.setdefault(group, []).append(request)
        return list(groups.values())

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue the requests of a group."""
        for request in requests:
            self._unfinished[request.request_id] = (requests[0].request_id, request)
        self._outbox.put(lambda: self._channel.send(submit_frame(requests)))

    def send_weights(self) -> None:
        """Queue the newest weights, as they are when their turn comes."""
        self._outbox.put(self._send_weights)

    def set_bound(self, is_at_bound: bool) -> None:
        """Say whether admission allows no more work at the moment."""
        self._outbox.put(lambda: self._channel.send(Frame("bound", {"value": is_at_bound})))

    def hold(self) -> None:
        """Queue the order to step only as `advance` says: the engine is replayed."""
        self._outbox.put(lambda: self._channel.send(Frame("hold")))

    def advance(self, step: int) -> None:
        """Queue the order to take as many steps, counted from the first one, before what is queued later."""
        self._outbox.put(lambda: self._channel.send(Frame("advance", {"step": step})))

    def usage(self) -> GeneratorUsage:
        """Reading of its meter, as of its last message."""
        return self._usage

    def ask_to_stop(self) -> None:
        """Queue the order to end after the running block; without an engine yet, there is nothing to wait for."""
        with self._transfer:
            self._is_stopping = True
            self._transfer.notify_all()
        if self._endpoint is not None and not self._is_ready:
            self._endpoint.kill()
        self._outbox.put(lambda: self._channel.send(Frame("stop")))

    def join(self, deadline: float) -> None:
        """Wait for the end of a process that was asked to stop; after `deadline` seconds it is killed.

        Raises:
          TimeoutError: It does not end even so.
        """
        if self._endpoint is None:
            return
        self._reader.join(deadline)
        if self._reader.is_alive():
            self._endpoint.kill()
            self._reader.join(_EXIT_SECONDS)
        if self._reader.is_alive():
            raise TimeoutError(f"generator {self.number} ({self._endpoint.name}) does not end")

    # ---- the thread that sends --------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            names = _JAX_SETTINGS + (_JAX_SETTINGS_HERE if self.endpoint.is_local else ())
            self._channel.send(hello_frame(self._settings, {name: jax.config.values[name] for name in names}))
            while (command := self._outbox.get()) is not None:
                command()
        except OSError:
            pass  # the process is gone, as the other thread sees
        except Exception as error:
            self._give_up(error)

    def _send_weights(self) -> None:
        """Hand the newest version over, once the one before is loaded: a generator fetches one at a time."""
        with self._transfer:
            self._transfer.wait_for(lambda: self._in_transfer is None or self._is_gone or self._is_stopping)
            if self._is_gone or self._is_stopping:
                return
            published = self._weights.hold()
            if published.manifest.version == self._sent_version:  # an earlier order has found it already
                self._weights.release(published, was_taken=True)
                return
            self._in_transfer, self._sent_version = published, published.manifest.version
            self._order_time = time.monotonic()
        self._channel.send(weights_frame(published.manifest, self._weights.order(published)))

    # ---- the thread that receives -----------------------------------------------------------------------------------

    def _read(self) -> None:
        num_missed = 0
        try:
            while True:
                try:
                    frame = self._channel.receive(BEAT_SECONDS)
                except TimeoutError:
                    # Beats are counted, not seconds: after a suspension of this very process they are not missing.
                    num_missed += 1
                    silence = num_missed * BEAT_SECONDS
                    if silence >= (self._limits.sign_of_life if self._is_ready else self._limits.step):
                        self._give_up(f"sent no sign of life for {silence:g} s")
                    continue
                if frame is None:
                    break
                num_missed = 0
                self._take(frame)
        except ProtocolError as error:
            self._give_up(f"sent {error}")
        except Exception as error:  # of a report: whoever listens has failed
            self._give_up(error)
        self._finish()

    def _take(self, frame: Frame) -> None:
        fields = frame.fields
        match frame.kind:
            case "rollout":
                self._usage = GeneratorUsage(**fields["usage"])
                if fields["id"] not in self._unfinished:
                    raise ProtocolError(f"completion {fields['id']}, which nobody waits for")
                _, request = self._unfinished.pop(fields["id"])
                self._reports.on_rollout(rollout_of(frame, request.prompt_ids))
            case "heartbeat":
                self._usage = GeneratorUsage(**fields["usage"])
                self._check_transfer()
                if fields["seconds_in_round"] > self._limits.step:
                    self._give_up(f"has not finished a step for {fields['seconds_in_round']:.0f} s")
            case "intake":
                self._reports.on_intake(dataclasses.replace(intake_of(frame), generator=self.number))
            case "receipt":
                self._has_weights, self._num_refusals = True, 0
                self._reports.on_weights(WeightVersion(fields["version"], fields["fingerprint"], self.number))
            case "loaded":
                self._end_transfer(was_taken=True)
            case "refused":
                self._end_transfer(was_taken=False)
                self._refuse(fields["reason"])
            case "ready":
                self._is_ready, self._ready_time = True, time.monotonic()
            case "failure":
                died = GeneratorDiedError(f"{self._label} failed: {fields['text']}")
                self._end = self._end or (MagistralError(fields["text"]) if fields["is_mistake"] else died)
            case unknown:
                raise ProtocolError(f"an unknown message, {unknown!r}")

    def _refuse(self, reason: str) -> None:
        """Weights were not taken, and those before are in use: try again at once, then with the next version."""
        self._num_refusals += 1
        if self._num_refusals == _MAX_REFUSALS or not self._has_weights:
            self._give_up(f"refused {reason}")
            return
        self._reports.on_notice(Notice("weights_refused", self.number, f"{self._label} refused {reason}."))
        if self._num_refusals == 1:
            self._sent_version = None
            self.send_weights()

    @property
    def _label(self) -> str:
        """Who it is, in sentences."""
        return f"Generator {self.number}" + ("" if self.endpoint.is_local else f" ({self.endpoint.name})")

    def _give_up(self, why: str | Exception) -> None:
        """Kill the process; the end of the connection follows, after what is still in it."""
        self._end = self._end or why
        self.endpoint.kill()

    def _check_transfer(self) -> None:
        """Give up one that lives, but does not answer to an order: its work would wait for ever."""
        with self._transfer:
            published, order_time = self._in_transfer, self._order_time
        if published is None:
            return
        limit = self._limits.answer if self._is_ready else self._limits.step
        seconds = time.monotonic() - max(order_time, self._ready_time)
        if seconds > allowance(limit, published.manifest.num_bytes):
            version = published.manifest.version
            self._give_up(f"has not answered to weights of version {version} for {seconds:.0f} s")

    def _end_transfer(self, *, was_taken: bool) -> None:
        with self._transfer:
            if self._in_transfer is not None:
                self._weights.release(self._in_transfer, was_taken=was_taken)
            self._in_transfer = None
            self._transfer.notify_all()

    def _finish(self) -> None:
        """The connection has ended: clear up, and report it unless it was to be."""
        with self._transfer:
            self._is_gone = True
        self._end_transfer(was_taken=False)
        self.endpoint.wait(_EXIT_SECONDS)
        self._outbox.put(None)
        self._writer.join()
        self._channel.close()
        if self._is_stopping:
            return
        error = self._end
        if not isinstance(error, Exception):
            error = GeneratorDiedError(f"{self._label} {self.endpoint.describe_end(error)}")
        self._reports.on_failure(error)
