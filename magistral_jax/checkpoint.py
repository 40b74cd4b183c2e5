"""Orbax checkpoints of a run: parameters, optimizer, schedule and its complete groups, in one atomic step."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from magistral_jax.policy.enqueue import turn
from magistral_jax.pytrees import TrainState
from magistral_jax.records import MagistralError

Announce = Callable[[int, dict[str, Any], bytes], None]


class Restored(NamedTuple):
    """A checkpoint as it was saved, but for its groups, which only the schedule wants."""

    step: int
    state: TrainState
    schedule: dict[str, Any]


REWARD = "reward"
"""Name of the value in a saved schedule by which the best checkpoint is found."""


class Checkpoints:
    """The checkpoints of one run folder; a context manager, as saving goes on in the background.

    Args:
      folder: Of the checkpoints.
      keep: How many of the last ones stay.
      keep_best: Whether the one of the highest reward stays beside them.
      announce: Told of each save before it begins, since every process of a trainer must take part.
      is_reader: Whether the folder is only read, perhaps while another process writes to it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int = 2,
        keep_best: bool = False,
        announce: Announce | None = None,
        is_reader: bool = False,
    ) -> None:
        # Orbax logs every exception with its traceback before it raises it; here it becomes one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        reward_of = lambda metrics: metrics[REWARD]
        best = BestN(n=1, get_metric_fn=reward_of, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=reward_of,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), *([best] if keep_best else [])]),
            cleanup_tmp_directories=not is_reader,
            read_only=is_reader,
        )
        self._folder = folder.absolute()
        self._announce = announce
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except MagistralError:
            if error is None:  # else that is what happened first
                raise

    @property
    def latest_step(self) -> int | None:
        """Last complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int:
        """The checkpoint of the highest reward among those that are there; of equal ones the last.

        Raises:
          MagistralError: None was saved with a reward.
        """
        step = self._manager.best_step()
        if step is None:
            raise MagistralError(f"{self._folder} holds no complete checkpoint with a reward; there is no best one.")
        return step

    def save(self, step: int, state: TrainState, schedule: dict[str, Any], groups: bytes = b"") -> None:
        """Begin to save; the arrays are copied before this returns, so they may be donated afterwards.

        Args:
          step: Its number; one that is saved already stays as it is.
          state: Parameters and optimizer.
          schedule: Plain values; one of the name `REWARD`, if there is one, ranks the checkpoint.
          groups: What is complete and not yet trained, as the schedule packs it.

        Raises:
          MagistralError: The folder cannot be written; earlier checkpoints are intact.
        """
        if step == self.latest_step:
            return
        if self._announce is not None:
            self._announce(step, schedule, groups)
        reward = schedule.get(REWARD)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_tree(state)),
            schedule=ocp.args.JsonSave(schedule),
            # With a byte in front, since an array of none cannot be saved.
            groups=ocp.args.PyTreeSave({"bytes": np.frombuffer(b"\0" + groups, np.uint8)}),
        )
        # Several processes meet in a collective before they write.
        devices = Mesh(np.array(jax.devices()), ("all",)) if jax.process_count() > 1 else None
        try:
            with turn(devices):
                self._manager.save(step, args=args, metrics=None if reward is None else {REWARD: reward})
        except (OSError, ValueError) as error:
            raise self._refusal(step, error) from error

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          MagistralError: It could not be written; earlier checkpoints are intact.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refusal(None, error) from error

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: TrainState, step: int | None = None) -> Restored:
        """The latest checkpoint, or that of a step, on the shardings of `like`.

        Raises:
          MagistralError: There is none, or it belongs to another model or optimizer.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise MagistralError(f"{self._folder} holds no complete checkpoint; nothing to resume from.")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), schedule=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            raise MagistralError(
                f"The checkpoint of step {step} in {self._folder} does not fit this model and optimizer: "
                f"{_shorten(error)}"
            ) from error
        tree = restored["state"]
        state = TrainState(tree["params"], tree["opt_state"], tree["num_updates"])
        return Restored(step, state, restored["schedule"])

    def restore_groups(self, step: int) -> bytes:
        """What was saved as `groups` with a step."""
        item = ocp.args.PyTreeRestore(restore_args={"bytes": ocp.RestoreArgs(restore_type=np.ndarray)})
        restored = self._manager.restore(step, args=ocp.args.Composite(groups=item))
        return restored["groups"]["bytes"].tobytes()[1:]

    def close(self) -> None:
        """Wait for pending saves and release the manager.

        Raises:
          MagistralError: One of them could not be written; earlier checkpoints are intact.
        """
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refusal(None, error) from error

    def _refusal(self, step: int | None, error: Exception) -> MagistralError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        return MagistralError(
            f"Could not write {which} to {self._folder}: {_shorten(error)}. The latest complete one is "
            f"{self.latest_step}; free some space and resume from it."
        )


def _shorten(error: Exception, size: int = 500) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= size else text[: size - 1] + "…"


def _as_tree(state: TrainState) -> dict[str, Any]:
    # Plain names on disk: parameters stay readable without this package.
    return {"params": state.params, "opt_state": state.opt_state, "num_updates": state.num_updates}
