"""A recorded run, done again: the same machine, fed by the event log; the same engines, verifiers and updates.

    record → compare what it says with what comes out now → event → machine → actions

Nothing waits for a clock here: each record is taken in its order, and what it tells of is made when its turn comes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from magistral_jax.generate.handle import Reports
from magistral_jax.generate.held import HeldEngine
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.pytrees import TrainState
from magistral_jax.records import Graded, MagistralError, Reward
from magistral_jax.schedule import machine
from magistral_jax.schedule.curriculum import Curriculum
from magistral_jax.schedule.event_log import (
    Generated,
    Happened,
    Holds,
    Record,
    Session,
    Trained,
    Verified,
    checksum,
    describe_reward,
    to_event,
)
from magistral_jax.schedule.holdings import Holdings
from magistral_jax.schedule.loop import Update, identify
from magistral_jax.schedule.observe import describe_rollouts
from magistral_jax.schedule.players import Players, read_scripts
from magistral_jax.schedule.state import Rules, State, to_saved
from magistral_jax.verify.pool import VerifyItem


@dataclasses.dataclass(frozen=True)
class Difference:
    """What came out otherwise than it was recorded."""

    what: str
    where: str
    recorded: Any
    replayed: Any

    @property
    def is_reward(self) -> bool:
        """A verdict may depend on the machine's speed; the recorded one is used, and all else can still be equal."""
        return self.what == "reward"

    def __str__(self) -> str:
        return f"{self.what} of {self.where}: recorded {self.recorded}, replayed {self.replayed}"


@dataclasses.dataclass(frozen=True)
class SessionStages:
    """What one session of a run is made of again."""

    rules: Rules
    update: Update
    publish: Callable[[Any], Any]
    initial_state: TrainState
    make_engine: Callable[[int, Reports], HeldEngine]
    deadline: float
    begin: str = ""  # the stage that was called for by hand


class Replay:
    """One pass over the records of a run.

    Args:
      records: All of them, from the first session on.
      stages_of: What a session is made of.
      holdings: Empty.
      curriculum: As it was before the first record; None where the run had none.
      grade: Begins to grade an item again and returns what waits for its reward; None takes the recorded rewards.
      metrics: Recorded metrics by step, to be compared as far as they do not depend on time.
      on_difference: Receives each difference; may raise to end the replay.
    """

    def __init__(
        self,
        records: Sequence[Record],
        stages_of: Callable[[Session], SessionStages],
        holdings: Holdings,
        curriculum: Curriculum | None = None,
        *,
        grade: Callable[[VerifyItem], Callable[[], Reward]] | None,
        metrics: Mapping[int, Mapping[str, Any]],
        on_difference: Callable[[Difference], None],
    ) -> None:
        self._records, self._stages_of, self._holdings = records, stages_of, holdings
        self._grade, self._metrics, self._on_difference = grade, metrics, on_difference
        self._curriculum = curriculum
        self._begun: list[machine.Event] = []  # stages and pools that are to come up in the log
        self._saved: dict[str, Any] | None = None  # the curriculum at the last checkpoint
        self._state = State(stage=0 if curriculum is None else curriculum.stage)
        self._train_state: TrainState | None = None
        self._batch: tuple[int, ...] = ()
        self._batch_stage = 0
        self._published: dict[int, int] = {}  # fingerprint of each version
        self._regraded: dict[int, Callable[[], Reward]] = {}
        self.num_completions = self.num_steps = 0

    @property
    def train_state(self) -> TrainState:
        """Parameters and optimizer as they are now."""
        assert self._train_state is not None
        return self._train_state

    @property
    def weights(self) -> Any:
        """What was published last."""
        return self._weights

    @property
    def schedule(self) -> State:
        """The schedule as it is now."""
        return self._state

    def run(self) -> Iterator[int]:
        """Do it; yields the number of records done so far, after each.

        Raises:
          MagistralError: The log speaks of what cannot have been, or an engine fails.
        """
        done = 0
        for session, records in split_sessions(self._records):
            self._begin(session)
            yield (done := done + 1)
            with self._players(records) as self._engines:
                self._publish(session.step)
                for record in records:
                    self._compare(record)
                    event = to_event(record)
                    if event is not None:
                        self._feed(event)
                    yield (done := done + 1)

    # ---- sessions ---------------------------------------------------------------------------------------------------

    def _begin(self, session: Session) -> None:
        self._stages = self._stages_of(session)
        initial = self._stages.initial_state
        if self._train_state is None:
            self._train_state = initial
        else:  # onto the devices of this session, which may be others
            self._train_state = jax.tree.map(
                lambda x, like: jax.device_put(x, like.sharding), self.train_state, initial
            )
        self._check("number of steps", "the session", session.step, self._state.num_done)
        self._weights = self._stages.publish(self.train_state.params)
        self._check_params(session.step, session.fingerprint)
        self._regraded.clear()

    def _players(self, records: Sequence[Record]) -> Players:
        requests = self._holdings.request
        return Players(read_scripts(records), self._stages.make_engine, requests, deadline=self._stages.deadline)

    def _publish(self, version: int) -> None:
        self._published[version] = fingerprint(self._weights)
        self._engines.publish(self._weights, version)

    # ---- what the records say ---------------------------------------------------------------------------------------

    def _compare(self, record: Record) -> None:
        match record:
            case Generated():
                self._generate(record)
            case Verified():
                self._verify(record)
            case Trained():
                self._train(record)
            case Holds(generator, version, recorded):
                where = f"version {version} in generator {generator}"
                self._check("fingerprint of the weights", where, recorded, self._published.get(version))
            case Happened("Resumed"):
                self._holdings.keep_only(group_id for group_id, _ in to_saved(self._state)["ready"])
                self._resume_curriculum()
            case Happened("StageBegan" | "PoolDrawn" as name, fields):
                again = self._begun.pop(0) if self._begun else None
                replayed = None if again is None else (type(again).__name__, list(dataclasses.astuple(again)))
                self._check("pool", f"{name} after step {self._state.num_done}", (name, fields), replayed)

    def _generate(self, record: Generated) -> None:
        rollout = self._engines.rollout(record.engine, record.request_id)
        where = f"completion {record.request_id}"
        self._check("step of the engine", where, record.engine_step, rollout.engine_step)
        self._check("number of tokens", where, record.num_tokens, len(rollout.completion_ids))
        self._check("tokens, log-probs and versions", where, record.checksum, checksum(rollout))
        self._holdings.rollouts[record.request_id] = rollout
        self.num_completions += 1
        if self._grade is not None:
            self._regraded[record.request_id] = self._grade(self._holdings.item(record.request_id))

    def _verify(self, record: Verified) -> None:
        reward = record.reward
        if self._grade is not None:
            again = self._regraded.pop(record.request_id)()
            described = describe_reward(record.request_id, again)
            if record.parts is not None:  # a failure of the machinery says nothing
                what, where = "reward", f"completion {record.request_id}"
                self._check(what, where, (record.verdict, record.parts), (described.verdict, described.parts))
        self._holdings.rewards[record.request_id] = reward

    def _train(self, record: Trained) -> None:
        where = f"step {record.step}"
        self._check("batch", where, record.group_ids, list(self._batch))
        groups = [self._holdings.take(group_id)[1] for group_id in self._batch]
        metrics = self._update(groups, record.step)
        self._check_params(record.step, record.fingerprint)
        self._check_metrics(record.step, metrics)
        self.num_steps += 1

    def _update(self, groups: Sequence[Sequence[Graded]], step: int) -> dict[str, float]:
        self._train_state, metrics, _ = self._stages.update(self.train_state, groups, step - 1, self._batch_stage)
        self._weights = self._stages.publish(self.train_state.params)
        return metrics | describe_rollouts(groups, step - 1)

    # ---- what the machine says --------------------------------------------------------------------------------------

    def _feed(self, event: machine.Event) -> None:
        try:
            self._state, actions = machine.step(self._stages.rules, self._state, event)
        except ValueError as error:
            raise MagistralError(f"The event log does not fit the schedule: {error}.") from error
        for action in actions:
            if self._curriculum is not None and (begun := self._curriculum.follow(action, self._holdings.look)):
                self._begun.append(begun)
            match action:
                case machine.Dispatch(group_id):
                    self._holdings.requests(group_id)
                case machine.Discard(group_id, _):
                    self._holdings.take(group_id)
                case machine.Train(_, group_ids):  # trained when its record comes: a kill may have come before
                    self._batch, self._batch_stage = group_ids, self._state.stage
                case machine.Checkpoint() if self._curriculum is not None:
                    self._saved = self._curriculum.to_saved(self._state.oldest_group())
                case machine.Publish(version):
                    self._publish(version)

    def _resume_curriculum(self) -> None:
        """What the checkpoint of the last session did not know is forgotten."""
        if self._curriculum is None:
            return
        assert self._saved is not None  # the log was cut off where a checkpoint was written
        self._curriculum.load(self._saved)
        call = self._curriculum.call(self._stages.begin) if self._stages.begin else None
        self._begun = [] if call is None else [call]

    # ---- comparing --------------------------------------------------------------------------------------------------

    def _check(self, what: str, where: str, recorded: Any, replayed: Any) -> None:
        if recorded != replayed:
            self._on_difference(Difference(what, where, recorded, replayed))

    def _check_params(self, step: int, recorded: int) -> None:
        now = identify(self.train_state.params, self._weights)
        self._check("fingerprint of the parameters", f"step {step}", f"{recorded:#010x}", f"{now:#010x}")

    def _check_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if step in self._metrics and name in self._metrics[step]:
                replayed = value if math.isfinite(value) else None
                self._check(f"metric {name}", f"step {step}", self._metrics[step][name], replayed)


def split_sessions(records: Sequence[Record]) -> Iterator[tuple[Session, Sequence[Record]]]:
    """Each session with the records that follow it.

    Raises:
      MagistralError: The first record is no session.
    """
    starts = [place for place, record in enumerate(records) if isinstance(record, Session)]
    if starts[:1] != [0]:
        raise MagistralError("The event log is empty: the run was killed before anything had happened.")
    for start, end in itertools.pairwise([*starts, len(records)]):
        session = records[start]
        assert isinstance(session, Session)
        yield session, records[start + 1 : end]


def up_to_step(records: Sequence[Record], step: int) -> Sequence[Record]:
    """The records up to the end of a step; all of them, where it was never reached."""
    ends = (place for place, record in enumerate(records) if isinstance(record, Trained) and record.step == step)
    return records[: next(ends, len(records)) + 1]
