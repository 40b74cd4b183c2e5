"""The event log of a run: what happened, in the order in which the schedule learnt of it.

    begin of the file | batch | batch | …        batch = length, checksum, records (MessagePack)

With the configuration, the seed and the data it decides the whole run: which engine took which requests and weights
before which of its steps, when completions came back, how they were graded, and when a batch was trained. Tokens are
not in it, since they follow; a checksum of every completion is, and one of the parameters after every step.

Records are written in batches, so a kill loses what the last moments brought, never what stands there: a reader stops
at the first batch that is cut or changed, and what came before is good.
"""

import dataclasses
import json
import os
import pathlib
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgpack
import numpy as np

from magistral_jax.records import MagistralError, Reward, Rollout, Verdict
from magistral_jax.schedule import machine

LOG_FILE = "events.log"
_MAGIC = b"magistral-jax events 1\n"
_BATCH = struct.Struct("<II")  # length of the records, checksum over the length and the records
_FLUSH_SECONDS, _FLUSH_BYTES = 0.5, 2**16

# ---- what is recorded ----


@dataclasses.dataclass(frozen=True)
class Session:
    """The run begins, or goes on from a checkpoint: everything that holds until the next one of these."""

    step: int  # batches trained before
    fingerprint: int  # of the trainer's parameters
    config: str  # JSON, as in the run folder
    data: str  # fingerprint of problems and their order
    software: dict[str, str]  # versions of what computes
    device: str  # kind and number of devices
    threads: int  # cores that the computation may use
    began: float  # seconds since 1970


@dataclasses.dataclass(frozen=True)
class Took:
    """An engine took requests, or weights, before its step number `engine_step`."""

    engine: int
    generator: int
    engine_step: int
    request_ids: list[int]
    version: int | None


@dataclasses.dataclass(frozen=True)
class Generated:
    """A completion ended in an engine's step."""

    request_id: int
    engine: int
    engine_step: int
    num_tokens: int
    checksum: int  # of tokens, log-probs, versions


@dataclasses.dataclass(frozen=True)
class Verified:
    """A completion was graded; `parts` of the reward are None where the verifier itself failed."""

    request_id: int
    verdict: str
    parts: list[float] | None

    @property
    def reward(self) -> Reward:
        """As far as training depends on it."""
        return Reward(Verdict(self.verdict), *(self.parts or (0.0, 0.0, 0.0, 0.0)), path="recorded", seconds=0.0)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A batch was trained: the step's number from 1, its groups, and the fingerprint of the parameters after it."""

    step: int
    group_ids: list[int]
    fingerprint: int


@dataclasses.dataclass(frozen=True)
class Holds:
    """A generator's receipt: it samples from this version of the weights, which have this fingerprint."""

    generator: int
    version: int
    fingerprint: int


@dataclasses.dataclass(frozen=True)
class Noted:
    """A mishap that was dealt with; nothing depends on it."""

    kind: str
    generator: int
    sentence: str


@dataclasses.dataclass(frozen=True)
class Happened:
    """Any other event of the schedule, by name."""

    name: str
    fields: list[Any]


Record = Session | Took | Generated | Verified | Trained | Holds | Noted | Happened
_KINDS: tuple[type[Any], ...] = (Session, Took, Generated, Verified, Trained, Holds, Noted, Happened)  # order: format
_CODES = {kind: code for code, kind in enumerate(_KINDS)}


def checksum(rollout: Rollout) -> int:
    """CRC-32 over the bits of a completion: its tokens, log-probs and versions, and how it ended."""
    total = int(rollout.truncated)
    for array in (rollout.completion_ids, rollout.behavior_logprob, rollout.weight_version):
        total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def describe_rollout(rollout: Rollout) -> Generated:
    """Record of a finished completion."""
    num_tokens = len(rollout.completion_ids)
    return Generated(rollout.request_id, rollout.engine, rollout.engine_step, num_tokens, checksum(rollout))


def describe_reward(request_id: int, reward: Reward) -> Verified:
    """Record of a verdict."""
    parts = [reward.format, reward.correctness, reward.length, reward.language]
    return Verified(request_id, reward.verdict.value, None if reward.verdict.is_infrastructure_failure else parts)


def to_event(record: Record) -> machine.Event | None:
    """What the schedule is told; None for records that only explain."""
    match record:
        case Generated(request_id):
            return machine.Generated(request_id)
        case Verified(request_id, _, parts):
            return machine.Verified(request_id, None if parts is None else record.reward.total)
        case Trained():
            return machine.Trained()
        case Happened(name, fields):
            return getattr(machine, name)(*fields)
        case _:
            return None


# ---- writing ----


class EventLog:
    """Appends records to a run's log; one thread writes.

    Args:
      path: Of the file.
      position: What `sync` said when the checkpoint was written that a run is resumed from: the rest is cut off. None
        begins anew.

    Raises:
      MagistralError: The file does not reach as far as `position`.
    """

    def __init__(self, path: pathlib.Path, position: int | None = None) -> None:
        if position is not None and (not path.exists() or path.stat().st_size < position):
            raise MagistralError(f"{path}: expected at least {position} bytes, which the checkpoint speaks of.")
        self._file = path.open("wb" if position is None else "r+b")
        self._file.truncate(position or 0)
        self._file.seek(position or 0)
        if position is None:
            self._file.write(_MAGIC)
        self._packer = msgpack.Packer()
        self._records: list[bytes] = []
        self._size = 0
        self._began = self._flushed = time.monotonic()

    def write(self, record: Record) -> None:
        """Add a record; it is in the file soon."""
        now = time.monotonic()
        fields = [getattr(record, field.name) for field in dataclasses.fields(record)]
        self._records.append(self._packer.pack([_CODES[type(record)], int(1000 * (now - self._began)), *fields]))
        self._size += len(self._records[-1])
        if self._size >= _FLUSH_BYTES or now - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        if self._records:
            body = b"".join(self._records)
            self._file.write(_BATCH.pack(len(body), _checksum(body)) + body)
            self._file.flush()
            self._records, self._size = [], 0
        self._flushed = time.monotonic()

    def sync(self) -> int:
        """Flush, to the disk itself; returns the position from which a run goes on that is resumed from here."""
        self.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


# ---- reading ----


def read_log(path: pathlib.Path) -> Iterator[tuple[float, Record]]:
    """Records with their seconds since their session began, up to the end or to where the file is damaged.

    Raises:
      MagistralError: There is no such file, or it is no event log.
    """
    if not path.exists():
        raise MagistralError(f"{path}: no event log; expected the folder of a run of `magistral-jax train`.")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise MagistralError(f"{path}: no event log of this version (it begins otherwise).")
        while (body := _read_batch(file)) is not None:
            for code, milliseconds, *fields in _unpack(body):
                yield milliseconds / 1000, _KINDS[code](*fields)


def to_line(seconds: float, record: Record) -> str:
    """A record as one JSON object, for people."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if isinstance(record, Happened):
        fields = {"event": record.name, "fields": record.fields}
    else:
        fields = {"event": type(record).__name__, **fields}
    return json.dumps({"seconds": seconds, **fields}, ensure_ascii=False)


def _read_batch(file: BinaryIO) -> bytes | None:
    """The records of the next batch; None at the end, or where the rest is not as it was written."""
    head = file.read(_BATCH.size)
    if len(head) < _BATCH.size:
        return None
    length, expected = _BATCH.unpack(head)
    body = file.read(length)
    return body if len(body) == length and _checksum(body) == expected else None


def _checksum(body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(len(body).to_bytes(4, "little")))


def _unpack(body: bytes) -> Iterator[list[Any]]:
    unpacker = msgpack.Unpacker(max_buffer_size=len(body))
    unpacker.feed(body)
    return iter(unpacker)
