"""What travels between the pool and its workers: completions to be graded one way, rewards the other.

To a worker goes a pickle behind its length: columns of a data set arrive as they are, and the parent is trusted. From
a worker, which has read untrusted text, comes a line of JSON.
"""

import dataclasses
import io
import json
import math
import pickle
import struct
from typing import Any

from magistral_jax.records import Problem, Reward, Verdict
from magistral_jax.verify.code_tests import CodeTests


@dataclasses.dataclass(frozen=True)
class VerifyItem:
    """One completion to be graded."""

    request_id: int
    problem: Problem
    completion: str
    num_tokens: int
    max_length: int
    truncated: bool
    length_cache: int | None = None
    """l_cache of Eq. 1 in tokens, where it is not `reward.length_cache`."""
    group: int = -1
    """Group of the completion; a group that few gradings would complete goes first. -1: none."""
    group_size: int = 0
    """Completions of the group."""
    test_seed: int = 0
    """Picks the tests of a code problem; the same for all completions of a group."""
    is_strict: bool = True
    """False judges the answer wherever it stands: without the format gate, and without format and language parts."""
    code_language: str = ""
    """Language of a program whose fence names none; looked at only where the format is not strict."""


@dataclasses.dataclass(frozen=True)
class Task:
    """An item as a worker gets it."""

    item: VerifyItem
    tests: CodeTests | None = None
    """The sampled tests of a code problem."""
    is_explained: bool = False
    """True asks for what was extracted, parsed and decided beside the verdict."""
    serial: int = 0
    """Number of the task, which its messages repeat."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A worker's word: `ready` or `failed` once, then `form` and `verdict`, or `verdict` alone, for every task."""

    kind: str
    reward: Reward | None = None
    serial: int = 0
    pid: int = 0
    growth_mib: float = 0.0
    """Resident memory at its peak beyond that at the start."""
    detail: str = ""
    """Of a failure: what happened, for people."""
    explanation: dict[str, Any] = dataclasses.field(default_factory=dict)


_LENGTH = struct.Struct("!Q")


def encode_task(task: Task) -> bytes:
    """The frame of a task."""
    payload = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


def read_task(stream: io.BufferedIOBase) -> Task | None:
    """The next task, or None where the other end is closed."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    payload = stream.read(length)
    return pickle.loads(payload) if len(payload) == length else None


def encode_message(message: Message) -> bytes:
    """One line of ASCII."""
    fields = {**dataclasses.asdict(message), "reward": None}
    if message.reward is not None:
        fields["reward"] = {**dataclasses.asdict(message.reward), "verdict": message.reward.verdict.value}
    return json.dumps(fields).encode("ascii") + b"\n"


def decode_message(line: bytes) -> Message:
    """Inverse of `encode_message`.

    Raises:
      ValueError: No worker of ours writes that. This one has read untrusted text and may have been taken over, so what
        goes on from here is of the right types, and its numbers are finite.
    """
    try:
        fields = json.loads(line)
        _check_types(Message, fields | {"reward": None})
        if fields["reward"] is None:
            return Message(**fields)
        verdict = Verdict(fields["reward"].pop("verdict"))
        _check_types(Reward, fields["reward"])
        return Message(**fields | {"reward": Reward(verdict=verdict, **fields["reward"])})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a worker's message: {error}") from error


def _check_types(record: type[Message] | type[Reward], fields: dict[str, Any]) -> None:
    for field in dataclasses.fields(record):
        value = fields.get(field.name)
        if field.type is float and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise ValueError(f"{field.name} is {value!r}")
        if field.type in (int, str) and type(value) is not field.type:
            raise ValueError(f"{field.name} is {value!r}")
