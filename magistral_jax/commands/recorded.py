"""A recorded run and what it was made from, to be made from again."""

import dataclasses
import functools
import itertools
import pathlib
import queue
from collections.abc import Callable, Sequence

import numpy as np

from magistral_jax.commands.session import describe_session, make_assign, make_curriculum, make_rules, make_update
from magistral_jax.commands.setup import completion_text, load_model, make_batcher, make_verifiers, say
from magistral_jax.commands.train import load_data
from magistral_jax.commands.trainer import make_trainer
from magistral_jax.config import Config, RunConfig, config_from_json
from magistral_jax.generate.handle import Reports
from magistral_jax.generate.held import HeldEngine, HeldProcess
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.policy.sharding import make_mesh
from magistral_jax.records import MagistralError, Reward
from magistral_jax.schedule import machine
from magistral_jax.schedule.curriculum import Curriculum
from magistral_jax.schedule.event_log import LOG_FILE, Record, Session, Trained, to_event
from magistral_jax.schedule.holdings import Assignment
from magistral_jax.schedule.replay import SessionStages, split_sessions
from magistral_jax.schedule.state import State
from magistral_jax.verify.pool import VerifyItem


class RecordedRun:
    """The records of a run, its model and its data.

    Args:
      folder: Of the run.
      records: Of its event log.

    Raises:
      MagistralError: The log is empty, or model or data are missing or not those of the run.
    """

    def __init__(self, folder: pathlib.Path, records: Sequence[Record]) -> None:
        self.folder, self.records = folder, records
        sessions = [session for session, _ in split_sessions(records)]
        self.config = config_of(sessions[0])
        self.model = load_model(self.config, make_mesh(self.config.mesh))
        _, self.loader, _ = load_data(self.config, self.model)
        if self.loader.fingerprint != sessions[0].data:
            raise MagistralError(f"{folder}: the run was made from other problems than `data.train` gives now.")
        self.curriculum = make_curriculum(self.config, self.loader, lambda sentence: None)
        self.stage_of_step: dict[int, int] = {}
        if self.curriculum is not None:
            self.curriculum = self._look_ahead(self.curriculum)
        self._say_surroundings(sessions[-1])
        self._stages: dict[Config, SessionStages] = {}
        for session in sessions:
            self.stages_of(session, logs=folder)

    @property
    def assign(self) -> Callable[[int], Assignment]:
        """What a group was asked for, by its id."""
        return make_assign(self.config, self.loader, self.curriculum)

    def decode(self, ids: np.ndarray) -> str:
        """Text of a completion."""
        return completion_text(self.model, ids)

    def stages_of(self, session: Session, *, logs: pathlib.Path) -> SessionStages:
        """What a session is made of; the output of its processes goes to the folder `logs`."""
        config = config_of(session)
        if config not in self._stages:
            self._stages[config] = self._make_stages(config)
        return dataclasses.replace(self._stages[config], make_engine=functools.partial(self._make_engine, config, logs))

    def session_of_step(self, step: int) -> Session:
        """The session in which a step was trained."""
        return next(
            session
            for session, records in split_sessions(self.records)
            if any(isinstance(record, Trained) and record.step == step for record in records)
        )

    def _look_ahead(self, first: Curriculum) -> Curriculum:
        """The curriculum with all pools that were opened, since engines run ahead; notes the stage of each step."""
        state, known = State(stage=first.stage), list[machine.OpenPool]()
        for session, records in split_sessions(self.records):
            rules = make_rules(config_of(session))
            for event in filter(None, map(to_event, records)):
                state, actions = machine.step(rules, state, event)
                for action in actions:
                    if isinstance(action, machine.OpenPool):
                        known.append(action)
                    if isinstance(action, machine.Train):
                        self.stage_of_step[action.step + 1] = state.stage
        again = make_curriculum(self.config, self.loader, lambda sentence: None, known=known)
        assert again is not None
        return again

    def _make_stages(self, config: Config) -> SessionStages:
        mesh = make_mesh(config.mesh)
        model = load_model(config, mesh) if self._stages else self.model  # whose parameters the first one consumes
        trainer = make_trainer(config, model, mesh)
        return SessionStages(
            make_rules(config),
            make_update(config, model, trainer, mesh),
            trainer.publish,
            trainer.initial_state,
            functools.partial(self._make_engine, config, self.folder),
            config.schedule.role_deadline,
            config.curriculum.begin,
        )

    def _make_engine(self, config: Config, logs: pathlib.Path, number: int, reports: Reports) -> HeldEngine:
        generation, stop_ids = config.generation, tuple(self.model.tokenizer.stop_ids)
        if generation.where == "thread":
            return GeneratorThread(make_batcher(config, self.model, make_mesh(config.mesh)), reports)
        settings = EngineSettings(self.model.config, generation, stop_ids, config.run.seed, config.policy.dtype)
        return HeldProcess(settings, number, reports, folder=logs, deadline=config.schedule.role_deadline)

    def _say_surroundings(self, session: Session) -> None:
        """Warn of what may change the last bits of a result: other software, devices or numbers of threads."""
        now = describe_session(self.config, data=session.data, step=0, fingerprint=0)
        for name in ("software", "device", "threads"):
            recorded, here = getattr(session, name), getattr(now, name)
            if recorded != here:
                say(f"warning: the run was recorded with {name} {recorded}, here it is {here}: bits may differ")


class Grader:
    """Verifiers that are asked again; a context manager.

    Call it with an item; what it returns waits for the reward.
    """

    def __init__(self, config: Config) -> None:
        self._deadline = config.schedule.role_deadline
        self._numbers = itertools.count()  # after a resume an id comes again, for another completion
        self._waiting: dict[int, queue.SimpleQueue[Reward]] = {}
        self._pool = make_verifiers(config, lambda number, reward: self._waiting.pop(number).put(reward))

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._pool.cancel_all()
        self._pool.close()

    def __call__(self, item: VerifyItem) -> Callable[[], Reward]:
        """Begin to grade."""
        number, answer = next(self._numbers), queue.SimpleQueue[Reward]()
        self._waiting[number] = answer
        self._pool.submit(dataclasses.replace(item, request_id=number))
        return lambda: self._wait(answer, item.request_id)

    def _wait(self, answer: "queue.SimpleQueue[Reward]", request_id: int) -> Reward:
        try:
            return answer.get(timeout=self._deadline)
        except queue.Empty as error:
            raise MagistralError(f"The verifiers gave no reward for completion {request_id} in the replay.") from error


def config_of(session: Session) -> Config:
    """Settings of a session, as far as they decide what it computes."""
    config = config_from_json(session.config, origin=LOG_FILE)
    return dataclasses.replace(config, run=RunConfig(seed=config.run.seed))
