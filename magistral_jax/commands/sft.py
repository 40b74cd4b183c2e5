"""`magistral-jax sft`: supervised fine-tuning on traces, with the packing and the step of reinforcement learning."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable

import numpy as np

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.progress import on_interrupt, progress_bar
from magistral_jax.commands.setup import (
    Model,
    load_model,
    load_prompts,
    open_run,
    save_policy,
    say,
    start_run,
    think_tags,
)
from magistral_jax.config import Config
from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.sources import load_problems
from magistral_jax.data.tokenizer import encode_completion
from magistral_jax.data.traces import chain_sum_traces, read_traces
from magistral_jax.metrics import MetricsWriter
from magistral_jax.records import MagistralError, Prompt
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state, make_train_step, sft_objective

_REPORT_EVERY = 10  # updates between lines of metrics


def sft(config: Config) -> None:
    """Fine-tune on traces; the policy lands in `run.folder`/policy."""
    folder = open_run(config)
    model = load_model(config)
    batch_at = make_batches(config, model, folder)
    optimizer = make_optimizer(config.optimizer, config.sft.num_updates)
    train_step = make_train_step(model.config, config.policy, sft_objective, optimizer)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        state, first = init_state(model.params, optimizer), 0
        if config.run.resume and checkpoints.latest_step is not None:
            first, state, _ = checkpoints.restore(state)
            say(f"resuming after update {first}")
        metrics = MetricsWriter(
            folder,
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb,
            resumed_step=first if config.run.resume else None,
        )
        stack.callback(metrics.close)
        report = stack.enter_context(progress_bar("fine-tuning"))
        stops: list[bool] = []
        stack.enter_context(on_interrupt(lambda: stops.append(True)))
        began, num_tokens = time.monotonic(), 0
        for update in range(first + 1, config.sft.num_updates + 1):
            sequences = batch_at(update - 1)
            num_tokens += sum(len(sequence) for sequence in sequences)
            packed = collate(
                sequences, row_tokens=config.batch.row_tokens, rows_per_microbatch=config.batch.rows_per_microbatch
            )
            state, sums = train_step(state, packed, None)
            report(update, config.sft.num_updates)
            is_last = update == config.sft.num_updates or bool(stops)
            if is_last or update % _REPORT_EVERY == 0:
                means = {name: float(value.mean()) for name, value in sums.items()}
                metrics.write(update, means | {"tokens_per_second": num_tokens / (time.monotonic() - began)})
            if is_last or (config.sft.checkpoint_every and update % config.sft.checkpoint_every == 0):
                checkpoints.save(update, state, {})
            if stops:
                checkpoints.wait()
                say(f"stopped after update {update}; go on with --resume")
                return
        checkpoints.wait()

    shutil.rmtree(folder / "policy", ignore_errors=True)  # of an end that was cut off
    save_policy(folder / "policy", model, state.params, config.policy.path)
    say(f"policy: {folder / 'policy'}")


def make_batches(config: Config, model: Model, folder: pathlib.Path) -> Callable[[int], list[TrainingSequence]]:
    """A function from the number of an update to its traces; nothing else decides them, so a resume repeats none."""
    problems, completions = load_problems_or_traces(config)
    prompts = load_prompts(config, model.tokenizer, problems)
    loader = PromptLoader(prompts, config.run.seed)
    size = config.sft.batch_size

    def batch_at(update: int) -> list[TrainingSequence]:
        drawn = [loader.prompt_at(cursor) for cursor in range(update * size, (update + 1) * size)]
        return make_sequences(drawn, update)

    def make_sequences(drawn: list[Prompt], update: int) -> list[TrainingSequence]:
        if completions is None:
            traces = chain_sum_traces(
                [prompt.problem for prompt in drawn],
                np.random.default_rng([config.run.seed, update]),
                thorough_share=config.sft.thorough_share,
                lucky_share=config.sft.lucky_share,
                think_tags=think_tags(config),
            )
            texts = [trace.completion for trace in traces]
        else:
            texts = [completions[prompt.problem.id] for prompt in drawn]
        return [
            _sequence(prompt.token_ids, encode_completion(text, model.tokenizer, think_tags(config)))
            for prompt, text in zip(drawn, texts, strict=True)
        ]

    for prompt, sequence in zip(prompts, make_sequences(prompts, update=0), strict=True):
        if len(sequence) > config.batch.row_tokens:
            raise MagistralError(
                f"The trace of problem {prompt.problem.id} has {len(sequence)} tokens with its prompt; expected at "
                f"most `batch.row_tokens` ({config.batch.row_tokens})."
            )
    start_run(folder, config, loader)
    return batch_at


def load_problems_or_traces(config: Config) -> tuple[list, dict[str, str] | None]:
    """The problems, and for each its completion where traces are given."""
    if config.sft.traces:
        traces = read_traces(config.sft.traces)
        return [trace.problem for trace in traces], {trace.problem.id: trace.completion for trace in traces}
    if not config.data.train:
        raise MagistralError(
            "Neither `sft.traces` nor `data.train` is given; expected traces, or sums to make some for."
        )
    return load_problems(config.data.train, config.data.num_train, config.run.seed), None


def _sequence(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> TrainingSequence:
    nothing = np.zeros(len(completion_ids))
    return TrainingSequence(
        prompt_ids, completion_ids, nothing.astype(np.float32), advantage=1.0, staleness=nothing.astype(np.int32)
    )
