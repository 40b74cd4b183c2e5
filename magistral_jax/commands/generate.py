"""`magistral-jax generate`: completions of the evaluation problems, as JSON lines."""

import json

from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import (
    completion_text,
    load_evaluation_problems,
    load_model,
    load_prompts,
    make_sampler,
    say_warnings,
)
from magistral_jax.config import Config
from magistral_jax.evaluate import generate_all
from magistral_jax.records import SamplingParams


def generate(config: Config) -> None:
    """Sample `evaluation.num_samples` completions of each problem of `data.evaluation` to standard output."""
    say_warnings(config)
    model = load_model(config)
    prompts = load_prompts(config, model.tokenizer, load_evaluation_problems(config))
    batcher = make_sampler(config, model)
    settings = config.evaluation
    sampling = SamplingParams(settings.temperature, settings.top_p, 0, config.generation.max_new_tokens)
    with progress_bar("generation") as report:
        rollouts = generate_all(prompts, batcher, sampling, num_samples=settings.num_samples, on_progress=report)
    for index, rollout in enumerate(rollouts):
        prompt = prompts[index // settings.num_samples]
        line = {
            "problem": prompt.problem.id,
            "prompt": prompt.text,
            "completion": completion_text(model, rollout.completion_ids),
            "reference": prompt.problem.answer,
            "completion_tokens": len(rollout.completion_ids),
            "logprob": float(rollout.behavior_logprob.sum()),
            "truncated": rollout.truncated,
        }
        print(json.dumps(line, ensure_ascii=False))  # noqa: T201 (the result, for a program to read)
