"""google-tunix's side of `train_step.py`: its own GRPO train step on padded rows, whole or in microbatches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import tunix_peer
from step_side import Workload

from magistral_jax.policy.hf_folder import load_params, read_model_config


def make_step(work: Workload) -> Callable[[], object]:
    """One update by Tunix's trainer; its default is the whole batch at once."""
    folder, prompt = work.folder / "model", work.settings["prompt"]
    model = read_model_config(folder)
    peer = tunix_peer.make_model(model, jax.tree.map(jnp.asarray, load_params(folder, model)))
    return tunix_peer.make_train_step(
        peer,
        optax.adamw(work.settings["learning_rate"], b1=0.9, b2=0.95),
        work.tokens[:, :prompt],
        work.tokens[:, prompt:],
        work.advantage,
        work.behavior_logprob[:, prompt:],
    )
