"""Curation of math problems: format first, which costs nothing, then k samples of each problem that is left."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from magistral_jax.commands.curate import load_raw, start_folder, write_results
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import (
    Model,
    completion_text,
    load_model,
    load_prompts,
    make_sampler,
    make_verifiers,
    think_tags,
)
from magistral_jax.config import Config
from magistral_jax.curate.difficulty import GradedSample, Score, by_difficulty, rivals, score, with_score
from magistral_jax.curate.journal import in_chunks
from magistral_jax.curate.ledger import filter_step, split_step
from magistral_jax.curate.math_format import open_format
from magistral_jax.data.overlap import Removal
from magistral_jax.evaluate import FIRST_REQUEST, extract_answer, generate_all
from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.records import Problem, Prompt, SamplingParams, Verdict
from magistral_jax.verify.extract import extract_answer as find_answer
from magistral_jax.verify.pool import VerifierPool, VerifyItem


def curate_math(config: Config, folder: pathlib.Path) -> None:
    """Curate `data.train` into `folder`.

    Source: Magistral (arXiv:2506.10910), section 4.1.
    """
    raw = load_raw(config)
    problems, step = filter_step("format", raw.problems, open_format)
    steps = [*raw.steps, step]
    if not config.curate.num_samples:
        start_folder(config, folder)
        write_results(folder, problems, problems, steps)
        return

    model = load_model(config)
    prompts = load_prompts(config, model.tokenizer, problems)
    fitting = {prompt.problem.id for prompt in prompts}
    problems, step = split_step("prompt", [_if_fitting(problem, fitting) for problem in problems])
    steps.append(step)
    start_folder(config, folder)
    scores = _sample(config, folder, model, prompts)
    pool = [with_score(p, s, config.curate.stage) for p, s in zip(problems, scores, strict=True)]
    judged = [by_difficulty(p, s, config.curate) for p, s in zip(pool, scores, strict=True)]
    kept, step = split_step(f"difficulty, stage {config.curate.stage}", judged)
    write_results(folder, pool, kept, [*steps, step])


def _if_fitting(problem: Problem, fitting: set[str]) -> Problem | Removal:
    return problem if problem.id in fitting else Removal(problem.id, "longer than generation.max_prompt_tokens")


def _sample(config: Config, folder: pathlib.Path, model: Model, prompts: list[Prompt]) -> list[Score]:
    """A score for each prompt, from the journal of the folder or from samples."""
    with progress_bar("sampling") as report, make_verifiers(config) as verifiers:
        batcher = make_sampler(config, model)
        records = in_chunks(
            prompts,
            sampler(config, model, batcher, verifiers),
            journal=folder / f"samples_{config.curate.stage}.jsonl",
            key=lambda prompt: prompt.problem.id,
            chunk=config.curate.chunk,
            on_progress=report,
        )
    return [Score(**record) for record in records]


def _comparison(problem: Problem, answer: str, other: str) -> VerifyItem:
    """Asks the verifier whether two answers to a problem are one."""
    reference = dataclasses.replace(problem, answer=answer)
    return VerifyItem(0, reference, f"\\boxed{{{other}}}", 0, 0, truncated=False, is_strict=False)


def sampler(
    config: Config, model: Model, batcher: ContinuousBatcher, verifiers: VerifierPool
) -> Callable[[int, Sequence[Prompt]], list[dict[str, Any]]]:
    """A function that samples and grades some prompts. The engine is empty before and after each call."""
    num, is_strict, tags = config.curate.num_samples, config.curate.format == "strict", think_tags(config)
    generation = config.generation
    sampling = SamplingParams(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)

    def compute(start: int, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        first = FIRST_REQUEST + start * num
        rollouts = generate_all(prompts, batcher, sampling, num_samples=num, first_request=first)
        texts = [completion_text(model, rollout.completion_ids) for rollout in rollouts]
        rewards = verifiers.grade_all(
            [
                VerifyItem(
                    request_id=rollout.request_id,
                    problem=prompts[index // num].problem,
                    completion=text,
                    num_tokens=len(rollout.completion_ids),
                    max_length=generation.max_new_tokens,
                    truncated=rollout.truncated,
                    is_strict=is_strict,
                )
                for index, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
            ]
        )
        samples = [
            GradedSample(
                extract_answer(text, tags) if is_strict else find_answer(text, tags[1]),
                reward.verdict,
                len(rollout.completion_ids),
            )
            for text, reward, rollout in zip(texts, rewards, rollouts, strict=True)
        ]
        of_problem = [samples[start : start + num] for start in range(0, len(samples), num)]
        pairs = [(place, pair) for place, own in enumerate(of_problem) for pair in rivals(own)]
        compared = verifiers.grade_all([_comparison(prompts[place].problem, *pair) for place, pair in pairs])
        equal = [found for found, reward in zip(pairs, compared, strict=True) if reward.verdict is Verdict.CORRECT]
        return [
            dataclasses.asdict(score(prompt.problem.id, own, [pair for i, pair in equal if i == place]))
            for place, (prompt, own) in enumerate(zip(prompts, of_problem, strict=True))
        ]

    return compute
