"""`magistral-jax sft`: supervised fine-tuning on traces, with the packing and the step of reinforcement learning."""

import contextlib
import time

from jax.sharding import Mesh

from magistral_jax.commands.progress import on_interrupt, progress_bar
from magistral_jax.commands.setup import describe_training_attention, load_model, open_run, say
from magistral_jax.commands.sft_data import load_sft_data
from magistral_jax.commands.trainable import check_base
from magistral_jax.commands.trainer import open_checkpoints, run_or_follow
from magistral_jax.commands.tuner import follow, lead, make_tuner
from magistral_jax.commands.validation import Validation
from magistral_jax.config import Config
from magistral_jax.distributed.orders import Leader
from magistral_jax.metrics import MetricsWriter
from magistral_jax.train.balance import ranks_of
from magistral_jax.train.collate import collate

_REPORT_EVERY = 10  # updates between lines of metrics


def sft(config: Config) -> None:
    """Fine-tune on traces, on the devices of `mesh`; the policy lands in `run.folder`/policy.

    Where there are several processes, this is the command of each; all but process 0 follow it.
    """
    run_or_follow(config, run, follow)


def run(config: Config, leader: Leader, mesh: Mesh) -> None:
    """The whole of a run, as the only process or the first.

    Raises:
      MagistralError: Settings, a model or traces that do not fit together.
    """
    folder = open_run(config)
    model = load_model(config, mesh)
    attention = describe_training_attention(config, model)
    data = load_sft_data(config, model, folder)
    say(attention)
    tuner = lead(make_tuner(config, model, mesh), leader)
    check_base(folder, tuner.part)
    ranks = ranks_of(model.config, config.mesh.data * config.mesh.fsdp)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(open_checkpoints(config, folder / "checkpoints", leader))
        state, first = tuner.initial_state, 0
        if config.run.resume and checkpoints.latest_step is not None:
            first, state, _ = checkpoints.restore(state)
            checkpoints.restore_groups(first)  # there are none; but all processes restore the same
            say(f"resuming after update {first}")
        metrics = MetricsWriter(
            folder,
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb,
            resumed_step=first if config.run.resume else None,
        )
        stack.callback(metrics.close)
        validation = Validation(config, model, folder, data.validation, tuner)
        report = stack.enter_context(progress_bar("fine-tuning"))
        stops: list[bool] = []
        stack.enter_context(on_interrupt(lambda: stops.append(True)))
        began, num_tokens = time.monotonic(), 0
        for update in range(first + 1, config.sft.num_updates + 1):
            if validation.is_exhausted:
                say(f"no lower validation loss in {config.sft.patience} measurements: fine-tuning ends")
                break
            sequences = data.batch_at(update - 1)
            num_tokens += sum(len(sequence) for sequence in sequences)
            packed = collate(
                sequences,
                row_tokens=config.batch.row_tokens,
                rows_per_microbatch=config.batch.rows_per_microbatch,
                ranks=ranks,
            )
            state, sums = tuner.step(state, packed)
            report(update, config.sft.num_updates)
            is_measured = validation.is_due(update)
            is_last = update == config.sft.num_updates or bool(stops)
            if is_last or is_measured or update % _REPORT_EVERY == 0:
                means = {name: float(value.mean()) for name, value in sums.items()}
                means |= validation.measure(state.params) if is_measured else {}
                metrics.write(update, means | {"tokens_per_second": num_tokens / (time.monotonic() - began)})
            if is_last or (config.sft.checkpoint_every and update % config.sft.checkpoint_every == 0):
                checkpoints.save(update, state, {})
            if stops:
                checkpoints.wait()
                say(f"stopped after update {update}; go on with --resume")
                return
        checkpoints.wait()

    say(validation.save_result(folder / "policy", state.params))
