"""Loss on held-out traces while a policy is fine-tuned: the best weights are kept, and it is known when to stop."""

import functools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from magistral_jax.commands.setup import Model, save_policy
from magistral_jax.config import Config
from magistral_jax.metrics import METRICS_FILE, read_json_lines
from magistral_jax.policy.layout import TOKEN_AXES, Layout
from magistral_jax.policy.sharding import BATCH_SPEC, make_layout
from magistral_jax.pytrees import Batch, WeightedSum
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.loss import sft_loss
from magistral_jax.train.step import score

LOSS = "validation_loss"


class Validation:
    """Measurements of one run, which go on after a resume. Without held-out traces it does nothing.

    Args:
      config: Of the run.
      model: Architecture and tokenizer.
      folder: Of the run; the best weights so far lie in its folder `best`.
      sequences: Held-out traces.
      mesh: Where the parameters lie; None is one device.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        folder: pathlib.Path,
        sequences: Sequence[TrainingSequence],
        mesh: Mesh | None = None,
    ) -> None:
        self._config, self._model, self._sequences = config, model, sequences
        self._best = folder / "best"
        self._losses = [line[LOSS] for line in read_json_lines(folder / METRICS_FILE) if LOSS in line]
        self._loss_of = make_loss(config, model, sequences, mesh) if sequences else None

    def is_due(self, update: int) -> bool:
        """Whether to measure after this update."""
        is_turn = update % self._config.sft.validate_every == 0 or update == self._config.sft.num_updates
        return self._loss_of is not None and is_turn

    def measure(self, params: Any) -> dict[str, float]:
        """The loss as a metric; the weights are kept where none were better. Nothing without held-out traces."""
        if self._loss_of is None:
            return {}
        self._losses.append(self._loss_of(params))
        if self._losses[-1] == min(self._losses):
            shutil.rmtree(self._best, ignore_errors=True)
            save_policy(self._best, self._model, params, self._config.policy.path)
        return {LOSS: self._losses[-1]}

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `sft.patience` measurements have all failed to be the lowest so far."""
        return is_exhausted(self._losses, self._config.sft.patience)

    def save_result(self, target: pathlib.Path, params: Any) -> str:
        """Write the best weights, or these where nothing was measured; returns a sentence about them."""
        shutil.rmtree(target, ignore_errors=True)  # of an end that was cut off
        if not self._losses:
            save_policy(target, self._model, params, self._config.policy.path)
            return f"policy: {target}"
        shutil.copytree(self._best, target)
        return f"policy, of the lowest validation loss, {min(self._losses):.4f}: {target}"


def make_loss(
    config: Config, model: Model, sequences: Sequence[TrainingSequence], mesh: Mesh | None = None
) -> Callable[[Any], float]:
    """A function from the parameters of a policy to its mean loss on these sequences, in nats for each token.

    On a mesh each device scores its part of the rows, as in a train step.
    """
    batch = collate(sequences, row_tokens=config.batch.row_tokens, rows_per_microbatch=config.batch.rows_per_microbatch)

    def add_up(params: Any, part: Batch, layout: Layout | None = None) -> WeightedSum:
        logprob, _ = score(params, model.config, config.policy, part, temperature=1.0, layout=layout)
        loss = sft_loss(logprob, part.loss_mask)
        return loss if layout is None else jax.lax.psum(loss, TOKEN_AXES)

    @jax.jit
    def loss_of(params: Any, part: Batch) -> WeightedSum:
        if mesh is None:
            return add_up(params, part)
        layout = make_layout(model.config, mesh, params)
        split = jax.shard_map(
            functools.partial(add_up, layout=layout),
            mesh=mesh,
            in_specs=(layout.specs, P(*BATCH_SPEC[1:])),
            out_specs=P(),
            axis_names=set(TOKEN_AXES),
            check_vma=False,
        )
        return split(params, part)

    def validate(params: Any) -> float:
        parts = [loss_of(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(len(batch.tokens))]
        return float(sum(part.total for part in parts) / sum(part.weight for part in parts))

    return validate


def is_exhausted(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is lower than all before; never with a patience of 0."""
    return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
