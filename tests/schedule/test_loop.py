"""The loop with a real engine and real threads, and verifiers and updates that are played.

Whatever the verifiers' delays, nothing is lost or doubled; whoever fails, the run ends in order and says who it was.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.fleet import GeneratorFleet
from magistral_jax.generate.handle import Generator, Reports
from magistral_jax.generate.launch import WorkerProcess
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.process import GeneratorProcess
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.metrics import MetricsWriter, RolloutWriter, read_json_lines
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params
from magistral_jax.publish.same_process import make_publish
from magistral_jax.publish.shared_memory import SharedWeights
from magistral_jax.pytrees import TrainState
from magistral_jax.records import Graded, MagistralError, Problem, Prompt, Reward, SamplingParams, Verdict
from magistral_jax.schedule.event_log import LOG_FILE, EventLog, Noted, Took, Trained, Verified, read_log
from magistral_jax.schedule.holdings import Assignment
from magistral_jax.schedule.live import RoleFailedError
from magistral_jax.schedule.loop import AsyncLoop, Stages, Update
from magistral_jax.schedule.machine import Rules, State, StopRequested, from_saved
from magistral_jax.verify.pool import PoolMetrics, VerifierPool, VerifyItem

MODEL = ModelConfig(vocab_size=20, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16)
ENGINE = GenerationConfig(
    num_slots=6, page_size=4, max_prompt_tokens=4, max_new_tokens=24, decode_block=2, prefill_rows=2
)
RULES = Rules(
    group_size=2,
    batch_size=4,
    num_steps=4,
    num_async=12,
    max_ready=4,
    max_staleness=4,
    checkpoint_every=2,
    filter_zero_variance=True,
)
PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
PUBLISH = make_publish(MODEL, jnp.dtype("float32"))
PATIENCE = 120.0
SAMPLING = SamplingParams(1.0, 1.0, 0, ENGINE.max_new_tokens)

OnResult = Callable[[int, Reward], None]
Judge = Callable[[int], Verdict | None]
Groups = Sequence[Sequence[Graded]]
R = TypeVar("R")


class FakePool(VerifierPool):
    """Verifiers that answer after a random time, each from a thread of its own.

    `judge(request_id)` gives the verdict, and None for no answer at all. The reward is that of the parity of the
    request, so that no group is without variance.
    """

    def __init__(self, on_result: OnResult, judge: Judge, seed: int, longest: float) -> None:
        self._deliver, self._judge, self._longest = on_result, judge, longest
        self._random = random.Random(seed)
        self.submitted: list[VerifyItem] = []
        self.is_cancelled = self.is_closed = False
        self._timers: list[threading.Timer] = []

    def submit(self, item: VerifyItem) -> None:
        self.submitted.append(item)
        verdict = self._judge(item.request_id)
        if verdict is None:
            return
        correctness = 0.9 * (item.request_id % 2) if verdict is Verdict.CORRECT else 0.0
        reward = Reward(verdict, 0.1, correctness, 0.0, 0.0, path="", seconds=0.0)
        timer = threading.Timer(self._random.uniform(0, self._longest), self._answer, (item.request_id, reward))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _answer(self, request_id: int, reward: Reward) -> None:
        if not self.is_cancelled:
            self._deliver(request_id, reward)

    def cancel_all(self) -> int:
        self.is_cancelled = True
        return 0

    def metrics(self) -> PoolMetrics:
        """As if each completion had waited for 2 s, been graded for 3 s, and killed a worker."""
        num = len(self.submitted)
        return PoolMetrics(num_graded=num, queue_seconds=2.0 * num, verify_seconds=3.0 * num, num_kills=num)

    def close(self) -> None:
        self.is_closed = True
        for timer in self._timers:
            timer.join(PATIENCE)


class SlowBatcher(ContinuousBatcher):
    """An engine that is the bottleneck: when a batch is full, other completions are always under way."""

    def step(self) -> list[Any]:
        time.sleep(0.005)
        return super().step()


class FakeCheckpoints(Checkpoints):
    """Keeps what would be saved."""

    def __init__(self):
        self.saved: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.groups: dict[int, bytes] = {}

    def save(self, step: int, state: TrainState, schedule: dict[str, Any], groups: bytes = b"") -> None:
        self.saved[step] = (jax.tree.map(np.asarray, state.params), json.loads(json.dumps(schedule)))
        self.groups[step] = groups

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Run:
    """One loop and all that can be seen of it."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        num_steps: int = RULES.num_steps,
        schedule: State | None = None,
        judge: Judge = lambda request_id: Verdict.CORRECT,
        longest_delay: float = 0.05,
        seed: int = 0,
        update: Update | None = None,
        train_state: TrainState | None = None,
        deadline: float = PATIENCE,
        batcher: ContinuousBatcher | None = None,
        make_generator: Callable[[Reports], Generator] | None = None,
        resumed_step: int | None = None,
        groups: bytes | None = None,
        log_position: int | None = None,
    ) -> None:
        self.folder, self.rules = folder, dataclasses.replace(RULES, num_steps=num_steps)
        folder.mkdir(exist_ok=True)
        self.batches: list[tuple[int, list[Any]]] = []  # (version, groups) of each update
        self.warnings: list[str] = []
        self.checkpoints = FakeCheckpoints()
        self.pool: FakePool | None = None
        self.batcher = batcher or ContinuousBatcher(MODEL, ENGINE, (0, 1), seed=3)
        # Each run owns its arrays: an update may consume them.
        state = train_state or TrainState(jax.tree.map(jnp.copy, PARAMS), {}, jnp.zeros((), jnp.int32))
        self.metrics = MetricsWriter(folder, resumed_step=resumed_step)
        self.rollouts = RolloutWriter(folder, resumed_step=resumed_step)
        self.log = EventLog(folder / LOG_FILE, log_position)

        def make_verifiers(on_result: OnResult) -> FakePool:
            self.pool = FakePool(on_result, judge, seed, longest_delay)
            return self.pool

        stages = Stages(
            assign=lambda group_id: Assignment(self.prompt_at(group_id), SAMPLING),
            decode=lambda ids: " ".join(map(str, ids)),
            extract_answer=lambda text: text[-1:],
            make_generator=make_generator or functools.partial(GeneratorThread, self.batcher),
            make_verifiers=make_verifiers,
            update=update or self.update,
            publish=PUBLISH,
            checkpoints=self.checkpoints,
            metrics=self.metrics,
            rollouts=self.rollouts,
            log=self.log,
            on_step=lambda step, metrics: None,
            warn=self.warn,
        )
        self.loop = AsyncLoop(self.rules, schedule or State(), state, stages, deadline=deadline, groups=groups)

    def warn(self, sentence: str) -> None:
        """The user reads it and gives up."""
        self.warnings.append(sentence)
        self.loop.inbox.put(StopRequested())

    @staticmethod
    def prompt_at(cursor: int) -> Prompt:
        ids = np.array([2, 3 + cursor % 7, 10 + cursor % 10], np.int32)
        return Prompt(Problem(f"p{cursor}", f"Question {cursor}", "7"), ids, f"Question {cursor}")

    def update(
        self, state: TrainState, groups: Groups, version: int, stage: int
    ) -> tuple[TrainState, dict[str, float], np.ndarray]:
        """Any change of the weights will do."""
        self.batches.append((version, [list(group) for group in groups]))
        params = jax.tree.map(lambda leaf: leaf * 1.01, state.params)
        rewards = np.array([[graded.reward.total for graded in group] for group in groups])
        return TrainState(params, state.opt_state, state.num_updates + 1), {"loss": 0.0}, rewards

    def run(self):
        try:
            return self.loop.run()
        finally:
            for file in (self.metrics, self.rollouts, self.log):
                file.close()

    @property
    def trained(self):
        """Request ids in the order of training."""
        return [graded.rollout.request_id for _, groups in self.batches for group in groups for graded in group]

    def records(self, kind: type[R]) -> list[R]:
        """Of the event log."""
        return [record for _, record in read_log(self.folder / LOG_FILE) if isinstance(record, kind)]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def threads_left():
    return [t.name for t in threading.enumerate() if t.name in ("generator", "trainer") and t.is_alive()]


# --- nothing lost, nothing doubled -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, State]:
    """A run in which completions see weight swaps; one verification in six fails."""
    judge = lambda request_id: Verdict.SANDBOX_ERROR if request_id % 6 == 3 else Verdict.CORRECT
    batcher = SlowBatcher(MODEL, ENGINE, (0, 1), seed=3)
    run = Run(tmp_path_factory.mktemp("usual"), judge=judge, longest_delay=0.01, batcher=batcher)
    return run, run.run()


@pytest.mark.parametrize(("seed", "longest_delay"), [(1, 0.0), (2, 0.2)])
def test_nothing_is_lost_or_doubled(tmp_path: pathlib.Path, seed: int, longest_delay: float):
    run = Run(tmp_path, seed=seed, longest_delay=longest_delay)
    state = run.run()
    check_books(run, state)
    assert sorted(run.trained)[:4] == [0, 1, 2, 3]
    assert threads_left() == []


def test_nothing_is_lost_when_verifiers_fail(usual: tuple[Run, State]):
    check_books(*usual)


def check_books(run: Run, state: State) -> None:
    rules = run.rules
    assert state.num_done == rules.num_steps
    assert [version for version, _ in run.batches] == list(range(rules.num_steps))
    assert len(run.trained) == len(set(run.trained)) == rules.num_steps * rules.batch_size
    counts = dict(state.counts)
    assert counts.pop("dispatched") == sum(counts.values()) + rules.group_size * len(state.outstanding())
    assert counts["trained"] == len(run.trained)
    # Each completion went to the verifiers once, as it was sampled, with the problem of its group.
    assert run.pool is not None
    ids = [item.request_id for item in run.pool.submitted]
    assert len(set(ids)) == len(ids)
    sampled = {g.rollout.request_id: g.rollout for _, groups in run.batches for group in groups for g in group}
    for item in run.pool.submitted:
        assert item.problem.id == f"p{item.request_id // rules.group_size}"
        assert (item.group, item.group_size) == (item.request_id // rules.group_size, rules.group_size)
        assert item.test_seed == item.group  # so all completions of a group get the same tests
        if item.request_id in sampled:
            rollout = sampled[item.request_id]
            assert item.completion == " ".join(map(str, rollout.completion_ids))
            assert (item.num_tokens, item.truncated) == (len(rollout.completion_ids), rollout.truncated)
    assert run.pool.is_cancelled
    assert run.pool.is_closed
    for _, groups in run.batches:
        for group in groups:
            assert len({graded.rollout.request_id // rules.group_size for graded in group}) == 1
            assert [graded.rollout.request_id % rules.group_size for graded in group] == list(range(rules.group_size))
            np.testing.assert_array_equal(
                group[0].rollout.prompt_ids, run.prompt_at(group[0].rollout.request_id // 2).token_ids
            )


def test_a_verifiers_failure_is_never_a_reward(usual: tuple[Run, State]):
    run, state = usual
    assert state.counts["verifier_failed"] > 0
    assert not any(request_id % 6 in (2, 3) for request_id in run.trained)  # neither it nor the rest of its group
    for verified in run.records(Verified):
        odd = verified.request_id % 2
        assert verified.parts == (None if verified.request_id % 6 == 3 else [0.1, 0.9 * odd, 0.0, 0.0])


def test_a_policy_that_is_never_rewarded_is_not_left_to_itself(tmp_path: pathlib.Path):
    run = Run(tmp_path, judge=lambda request_id: Verdict.WRONG)
    state = run.run()
    assert state.num_done == 0
    assert state.counts["zero_variance"] >= 4 * RULES.batch_size
    assert "groups in a row were filtered" in run.warnings[0]
    assert "never rewarded" in run.warnings[0]


def test_tokens_carry_the_version_that_sampled_them(usual: tuple[Run, State]):
    run, _ = usual
    seen = collections.Counter()
    for version, groups in run.batches:
        for group in groups:
            for graded in group:
                versions = graded.rollout.weight_version
                assert (np.diff(versions) >= 0).all()
                assert 0 <= versions[0] <= versions[-1] <= version
                assert version - versions[0] <= run.rules.max_staleness
                seen[len(set(versions.tolist()))] += 1
    assert sum(count for num_versions, count in seen.items() if num_versions > 1) > 0  # a swap in mid-completion
    metrics = list(read_json_lines(run.folder / "metrics.jsonl"))
    assert max(line["swapped_token_share"] for line in metrics) > 0


def test_what_is_written_is_what_was_trained(usual: tuple[Run, State]):
    run, state = usual
    assert run.pool is not None
    metrics, rollouts = run.lines("metrics.jsonl"), run.lines("rollouts.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    trained = [graded for _, groups in run.batches for group in groups for graded in group]
    assert len(rollouts) == len(trained)
    for line, graded in zip(rollouts, trained, strict=True):
        assert line["problem"] == f"p{graded.rollout.request_id // 2}"
        assert line["completion"] == " ".join(map(str, graded.rollout.completion_ids))
        assert line["advantage"] == pytest.approx(graded.reward.total)  # the fake update hands the rewards back
    for line, (version, groups) in zip(metrics, run.batches, strict=True):
        members = [graded for group in groups for graded in group]
        assert line["staleness_max"] == max(version - graded.rollout.weight_version.min() for graded in members)
        assert 0 <= line["generator_idle_unbounded_share"] <= line["generator_idle_share"] <= 1
        assert line["step_seconds"] >= line["train_seconds"] >= 0
        assert 0 <= line["in_flight"] <= RULES.num_async
        assert line.get("total_trained", 0) == 4 * version
        assert (line["verify_queue_seconds"], line["verify_seconds"]) in ((2.0, 3.0), (0.0, 0.0))  # 0: none was graded
    assert sum(line["verifier_kills"] for line in metrics) <= len(run.pool.submitted)
    assert state.counts["trained"] == 16
    assert [trained.step for trained in run.records(Trained)] == [1, 2, 3, 4]
    assert [i for trained in run.records(Trained) for i in trained.group_ids] == [i // 2 for i in run.trained[::2]]
    assert list(run.checkpoints.saved) == [2, 4]


def test_checkpoints_hold_the_weights_of_their_step(usual: tuple[Run, State]):
    run, _ = usual
    for step, (params, schedule) in run.checkpoints.saved.items():
        factor = np.float32(1.0)
        for _ in range(step):
            factor *= np.float32(1.01)
        expected = jax.tree.map(lambda leaf, factor=factor: np.asarray(leaf) * factor, PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)
        assert schedule["num_done"] == step


# --- generators in processes -----------------------------------------------------------------------------------------


def pid_of(process: GeneratorProcess) -> int:
    assert isinstance(process.endpoint, WorkerProcess)
    return process.endpoint.process.pid


class Killing(GeneratorFleet):
    """Kills a generator that is at work, just when it has been given another group."""

    killed: int | None = None

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        before = [process.num_unfinished for process in self.processes]
        super().submit(requests)
        (chosen,) = (p for p, count in zip(self.processes, before, strict=True) if p.num_unfinished > count)
        if self.killed is None and chosen.usage().num_tokens:
            self.killed = chosen.number
            os.kill(pid_of(chosen), signal.SIGKILL)


class InProcesses(Run):
    """Two generators in processes of their own, of which one is killed."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder, make_generator=self.make_generator)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def make_generator(self, reports: Reports) -> Generator:
        weights = SharedWeights()
        settings = EngineSettings(MODEL, ENGINE, (0, 1), 3, "float32")
        make = lambda number, reports: GeneratorProcess(
            number,
            settings,
            weights,
            reports,
            launch=lambda: WorkerProcess(self.folder / f"generator_{number}.log", {}),
        )
        self.fleet = Killing(make, weights, reports, num_generators=2, max_restarts=1)
        return self.fleet


def test_nothing_is_lost_or_doubled_when_a_generator_is_killed(tmp_path: pathlib.Path):
    run = InProcesses(tmp_path)
    check_books(run, run.run())
    (warning,) = run.warnings
    assert re.match(rf"Generator {run.fleet.killed} was killed by SIGKILL\. Its [1-9]\d* unfinished", warning)
    assert run.fleet.killed is not None
    assert run.records(Noted) == [Noted("generator_lost", run.fleet.killed, warning)]
    # Its replacement is another engine of the same generator, and may come when the rest is done already.
    replacement = (2, run.fleet.killed)
    at_work = {(took.engine, took.generator) for took in run.records(Took)}
    assert at_work | {replacement} == {(0, 0), (1, 1), replacement}
    metrics = run.lines("metrics.jsonl")
    assert sum(line["generators_lost"] for line in metrics) == 1
    assert all(0 <= line["generator_idle_share"] <= 1 for line in metrics)
    assert all(not pathlib.Path(f"/proc/{pid_of(process)}").exists() for process in run.fleet.processes)
    # Both have worked, and what was begun again is what a whole run in a thread samples: the ids decide.
    sampled = {g.rollout.request_id: g.rollout for _, groups in run.batches for group in groups for g in group}
    first = {i: r.completion_ids for i, r in sampled.items() if not r.weight_version.any()}
    assert first
    batcher = ContinuousBatcher(MODEL, ENGINE, (0, 1), seed=3)
    batcher.set_weights(PUBLISH(PARAMS), 0)
    for request_id in first:
        prompt = run.prompt_at(request_id // 2).token_ids
        batcher.submit(GenerationRequest(request_id, prompt, SAMPLING))
    while batcher.num_running or batcher.num_waiting:
        for rollout in batcher.step():
            np.testing.assert_array_equal(rollout.completion_ids, first[rollout.request_id])


# --- stop and go on --------------------------------------------------------------------------------------------------


def test_a_stop_and_a_resume_train_everything_once(tmp_path: pathlib.Path):
    class Stopping(Run):
        def update(self, state: TrainState, groups: Groups, version: int, stage: int) -> Any:
            if version == 1:
                self.loop.inbox.put(StopRequested())
            return super().update(state, groups, version, stage)

    first = Stopping(tmp_path / "run", seed=4)
    state = first.run()
    assert state.num_done == 2  # the running step was finished
    assert max(first.checkpoints.saved) == 2
    _, saved = first.checkpoints.saved[2]

    second = Run(
        tmp_path / "run",
        schedule=from_saved(saved),
        seed=5,
        train_state=first.loop.train_state,
        resumed_step=2,
        groups=first.checkpoints.groups[2],
        log_position=saved["log_position"],
    )
    state = second.run()
    assert state.num_done == 4
    together = first.trained + second.trained
    assert len(set(together)) == len(together) == 16
    # What was on its way at the stop comes again, and nothing of what was done.
    assert set(saved["again"]).isdisjoint(request_id // 2 for request_id in first.trained)
    counts = dict(state.counts)
    assert counts.pop("dispatched") == sum(counts.values()) + 2 * len(state.outstanding())
    assert [line["step"] for line in second.lines("metrics.jsonl")] == [1, 2, 3, 4]
    # What was complete is trained as it was; what is sampled has the weights before the first rollout.
    kept = {group_id for group_id, _ in saved["ready"]}
    for _, groups in second.batches:
        for member in (member for group in groups for member in group):
            if member.rollout.request_id // 2 not in kept:
                assert member.rollout.weight_version.min() >= 2
    assert kept <= {request_id // 2 for request_id in second.trained} | set(state.outstanding())
    assert [trained.step for trained in second.records(Trained)] == [1, 2, 3, 4]


# --- whoever fails ---------------------------------------------------------------------------------------------------


def test_a_generator_with_other_weights_ends_the_run(tmp_path: pathlib.Path):
    class Corrupted(ContinuousBatcher):
        """Holds something else than it was given, from the second version on."""

        def set_weights(self, params: dict[str, Any], version: int) -> None:
            if version:
                params = jax.tree.map(lambda leaf: leaf + 1e-6, params)
            super().set_weights(params, version)

    # Many steps: most prompts are dispatched after a publish, so the engine must have swapped.
    run = Run(tmp_path, num_steps=20, batcher=Corrupted(MODEL, ENGINE, (0, 1), seed=3))
    with pytest.raises(MagistralError, match=r"as version \d+, the trainer sent \d+: rollouts would come from wrong"):
        run.run()
    assert 1 <= len(run.batches) < 20
    assert run.pool is not None
    assert run.pool.is_closed
    assert threads_left() == []


def used_batcher(kind: type[ContinuousBatcher], *, is_stepped: bool) -> ContinuousBatcher:
    """An engine that has the first weights already, from an evaluation (then it has used them) or from a resume."""
    batcher = kind(MODEL, ENGINE, (0, 1), seed=3)
    ContinuousBatcher.set_weights(batcher, PUBLISH(PARAMS), 0)
    if is_stepped:
        batcher.step()
    return batcher


@pytest.mark.parametrize("is_stepped", [True, False])
def test_the_first_weights_are_checked_even_if_the_engine_has_some(tmp_path: pathlib.Path, is_stepped: bool):
    class Corrupted(ContinuousBatcher):
        def set_weights(self, params: dict[str, Any], version: int) -> None:
            super().set_weights(jax.tree.map(lambda leaf: leaf + 1e-6, params), version)

    run = Run(tmp_path / "corrupted", batcher=used_batcher(Corrupted, is_stepped=is_stepped))
    with pytest.raises(MagistralError, match="as version 0"):
        run.run()
    assert run.batches == []

    run = Run(tmp_path / "sound", batcher=used_batcher(ContinuousBatcher, is_stepped=is_stepped))
    check_books(run, run.run())


def test_a_generator_that_fails_ends_the_run_in_order(tmp_path: pathlib.Path):
    class Failing(SlowBatcher):
        """Breaks some time after the first swap."""

        num_steps = 0

        def step(self) -> list[Any]:
            self.num_steps += self.version > 0
            if self.num_steps == 3:
                raise RuntimeError("out of pages")
            return super().step()

    run = Run(tmp_path, num_steps=20, batcher=Failing(MODEL, ENGINE, (0, 1), seed=3))
    with pytest.raises(RoleFailedError, match=r"^The generator failed: RuntimeError\('out of pages'\)$"):
        run.run()
    # What was trained is saved, and what was on its way is to be dispatched again.
    done = len(run.batches)
    assert done >= 1
    params, schedule = run.checkpoints.saved[done]
    assert schedule["num_done"] == done
    assert set(schedule["again"]).isdisjoint(request_id // 2 for request_id in run.trained)
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, run.loop.train_state.params))
    assert threads_left() == []


def test_a_trainer_that_fails_is_named(tmp_path: pathlib.Path):
    def update(state: TrainState, groups: Groups, version: int, stage: int) -> Any:
        raise FloatingPointError("loss is not finite")

    run = Run(tmp_path, update=update)
    with pytest.raises(RoleFailedError, match=r"^The trainer failed: FloatingPointError\('loss is not finite'\)$"):
        run.run()
    assert run.checkpoints.saved == {}
    assert threads_left() == []


def test_a_trainer_that_hangs_is_named_and_left_behind(tmp_path: pathlib.Path):
    release = threading.Event()

    def update(state: TrainState, groups: Groups, version: int, stage: int) -> Any:
        release.wait(PATIENCE)
        raise ValueError("too late")

    run = Run(tmp_path, update=update, deadline=2.0)
    began = time.monotonic()
    with pytest.raises(RoleFailedError, match=r"^No role reported anything for 2 s .* The trainer has been at step 0"):
        run.run()
    assert time.monotonic() - began < PATIENCE / 2
    release.set()


def test_verifiers_that_hang_are_named_and_the_state_is_saved(tmp_path: pathlib.Path):
    run = Run(tmp_path, judge=lambda request_id: Verdict.CORRECT if request_id < 6 else None, deadline=3.0)
    with pytest.raises(RoleFailedError, match=r"6 groups are with the generator or the verifiers, 1 are ready"):
        run.run()
    params, schedule = run.checkpoints.saved[1]
    assert schedule["num_done"] == len(run.batches) == 1
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, run.loop.train_state.params))
    assert threads_left() == []


def test_a_pool_that_has_failed_ends_the_run_in_order(tmp_path: pathlib.Path):
    def judge(request_id: int) -> Verdict:
        if request_id >= 10:
            raise MagistralError("the verifier pool has failed: no room")
        return Verdict.CORRECT

    run = Run(tmp_path, judge=judge)
    with pytest.raises(RoleFailedError, match=r"^The verifier pool failed: .*no room"):
        run.run()
    assert list(run.checkpoints.saved) == [len(run.batches)]
    assert threads_left() == []
