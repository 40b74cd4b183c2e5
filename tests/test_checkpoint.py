"""Checkpoints: everything comes back, on whatever devices; what is half there is not; a full disk harms nothing."""

import functools
import gc
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.pytrees import TrainState
from magistral_jax.records import MagistralError
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import apply_gradients, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_updates=3), 10)
SCHEDULE = {"next_group": 12, "again": [3, 5], "num_done": 4, "counts": {"trained": 8, "dispatched": 40}}


def make_params(seed: int, columns: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"embed": {"embedding": normal(64, columns)}, "layers": {"norm": {"scale": normal(3, 5)}}}


@jax.jit
def advance(state: TrainState) -> TrainState:
    gradients = jax.tree.map(lambda x: jnp.sin(x) + 0.1, state.params)
    params, opt_state, _ = apply_gradients(OPTIMIZER, state.params, state.opt_state, gradients)
    return TrainState(params, opt_state, state.num_updates + 1)


def make_state(seed: int = 0, num_updates: int = 2, columns: int = 128) -> TrainState:
    params = make_params(seed, columns)
    state = TrainState(params, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))
    return functools.reduce(lambda s, _: advance(s), range(num_updates), state)


def blank(like: TrainState) -> TrainState:
    return jax.tree.map(jnp.zeros_like, like)


def assert_same(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def save(folder: pathlib.Path, *steps: int) -> None:
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(seed=step), SCHEDULE | {"num_done": step})


# --- round trip ------------------------------------------------------------------------------------------------------


def test_groups_come_back_bit_by_bit_and_may_be_none(tmp_path: pathlib.Path):
    groups = bytes(range(256)) * 40
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), SCHEDULE, groups)
        checkpoints.save(2, make_state(), SCHEDULE)
        checkpoints.wait()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # another one is being written
    with Checkpoints(tmp_path, is_reader=True) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(blank(make_state()), 1).step == 1
        assert (checkpoints.restore_groups(1), checkpoints.restore_groups(2)) == (groups, b"")
    assert (tmp_path / "3.orbax-checkpoint-tmp").exists()  # who only reads leaves it alone


def test_everything_comes_back(tmp_path: pathlib.Path):
    state = make_state()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(4, state, SCHEDULE)
        checkpoints.wait()
        assert checkpoints.latest_step == 4
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, restored, schedule = checkpoints.restore(blank(state))
    assert (step, schedule) == (4, SCHEDULE)
    assert isinstance(restored, TrainState)
    assert_same(restored, state)
    # Moments and counts of the optimizer too: the next update is the same to the bit, warm-up included.
    assert_same(advance(restored), advance(state))


def test_arrays_may_be_donated_while_they_are_saved(tmp_path: pathlib.Path):
    state, kept = make_state(), make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, SCHEDULE)
        jax.tree.map(lambda leaf: leaf.delete(), state)
        checkpoints.wait()
        _, restored, _ = checkpoints.restore(blank(kept))
    assert_same(restored, kept)


def test_restoring_onto_other_devices(tmp_path: pathlib.Path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec("data", "model"))
    place = lambda leaf, matrix: jax.device_put(leaf, spread if leaf.ndim == 2 and matrix else jax.devices()[3])
    state = make_state()
    on_mesh = jax.tree.map(lambda leaf: place(leaf, leaf.shape[:1] == (64,)), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, SCHEDULE)
        _, restored, _ = checkpoints.restore(blank(on_mesh))
        assert restored.params["embed"]["embedding"].sharding == spread
        assert restored.params["layers"]["norm"]["scale"].devices() == {jax.devices()[3]}
        assert_same(restored, state)
        checkpoints.save(2, restored, SCHEDULE)  # and back to one device
        step, back, _ = checkpoints.restore(blank(state))
    assert step == 2
    assert back.params["embed"]["embedding"].devices() == {jax.devices()[0]}
    assert_same(back, state)


# --- which ones are there --------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path: pathlib.Path):
    save(tmp_path, 1, 2, 3, 10)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 10]
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, schedule = checkpoints.restore(blank(make_state()))
    assert (step, schedule["num_done"]) == (10, 10)
    assert_same(restored, make_state(seed=10))


def test_the_best_one_is_kept_beside_the_last_ones(tmp_path: pathlib.Path):
    state = make_state()
    with Checkpoints(tmp_path, keep_best=True) as checkpoints:
        for step, reward in {1: 0.1, 2: 0.9, 3: 0.2, 4: None, 5: 0.4}.items():
            checkpoints.save(step, state, SCHEDULE | {"reward": reward})
    with Checkpoints(tmp_path, keep_best=True) as checkpoints:  # the rewards are on disk: a resume knows them
        assert (checkpoints.steps(), checkpoints.best_step) == ([2, 4, 5], 2)
        assert checkpoints.restore(blank(state), 2).schedule["reward"] == 0.9
        checkpoints.save(6, state, SCHEDULE | {"reward": 0.9})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step) == ([5, 6], 6)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (7, 8):
            checkpoints.save(step, state, SCHEDULE)
        checkpoints.wait()
        assert checkpoints.steps() == [7, 8]
        with pytest.raises(MagistralError, match="holds no complete checkpoint with a reward"):
            checkpoints.best_step  # noqa: B018


def test_saving_a_step_twice_is_once(tmp_path: pathlib.Path):
    save(tmp_path, 5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(tmp_path, 5)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_incomplete_checkpoint_is_not_there(tmp_path: pathlib.Path):
    save(tmp_path, 3)
    partial = tmp_path / "9.orbax-checkpoint-tmp"  # what a kill in the middle of a save leaves
    (tmp_path / "3").rename(tmp_path / "kept")
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "half").write_bytes(b"\0" * 100)
    (tmp_path / "kept").rename(tmp_path / "3")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 3
        step, restored, _ = checkpoints.restore(blank(make_state()))
        assert step == 3
        assert_same(restored, make_state(seed=3))
        checkpoints.save(9, restored, SCHEDULE)
        checkpoints.wait()
        assert checkpoints.latest_step == 9


def test_none_at_all_is_said(tmp_path: pathlib.Path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(MagistralError, match="holds no complete checkpoint; nothing to resume from"),
    ):
        checkpoints.restore(make_state())


# Orbax leaves the reads of a failed restore unawaited; they are collected here, so that no other test hears of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("other", ["shape", "optimizer", "layers"])
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(tmp_path: pathlib.Path, other: str):
    save(tmp_path, 1)
    like = make_state(num_updates=0, columns=96 if other == "shape" else 128)
    if other == "optimizer":
        like = TrainState(like.params, {"momentum": like.params}, like.num_updates)
    if other == "layers":
        like = TrainState(like.params | {"head": jnp.zeros(3)}, like.opt_state, like.num_updates)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(MagistralError) as error:
        checkpoints.restore(like)
    sentence = str(error.value)
    assert f"The checkpoint of step 1 in {tmp_path} does not fit this model and optimizer" in sentence
    assert "\n" not in sentence
    assert len(sentence) < 1000
    del error, checkpoints
    gc.collect()


# --- a full disk -----------------------------------------------------------------------------------------------------

# A process of its own, as the threads of a failed save outlive it. Files may not grow past 4 KiB: Python ignores
# SIGXFSZ, so that a longer write fails as on a full disk.
SAVE_ON_A_FULL_DISK = """
import pathlib, resource, sys
import jax.numpy as jnp, numpy as np
from magistral_jax.checkpoint import Checkpoints
from magistral_jax.pytrees import TrainState
from magistral_jax.records import MagistralError

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=10_000), jnp.float32)}
try:
    with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
        checkpoints.save(4, TrainState(params, {}, jnp.zeros((), jnp.int32)), {})
        if sys.argv[2] == "wait":
            checkpoints.wait()
except MagistralError as error:
    print(error)
"""


@pytest.mark.parametrize("ending", ["wait", "close"])
def test_a_full_disk_is_one_sentence_and_harms_nothing(tmp_path: pathlib.Path, ending: str):
    save(tmp_path, 3)
    words = [sys.executable, "-c", SAVE_ON_A_FULL_DISK, str(tmp_path), ending]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    (sentence,) = result.stdout.splitlines()
    assert sentence.startswith(f"Could not write a checkpoint to {tmp_path}: ")
    assert "File too large" in sentence
    assert sentence.endswith("The latest complete one is 3; free some space and resume from it.")
    assert "/magistral_jax/" not in result.stderr  # no traceback of ours

    with Checkpoints(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore(blank(make_state()))
        assert step == 3
        assert_same(restored, make_state(seed=3))
        checkpoints.save(4, restored, SCHEDULE)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 4
