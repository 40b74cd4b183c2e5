"""Magistral's asynchronous loop (report §3), wired to real roles.

    prompts → generators → verifier processes → groups → trainer thread → publish → generators

The generators sample all the time and swap weights in the middle of completions; verifiers stream; the trainer takes
fixed numbers of sequences. What happens when is decided by `schedule.machine` alone; here its actions meet arrays.
Whether there is one generator in a thread or several in processes, the loop has one handle to all of them.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from magistral_jax.checkpoint import REWARD, Checkpoints
from magistral_jax.generate.handle import Generator, GeneratorUsage, Intake, Notice, Reports
from magistral_jax.metrics import MetricsWriter, RolloutWriter
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.pytrees import TrainState
from magistral_jax.records import Graded, MagistralError, Reward, Rollout, WeightVersion
from magistral_jax.schedule import event_log, machine
from magistral_jax.schedule.curriculum import Curriculum
from magistral_jax.schedule.event_log import EventLog
from magistral_jax.schedule.holdings import Assignment, Group, Holdings
from magistral_jax.schedule.live import Inbox, Report, RoleFailed, RoleFailedError, drive
from magistral_jax.schedule.observe import FilterWatch, describe_rollouts
from magistral_jax.schedule.state import Rules, State, to_saved
from magistral_jax.verify.pool import PoolMetrics, VerifierPool

# (state, groups, version, stage of the curriculum) -> (state, metrics, advantages)
Update = Callable[[TrainState, Sequence[Sequence[Graded]], int, int], tuple[TrainState, dict[str, float], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the loop is made of; each is a value, so that a test or a study can put another in its place."""

    assign: Callable[[int], Assignment]
    decode: Callable[[np.ndarray], str]
    extract_answer: Callable[[str], str | None]
    make_generator: Callable[[Reports], Generator]
    make_verifiers: Callable[[Callable[[int, Reward], None]], VerifierPool]
    update: Update
    publish: Callable[[Any], Any]
    checkpoints: Checkpoints
    metrics: MetricsWriter
    rollouts: RolloutWriter
    log: EventLog
    on_step: Callable[[int, dict[str, float]], None]
    warn: Callable[[str], None]
    curriculum: Curriculum | None = None


class AsyncLoop:
    """One run of the loop. `inbox` takes `StopRequested` from a signal handler at any time.

    Args:
      rules: Of the run.
      schedule: Where to begin.
      train_state: Parameters and optimizer to begin with; consumed.
      stages: What the loop is made of.
      deadline: Seconds without any report after which the run is given up.
      seconds_before: What the run took before a resume: the metric `wall_seconds` counts on from it.
      groups: The complete groups of the checkpoint that the run is resumed from, as `Holdings` packed them; None where
        it begins.
      call: A stage that is to begin at once, by hand.
    """

    def __init__(
        self,
        rules: Rules,
        schedule: State,
        train_state: TrainState,
        stages: Stages,
        *,
        deadline: float,
        seconds_before: float = 0.0,
        groups: bytes | None = None,
        call: machine.StageBegan | None = None,
    ) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self._rules, self._schedule, self._train_state = rules, schedule, train_state
        self._stages, self._deadline = stages, deadline
        self._holdings = Holdings(rules.group_size, stages.assign, stages.decode)
        if groups is not None:
            self._holdings.unpack(groups)
        self._first_events: list[machine.Event] = [machine.Started() if groups is None else machine.Resumed()]
        self._first_events += [] if call is None else [call]
        self._sent: dict[int, int] = {}  # fingerprint of each published version
        self._step, self._in_trainer = schedule.num_done, tuple[int, ...]()
        self._fingerprint = 0  # of the trainer's parameters, after the last step
        self._rewards: list[float] = []  # mean of each batch since the last checkpoint
        self._usage = GeneratorUsage()
        self._pool_metrics = PoolMetrics()
        self._trainer: threading.Thread | None = None  # of the running step
        self._step_began = time.monotonic()
        self._began = self._step_began - seconds_before
        self._filtered = FilterWatch(rules.at(schedule.stage).batch_size // rules.group_size)

    @property
    def train_state(self) -> TrainState:
        """Parameters and optimizer after the run."""
        return self._train_state

    def run(self) -> State:
        """Train until the last step, a stop request, or a failure; returns the schedule as it ended.

        Raises:
          MagistralError: A role failed; the sentence says which and how.
        """
        stages = self._stages
        self._generator = stages.make_generator(
            Reports(
                on_rollout=self._on_rollout,
                on_weights=self.inbox.put,
                on_failure=lambda error: self.inbox.put(RoleFailed("generator", error)),
                on_notice=self.inbox.put,
                on_intake=self.inbox.put,
            )
        )
        with stages.make_verifiers(self._on_reward) as self._verifiers:
            self._prepare_weights()
            self._publish(self._schedule.num_done)  # weights come before the first rollout, and before any others
            self._generator.start()
            for event in self._first_events:
                self.inbox.put(event)
            try:
                self._schedule = drive(
                    self._rules,
                    self._schedule,
                    self.inbox,
                    act=self._act,
                    on_report=self._note,
                    record=self._record,
                    deadline=self._deadline,
                )
            finally:
                self._verifiers.cancel_all()
                hung = self._stop_threads()
            if hung:
                raise RoleFailedError(f"The {' and the '.join(hung)} did not stop within {self._deadline:g} s.")
        stages.checkpoints.wait()
        return self._schedule

    def usage(self) -> GeneratorUsage:
        """What the generators did with their time."""
        return self._generator.usage()

    # ---- actions ----

    def _act(self, state: State, action: machine.Action) -> None:
        stages = self._stages
        self._generator.is_at_bound = machine.is_at_bound(self._rules, state)
        curriculum = stages.curriculum
        if curriculum is not None and (event := curriculum.follow(action, self._holdings.look)):
            self.inbox.put(event)  # before this batch can end
        match action:
            case machine.Dispatch(group_id):
                self._generator.submit(self._holdings.requests(group_id))
            case machine.Verify(request_id):
                self._verify(request_id)
            case machine.Discard(group_id, reason):
                _, graded = self._holdings.take(group_id)
                if reason == "zero_variance" and (warning := self._filtered.add(graded)):
                    stages.warn(warning)
            case machine.Train(step, group_ids):
                self._step = step + 1
                self._filtered.reset()
                groups, self._in_trainer = [self._holdings.take(group_id) for group_id in group_ids], group_ids
                depths: dict[str, int | float] = {"in_flight": state.num_in_flight, "ready_groups": len(state.ready)}
                depths |= {f"total_{how}": count for how, count in state.counts.items()}
                depths |= {} if curriculum is None else curriculum.metrics()
                work = (step, groups, depths, state.stage)
                self._trainer = threading.Thread(target=self._train, args=work, name="trainer", daemon=True)
                self._trainer.start()
            case machine.Publish(version):
                self._publish(version)
            case machine.Checkpoint(step):
                saved = to_saved(state)
                groups = self._holdings.pack(group_id for group_id, _ in saved["ready"])
                saved["log_position"] = stages.log.sync()
                if curriculum is not None:
                    saved["curriculum"] = curriculum.to_saved(state.oldest_group())
                saved[REWARD], self._rewards = float(np.mean(self._rewards)) if self._rewards else None, []
                stages.checkpoints.save(step, self._train_state, saved, groups)
            case machine.OpenPool() | machine.Finish():
                pass

    def _verify(self, request_id: int) -> None:
        try:
            self._verifiers.submit(self._holdings.item(request_id))
        except MagistralError as error:
            self.inbox.put(RoleFailed("verifier pool", error))

    def _publish(self, version: int) -> None:
        self._sent[version] = fingerprint(self._weights)
        self._generator.set_weights(self._weights, version)

    def _prepare_weights(self) -> None:
        """What is to be published next, and its mark: in the trainer's thread, so that the driver need not wait."""
        self._weights = self._stages.publish(self._train_state.params)
        self._fingerprint = identify(self._train_state.params, self._weights)

    def _stop_threads(self) -> list[str]:
        """End generator and trainer; names of those that hang, which are left behind (their threads are daemons)."""
        end = time.monotonic() + self._deadline
        hung = []
        try:
            self._generator.stop(self._deadline)
        except TimeoutError:
            hung.append("generator")
        if self._trainer is not None:
            self._trainer.join(max(end - time.monotonic(), 0.0))
            if self._trainer.is_alive():
                hung.append("trainer")
        return hung

    # ---- the trainer thread ----

    def _train(self, step: int, taken: list[Group], depths: dict[str, int | float], stage: int) -> None:
        try:
            self._train_step(step, taken, depths, stage)
        except Exception as error:
            self.inbox.put(RoleFailed("trainer", error))
        else:
            self.inbox.put(machine.Trained())

    def _train_step(self, step: int, taken: list[Group], depths: dict[str, int | float], stage: int) -> None:
        began = time.monotonic()
        groups = [graded for _, graded in taken]
        self._train_state, metrics, advantages = self._stages.update(self._train_state, groups, step, stage)
        self._prepare_weights()
        now = time.monotonic()
        num_tokens = sum(graded.rollout.num_tokens for group in groups for graded in group)
        metrics |= describe_rollouts(groups, step) | {name: float(count) for name, count in depths.items()}
        self._rewards.append(metrics["reward"])
        metrics |= {
            "train_seconds": now - began,
            "step_seconds": now - self._step_began,
            "wall_seconds": now - self._began,
            "tokens_per_second": num_tokens / (now - self._step_began),
        }
        metrics |= self._generator_metrics() | self._verifier_metrics()
        self._step_began = now
        self._stages.metrics.write(step + 1, metrics)
        for (prompt, graded), values in zip(taken, advantages, strict=True):
            for member, value in zip(graded, values, strict=True):
                text = self._stages.decode(member.rollout.completion_ids)
                answer = self._stages.extract_answer(text)
                self._stages.rollouts.write(step + 1, prompt, member, completion=text, answer=answer, advantage=value)
        self._stages.on_step(step + 1, metrics)

    def _generator_metrics(self) -> dict[str, float]:
        usage = self._generator.usage()
        spent, self._usage = usage - self._usage, usage
        total = max(spent.busy + spent.idle, 1e-9)
        return {
            "generator_idle_share": spent.idle / total,
            "generator_idle_unbounded_share": (spent.idle - spent.idle_at_bound) / total,
            "sampled_tokens_per_second": spent.num_tokens / total,
            "generators_lost": float(spent.num_lost),
        }

    def _verifier_metrics(self) -> dict[str, float]:
        """Means over the completions graded since the last step, and counts."""
        before, now = self._pool_metrics, self._verifiers.metrics()
        self._pool_metrics = now
        num_graded = max(now.num_graded - before.num_graded, 1)
        return {
            "verify_queue_seconds": (now.queue_seconds - before.queue_seconds) / num_graded,
            "verify_seconds": (now.verify_seconds - before.verify_seconds) / num_graded,
            "verifier_kills": float(now.num_kills - before.num_kills),
            "verifier_retries": float(now.num_retries - before.num_retries),
        }

    # ---- what the roles report ----

    def _on_rollout(self, rollout: Rollout) -> None:
        self._holdings.rollouts[rollout.request_id] = rollout
        self.inbox.put(machine.Generated(rollout.request_id))

    def _on_reward(self, request_id: int, reward: Reward) -> None:
        self._holdings.rewards[request_id] = reward
        failed = reward.verdict.is_infrastructure_failure
        self.inbox.put(machine.Verified(request_id, None if failed else reward.total))

    def _check_receipt(self, receipt: WeightVersion) -> None:
        """A generator says what it holds; anything but what was sent is a bug that must not go unnoticed."""
        expected = self._sent.get(receipt.version)  # kept: another generator may come to it later
        if expected != receipt.fingerprint:
            raise MagistralError(
                f"Generator {receipt.generator} holds weights with fingerprint {receipt.fingerprint:#010x} as version "
                f"{receipt.version}, the trainer sent {expected!r}: rollouts would come from wrong weights."
            )

    # ---- the event log ----

    def _note(self, report: Report) -> None:
        """What decides nothing: it is checked, said, and written down."""
        log = self._stages.log
        match report:
            case WeightVersion(version, fingerprint, generator):
                self._check_receipt(report)
                log.write(event_log.Holds(generator, version, fingerprint))
            case Notice(kind, generator, sentence):
                self._stages.warn(sentence)
                log.write(event_log.Noted(kind, generator, sentence))
            case Intake():
                ids = list(report.request_ids)
                log.write(event_log.Took(report.engine, report.generator, report.step, ids, report.version))

    def _record(self, event: machine.Event) -> None:
        """Write an event down, with what a replay is compared with."""
        match event:
            case machine.Generated(request_id):
                record = event_log.describe_rollout(self._holdings.rollouts[request_id])
            case machine.Verified(request_id):
                record = event_log.describe_reward(request_id, self._holdings.rewards[request_id])
            case machine.Trained():
                record = event_log.Trained(self._step, list(self._in_trainer), self._fingerprint)
            case other:
                record = event_log.Happened(type(other).__name__, list(dataclasses.astuple(other)))
        self._stages.log.write(record)


def identify(params: Any, published: Any) -> int:
    """Fingerprint of the trainer's parameters; where other processes hold parts of them, of what was published."""
    is_here = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
    return fingerprint(params if is_here else published)
