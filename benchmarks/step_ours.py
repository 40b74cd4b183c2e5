"""Our side of `train_step.py`: packed rows, microbatches, one jitted update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from step_side import Workload

from magistral_jax.policy.config import PolicyConfig
from magistral_jax.policy.hf_folder import load_params, read_model_config
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import LossConfig
from magistral_jax.train.step import grpo_objective, init_state, make_train_step


def make_step(work: Workload) -> Callable[[], object]:
    """One update of AdamW, done when it returns; packing is part of it."""
    settings, folder = work.settings, work.folder / "model"
    model = read_model_config(folder)
    policy = PolicyConfig(**{name: settings[name] for name in ("remat", "unroll", "logprob_chunk")})
    optimizer = optax.adamw(settings["learning_rate"], b1=0.9, b2=0.95)
    train_step = make_train_step(model, policy, grpo_objective(LossConfig()), optimizer)
    state = init_state(jax.tree.map(jnp.asarray, load_params(folder, model)), optimizer)
    sequences = make_sequences(work)

    def step() -> object:
        nonlocal state
        sizes = {name: settings[name] for name in ("row_tokens", "rows_per_microbatch")}
        state, metrics = train_step(state, collate(sequences, **sizes), None)
        return jax.block_until_ready((state, metrics))

    return step


def make_sequences(work: Workload) -> list[TrainingSequence]:
    """The workload's sequences without their padding."""
    prompt = work.settings["prompt"]
    return [
        TrainingSequence(
            prompt_ids=row[:prompt],
            completion_ids=row[prompt:length],
            behavior_logprob=behavior[prompt:length],
            advantage=float(advantage),
            staleness=row[prompt:length] * 0,
        )
        for row, length, behavior, advantage in zip(
            work.tokens, work.lengths, work.behavior_logprob, work.advantage, strict=True
        )
    ]
