"""`magistral-jax train`: evaluation, the asynchronous loop, evaluation, report. The main path, top to bottom."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from magistral_jax.checks import stages_of
from magistral_jax.commands.evaluate import measure_policy
from magistral_jax.commands.problems import TrainingProblems, load_training_problems
from magistral_jax.commands.progress import StepPrinter, on_interrupt
from magistral_jax.commands.session import describe_session, make_assign, make_curriculum, make_rules, make_update
from magistral_jax.commands.setup import (
    Model,
    completion_text,
    describe_training_attention,
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
from magistral_jax.commands.trainable import check_base
from magistral_jax.commands.trainer import follow, gather, lead, make_trainer, open_checkpoints, run_or_follow
from magistral_jax.config import Config
from magistral_jax.data.curriculum import STAGES_FILE
from magistral_jax.data.loader import PromptLoader
from magistral_jax.distributed.orders import Leader
from magistral_jax.evaluate import extract_answer
from magistral_jax.metrics import METRICS_FILE, MetricsWriter, RolloutWriter, read_json_lines, replace_text
from magistral_jax.records import Prompt
from magistral_jax.schedule.curriculum import Curriculum
from magistral_jax.schedule.event_log import LOG_FILE, EventLog
from magistral_jax.schedule.loop import AsyncLoop, Stages, identify
from magistral_jax.schedule.machine import StageBegan, StopRequested
from magistral_jax.schedule.state import State, from_saved
from magistral_jax.studies.report import write_report


def train(config: Config) -> None:
    """Train a policy by reinforcement learning; all that comes of it is in `run.folder`.

    Where the trainer has several processes, this is the command of each; all but process 0 follow it.
    """
    run_or_follow(config, run, follow)


def run(config: Config, leader: Leader, mesh: Mesh) -> None:
    """The whole of a run, as the trainer's only process or its first."""
    folder = open_run(config)
    began = time.monotonic()

    # ---- what is trained, and on what ----
    model = load_model(config, mesh)
    attention = describe_training_attention(config, model)
    training, loader, held_out_prompts = load_data(config, model)
    batcher = make_batcher(config, model, mesh)  # finds mistakes, too, so it comes before anything is written
    start_run(folder, config, loader)
    training.report(folder)
    say(attention)
    curriculum = make_curriculum(config, loader, say)
    trainer = lead(make_trainer(config, model, mesh), leader)
    check_base(folder, trainer.part)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(open_checkpoints(config, folder / "checkpoints", leader))
        train_state = trainer.initial_state
        schedule, saved = State(stage=curriculum.stage if curriculum else 0), None
        groups, log_position = None, None
        if config.run.resume and checkpoints.latest_step is not None:
            step, train_state, saved = checkpoints.restore(train_state)
            schedule, groups, log_position = from_saved(saved), checkpoints.restore_groups(step), saved["log_position"]
            say(f"resuming after step {step}")
        call = start_curriculum(folder, config, curriculum, saved)
        published = trainer.publish(train_state.params)
        batcher.set_weights(published, schedule.num_done)
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
        log = EventLog(folder / LOG_FILE, log_position)
        mark = identify(train_state.params, published)
        log.write(describe_session(config, data=loader.fingerprint, step=schedule.num_done, fingerprint=mark))
        for file in (metrics, rollouts, log):
            stack.callback(file.close)
        seconds_before = seconds_of(folder) + time.monotonic() - began
        loop = AsyncLoop(
            make_rules(config),
            schedule,
            train_state,
            Stages(
                assign=make_assign(config, loader, curriculum),
                decode=functools.partial(completion_text, model),
                extract_answer=functools.partial(extract_answer, tags=think_tags(config)),
                make_generator=functools.partial(make_generator, config, model, batcher, folder),
                make_verifiers=functools.partial(make_verifiers, config),
                update=make_update(config, model, trainer, mesh),
                publish=trainer.publish,
                checkpoints=checkpoints,
                metrics=metrics,
                rollouts=rollouts,
                log=log,
                on_step=StepPrinter(config.schedule.num_steps),
                warn=lambda sentence: say(f"warning: {sentence}"),
                curriculum=curriculum,
            ),
            deadline=config.schedule.role_deadline,
            seconds_before=seconds_before,
            groups=groups,
            call=call,
        )
        with on_interrupt(lambda: loop.inbox.put(StopRequested())):
            schedule = loop.run()
        if schedule.num_done < config.schedule.num_steps:
            say(f"stopped after step {schedule.num_done}; go on with --resume")
            return
        trained = time.monotonic()
        batcher.set_weights(trainer.publish(loop.train_state.params), schedule.num_done)
        measure("after")
        params = gather(trainer.part.whole(loop.train_state.params), leader)

    # ---- what there is to show ----
    shutil.rmtree(folder / "policy", ignore_errors=True)  # of the shorter run, or of an end that was cut off
    save_policy(folder / "policy", model, params, config.policy.path)
    write_summary(folder, schedule, wall_seconds=seconds_of(folder) + time.monotonic() - trained)
    say(f"report: {write_report(folder)}")


def load_data(config: Config, model: Model) -> tuple[TrainingProblems, PromptLoader, list[Prompt]]:
    """Training problems, their prompts in endless order, and the held-out ones, which are never among them."""
    held_out_problems = load_evaluation_problems(config)
    training = load_training_problems(config, held_out_problems)
    loader = training.loader(config, model.tokenizer)
    return training, loader, load_prompts(config, model.tokenizer, held_out_problems)


def start_curriculum(
    folder: pathlib.Path, config: Config, curriculum: Curriculum | None, saved: Mapping[str, Any] | None
) -> StageBegan | None:
    """Have a curriculum, if there is one, stand where a saved run stood; writes its table to `stages.json`.

    Returns:
      The stage that was called for by hand.
    """
    if curriculum is None:
        return None
    if saved is not None:
        curriculum.load(saved["curriculum"])
    say(curriculum.describe())
    table = [dataclasses.asdict(stage) for stage in stages_of(config)]
    replace_text(folder / STAGES_FILE, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    return curriculum.call(config.curriculum.begin) if config.curriculum.begin and saved is not None else None


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
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
