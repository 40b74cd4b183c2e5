"""Steps that are begun, stopped, gone on with, done, and out of date; the command behind them is a stand-in."""

import pathlib
import shutil
from collections.abc import Callable

import pytest

from magistral_jax.commands import recipe_steps
from magistral_jax.commands.recipe_steps import StepStoppedError, do_step, seconds_of
from magistral_jax.config import Config, RunConfig, dump
from magistral_jax.records import MagistralError


class Command:
    """Stands in for `train`; each call ends as the next of `endings` says."""

    def __init__(self, *endings: str) -> None:
        self.endings, self.resumed = list(endings), list[bool]()

    def __call__(self, config: Config) -> None:
        folder, ending = pathlib.Path(config.run.folder), self.endings.pop(0)
        if ending == "refused":
            raise MagistralError("a mistake.")
        self.resumed.append(config.run.resume)
        (folder / "config.json").write_text(dump(config))
        if ending == "Ctrl-C":
            raise KeyboardInterrupt
        if ending == "done":
            (folder / "summary.json").write_text("{}")
        assert ending in ("done", "stopped")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Command]:
    def use(*endings: str) -> Command:
        command = Command(*endings)
        monkeypatch.setattr(recipe_steps, "_COMMANDS", {"train": (command, "summary.json")})
        return command

    return use


def run(folder: pathlib.Path, *needs: pathlib.Path, seed: int = 0) -> None:
    do_step("train", Config(RunConfig(folder=str(folder), seed=seed)), folder, needs=needs)


def test_a_step_goes_on_until_it_is_done_and_is_not_done_again(use: Callable[..., Command], tmp_path: pathlib.Path):
    command, folder = use("stopped", "Ctrl-C", "done"), tmp_path / "step"
    with pytest.raises(StepStoppedError):
        run(folder)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    before = seconds_of(folder)
    run(folder)
    assert seconds_of(folder) > before > 0  # of all sessions
    run(folder)
    assert command.resumed == [False, True, True]


def test_a_session_that_was_killed_is_gone_on_with(use: Callable[..., Command], tmp_path: pathlib.Path):
    command, folder = use("stopped", "done"), tmp_path / "step"
    with pytest.raises(StepStoppedError):
        run(folder)
    (folder / "summary.json").write_text("{}")  # as if it had ended and the kill had come before that was noted
    run(folder)
    assert command.resumed == [False, True]


def test_a_mistake_leaves_nothing_behind(use: Callable[..., Command], tmp_path: pathlib.Path):
    command, folder = use("refused", "done"), tmp_path / "step"
    with pytest.raises(MagistralError, match="a mistake"):
        run(folder)
    assert not folder.exists()
    run(folder)
    assert command.resumed == [False]


def test_a_step_that_is_out_of_date_is_named(use: Callable[..., Command], tmp_path: pathlib.Path):
    use("done", "done", "done", "done")
    first, second = tmp_path / "first", tmp_path / "second"
    run(first)
    run(second, first)
    run(second, first)
    with pytest.raises(MagistralError, match=r"started with other settings of run\.seed"):
        run(second, first, seed=1)
    shutil.rmtree(first)
    run(first)
    with pytest.raises(MagistralError, match=r"second was made from what .*first held before; delete it"):
        run(second, first)
    shutil.rmtree(second)
    run(second, first)
