"""The event log: what was written is read back, and a damaged tail costs what lies behind the damage, and no more."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.records import MagistralError, Reward, Rollout, Verdict
from magistral_jax.schedule import machine
from magistral_jax.schedule.event_log import (
    EventLog,
    Generated,
    Happened,
    Holds,
    Noted,
    Record,
    Session,
    Took,
    Trained,
    Verified,
    checksum,
    describe_reward,
    describe_rollout,
    read_log,
    to_event,
    to_line,
)

RECORDS: list[Record] = [
    Session(3, 7, "{}", "abc", {"jax": "0.10.2"}, "1 × cpu", 2, 0.5),
    Happened("Started", []),
    Took(0, 1, 0, [], 3),
    Took(0, 1, 2, [8, 9], None),
    Holds(1, 3, 2**32 - 1),
    Generated(9, 0, 5, 12, 2**31),
    Verified(9, "correct", [0.1, 0.9, -1 / 3, 0.0]),
    Verified(8, "sandbox_error", None),
    Trained(4, [4, 6], 11),
    Noted("generator_lost", 1, "Generator 1 was killed — again."),
    Happened("GeneratorLost", [1]),
]


def write(path: pathlib.Path, batches: list[list[Record]]) -> list[int]:
    """A log of these batches; the file's length after each."""
    log, positions = EventLog(path), []
    for batch in batches:
        for record in batch:
            log.write(record)
        positions.append(log.sync())
    log.close()
    return positions


def read(path: pathlib.Path) -> list[Record]:
    return [record for _, record in read_log(path)]


def test_all_kinds_come_back_bit_by_bit(tmp_path: pathlib.Path):
    write(tmp_path / "log", [RECORDS[:4], RECORDS[4:]])
    assert read(tmp_path / "log") == RECORDS
    assert [seconds for seconds, _ in read_log(tmp_path / "log")] == pytest.approx(len(RECORDS) * [0.0], abs=60)


def test_the_schedule_is_told_what_decides_and_nothing_else():
    assert [event for record in RECORDS if (event := to_event(record)) is not None] == [
        machine.Started(),
        machine.Generated(9),
        machine.Verified(9, 0.1 + 0.9 - 1 / 3 + 0.0),
        machine.Verified(8, None),
        machine.Trained(),
        machine.GeneratorLost(1),
    ]


def test_a_line_for_people():
    assert json.loads(to_line(1.5, RECORDS[5])) == {
        "seconds": 1.5,
        "event": "Generated",
        "request_id": 9,
        "engine": 0,
        "engine_step": 5,
        "num_tokens": 12,
        "checksum": 2**31,
    }
    assert json.loads(to_line(0.0, RECORDS[-1])) == {"seconds": 0.0, "event": "GeneratorLost", "fields": [1]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int], list[list[Record]]]:
    """(bytes, positions after each batch, batches)."""
    path = tmp_path_factory.mktemp("log") / "log"
    batches = [RECORDS[:1], RECORDS[1:5], RECORDS[5:6], RECORDS[6:]]
    positions = write(path, batches)
    return path.read_bytes(), positions, batches


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_costs_what_lies_behind_it(
    written: tuple[bytes, list[int], list[list[Record]]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
):
    whole, positions, batches = written
    start = 23  # of the first batch; what comes before says what the file is
    place = data.draw(st.integers(start, len(whole)), "where")
    tail = data.draw(st.binary(max_size=40) | st.just(bytes(40)), "what stands there instead")
    path = tmp_path_factory.getbasetemp() / "damaged"
    damaged = whole[:place] + tail
    num_good = next((i for i, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b), len(damaged))
    num_whole = sum(position <= num_good for position in positions)
    path.write_bytes(damaged)
    assert read(path) == [record for batch in batches[:num_whole] for record in batch]


@settings(max_examples=100, deadline=None)
@given(place=st.integers(23, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_costs_its_batch_and_the_rest(
    written: tuple[bytes, list[int], list[list[Record]]],
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    bit: int,
):
    whole, positions, batches = written
    place = 23 + (place - 23) % (len(whole) - 23)
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(damaged)
    num_whole = sum(position <= place for position in positions)
    assert read(path) == [record for batch in batches[:num_whole] for record in batch]


def test_a_resumed_log_goes_on_at_the_checkpoint(tmp_path: pathlib.Path):
    path = tmp_path / "log"
    first, _ = write(path, [RECORDS[:5], RECORDS[5:]])
    log = EventLog(path, first)
    log.write(RECORDS[8])
    log.close()
    assert read(path) == [*RECORDS[:5], RECORDS[8]]
    assert write(path, [RECORDS[:1]])  # without a position it begins anew
    assert read(path) == RECORDS[:1]


def test_a_log_that_is_too_short_for_the_checkpoint_is_said(tmp_path: pathlib.Path):
    (end,) = write(tmp_path / "log", [RECORDS])
    with pytest.raises(MagistralError, match=f"expected at least {end + 1} bytes, which the checkpoint speaks of"):
        EventLog(tmp_path / "log", end + 1)
    assert read(tmp_path / "log") == RECORDS


def test_no_log_is_one_sentence(tmp_path: pathlib.Path):
    with pytest.raises(MagistralError, match="no event log; expected the folder of a run"):
        read(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"something else entirely, and long enough")
    with pytest.raises(MagistralError, match="no event log of this version"):
        read(tmp_path / "log")


def rollout(**changes) -> Rollout:
    fields = {
        "request_id": 5,
        "prompt_ids": np.array([1], np.int32),
        "completion_ids": np.array([3, 4], np.int32),
        "behavior_logprob": np.array([-0.5, -1.25], np.float32),
        "weight_version": np.array([0, 1], np.int32),
        "truncated": False,
        "engine": 2,
        "engine_step": 7,
    }
    return Rollout(**(fields | changes))


def test_a_checksum_sees_every_bit_that_is_trained():
    usual = checksum(rollout())
    assert usual == checksum(rollout(prompt_ids=np.array([2], np.int32), engine=1))  # the prompt follows from the id
    for changes in (
        {"completion_ids": np.array([4, 3], np.int32)},
        {"behavior_logprob": np.array([-0.5, np.nextafter(np.float32(-1.25), np.float32(0))], np.float32)},
        {"weight_version": np.array([1, 1], np.int32)},
        {"truncated": True},
    ):
        assert checksum(rollout(**changes)) != usual
    assert describe_rollout(rollout()) == Generated(5, 2, 7, 2, usual)


def test_a_recorded_reward_is_the_reward():
    reward = Reward(Verdict.TIMEOUT, 0.1, 0.0, -0.03, 0.1, path="sympy", seconds=3.0)
    recorded = describe_reward(5, reward)
    assert recorded.reward.total == reward.total
    assert recorded.reward.verdict is Verdict.TIMEOUT
    assert describe_reward(5, Reward(Verdict.SANDBOX_ERROR, 0.1, 0.0, 0.0, 0.0, path="", seconds=0.0)).parts is None
