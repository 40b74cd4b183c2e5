"""`magistral-jax evaluate`: scores of a model folder on held-out problems."""

import functools
import json
import pathlib

from magistral_jax import evaluate as evaluation
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import (
    Model,
    completion_text,
    load_evaluation_problems,
    load_model,
    load_prompts,
    make_sampler,
    make_verifiers,
    say,
    say_warnings,
    think_tags,
)
from magistral_jax.config import Config
from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.metrics import replace_text
from magistral_jax.records import Prompt
from magistral_jax.studies.pass_at_k import EvaluationSummary, parts_table


def evaluate(config: Config) -> None:
    """Evaluate `policy.path` on `data.evaluation`; prints a table and, as the last line, one JSON object."""
    say_warnings(config)
    model = load_model(config)
    prompts = load_prompts(config, model.tokenizer, load_evaluation_problems(config))
    batcher = make_sampler(config, model)
    summary = score_policy(config, model, batcher, prompts, title="evaluation")
    if summary.parts:
        print(parts_table(summary, config.evaluation.by), end="")  # noqa: T201
    print(json.dumps(summary.to_dict()))  # noqa: T201 (the result, for a program to read)


def score_policy(
    config: Config, model: Model, batcher: ContinuousBatcher, prompts: list[Prompt], *, title: str
) -> EvaluationSummary:
    """Scores of the weights that the engine holds, with a progress bar and one line of result."""
    with progress_bar(title) as report, make_verifiers(config) as verifiers:
        summary, _ = evaluation.evaluate(
            prompts,
            batcher,
            verifiers,
            config=config.evaluation,
            max_new_tokens=config.generation.max_new_tokens,
            decode=functools.partial(completion_text, model),
            tags=think_tags(config),
            on_progress=report,
        )
    low, high = summary.intervals["pass_at_1"]
    say(
        f"{title}: pass@1 {summary.pass_at_k[1]:.3f} (95 % interval {low:.3f} to {high:.3f}), "
        f"maj@{summary.maj_k} {summary.maj_at_k:.3f}, format {summary.format_rate:.1%}, "
        f"{summary.mean_completion_length:.1f} tokens, {summary.num_problems} problems"
    )
    return summary


def measure_policy(
    config: Config, folder: pathlib.Path, model: Model, batcher: ContinuousBatcher, prompts: list[Prompt], when: str
) -> None:
    """Evaluate into `evaluation_{when}.json` of a run folder, unless that stands there from before a resume."""
    path = folder / f"evaluation_{when}.json"
    if not path.exists():
        summary = score_policy(config, model, batcher, prompts, title=f"evaluation {when}")
        replace_text(path, json.dumps(summary.to_dict(), indent=2) + "\n")
