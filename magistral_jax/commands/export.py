"""`magistral-jax export`: the policy of a run's latest or best checkpoint as a Hugging Face folder."""

import pathlib

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.setup import load_model, save_policy, say
from magistral_jax.commands.trainable import check_base, trainable
from magistral_jax.config import Config, config_from_json
from magistral_jax.records import MagistralError
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state


def export(config: Config) -> None:
    """Write `run.folder`/export from the latest checkpoint in `run.folder`, or with `run.best` from the best one."""
    folder = pathlib.Path(config.run.folder)
    path = folder / "config.json"
    if not path.exists():
        raise MagistralError(f"{folder} holds no run: config.json is missing; expected --folder=RUN.")
    saved = config_from_json(path.read_text(encoding="utf-8"), origin=str(path))
    model = load_model(saved)
    part = trainable(saved, model)
    check_base(folder, part)
    with Checkpoints(folder / "checkpoints", is_reader=True) as checkpoints:
        chosen = checkpoints.best_step if config.run.best else None
        step, state, _ = checkpoints.restore(init_state(part.start, make_optimizer(saved.optimizer, 1)), chosen)
    save_policy(folder / "export", model, part.whole(state.params), saved.policy.path)
    say(f"step {step}: {folder / 'export'}")
