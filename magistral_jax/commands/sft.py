"""`magistral-jax sft`: supervised fine-tuning on traces, with the packing and the step of reinforcement learning."""

import contextlib
import time

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.progress import on_interrupt, progress_bar
from magistral_jax.commands.setup import describe_training_attention, load_model, open_run, say
from magistral_jax.commands.sft_data import load_sft_data
from magistral_jax.commands.trainable import check_base, trainable
from magistral_jax.commands.validation import Validation
from magistral_jax.config import Config
from magistral_jax.metrics import MetricsWriter
from magistral_jax.policy.sharding import make_mesh, shard_batch
from magistral_jax.records import MagistralError
from magistral_jax.train.balance import ranks_of
from magistral_jax.train.collate import collate
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_sharded, make_train_step, sft_objective

_REPORT_EVERY = 10  # updates between lines of metrics


def sft(config: Config) -> None:
    """Fine-tune on traces, on the devices of `mesh`; the policy lands in `run.folder`/policy.

    Raises:
      MagistralError: Settings, a model or traces that do not fit together, or several processes.
    """
    if config.distributed.coordinator:
        raise MagistralError(
            f"`distributed.coordinator` is {config.distributed.coordinator}, but `sft` runs in one process; expected "
            "it empty, with `mesh` over the devices of this host."
        )
    folder = open_run(config)
    mesh = make_mesh(config.mesh)
    model = load_model(config, mesh)
    attention = describe_training_attention(config, model)
    data = load_sft_data(config, model, folder)
    say(attention)
    optimizer = make_optimizer(config.optimizer, config.sft.num_updates)
    part = trainable(config, model, mesh)
    check_base(folder, part)
    split = mesh if mesh.size > 1 else None
    train_step = make_train_step(model.config, config.policy, sft_objective, optimizer, mesh=split, frozen=part.frozen)
    ranks = ranks_of(model.config, config.mesh.data * config.mesh.fsdp)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        state, first = init_sharded(part.start, model.config, mesh, optimizer), 0
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
        validation = Validation(config, model, folder, data.validation, split)
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
            state, sums = train_step(state, shard_batch(packed, mesh), None)
            report(update, config.sft.num_updates)
            is_measured = validation.is_due(update)
            is_last = update == config.sft.num_updates or bool(stops)
            if is_last or is_measured or update % _REPORT_EVERY == 0:
                means = {name: float(value.mean()) for name, value in sums.items()}
                means |= validation.measure(part.whole(state.params)) if is_measured else {}
                metrics.write(update, means | {"tokens_per_second": num_tokens / (time.monotonic() - began)})
            if is_last or (config.sft.checkpoint_every and update % config.sft.checkpoint_every == 0):
                checkpoints.save(update, state, {})
            if stops:
                checkpoints.wait()
                say(f"stopped after update {update}; go on with --resume")
                return
        checkpoints.wait()

    say(validation.save_result(folder / "policy", part.whole(state.params)))
