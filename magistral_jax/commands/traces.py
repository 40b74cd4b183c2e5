"""`magistral-jax traces`: right completions of a teacher, balanced over lengths and languages, for `sft`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from magistral_jax.commands.curate import start_folder
from magistral_jax.commands.problems import load_training_problems
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import (
    Model,
    completion_text,
    load_evaluation_problems,
    load_model,
    load_prompts,
    make_sampler,
    make_verifiers,
    open_run,
    say,
)
from magistral_jax.config import Config
from magistral_jax.curate.journal import in_chunks, write_atomically
from magistral_jax.data.trace_choice import Candidate, choose_traces
from magistral_jax.evaluate import FIRST_REQUEST, generate_all
from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.records import MagistralError, Prompt, SamplingParams, Verdict
from magistral_jax.verify.language import LanguageOutcome, classify
from magistral_jax.verify.pool import VerifierPool, VerifyItem

TRACES_FILE = "traces.jsonl"


def traces(config: Config) -> None:
    """Sample `policy.path` on `data.train`; the traces land in `run.folder`/traces.jsonl.

    Source: Magistral (arXiv:2506.10910), section 5.3.
    """
    folder = open_run(config)
    model = load_model(config)
    held_out = load_evaluation_problems(config) if config.data.evaluation else []
    prompts = load_prompts(config, model.tokenizer, load_training_problems(config, held_out).problems)
    start_folder(config, folder)
    with progress_bar("sampling") as report, make_verifiers(config) as verifiers:
        batcher = make_sampler(config, model)
        records = in_chunks(
            prompts,
            sampler(config, model, batcher, verifiers),
            journal=folder / "samples.jsonl",
            key=lambda prompt: prompt.problem.id,
            chunk=config.traces.chunk,
            on_progress=report,
        )
    candidates = [
        Candidate(prompt.problem, found["completion"], found["num_tokens"], record["language"])
        for prompt, record in zip(prompts, records, strict=True)
        for found in record["right"]
    ]
    chosen = choose_traces(candidates, max_per_problem=config.traces.max_per_problem, num=config.traces.num)
    if not chosen:
        raise MagistralError(f"{config.policy.path} has solved none of {len(prompts)} problems in the right format.")
    write_atomically(folder / TRACES_FILE, "".join(map(_row, chosen)))
    num_problems = len({candidate.problem.id for candidate in chosen})
    say(
        f"{len(chosen)} traces of {num_problems} problems, from {len(candidates)} right completions to {len(prompts)}: "
        f"{folder / TRACES_FILE}"
    )


def sampler(
    config: Config, model: Model, batcher: ContinuousBatcher, verifiers: VerifierPool
) -> Callable[[int, Sequence[Prompt]], list[dict[str, Any]]]:
    """A function that samples some prompts and keeps what is right. The engine is empty before and after each call."""
    num, generation = config.traces.num_samples, config.generation
    sampling = SamplingParams(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)

    def compute(start: int, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        first = FIRST_REQUEST + start * num
        rollouts = generate_all(prompts, batcher, sampling, num_samples=num, first_request=first)
        texts = [completion_text(model, rollout.completion_ids) for rollout in rollouts]
        items = [
            VerifyItem(
                request_id=rollout.request_id,
                problem=prompts[index // num].problem,
                completion=text,
                num_tokens=len(rollout.completion_ids),
                max_length=generation.max_new_tokens,
                truncated=rollout.truncated,
                test_seed=index // num,
            )
            for index, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
        ]
        right: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for index, reward in enumerate(verifiers.grade_all(items)):
            is_mixed = reward.language_note == LanguageOutcome.INCONSISTENT.value
            if reward.verdict is Verdict.CORRECT and not rollouts[index].truncated and not is_mixed:
                found = {"completion": texts[index], "num_tokens": len(rollouts[index].completion_ids)}
                right[index // num].append(found)
        return [
            {"id": prompt.problem.id, "language": classify(prompt.problem.statement) or "", "right": found}
            for prompt, found in zip(prompts, right, strict=True)
        ]

    return compute


def _row(candidate: Candidate) -> str:
    row = {
        "problem": candidate.problem.statement,
        "completion": candidate.completion,
        "answer": candidate.problem.answer,
        "kind": candidate.problem.kind,
        "problem_id": candidate.problem.id,
        "language": candidate.language,
        "num_tokens": candidate.num_tokens,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
