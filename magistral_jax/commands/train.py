"""`magistral-jax train`: evaluation, the asynchronous loop, evaluation, report. The main path, top to bottom."""

import contextlib
import functools
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.evaluate import measure_policy
from magistral_jax.commands.progress import StepPrinter, on_interrupt
from magistral_jax.commands.setup import (
    Model,
    completion_text,
    load_evaluation_problems,
    load_model,
    load_prompts,
    make_batcher,
    make_generator,
    make_verifiers,
    open_run,
    save_policy,
    say,
    start_run,
    think_tags,
)
from magistral_jax.config import Config
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.sources import held_out, load_problems
from magistral_jax.evaluate import extract_answer
from magistral_jax.metrics import METRICS_FILE, MetricsWriter, RolloutWriter, read_json_lines
from magistral_jax.policy.sharding import make_mesh, shard_batch, shard_state
from magistral_jax.publish.same_process import make_publish
from magistral_jax.records import Prompt, SamplingParams
from magistral_jax.schedule.loop import AsyncLoop, Stages
from magistral_jax.schedule.machine import Rules, State, StopRequested, from_saved
from magistral_jax.studies.report import write_report
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import grpo_objective, init_state, make_train_step
from magistral_jax.train.update import update


def train(config: Config) -> None:
    """Train a policy by reinforcement learning; all that comes of it is in `run.folder`."""
    folder = open_run(config)
    began = time.monotonic()

    # ---- what is trained, and on what ----
    model = load_model(config)
    loader, held_out_prompts = load_data(config, model)
    start_run(folder, config, loader)

    # ---- trainer and generator ----
    rules = Rules.of(
        config.schedule,
        group_size=config.batch.group_size,
        batch_size=config.batch.batch_size,
        filter_zero_variance=config.loss.filter_zero_variance,
    )
    minibatches = config.batch.batch_size // (config.batch.minibatch_size or config.batch.batch_size)
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps * minibatches)
    objective, temperature = grpo_objective(config.loss), config.generation.temperature or 1.0
    train_step = make_train_step(model.config, config.policy, objective, optimizer, temperature=temperature)
    mesh = make_mesh(config.mesh)
    publish = make_publish(model.config, jnp.dtype(config.policy.dtype), mesh)
    batcher = make_batcher(config, model)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        train_state = shard_state(init_state(model.params, optimizer), model.config, mesh, optimizer)
        reference = jax.tree.map(jnp.copy, train_state.params) if config.loss.kl_coef else None
        schedule = State()
        if config.run.resume and checkpoints.latest_step is not None:
            step, train_state, saved = checkpoints.restore(train_state)
            schedule = from_saved(saved)
            say(f"resuming after step {step}")
        batcher.set_weights(publish(train_state.params), schedule.num_done)
        measure = functools.partial(measure_policy, config, folder, model, batcher, held_out_prompts)

        # ---- before, training, after ----
        measure("before")
        if schedule.num_done < config.schedule.num_steps:  # a longer run than the one that stands here is another one
            (folder / "evaluation_after.json").unlink(missing_ok=True)
        resumed_step = schedule.num_done if config.run.resume else None
        metrics = MetricsWriter(
            folder, tensorboard=config.run.tensorboard, wandb=config.run.wandb, resumed_step=resumed_step
        )
        rollouts = RolloutWriter(folder, resumed_step=resumed_step)
        stack.callback(metrics.close)
        stack.callback(rollouts.close)
        seconds_before = seconds_of(folder) + time.monotonic() - began
        loop = AsyncLoop(
            rules,
            schedule,
            train_state,
            Stages(
                prompt_at=loader.prompt_at,
                decode=functools.partial(completion_text, model),
                extract_answer=functools.partial(extract_answer, tags=think_tags(config)),
                sampling=training_sampling(config),
                make_generator=functools.partial(make_generator, config, model, batcher, folder),
                make_verifiers=functools.partial(make_verifiers, config),
                update=lambda state, groups, version: update(
                    lambda state, batch, reference: train_step(state, shard_batch(batch, mesh), reference),
                    state,
                    groups,
                    version=version,
                    batch=config.batch,
                    loss=config.loss,
                    reference_params=reference,
                ),
                publish=publish,
                checkpoints=checkpoints,
                metrics=metrics,
                rollouts=rollouts,
                on_step=StepPrinter(config.schedule.num_steps),
                warn=lambda sentence: say(f"warning: {sentence}"),
            ),
            folder=folder,
            deadline=config.schedule.role_deadline,
            seconds_before=seconds_before,
        )
        with on_interrupt(lambda: loop.inbox.put(StopRequested())):
            schedule = loop.run()
        if schedule.num_done < config.schedule.num_steps:
            say(f"stopped after step {schedule.num_done}; go on with --resume")
            return
        trained = time.monotonic()
        batcher.set_weights(publish(loop.train_state.params), schedule.num_done)
        measure("after")

    # ---- what there is to show ----
    shutil.rmtree(folder / "policy", ignore_errors=True)  # of the shorter run, or of an end that was cut off
    save_policy(folder / "policy", model, loop.train_state.params, config.policy.path)
    write_summary(folder, schedule, wall_seconds=seconds_of(folder) + time.monotonic() - trained)
    say(f"report: {write_report(folder)}")


def load_data(config: Config, model: Model) -> tuple[PromptLoader, list[Prompt]]:
    """Training prompts in their endless order, and the held-out ones, which are never among them."""
    held_out_problems = load_evaluation_problems(config)
    problems = load_problems(config.data.train, config.data.num_train, config.run.seed)
    problems, num_leaked = held_out(problems, held_out_problems)
    if num_leaked:
        say(f"{num_leaked} training problems left out: they are in the evaluation set")
    loader = PromptLoader(load_prompts(config, model.tokenizer, problems), config.run.seed)
    return loader, load_prompts(config, model.tokenizer, held_out_problems)


def seconds_of(folder: pathlib.Path) -> float:
    """What the run has taken up to its last step, all its sessions together; 0 before the first."""
    steps = list(read_json_lines(folder / METRICS_FILE))
    return steps[-1]["wall_seconds"] if steps else 0.0


def write_summary(folder: pathlib.Path, schedule: State, *, wall_seconds: float) -> None:
    """`summary.json` from what the run folder holds, so that a resumed run is summed up as a whole."""
    steps = list(read_json_lines(folder / METRICS_FILE))
    mean = lambda name: float(np.mean([step[name] for step in steps]))
    ended = {how: count for how, count in schedule.counts.items() if how not in ("dispatched", "trained")}
    summary: dict[str, Any] = {
        "eval_before": json.loads((folder / "evaluation_before.json").read_text(encoding="utf-8")),
        "eval_after": json.loads((folder / "evaluation_after.json").read_text(encoding="utf-8")),
        "steps": schedule.num_done,
        "wall_seconds": wall_seconds,
        "mean_staleness": mean("staleness"),
        "swapped_token_share": mean("swapped_token_share"),
        "generator_idle_share": mean("generator_idle_share"),
        "generator_idle_unbounded_share": mean("generator_idle_unbounded_share"),
        "mean_completion_length_first": steps[0]["completion_length"],
        "mean_completion_length_last": steps[-1]["completion_length"],
        "dispatched": schedule.counts.get("dispatched", 0),
        "trained": schedule.counts.get("trained", 0),
        "dropped": ended,
    }
    # What was on its way when the run ended was dispatched and never judged: counted as well.
    summary["dropped"]["run_end"] = summary["dispatched"] - summary["trained"] - sum(ended.values())
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def training_sampling(config: Config) -> SamplingParams:
    """How training rollouts are drawn."""
    generation = config.generation
    return SamplingParams(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)
