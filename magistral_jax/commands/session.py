"""What `train` and `replay` share: rules, update and curriculum of a run, and what holds for a session."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

import magistral_jax
from magistral_jax.checks import stages_of
from magistral_jax.commands.problems import mixtures_of
from magistral_jax.commands.setup import Model
from magistral_jax.commands.trainer import Trainer
from magistral_jax.config import Config, dump
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.pool import PromptPools
from magistral_jax.records import SamplingParams
from magistral_jax.schedule.curriculum import Curriculum
from magistral_jax.schedule.event_log import Session
from magistral_jax.schedule.holdings import Assignment
from magistral_jax.schedule.loop import Update
from magistral_jax.schedule.machine import OpenPool
from magistral_jax.schedule.state import Rules
from magistral_jax.train.balance import ranks_of
from magistral_jax.train.update import update


def make_rules(config: Config) -> Rules:
    """Rules of the schedule, and of each stage of the curriculum."""

    def rules(num_async: int, batch_size: int) -> Rules:
        return Rules.of(
            dataclasses.replace(config.schedule, num_async=num_async),
            group_size=config.batch.group_size,
            batch_size=batch_size,
            filter_zero_variance=config.loss.filter_zero_variance,
        )

    own = tuple(rules(stage.num_async, stage.batch_size) for stage in stages_of(config))
    return dataclasses.replace(rules(config.schedule.num_async, config.batch.batch_size), stages=own)


def make_update(config: Config, model: Model, trainer: Trainer, mesh: Mesh) -> Update:
    """What a batch of groups does to the trainer's state."""
    ranks = ranks_of(model.config, mesh.shape["data"] * mesh.shape["fsdp"])
    sizes = [
        dataclasses.replace(config.batch, batch_size=stage.batch_size, minibatch_size=stage.minibatch_size)
        for stage in stages_of(config)
    ] or [config.batch]
    return lambda state, groups, version, stage: update(
        trainer.step,
        state,
        groups,
        version=version,
        batch=sizes[stage],
        loss=config.loss,
        reference_params=trainer.reference,
        ranks=ranks,
    )


def make_curriculum(
    config: Config, loader: PromptLoader, tell: Callable[[str], None], *, known: Sequence[OpenPool] = ()
) -> Curriculum | None:
    """The curriculum of a run, before its first step; None where it has none.

    Args:
      config: Of the run.
      loader: Its prompts.
      tell: Told of stages that begin.
      known: Pools that will be opened, for a replay.
    """
    stages = stages_of(config)
    if not stages:
        return None
    pools = PromptPools(loader, mixtures_of(config), config.run.seed)
    return Curriculum(stages, pools, config.curriculum, training_sampling(config), tell, known)


def make_assign(config: Config, loader: PromptLoader, curriculum: Curriculum | None) -> Callable[[int], Assignment]:
    """What a group is asked for, by its id."""
    sampling = training_sampling(config)
    return curriculum.assign if curriculum else lambda group_id: Assignment(loader.prompt_at(group_id), sampling)


def training_sampling(config: Config) -> SamplingParams:
    """How training rollouts are drawn."""
    generation = config.generation
    return SamplingParams(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)


def describe_session(config: Config, *, data: str, step: int, fingerprint: int) -> Session:
    """What holds from here on: the first record of a run, and of each of its resumes.

    Args:
      config: Of the run.
      data: Fingerprint of the prompts and their order.
      step: Batches trained before.
      fingerprint: Of the parameters after these.
    """
    devices = jax.devices()
    return Session(
        step=step,
        fingerprint=fingerprint,
        config=dump(config),
        data=data,
        software={
            "magistral_jax": magistral_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
        device=f"{len(devices)} × {devices[0].device_kind}",
        # Of XLA's pool on a CPU: how sums are split, and so their last bits, may depend on it.
        threads=int(os.environ.get("PJRT_NPROC") or len(os.sched_getaffinity(0))),
        began=time.time(),
    )
