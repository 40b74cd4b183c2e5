"""The generator thread: receipts, rollouts, the meter, one report of a failure, and an end within a deadline."""

import queue
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.generate.handle import GeneratorUsage, Intake, Reports
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.records import MagistralError, Rollout, WeightVersion

DEADLINE = 60.0  # seconds; a machine with other work may compile slowly


class Recorder:
    """A generator thread with everything that it reports, in order."""

    def __init__(self, batcher: ContinuousBatcher, on_rollout: Callable[[Rollout], None] | None = None):
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = GeneratorThread(
            batcher,
            Reports(
                on_rollout=on_rollout or self.reports.put,
                on_weights=self.reports.put,
                on_failure=self.reports.put,
            ),
        )

    def collect(self, num_rollouts: int) -> list[Any]:
        """Reports up to and with this many rollouts."""
        reports = []
        while sum(isinstance(report, Rollout) for report in reports) < num_rollouts:
            reports.append(self.reports.get(timeout=DEADLINE))
            assert not isinstance(reports[-1], Exception), reports[-1]
        return reports

    def wait_for(self, is_reached: Callable[[], bool]):
        """Poll what no report tells."""
        end = time.monotonic() + DEADLINE
        while not is_reached():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def record():
    """Starts recorders, and stops them however the test ends."""
    threads = []

    def start(batcher: ContinuousBatcher, **options: Any):
        recorder = Recorder(batcher, **options)
        threads.append(recorder.thread)
        recorder.thread.start()
        return recorder

    yield start
    for thread in threads:
        thread.stop(DEADLINE)


def test_rollouts_and_receipts_come_back(tiny: Any, record: Callable[..., Recorder]):
    requests = [tiny.request(i, 1 + i, prompt_seed=i // 2) for i in range(8)]
    expected = tiny.finish(tiny.batcher(), requests)

    recorder = record(tiny.batcher(weights=False))
    recorder.thread.set_weights(tiny.params(0), 0)
    recorder.thread.submit(requests[:4])
    recorder.thread.submit(requests[4:])
    receipt, *rollouts = recorder.collect(8)
    # The receipt comes before anything sampled, and says what the trainer computes of what it sent.
    assert receipt == WeightVersion(0, fingerprint(tiny.params(0)))
    assert {r.request_id: r.completion_ids.tolist() for r in rollouts} == {
        i: r.completion_ids.tolist() for i, r in expected.items()
    }

    recorder.thread.set_weights(tiny.params(1), 4)  # to an idle engine: it answers without any request
    assert recorder.reports.get(timeout=DEADLINE) == WeightVersion(4, fingerprint(tiny.params(1)))
    assert fingerprint(tiny.params(0)) != fingerprint(tiny.params(1))


def test_weights_are_swapped_while_completions_run(tiny: Any, record: Callable[..., Recorder]):
    batcher = tiny.batcher(stop_ids=(1000, 1001, 1002))
    recorder = record(batcher)
    recorder.thread.submit([tiny.request(i, 4) for i in range(200)])
    recorder.collect(4)
    recorder.thread.set_weights(tiny.params(1), 1)
    reports = recorder.collect(196)
    receipts = [report for report in reports if isinstance(report, WeightVersion)]
    assert receipts == [WeightVersion(1, fingerprint(tiny.params(1)))]
    at = reports.index(receipts[0])
    versions = [r.weight_version.tolist() for r in reports if isinstance(r, Rollout)]
    # No token of a version is reported before the receipt of the version.
    assert all(set(v) == {0} for v in versions[:at])
    assert all(v == sorted(v) for v in versions)
    assert versions[-1] == [1] * 12


def test_weights_that_are_replaced_before_their_turn_get_no_receipt(tiny: Any, record: Callable[..., Recorder]):
    recorder = Recorder(tiny.batcher(weights=False))
    recorder.thread.set_weights(tiny.params(0), 0)
    recorder.thread.set_weights(tiny.params(1), 1)
    recorder.thread.start()
    assert recorder.reports.get(timeout=DEADLINE) == WeightVersion(1, fingerprint(tiny.params(1)))
    recorder.thread.stop(DEADLINE)
    assert recorder.reports.empty()


def test_a_fingerprint_that_is_known_is_believed_only_of_what_the_engine_holds(
    tiny: Any, record: Callable[..., Recorder]
):
    class Other(ContinuousBatcher):
        def set_weights(self, params: dict[str, Any], version: int) -> None:
            super().set_weights(tiny.params(1), version)

    recorder = record(tiny.batcher(weights=False))
    recorder.thread.set_weights(tiny.params(0), 0, 77)
    assert recorder.reports.get(timeout=DEADLINE) == WeightVersion(0, 77)
    recorder = record(Other(tiny.model, tiny.engine, (0,), 0))
    recorder.thread.set_weights(tiny.params(0), 0, 77)
    assert recorder.reports.get(timeout=DEADLINE) == WeightVersion(0, fingerprint(tiny.params(1)))


def test_what_an_engine_took_is_reported_and_makes_it_do_the_same_again(tiny: Any):
    """A run with swaps whose moments are chance, and a held engine that gets the same before the same steps."""

    def start():
        intakes, rollouts = queue.SimpleQueue[Intake](), queue.SimpleQueue[Rollout]()
        reports = Reports(rollouts.put, lambda receipt: None, lambda error: None, on_intake=intakes.put)
        return GeneratorThread(tiny.batcher(weights=False, stop_ids=(1000, 1001, 1002)), reports), intakes, rollouts

    requests = {i: tiny.request(i, 3 + i % 5) for i in range(112)}
    live, intakes, rollouts = start()
    live.start()
    live.set_weights(tiny.params(0), 0)
    live.submit([requests[i] for i in range(100)])
    first = [rollouts.get(timeout=DEADLINE) for _ in range(5)]
    live.set_weights(tiny.params(1), 1)
    live.submit([requests[i] for i in range(100, 112)])
    recorded = {r.request_id: r for r in [*first, *(rollouts.get(timeout=DEADLINE) for _ in range(107))]}
    live.stop(DEADLINE)

    held, _, again = start()
    held.hold()
    held.start()
    for _ in range(4):
        intake = intakes.get(timeout=DEADLINE)
        held.advance(intake.step)
        if intake.version is None:
            held.submit([requests[i] for i in intake.request_ids])
        else:
            held.set_weights(tiny.params(intake.version), intake.version)
    held.advance(1 + max(r.engine_step for r in recorded.values()))
    replayed = {r.request_id: r for r in (again.get(timeout=DEADLINE) for _ in recorded)}
    held.stop(DEADLINE)
    assert replayed.keys() == recorded.keys()
    for request_id, rollout in recorded.items():
        assert replayed[request_id].engine_step == rollout.engine_step
        for name in ("completion_ids", "behavior_logprob", "weight_version"):
            np.testing.assert_array_equal(getattr(replayed[request_id], name), getattr(rollout, name))
    assert any(len(set(rollout.weight_version.tolist())) == 2 for rollout in recorded.values())


def test_the_meter_adds_up(tiny: Any, record: Callable[..., Recorder]):
    recorder = record(tiny.batcher(weights=False))
    time.sleep(0.12)
    assert recorder.thread.usage() == GeneratorUsage()  # without weights there is nothing to measure
    recorder.thread.set_weights(tiny.params(0), 0)
    began = time.monotonic()
    recorder.thread.submit([tiny.request(i, 5) for i in range(6)])
    num_tokens = sum(len(r.completion_ids) for r in recorder.collect(6)[1:])
    recorder.wait_for(lambda: recorder.thread.usage().num_tokens == num_tokens)

    first = recorder.thread.usage()
    recorder.wait_for(lambda: recorder.thread.usage().idle > first.idle + 0.15)
    recorder.thread.is_at_bound = True
    second = recorder.thread.usage()
    recorder.wait_for(lambda: recorder.thread.usage().idle_at_bound > 0.1)
    third = recorder.thread.usage()
    elapsed = time.monotonic() - began
    assert 0 < first.busy == second.busy == third.busy
    assert third.busy + third.idle <= elapsed + 0.06  # the poll that began before the weights came
    assert first.idle_at_bound == 0.0
    spent = third - second
    assert spent.num_tokens == 0
    assert spent.busy == 0.0
    assert 0.1 < spent.idle_at_bound <= spent.idle + 1e-9
    assert third.num_tokens == num_tokens


def test_a_request_that_cannot_be_served_is_reported_once(tiny: Any, record: Callable[..., Recorder]):
    recorder = record(tiny.batcher())
    recorder.thread.submit([tiny.request(0, 3), tiny.request(1, 13)])
    error = recorder.reports.get(timeout=DEADLINE)
    assert isinstance(error, MagistralError)
    assert str(error).startswith("Prompt of request 1 has 13 tokens")
    recorder.thread.submit([tiny.request(2, 3)])  # to a dead thread: no harm
    recorder.thread.stop(DEADLINE)
    assert recorder.reports.empty()


def test_requests_before_any_weights_are_a_failure(tiny: Any, record: Callable[..., Recorder]):
    recorder = record(tiny.batcher(weights=False))
    recorder.thread.submit([tiny.request(0, 3)])
    error = recorder.reports.get(timeout=DEADLINE)
    assert isinstance(error, ValueError)
    assert "no weights yet" in str(error)


def test_versions_that_go_back_are_a_failure(tiny: Any, record: Callable[..., Recorder]):
    recorder = record(tiny.batcher(weights=False))
    recorder.thread.set_weights(tiny.params(0), 3)
    assert isinstance(recorder.reports.get(timeout=DEADLINE), WeightVersion)
    recorder.thread.set_weights(tiny.params(1), 2)
    error = recorder.reports.get(timeout=DEADLINE)
    assert isinstance(error, ValueError)
    assert "weight version 2 after 3" in str(error)


def test_an_error_of_a_callback_is_a_failure_too(tiny: Any, record: Callable[..., Recorder]):
    def refuse(rollout: Rollout):
        raise RuntimeError(f"no room for {rollout.request_id}")

    recorder = record(tiny.batcher(), on_rollout=refuse)
    recorder.thread.submit([tiny.request(5, 3)])
    report = recorder.reports.get(timeout=DEADLINE)
    if isinstance(report, WeightVersion):
        report = recorder.reports.get(timeout=DEADLINE)
    assert str(report) == "no room for 5"


def test_stopping_gives_up_what_runs_and_frees_its_pages(tiny: Any, record: Callable[..., Recorder]):
    batcher = tiny.batcher(stop_ids=(1000, 1001, 1002))
    recorder = record(batcher)
    recorder.thread.submit([tiny.request(i, 12) for i in range(3000)])
    recorder.collect(1)
    began = time.monotonic()
    recorder.thread.stop(DEADLINE)
    assert time.monotonic() - began < DEADLINE / 2
    assert (batcher.num_running, batcher.num_waiting) == (0, 0)
    assert batcher.allocator.num_free == batcher.allocator.num_pages
    num_left = 0
    while not recorder.reports.empty():
        assert isinstance(recorder.reports.get(), Rollout | WeightVersion)
        num_left += 1
    assert num_left < 2999


def test_a_thread_that_does_not_stop_in_time_is_named(tiny: Any):
    release = queue.SimpleQueue()
    entered = queue.SimpleQueue()

    def block(rollout: Rollout):
        entered.put(rollout)
        release.get(timeout=DEADLINE)

    recorder = Recorder(tiny.batcher(), on_rollout=block)
    recorder.thread.start()
    recorder.thread.submit([tiny.request(5, 3)])
    entered.get(timeout=DEADLINE)
    with pytest.raises(TimeoutError, match=r"the generator did not stop within 0\.01 s"):
        recorder.thread.stop(0.01)
    release.put(None)
    recorder.thread.stop(DEADLINE)
