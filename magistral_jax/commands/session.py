"""What `train` and `replay` share: the rules of a run, its update, and the record of what holds for a session."""

import os
import platform
import time

import jax
import numpy as np
from jax.sharding import Mesh

import magistral_jax
from magistral_jax.commands.setup import Model
from magistral_jax.commands.trainer import Trainer
from magistral_jax.config import Config, dump
from magistral_jax.records import SamplingParams
from magistral_jax.schedule.event_log import Session
from magistral_jax.schedule.loop import Update
from magistral_jax.schedule.state import Rules
from magistral_jax.train.balance import ranks_of
from magistral_jax.train.update import update


def make_rules(config: Config) -> Rules:
    """Rules of the schedule."""
    return Rules.of(
        config.schedule,
        group_size=config.batch.group_size,
        batch_size=config.batch.batch_size,
        filter_zero_variance=config.loss.filter_zero_variance,
    )


def make_update(config: Config, model: Model, trainer: Trainer, mesh: Mesh) -> Update:
    """What a batch of groups does to the trainer's state."""
    ranks = ranks_of(model.config, mesh.shape["data"] * mesh.shape["fsdp"])
    return lambda state, groups, version: update(
        trainer.step,
        state,
        groups,
        version=version,
        batch=config.batch,
        loss=config.loss,
        reference_params=trainer.reference,
        ranks=ranks,
    )


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
