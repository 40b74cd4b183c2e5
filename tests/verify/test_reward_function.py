import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.records import MagistralError, Problem
from magistral_jax.verify.format import Sections
from magistral_jax.verify.item import VerifyItem
from magistral_jax.verify.reward import Submission
from magistral_jax.verify.reward_function import call_function, load_function

PROBLEM = Problem("p", "one and two?", "3", extra={"levels": [1, 2], "answer": "of the row"})
ITEM = VerifyItem(0, PROBLEM, "<think>hm</think>three", 1, 1, False)
SUBMISSION = Submission(Sections("hm", "three"), None)


def call(function: Callable[..., Any]) -> float:
    return call_function(function, ITEM, SUBMISSION)


def test_a_function_gets_what_it_asks_for():
    given: dict[str, Any] = {}

    def some(completion: str, levels: list[int]) -> float:
        given.update(completion=completion, levels=levels)
        return 0.25

    assert call(some) == 0.25
    assert given == {"completion": "<think>hm</think>three", "levels": [1, 2]}
    assert given["levels"] is PROBLEM.extra["levels"]


def test_a_function_that_takes_all_gets_all():
    given: dict[str, Any] = {}

    def everything(thoughts: str, **columns: Any) -> int:
        given.update(columns, thoughts=thoughts)
        return 1

    assert call(everything) == 1.0
    assert given == {
        "completion": "<think>hm</think>three",
        "statement": "one and two?",
        "answer": "3",
        "thoughts": "hm",
        "levels": [1, 2],
    }


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_score_is_a_share(score: float):
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        call(lambda **columns: score)


def test_a_score_is_a_number():
    with pytest.raises(TypeError):
        call(lambda **columns: None)
    with pytest.raises(TypeError):
        call(lambda **columns: "0.5")
    assert call(lambda **columns: True) == 1.0


def test_a_column_that_is_not_there_is_the_functions_error():
    with pytest.raises(TypeError, match="difficulty"):
        call(lambda difficulty: 1.0)


def test_functions_are_found_by_their_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_rewards.py").write_text("class Rewards:\n    def score(): return 0.5\n")
    assert load_function("my_package.my_rewards:Rewards.score")() == 0.5
    (tmp_path / "broken_rewards.py").write_text("import no_such_thing\n")
    with pytest.raises(MagistralError, match=r"broken_rewards:score.*No module named 'no_such_thing'"):
        load_function("broken_rewards:score")
    del sys.modules["my_package"], sys.modules["my_package.my_rewards"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("score", "expected `package.module:name`"),
        (":score", "expected `package.module:name`"),
        ("json:", "expected `package.module:name`"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("json:score", "has no attribute 'score'"),
        ("sys:path", "is no function but list"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(path: str, sentence: str):
    with pytest.raises(MagistralError) as error:
        load_function(path)
    assert str(error.value).startswith(f"`reward.function` is `{path}`")
    assert sentence in str(error.value)
