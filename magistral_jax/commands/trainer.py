"""The trainer, in one process or several: its state and step, and how the others do what process 0 does.

Process 0 runs the schedule, the generators, the verifiers, and writes the files. The other processes hold their part
of the training state and follow: each step, publish, checkpoint and export is announced to them, and run by all.
"""

import dataclasses
import pathlib
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.checks import stages_of
from magistral_jax.commands.setup import Model, load_model, place_engine, say
from magistral_jax.commands.trainable import Trainable, trainable
from magistral_jax.config import Config
from magistral_jax.distributed.orders import Follower, Leader, connect
from magistral_jax.distributed.start import start
from magistral_jax.policy.enqueue import turn
from magistral_jax.policy.sharding import make_mesh, shard_batch
from magistral_jax.publish.same_process import make_publish
from magistral_jax.pytrees import TrainState
from magistral_jax.records import MagistralError
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import Metrics, grpo_objective, init_sharded, make_train_step


def join(config: Config) -> tuple[Leader | Follower, Mesh]:
    """Meet the other processes, if there are any, and lay the mesh over the devices of all.

    Raises:
      MagistralError: They do not come, or the devices do not suffice.
    """
    distributed = config.distributed
    start(distributed)
    mesh = make_mesh(config.mesh)
    host = "" if distributed.coordinator == "auto" else distributed.coordinator.rpartition(":")[0]
    return connect(host, seconds=distributed.start_seconds), mesh


def run_or_follow(
    config: Config, run: Callable[[Config, Leader, Mesh], None], follow: Callable[[Config, Follower, Mesh], None]
) -> None:
    """What a command does in each of its processes: process 0 runs it, all others follow."""
    leader, mesh = join(config)
    if isinstance(leader, Follower):
        follow(config, leader, mesh)
        return
    with leader:
        run(config, leader, mesh)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What every process of the trainer has. The functions are called in all of them, in the same order."""

    step: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    """(state, batch as a record or as arrays by their names, reference) -> (state, metrics of this process)"""
    publish: Callable[[Any], Any]
    initial_state: TrainState
    reference: Any
    """Parameters of the KL penalty, or None."""
    part: Trainable
    """What of the model is trained; `part.whole` makes a policy of it."""


def make_trainer(config: Config, model: Model, mesh: Mesh) -> Trainer:
    """State, step and publish of a run on a mesh."""
    sizes = [(stage.batch_size, stage.minibatch_size) for stage in stages_of(config)]
    sizes = sizes or [(config.batch.batch_size, config.batch.minibatch_size or config.batch.batch_size)]
    minibatches = max(batch // minibatch for batch, minibatch in sizes)  # at most: a decay never ends too early
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps * minibatches)
    part = trainable(config, model, mesh)
    state = init_sharded(part.start, model.config, mesh, optimizer)
    train_step = make_train_step(
        model.config,
        config.policy,
        grpo_objective(config.loss),
        optimizer,
        temperature=config.generation.temperature or 1.0,
        mesh=mesh if mesh.size > 1 else None,
        frozen=part.frozen,
    )

    def step(state: TrainState, batch: Any, reference: Any = None) -> tuple[TrainState, Metrics]:
        with turn(mesh):
            state, metrics = train_step(state, shard_batch(batch, mesh), reference)
        # The same numbers are everywhere; from here on they are this process's own.
        return state, jax.tree.map(lambda x: x.addressable_data(0), metrics)

    engine = place_engine(config, model, mesh)
    convert = _make_publish(config, model, mesh, *engine)

    def publish(params: Any) -> Any:
        with turn(mesh, engine[0]):
            return convert(part.whole(params))

    # Adapters change nothing at first: what stands under them is the policy that a KL penalty holds on to.
    reference = None
    if config.loss.kl_coef:
        reference = part.frozen or jax.tree.map(jnp.copy, state.params)
    return Trainer(step, publish, state, reference, part)


def _make_publish(
    config: Config, model: Model, mesh: Mesh, engine: Mesh | None, shardings: Any
) -> Callable[[Any], Any]:
    dtype = jnp.dtype(config.policy.dtype)
    if jax.process_count() == 1:
        return make_publish(model.config, dtype, mesh, engine, shardings)
    # Every process gets the whole, and process 0 hands it to its engine: devices of other hosts cannot.
    gather = make_publish(model.config, dtype, mesh)
    return gather if shardings is None else lambda params: jax.device_put(gather(params), shardings)


def lead(trainer: Trainer, leader: Leader) -> Trainer:
    """The trainer of process 0: what it does, the others are told to do."""

    def step(state: TrainState, batch: Any, reference: Any = None) -> tuple[TrainState, Metrics]:
        leader.send("step", **vars(batch))
        return trainer.step(state, batch, reference)

    def publish(params: Any) -> Any:
        leader.send("publish")
        return trainer.publish(params)

    return dataclasses.replace(trainer, step=step, publish=publish)


def open_checkpoints(config: Config, folder: pathlib.Path, leader: Leader) -> Checkpoints:
    """The checkpoints of a run; of what process 0 saves, the others are told to save their part."""

    def announce(step: int, schedule: dict[str, Any], groups: bytes) -> None:
        leader.send("save", {"step": step, "schedule": schedule}, groups=np.frombuffer(groups, np.uint8))

    return Checkpoints(folder, keep_best=config.run.keep_best, announce=announce)


def gather(params: Any, leader: Leader | None = None) -> Any:
    """Whole parameters for an export, in process 0's memory; the others are told to give it their parts."""
    if jax.process_count() == 1:
        return params
    if leader is not None:
        leader.send("gather")

    def whole(leaf: jax.Array) -> np.ndarray | None:
        array = multihost_utils.process_allgather(leaf, tiled=True)
        return None if leader is None else np.asarray(array)

    return jax.tree.map(whole, params)


@dataclasses.dataclass(frozen=True)
class Followed:
    """What a process needs to follow process 0."""

    initial_state: TrainState
    part: Trainable
    step: Callable[[TrainState, Any], TrainState]
    """(state, batch as arrays by their names) -> state"""
    others: Mapping[str, Callable[[Any, Any], object]]
    """What else a command orders, by name, from trained parameters and the arrays of the order."""


def follow(config: Config, follower: Follower, mesh: Mesh) -> None:
    """What the processes other than 0 do in place of `train`; see `obey`."""

    def make(model: Model) -> Followed:
        trainer = make_trainer(config, model, mesh)
        return Followed(
            trainer.initial_state,
            trainer.part,
            lambda state, batch: trainer.step(state, batch, trainer.reference)[0],
            {"publish": lambda params, _: trainer.publish(params)},
        )

    obey(config, follower, mesh, make)


def obey(config: Config, follower: Follower, mesh: Mesh, make: Callable[[Model], Followed]) -> None:
    """Do as process 0 says, until it says stop.

    Raises:
      MagistralError: Process 0 has failed; the sentence is its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # goes to all processes, and is process 0's to answer
    own = make(load_model(config, mesh))
    state = own.initial_state
    folder = pathlib.Path(config.run.folder) / "checkpoints"
    with Checkpoints(folder, keep_best=config.run.keep_best) as checkpoints:
        if config.run.resume and checkpoints.latest_step is not None:
            step, state, _ = checkpoints.restore(state)
            checkpoints.restore_groups(step)  # process 0 wants them, and no restore is one process's alone
        say(f"process {jax.process_index()} of {jax.process_count()} follows process 0")
        for order, header, arrays in follower.orders():
            match order:
                case "step":
                    state = own.step(state, arrays)
                case "save":
                    checkpoints.save(header["step"], state, header["schedule"], arrays["groups"].tobytes())
                case "gather":
                    gather(own.part.whole(state.params))
                case "stop":
                    if header["reason"]:
                        raise MagistralError(f"process 0 of the trainer has stopped: {header['reason']}")
                case other:
                    own.others[other](state.params, arrays)
