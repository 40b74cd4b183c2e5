"""Loss on held-out traces while a policy is fine-tuned: the best weights are kept, and it is known when to stop."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from magistral_jax.commands.setup import Model, save_policy
from magistral_jax.commands.tuner import Tuner
from magistral_jax.config import Config
from magistral_jax.metrics import METRICS_FILE, read_json_lines
from magistral_jax.train.collate import TrainingSequence, collate

LOSS = "validation_loss"


class Validation:
    """Measurements of one run, which go on after a resume. Without held-out traces it does nothing.

    Args:
      config: Of the run.
      model: Architecture and tokenizer.
      folder: Of the run; the best weights so far lie in its folder `best`.
      sequences: Held-out traces.
      tuner: What is fine-tuned.
    """

    def __init__(
        self, config: Config, model: Model, folder: pathlib.Path, sequences: Sequence[TrainingSequence], tuner: Tuner
    ) -> None:
        self._config, self._model, self._tuner = config, model, tuner
        self._best = folder / "best"
        self._losses = [line[LOSS] for line in read_json_lines(folder / METRICS_FILE) if LOSS in line]
        rows, tokens = config.batch.rows_per_microbatch, config.batch.row_tokens
        self._batch = collate(sequences, row_tokens=tokens, rows_per_microbatch=rows) if sequences else None

    def is_due(self, update: int) -> bool:
        """Whether to measure after this update."""
        is_turn = update % self._config.sft.validate_every == 0 or update == self._config.sft.num_updates
        return self._batch is not None and is_turn

    def measure(self, params: Any) -> dict[str, float]:
        """The loss with these trained parameters as a metric; where none was lower, the policy is kept."""
        if self._batch is None:
            return {}
        self._losses.append(float(self._tuner.measure(params, self._batch).mean()))
        if self._losses[-1] == min(self._losses):
            shutil.rmtree(self._best, ignore_errors=True)
            self._save(self._best, params)
        return {LOSS: self._losses[-1]}

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `sft.patience` measurements have all failed to be the lowest so far."""
        return is_exhausted(self._losses, self._config.sft.patience)

    def save_result(self, target: pathlib.Path, params: Any) -> str:
        """Write the best policy, or this one where nothing was measured; returns a sentence about it."""
        shutil.rmtree(target, ignore_errors=True)  # of an end that was cut off
        if not self._losses:
            self._save(target, params)
            return f"policy: {target}"
        shutil.copytree(self._best, target)
        return f"policy, of the lowest validation loss, {min(self._losses):.4f}: {target}"

    def _save(self, target: pathlib.Path, params: Any) -> None:
        save_policy(target, self._model, self._tuner.gather(params), self._config.policy.path)


def is_exhausted(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is lower than all before; never with a patience of 0."""
    return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
