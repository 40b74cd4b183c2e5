from typing import Any

import pytest

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.reward import shape_reward

WORDS = "We add the two numbers and look at the result for a moment. "
PROBLEM = Problem("p", "What is the sum of one and two in this problem?", "3")
FRENCH = "Nous additionnons les deux nombres et nous regardons le résultat. "


def shape(
    completion: str, *, problem: Problem = PROBLEM, num_tokens: int = 10, truncated: bool = False, **config: Any
) -> Reward:
    return shape_reward(completion, problem, num_tokens, 100, truncated, RewardConfig(**config))


def completion(answer: str, thoughts: str = WORDS) -> str:
    return f"<think>{thoughts}</think>{WORDS}\\boxed{{{answer}}}"


def test_a_right_answer_earns_all_parts():
    reward = shape(completion("3"))
    assert (reward.format, reward.correctness, reward.length, reward.language) == (0.1, 0.9, 0.0, 0.1)
    assert reward.total == pytest.approx(1.1)
    assert (reward.verdict, reward.path, reward.language_note) == (Verdict.CORRECT, "string", "consistent")


def test_a_wrong_answer_keeps_format_and_language():
    reward = shape(completion("4"))
    assert reward.verdict is Verdict.WRONG
    assert reward.total == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("3", "no_opening_tag"),
        ("<think>a \\boxed{3}", "no_closing_tag"),
        (completion("3") + "<think>", "repeated_tag"),
        ("<think>\\boxed{3}</think>It is 3.", "no_boxed_answer"),
    ],
)
def test_a_failed_gate_is_zero_in_total_even_over_the_length_limit(text: str, path: str):
    reward = shape(text, num_tokens=1000, length_cache=20)
    assert reward.verdict is Verdict.BAD_FORMAT
    assert (reward.total, reward.path, reward.language_note) == (0.0, path, "")


def test_length_is_penalised_by_the_sampling_limit_or_its_own():
    assert shape(completion("3"), num_tokens=90, length_cache=20).length == pytest.approx(-0.05)
    assert shape(completion("3"), num_tokens=90, length_cache=20, max_length=200).length == 0.0
    assert shape(completion("3"), num_tokens=90).length == 0.0


def test_a_cut_completion_counts_as_long_as_the_limit():
    assert shape(completion("3"), num_tokens=50, truncated=True, length_cache=20).length == pytest.approx(-0.1)


def test_language():
    reward = shape(completion("3", thoughts=FRENCH))
    assert (reward.language, reward.language_note) == (0.0, "inconsistent")
    reward = shape(f"<think>{WORDS}</think>\\boxed{{3}}")
    assert (reward.language, reward.language_note) == (0.0, "too_short")
    reward = shape(completion("3"), language=0.0)
    assert (reward.language, reward.language_note) == (0.0, "")


def test_sizes_and_tags_are_settings():
    config: dict[str, Any] = {
        "format": 0.2,
        "correctness": 0.5,
        "language": 0.25,
        "think_open": "[T]",
        "think_close": "[/T]",
    }
    reward = shape(f"[T]{WORDS}[/T]{WORDS}\\boxed{{3}}", **config)
    assert (reward.format, reward.correctness, reward.language) == (0.2, 0.5, 0.25)


def test_the_last_box_counts():
    assert shape(completion("3") + " or \\boxed{4}").verdict is Verdict.WRONG


def test_code_is_refused_not_faked():
    with pytest.raises(MagistralError, match="code verification is not available"):
        shape(completion("3"), problem=Problem("c", "s", "a", kind="code"))
