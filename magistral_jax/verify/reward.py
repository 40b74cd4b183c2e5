"""Reward shaping: the parts of a reward and their sum (report §2.2).

In: the text of a completion and its problem. Out: a `Reward`. It is computed in two halves, so that a verifier that is
killed in the second still has the first: the form (format, length, language: cheap, certain to end) and the verdict
(correctness: may take long).
"""

import dataclasses

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.extract import extract_answer
from magistral_jax.verify.format import CodeBlock, FormatFault, Sections, first_code_block, last_boxed, split_completion
from magistral_jax.verify.item import VerifyItem
from magistral_jax.verify.language import LanguageOutcome, consistent_language
from magistral_jax.verify.length import length_reward
from magistral_jax.verify.math_answer import asks_for_order, grade_math

UNGRADED = Reward(Verdict.SANDBOX_ERROR, 0.0, 0.0, 0.0, 0.0, path="ungraded", seconds=0.0)
"""Of a completion about which nothing is known."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """A completion that may be graded: its parts, and its box, its program, or None for own functions."""

    sections: Sections
    answer: str | CodeBlock | None


def shape_reward(
    completion: str,
    problem: Problem,
    num_tokens: int,
    max_length: int,
    truncated: bool,
    config: RewardConfig,
) -> Reward:
    """Grade one completion of a math problem, in this process and without a time limit.

    A completion that fails the format gate gets 0 in total and nothing else is evaluated.

    Args:
      completion: What the policy wrote, with its tags, without the stop token.
      problem: The task and its reference answer.
      num_tokens: Completion tokens, with the stop token.
      max_length: Sampling limit in completion tokens: l_max, unless `config.max_length` sets another.
      truncated: True where the completion was cut at the limit. It would have gone on, so Eq. 1 takes it as l_max long
        even where it was cut earlier; the rest is judged as it stands.
      config: Size of each part.

    Returns:
      The reward with all its parts; `seconds` is 0 and `sandbox` empty, the verifier pool fills them in.

    Raises:
      MagistralError: The problem is one of code, or `config.function` is set: those need the pool.

    Source: Magistral (arXiv:2506.10910), section 2.2.
    Differs: parts with too few letters for a language verdict earn no language bonus.
    """
    if config.function or problem.kind != "math":
        what = "an own reward function" if config.function else f"a problem of kind {problem.kind!r}"
        raise MagistralError(f"shape_reward grades math; {what} needs VerifierPool, which confines what it runs")
    form, submission = shape_form(VerifyItem(0, problem, completion, num_tokens, max_length, truncated), config)
    if submission is None:
        return form
    assert isinstance(submission.answer, str)
    verdict, path = grade_math(submission.answer, problem.answer, is_ordered=asks_for_order(problem.statement))
    return settle(form, verdict, path, config.correctness if verdict is Verdict.CORRECT else 0.0)


def shape_form(item: VerifyItem, config: RewardConfig) -> tuple[Reward, Submission | None]:
    """First half of a reward: all but correctness.

    Returns:
      The reward so far and what is still to be graded. That is None where the format gate failed: then the reward is
      final. Otherwise its verdict is a placeholder.
    """
    submission = find_submission(item, config)
    if isinstance(submission, FormatFault):
        verdict = Verdict.BAD_FORMAT if item.is_strict else Verdict.UNPARSABLE
        return dataclasses.replace(UNGRADED, verdict=verdict, path=submission.value), None
    l_max = config.max_length or item.max_length
    length = length_reward(
        max(item.num_tokens, l_max) if item.truncated else item.num_tokens,
        max_length=l_max,
        length_cache=config.length_cache if item.length_cache is None else item.length_cache,
        penalty=config.length_penalty,
    )
    form = dataclasses.replace(UNGRADED, length=length)
    if not item.is_strict:
        return form, submission
    form = dataclasses.replace(form, format=config.format)
    if config.language > 0:
        parts = submission.sections
        outcome = consistent_language(item.problem.statement, parts.thoughts, parts.answer)
        bonus = config.language * (outcome is LanguageOutcome.CONSISTENT)
        form = dataclasses.replace(form, language=bonus, language_note=outcome.value)
    return form, submission


def settle(form: Reward, verdict: Verdict, path: str, correctness: float) -> Reward:
    """Second half of a reward: put a verdict on a form."""
    return dataclasses.replace(form, verdict=verdict, correctness=correctness, path=path)


def find_submission(item: VerifyItem, config: RewardConfig) -> Submission | FormatFault:
    """What of a completion is to be graded, or the first rule of the format that it breaks.

    Strict, the tags come first, and after them a box, a fenced block with a language, or for an own function anything.
    Otherwise the answer is taken from wherever it stands, after the last closing tag if there is one.
    """
    if item.is_strict:
        sections = split_completion(item.completion, config.think_open, config.think_close)
        if isinstance(sections, FormatFault):
            return sections
    else:
        thoughts, close, rest = item.completion.rpartition(config.think_close)
        sections = Sections(thoughts.removeprefix(config.think_open) if close else "", rest)
    if config.function:
        return Submission(sections, None)
    if item.problem.kind == "code":
        answer = first_code_block(sections.answer) if item.is_strict else _loose_program(item, sections.answer)
        missing = FormatFault.NO_CODE_BLOCK
    else:
        answer = last_boxed(sections.answer) if item.is_strict else extract_answer(sections.answer, config.think_close)
        missing = FormatFault.NO_BOXED_ANSWER
    if answer is None:
        return missing if item.is_strict else FormatFault.NO_ANSWER
    return Submission(sections, answer)


def _loose_program(item: VerifyItem, text: str) -> CodeBlock | None:
    """The first fenced block, or where there is none the whole text, if its language is known."""
    block = first_code_block(text, item.code_language)
    if block is None and item.code_language:
        return CodeBlock(item.code_language, text)
    return block
