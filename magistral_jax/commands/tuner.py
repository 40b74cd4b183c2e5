"""The trainer of `sft`, in one process or several: its state, its step, and its loss on held-out traces."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from magistral_jax.commands.setup import Model
from magistral_jax.commands.trainable import Trainable, trainable
from magistral_jax.commands.trainer import Followed, gather, obey
from magistral_jax.config import Config
from magistral_jax.distributed.orders import Follower, Leader
from magistral_jax.policy.layout import TOKEN_AXES, Layout
from magistral_jax.policy.sharding import BATCH_SPEC, make_layout, shard_batch
from magistral_jax.pytrees import Batch, TrainState, WeightedSum
from magistral_jax.train.loss import sft_loss
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import Metrics, init_sharded, make_train_step, score, sft_objective


@dataclasses.dataclass(frozen=True)
class Tuner:
    """What every process has. The functions are called in all of them, in the same order.

    A batch is a record, or its arrays by their names; what the functions return is this process's own.
    """

    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    measure: Callable[[Any, Any], WeightedSum]
    """(trained parameters, batch) -> loss of the policy that they make, in nats, over its tokens"""
    gather: Callable[[Any], Any]
    """The whole policy of trained parameters, for a folder, in the memory of process 0."""
    initial_state: TrainState
    part: Trainable


def make_tuner(config: Config, model: Model, mesh: Mesh) -> Tuner:
    """State, step and loss of a run on a mesh."""
    optimizer = make_optimizer(config.optimizer, config.sft.num_updates)
    part = trainable(config, model, mesh)
    split = mesh if mesh.size > 1 else None
    train_step = make_train_step(model.config, config.policy, sft_objective, optimizer, mesh=split, frozen=part.frozen)
    loss = _make_loss(config, model, split)
    own = functools.partial(jax.tree.map, lambda x: x.addressable_data(0))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        state, sums = train_step(state, shard_batch(batch, mesh), None)
        return state, own(sums)

    return Tuner(
        step,
        measure=lambda params, batch: own(loss(part.whole(params), shard_batch(batch, mesh))),
        gather=lambda params: gather(part.whole(params)),
        initial_state=init_sharded(part.start, model.config, mesh, optimizer),
        part=part,
    )


def lead(tuner: Tuner, leader: Leader) -> Tuner:
    """The tuner of process 0: what it does, the others are told to do."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        leader.send("step", **vars(batch))
        return tuner.step(state, batch)

    def measure(params: Any, batch: Any) -> WeightedSum:
        leader.send("measure", **vars(batch))
        return tuner.measure(params, batch)

    return dataclasses.replace(
        tuner, step=step, measure=measure, gather=lambda params: gather(tuner.part.whole(params), leader)
    )


def follow(config: Config, follower: Follower, mesh: Mesh) -> None:
    """What the processes other than 0 do in place of `sft`; see `trainer.obey`."""

    def make(model: Model) -> Followed:
        tuner = make_tuner(config, model, mesh)
        step = lambda state, batch: tuner.step(state, batch)[0]
        return Followed(tuner.initial_state, tuner.part, step, {"measure": tuner.measure})

    obey(config, follower, mesh, make)


def _make_loss(config: Config, model: Model, mesh: Mesh | None) -> Callable[[Any, Batch], WeightedSum]:
    """A function from the parameters of a policy to its summed loss; each device scores its part of the rows."""

    def add_up(params: Any, batch: Batch, layout: Layout | None = None) -> WeightedSum:
        def one(microbatch: Batch) -> WeightedSum:
            logprob, _ = score(params, model.config, config.policy, microbatch, temperature=1.0, layout=layout)
            return sft_loss(logprob, microbatch.loss_mask)

        loss = jax.tree.map(jnp.sum, jax.lax.map(one, batch))
        return loss if layout is None else jax.lax.psum(loss, TOKEN_AXES)

    @jax.jit
    def loss_of(params: Any, batch: Batch) -> WeightedSum:
        if mesh is None:
            return add_up(params, batch)
        layout = make_layout(model.config, mesh, params)
        split = jax.shard_map(
            functools.partial(add_up, layout=layout),
            mesh=mesh,
            in_specs=(layout.specs, BATCH_SPEC),
            out_specs=P(),
            axis_names=set(TOKEN_AXES),
            check_vma=False,
        )
        return split(params, batch)

    return loss_of
