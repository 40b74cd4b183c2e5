import dataclasses
from typing import Any

import pytest

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.format import CodeBlock, FormatFault, Sections
from magistral_jax.verify.item import VerifyItem
from magistral_jax.verify.reward import Submission, find_submission, shape_form, shape_reward

CONFIG = RewardConfig()
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


@pytest.mark.parametrize(("kind", "config"), [("code", {}), ("math", {"function": "a:b"})])
def test_what_needs_the_pool_is_refused_not_faked(kind: Any, config: dict[str, Any]):
    with pytest.raises(MagistralError, match="needs VerifierPool"):
        shape(completion("3"), problem=Problem("c", "s", "a", kind=kind), **config)


# ---- what is to be graded ----


def find(text: str, kind: Any = "math", config: RewardConfig = CONFIG, **fields: Any) -> Submission | FormatFault:
    return find_submission(VerifyItem(0, Problem("p", "s", "a", kind=kind), text, 1, 1, False, **fields), config)


PROGRAM = CodeBlock("python", "print(1)\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think>So:\n```python\nprint(1)\n```\n", PROGRAM),
        ("<think>t</think>So:\n```\nprint(1)\n```\n", FormatFault.NO_CODE_BLOCK),
        ("<think>t</think>\\boxed{1}", FormatFault.NO_CODE_BLOCK),
        ("<think>```python\nprint(1)\n```</think>", FormatFault.NO_CODE_BLOCK),
        ("```python\nprint(1)\n```", FormatFault.NO_OPENING_TAG),
    ],
)
def test_a_program_stands_in_a_fence_with_its_language(text: str, expected: CodeBlock | FormatFault):
    found = find(text, "code", code_language="python")
    assert (found.answer if isinstance(found, Submission) else found) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("<think>t</think>```python\nprint(1)\n```", "cpp", PROGRAM),
        ("```python\nprint(1)\n```", "", PROGRAM),
        ("```\nprint(1)\n```", "python", PROGRAM),
        ("```\nprint(1)\n```", "", FormatFault.NO_ANSWER),
        ("print(1)\n", "python", PROGRAM),
        ("print(1)\n", "", FormatFault.NO_ANSWER),
        ("```python\nprint(0)\n```</think>```python\nprint(1)\n```", "", PROGRAM),
    ],
)
def test_without_a_format_a_program_may_stand_anywhere(text: str, language: str, expected: CodeBlock | FormatFault):
    found = find(text, "code", is_strict=False, code_language=language)
    assert (found.answer if isinstance(found, Submission) else found) == expected


def test_without_a_format_an_answer_may_stand_anywhere():
    found = find("I take it that the answer is $\\frac12$.", is_strict=False)
    assert isinstance(found, Submission)
    assert found.answer == "\\frac12"
    assert find("", is_strict=False) is FormatFault.NO_ANSWER


def test_without_a_format_there_is_no_reward_for_it():
    item = VerifyItem(0, PROBLEM, completion("3"), 1, 1, False, is_strict=False)
    form, submission = shape_form(item, CONFIG)
    assert submission is not None
    assert (form.format, form.language, form.language_note) == (0.0, 0.0, "")
    form, submission = shape_form(dataclasses.replace(item, completion=""), CONFIG)
    assert (form.verdict, submission) == (Verdict.UNPARSABLE, None)


def test_an_own_function_wants_the_tags_only():
    config = RewardConfig(function="a:b")
    found = find("<think>some</think>thing", config=config)
    assert found == Submission(Sections("some", "thing"), None)
    assert find("thing", config=config) is FormatFault.NO_OPENING_TAG
    assert find("<think>some</think>thing", "code", config, is_strict=False) == found
    assert find("thing", config=config, is_strict=False) == Submission(Sections("", "thing"), None)


@pytest.mark.parametrize(
    ("statement", "verdict"), [("List them in order.", Verdict.WRONG), ("Find all.", Verdict.CORRECT)]
)
def test_the_question_decides_whether_the_order_of_a_list_counts(statement: str, verdict: Verdict):
    completion = "<think>Well.</think>\\boxed{3, 2, 1}"
    reward = shape_reward(completion, Problem("p", statement, "1, 2, 3"), 1, 9, False, RewardConfig())
    assert reward.verdict is verdict
