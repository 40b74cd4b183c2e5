"""Orbax checkpoints of a run: parameters, optimizer and the schedule's state, in one atomic step."""

import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from magistral_jax.pytrees import TrainState
from magistral_jax.records import MagistralError


class Checkpoints:
    """The checkpoints of one run folder; a context manager, as saving goes on in the background."""

    def __init__(self, folder: pathlib.Path, *, keep: int = 2) -> None:
        # Orbax logs every exception with its traceback before it raises it; here it becomes one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._folder = folder.absolute()
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

    def save(self, step: int, state: TrainState, schedule: dict[str, Any]) -> None:
        """Begin to save; the arrays are copied before this returns, so they may be donated afterwards.

        Raises:
          MagistralError: The folder cannot be written; earlier checkpoints are intact.
        """
        if step == self.latest_step:
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_tree(state)), schedule=ocp.args.JsonSave(schedule)
                ),
            )
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

    def restore(self, like: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The latest checkpoint, on the shardings of `like`.

        Raises:
          MagistralError: There is none, or it belongs to another model or optimizer.
        """
        step = self.latest_step
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
        return step, TrainState(tree["params"], tree["opt_state"], tree["num_updates"]), restored["schedule"]

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
