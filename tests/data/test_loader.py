"""The endless order of prompts: deterministic, indexed by a cursor, restartable, and tied to its data."""

import json
import pathlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.chat import build_prompt
from magistral_jax.data.loader import PromptLoader, make_prompts
from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.records import Problem, Prompt

PROBLEMS = [Problem(f"p{i}", f"{i}+1", str(i + 1)) for i in range(40)]


def build(problem: Problem):
    return build_prompt(problem, ByteTokenizer(), "none")


def loader(problems: list[Problem] = PROBLEMS, seed: int = 0):
    return PromptLoader([build(problem) for problem in problems], seed)


def order(prompts: PromptLoader, cursors: Iterable[int]):
    return [prompts.prompt_at(cursor).problem.id for cursor in cursors]


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own():
    prompts = loader()
    epochs = [order(prompts, range(40 * epoch, 40 * (epoch + 1))) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(problem.id for problem in PROBLEMS)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(prompts) == 40


@given(st.integers(0, 2**40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_restart_at_any_cursor_goes_on_with_the_same_prompts(seed: int, cursor: int):
    cursors = range(cursor, cursor + 5)
    uninterrupted = loader(seed=seed)
    order(uninterrupted, range(3))  # what was asked before has no influence
    assert order(uninterrupted, cursors) == order(loader(seed=seed), cursors)


def test_seeds_give_other_orders():
    assert order(loader(seed=0), range(40)) != order(loader(seed=1), range(40))


def test_one_prompt_is_repeated_for_ever():
    assert order(loader(PROBLEMS[:1]), [0, 1, 10**6]) == ["p0"] * 3


def test_no_thread_is_left():
    before = threading.active_count()
    order(loader(), range(100))
    assert threading.active_count() == before


def test_no_prompts_are_an_error(refuses: Any):
    with refuses("there are no prompts to draw from: the problem source is empty after filtering"):
        PromptLoader([], 0)


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_data(tmp_path: pathlib.Path):
    path = tmp_path / "data.json"
    loader().check_run(path, is_resumed=False)
    assert json.loads(path.read_text()) == {"fingerprint": loader().fingerprint, "num_prompts": 40}
    loader().check_run(path, is_resumed=True)


def test_a_new_run_notes_its_own_data(tmp_path: pathlib.Path):
    path = tmp_path / "data.json"
    loader(seed=1).check_run(path, is_resumed=False)
    loader().check_run(path, is_resumed=False)
    loader().check_run(path, is_resumed=True)


@pytest.mark.parametrize(
    "other",
    [
        loader(seed=1),
        loader(PROBLEMS[:-1]),
        loader(PROBLEMS[::-1]),
        loader([Problem("p0", "0+1 ", "1"), *PROBLEMS[1:]]),
        loader([Problem("p00", "+1", "1"), *PROBLEMS[1:]]),  # the same letters, cut elsewhere
    ],
    ids=["seed", "fewer", "order", "statement", "border"],
)
def test_other_data_are_refused_on_resume(other: PromptLoader, tmp_path: pathlib.Path, refuses: Any):
    path = tmp_path / "data.json"
    other.check_run(path, is_resumed=False)
    ours = loader()
    with refuses(
        f"{path}: the run was started with other data (fingerprint {other.fingerprint[:12]}) than the problems and "
        f"seed given now ({ours.fingerprint[:12]}); resume with the same ones"
    ):
        ours.check_run(path, is_resumed=True)


# --- overlong prompts ------------------------------------------------------------------------------------------------


def test_an_overlong_prompt_is_named(refuses: Any):
    long = Problem("long", "x" * 10, "1")
    make_prompts([*PROBLEMS, long], build, max_prompt_tokens=12, overlong="error")
    with refuses(
        "problem long: its prompt has 12 tokens, the limit is 11 (generation.max_prompt_tokens); "
        "raise it, or set data.overlong_prompts to drop"
    ):
        make_prompts([*PROBLEMS, long], build, max_prompt_tokens=11, overlong="error")


def test_overlong_prompts_are_dropped_and_counted():
    """`p10` … `p39` have a byte more than `p0` … `p9`: <bos>, "9+1", line break are five tokens."""
    prompts, num_dropped = make_prompts(PROBLEMS, build, max_prompt_tokens=5, overlong="drop")
    assert [prompt.problem for prompt in prompts] == PROBLEMS[:10]
    assert num_dropped == 30
    assert all(isinstance(prompt, Prompt) and prompt.token_ids.dtype == np.int32 for prompt in prompts)
