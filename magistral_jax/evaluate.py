"""pass@1, pass@k and maj@k over held-out problems, with the engine and verifiers of training (report §5.1)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from magistral_jax.data.config import EvaluationConfig
from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.records import Graded, MagistralError, Prompt, Rollout, SamplingParams
from magistral_jax.studies.pass_at_k import EvaluationSummary, Sample, summarize
from magistral_jax.verify.format import FormatFault, last_boxed, split_completion
from magistral_jax.verify.pool import VerifierPool, VerifyItem

T = TypeVar("T")

# Request ids of evaluations start here, so that none shares its random numbers with a training rollout.
FIRST_REQUEST = 2**31


def evaluate(
    prompts: Sequence[Prompt],
    batcher: ContinuousBatcher,
    verifiers: VerifierPool,
    *,
    config: EvaluationConfig,
    max_new_tokens: int,
    decode: Callable[[np.ndarray], str],
    tags: tuple[str, str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[EvaluationSummary, list[list[Graded]]]:
    """Sample every problem `config.num_samples` times and grade the samples.

    The samples depend on the engine's seed and weights only, so two evaluations differ in the weights alone.

    Returns:
      The scores, with parts where `config.by` names a column, and the graded samples of each problem.

    Raises:
      MagistralError: A problem has no such column.
    """
    values = _values(prompts, config.by)
    sampling = SamplingParams(config.temperature, config.top_p, 0, max_new_tokens)
    rollouts = generate_all(prompts, batcher, sampling, num_samples=config.num_samples, on_progress=on_progress)
    texts = [decode(rollout.completion_ids) for rollout in rollouts]
    items = [
        VerifyItem(
            request_id=rollout.request_id,
            problem=prompts[index // config.num_samples].problem,
            completion=text,
            num_tokens=len(rollout.completion_ids),
            max_length=max_new_tokens,
            truncated=rollout.truncated,
            group=index // config.num_samples,
            group_size=config.num_samples,
        )
        for index, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
    ]
    rewards = verifiers.grade_all(items)
    samples = [
        Sample(extract_answer(text, tags), reward, len(rollout.completion_ids), rollout.truncated)
        for text, reward, rollout in zip(texts, rewards, rollouts, strict=True)
    ]
    graded = [Graded(rollout, reward) for rollout, reward in zip(rollouts, rewards, strict=True)]
    by_problem = _by_problem(samples, config.num_samples)
    summary = summarize(by_problem, maj_k=config.num_samples)
    parts = {
        value: summarize([by_problem[place] for place in places], maj_k=config.num_samples)
        for value, places in values.items()
    }
    return dataclasses.replace(summary, parts=parts), _by_problem(graded, config.num_samples)


def _values(prompts: Sequence[Prompt], column: str) -> Mapping[str, list[int]]:
    """Places of the prompts whose problems have each value of a column; nothing without a column."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts if column else ()):
        if column not in prompt.problem.extra:
            raise MagistralError(f"problem {prompt.problem.id} has no column `{column}`, which `evaluation.by` names.")
        places.setdefault(str(prompt.problem.extra[column]), []).append(place)
    return dict(sorted(places.items()))


def generate_all(
    prompts: Sequence[Prompt],
    batcher: ContinuousBatcher,
    sampling: SamplingParams,
    *,
    num_samples: int,
    first_request: int = FIRST_REQUEST,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rollout]:
    """`num_samples` completions of each prompt, in order; their random numbers are those of their request ids."""
    total = len(prompts) * num_samples
    for index in range(total):
        prompt = prompts[index // num_samples]
        batcher.submit(GenerationRequest(first_request + index, prompt.token_ids, sampling))
    rollouts: list[Rollout] = []
    while len(rollouts) < total:
        rollouts += batcher.step()
        on_progress(len(rollouts), total)
    return sorted(rollouts, key=lambda rollout: rollout.request_id)


def extract_answer(completion: str, tags: tuple[str, str]) -> str | None:
    """The final answer as its author wrote it, without spaces; None where the format has none."""
    sections = split_completion(completion, *tags)
    boxed = None if isinstance(sections, FormatFault) else last_boxed(sections.answer)
    return None if boxed is None else "".join(boxed.split())


def _by_problem(values: Sequence[T], size: int) -> list[list[T]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]
