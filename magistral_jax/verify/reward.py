"""Reward shaping: the parts of a reward and their sum (report §2.2).

In: the text of a completion and its problem. Out: a `Reward`. It is computed in two halves, so that a verifier that is
killed in the second still has the first: the form (format, length, language: cheap, certain to end) and the verdict
(correctness: may take long).
"""

import dataclasses

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.format import FormatFault, last_boxed, split_completion
from magistral_jax.verify.language import LanguageOutcome, consistent_language
from magistral_jax.verify.length import length_reward
from magistral_jax.verify.math_answer import grade_math


def shape_reward(
    completion: str,
    problem: Problem,
    num_tokens: int,
    max_length: int,
    truncated: bool,
    config: RewardConfig,
) -> Reward:
    """Grade one completion.

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
      The reward with all its parts; `seconds` is 0, the verifier pool fills it in.

    Raises:
      MagistralError: The problem is of a kind that cannot be verified.

    Source: Magistral (arXiv:2506.10910), section 2.2.
    Differs: parts with too few letters for a language verdict earn no language bonus.
    """
    form, answer = shape_form(completion, problem, num_tokens, max_length, truncated, config)
    if answer is None:
        return form
    verdict, path = grade_math(answer, problem.answer)
    return settle(form, verdict, path, config)


def shape_form(
    completion: str,
    problem: Problem,
    num_tokens: int,
    max_length: int,
    truncated: bool,
    config: RewardConfig,
) -> tuple[Reward, str | None]:
    """First half of `shape_reward`: all but correctness.

    Returns:
      The reward so far and the answer that is still to be graded. That is None where the format gate failed: then the
      reward is final. Otherwise its verdict is a placeholder.
    """
    check_kind(problem)
    sections = split_completion(completion, config.think_open, config.think_close)
    answer = None if isinstance(sections, FormatFault) else last_boxed(sections.answer)
    if isinstance(sections, FormatFault) or answer is None:
        fault = sections if isinstance(sections, FormatFault) else FormatFault.NO_BOXED_ANSWER
        return Reward(Verdict.BAD_FORMAT, 0.0, 0.0, 0.0, 0.0, path=fault.value, seconds=0.0), None
    l_max = config.max_length or max_length
    length = length_reward(
        max(num_tokens, l_max) if truncated else num_tokens,
        max_length=l_max,
        length_cache=config.length_cache,
        penalty=config.length_penalty,
    )
    language, note = 0.0, ""
    if config.language > 0:
        outcome = consistent_language(problem.statement, sections.thoughts, sections.answer)
        language, note = config.language * (outcome is LanguageOutcome.CONSISTENT), outcome.value
    form = Reward(
        Verdict.SANDBOX_ERROR, config.format, 0.0, length, language, path="unsettled", seconds=0.0, language_note=note
    )
    return form, answer


def settle(form: Reward, verdict: Verdict, path: str, config: RewardConfig) -> Reward:
    """Second half of `shape_reward`: put a verdict on a form."""
    correctness = config.correctness if verdict is Verdict.CORRECT else 0.0
    return dataclasses.replace(form, verdict=verdict, correctness=correctness, path=path)


def check_kind(problem: Problem) -> None:
    """Raise `MagistralError` where no verifier exists for the kind of the problem."""
    if problem.kind != "math":
        raise MagistralError(
            f"problem {problem.id!r} is of kind {problem.kind!r}: code verification is not available in this version"
        )
