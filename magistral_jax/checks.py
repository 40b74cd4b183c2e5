"""What a configuration must fulfil: each number in its interval, and settings that can work together.

Imports no jax, like `config`.
"""

import dataclasses
import math
from collections.abc import Mapping

from magistral_jax.config import Config
from magistral_jax.data.curriculum import Stage, departures, read_stages
from magistral_jax.generate.address import is_loopback, is_wildcard, parse_address
from magistral_jax.records import MagistralError

_INTERVALS = {
    "[0, 4294967295]": "run.seed",
    "[0, 65535]": "serve.port",
    "[1, 20]": "serve.max_top_logprobs",
    "[1, inf)": """mesh.data mesh.fsdp mesh.sequence mesh.tensor distributed.num_processes
        policy.logprob_chunk generation.num_slots generation.page_size generation.max_prompt_tokens
        generation.max_new_tokens generation.decode_block generation.prefill_rows generation.prefill_chunk
        generation.num_generators generation.tensor
        verifiers.num_workers verifiers.max_pending verifiers.recycle_after verifiers.recycle_mib verifiers.memory_mib
        code.memory_mib batch.batch_size batch.rows_per_microbatch sft.batch_size schedule.num_steps schedule.num_async
        schedule.ready_batches schedule.max_staleness evaluation.num_samples
        serve.max_choices serve.max_body_mib serve.max_connections
        curate.stage curate.chunk curate.min_tests curate.max_tests curate.max_solutions
        sft.validate_every traces.num_samples traces.max_per_problem traces.chunk
        translate.attempts translate.max_tokens translate.concurrency translate.chunk""",
    "[2, inf)": "batch.group_size batch.row_tokens",
    "[0, inf)": """distributed.process_id curriculum.refresh_steps data.num_train data.num_evaluation data.max_statement
        curate.num_samples curate.new_tests traces.num sft.patience
        generation.num_pages generation.temperature generation.top_k
        generation.max_restarts
        reward.format reward.correctness reward.length_penalty reward.max_length reward.length_cache reward.language
        code.num_tests batch.minibatch_size loss.eps_high loss.kl_coef loss.entropy_coef optimizer.learning_rate
        policy.lora_rank policy.unroll translate.temperature translate.retries
        optimizer.warmup_updates optimizer.weight_decay optimizer.clip_norm sft.num_updates
        schedule.checkpoint_every sft.checkpoint_every evaluation.temperature serve.max_pending serve.drain_seconds""",
    "(0, inf)": """distributed.start_seconds distributed.heartbeat_seconds
        verifiers.deadline verifiers.start_deadline code.compile_seconds code.cpu_seconds code.wall_seconds
        serve.request_seconds translate.timeout optimizer.eps policy.lora_alpha schedule.role_deadline
        generation.transfer_deadline""",
    "(0, 1]": "generation.top_p evaluation.top_p curriculum.newest_weight",
    "[0, 1)": "sft.validation_share loss.eps_low optimizer.b1 optimizer.b2",
    "[0, 1]": """curate.too_hard curate.too_easy curate.agreement data.overlap data.similarity
        sft.thorough_share sft.lucky_share sft.native_share sft.general_share translate.share""",
}
INTERVALS: Mapping[str, str] = {name: interval for interval, names in _INTERVALS.items() for name in names.split()}
"""Where each number must lie; a test sees to it that none is missing."""

_ENDLESS = ("reasoning-gym:", "templated:")  # sources that generate as many problems as are asked for


def check(config: Config) -> list[str]:
    """Refuse numbers out of range and settings that cannot work together.

    Returns:
      One sentence for each choice that works but is unsound, to be shown as warnings.

    Raises:
      MagistralError: Names the setting, or both settings that disagree.
    """
    sections = dataclasses.asdict(config)
    for name, interval in INTERVALS.items():
        section, field = name.split(".")
        value = sections[section][field]
        if not _lies_in(value, interval):
            raise MagistralError(f"`{name}` is {value}; it must lie in {interval}.")

    data, generation, reward, batch, schedule = (
        config.data,
        config.generation,
        config.reward,
        config.batch,
        config.schedule,
    )
    minibatch_size = batch.minibatch_size or batch.batch_size
    longest = generation.max_prompt_tokens + generation.max_new_tokens
    max_length = reward.max_length or generation.max_new_tokens
    length_field = "reward.max_length" if reward.max_length else "generation.max_new_tokens"
    listen, _ = parse_address(generation.listen)
    demands = {
        f"`batch.batch_size` ({batch.batch_size}) must be a multiple of `batch.group_size` ({batch.group_size})": (
            batch.batch_size % batch.group_size == 0
        ),
        f"`batch.batch_size` ({batch.batch_size}) must be a multiple of `batch.minibatch_size` ({minibatch_size})": (
            batch.batch_size % minibatch_size == 0
        ),
        f"`batch.minibatch_size` ({minibatch_size}) must be a multiple of `batch.group_size` ({batch.group_size})": (
            minibatch_size % batch.group_size == 0
        ),
        f"`generation.max_prompt_tokens` + `generation.max_new_tokens` ({longest}) must fit into `batch.row_tokens` "
        f"({batch.row_tokens})": longest <= batch.row_tokens,
        f"`generation.num_pages` ({generation.num_pages}) must hold one sequence and a copy of its prompt's last page: "
        f"at least {math.ceil(longest / generation.page_size) + 1} pages of `generation.page_size` "
        f"({generation.page_size}), or 0": (
            generation.num_pages == 0 or generation.num_pages > math.ceil(longest / generation.page_size)
        ),
        f"`generation.num_generators` ({generation.num_generators}) must be 1 where `generation.where` is `thread`": (
            generation.num_generators == 1 or generation.where != "thread"
        ),
        f"`generation.devices` ({generation.devices}) must be empty where `generation.where` is `{generation.where}`": (
            not generation.devices or generation.where == "process"
        ),
        f"`generation.devices` ({generation.devices}) must name at least `generation.tensor` ({generation.tensor}) "
        "devices, or none": not generation.devices or len(set(generation.devices.split(","))) >= generation.tensor,
        f"`generation.plane` ({generation.plane}) must be `auto` where `generation.where` is `thread`": (
            generation.plane == "auto" or generation.where != "thread"
        ),
        "`generation.plane` (shared_memory) must be another where `generation.where` is `remote`": (
            generation.plane != "shared_memory" or generation.where != "remote"
        ),
        f"`generation.token_file` must be given, since `generation.listen` ({generation.listen}) is not a loopback "
        "address": bool(generation.token_file or generation.where != "remote" or is_loopback(listen)),
        f"`generation.listen` ({generation.listen}) must name one address of this host, since `generation.plane` is "
        "`transfer`": generation.plane != "transfer" or not is_wildcard(listen),
        f"`batch.rows_per_microbatch` ({batch.rows_per_microbatch}) must be a multiple of `mesh.data` × `mesh.fsdp` "
        f"({config.mesh.data * config.mesh.fsdp}), which share the rows of a microbatch": (
            batch.rows_per_microbatch % (config.mesh.data * config.mesh.fsdp) == 0
        ),
        f"`batch.row_tokens` ({batch.row_tokens}) must be a multiple of `mesh.sequence` ({config.mesh.sequence}), the "
        "parts into which a row is split": batch.row_tokens % config.mesh.sequence == 0,
        f"`reward.length_cache` ({reward.length_cache}) must not exceed `{length_field}` ({max_length})": (
            reward.length_cache <= max_length
        ),
        f"`schedule.num_async` ({schedule.num_async}) must be a multiple of `batch.group_size` ({batch.group_size}), "
        "since prompts are dispatched a group at a time": schedule.num_async % batch.group_size == 0,
        f"`data.train` ({data.train}) must be empty where `data.mixture` is given": not (data.train and data.mixture),
        f"`data.num_train` must be given, since `data.train` ({data.train}) has no end": (
            data.num_train > 0 or not data.train.startswith(_ENDLESS)
        ),
        f"`data.num_evaluation` must be given, since `data.evaluation` ({data.evaluation}) has no end": (
            data.num_evaluation > 0 or not data.evaluation.startswith(_ENDLESS)
        ),
    }
    for demand, is_met in demands.items():
        if not is_met:
            raise MagistralError(f"{demand}.")

    warnings = {
        f"`schedule.num_async` ({schedule.num_async}) is more than twice `batch.batch_size` ({batch.batch_size}): "
        "training goes further off-policy than the report found sound (Fig. 6).": (
            schedule.num_async > 2 * batch.batch_size
        ),
        f"`batch.minibatch_size` ({minibatch_size}) is less than `batch.batch_size` ({batch.batch_size}): several "
        "updates per batch trained worse in the report (Fig. 6).": minibatch_size < batch.batch_size,
        f"`reward.max_length` ({reward.max_length}) is more than `generation.max_new_tokens` "
        f"({generation.max_new_tokens}): the full length penalty is never reached.": (
            reward.max_length > generation.max_new_tokens
        ),
        "`generation.temperature` is 0: all completions of a group are the same, and nothing can be learnt from "
        "their rewards.": generation.temperature == 0,
    }
    return [sentence for sentence, applies in warnings.items() if applies] + _check_curriculum(config)


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Stages of a run's curriculum, what they leave out filled in; none where it has no curriculum.

    Raises:
      MagistralError: The table is wrong; the sentence names stage and field.
    """
    run = Stage(
        name="run",
        max_length=config.generation.max_new_tokens,
        length_cache=config.reward.length_cache,
        batch_size=config.batch.batch_size,
        minibatch_size=config.batch.minibatch_size,
        num_async=config.schedule.num_async,
    )
    return read_stages(config.curriculum.stages, run, group_size=config.batch.group_size)


def _check_curriculum(config: Config) -> list[str]:
    stages, begin, num_steps = stages_of(config), config.curriculum.begin, config.schedule.num_steps
    names = ", ".join(stage.name for stage in stages) or "none"
    if begin and begin not in [stage.name for stage in stages]:
        raise MagistralError(f"`curriculum.begin` ({begin}) must be the name of a stage; there are: {names}.")
    if stages and config.reward.max_length:
        raise MagistralError(
            f"`reward.max_length` ({config.reward.max_length}) must be 0 where `curriculum.stages` is given: each "
            "stage has its own."
        )
    planned = sum(stage.num_steps for stage in stages[:-1])
    warnings = {
        f"`schedule.num_steps` ({num_steps}) ends before stage `{stages[-1].name}` begins, which is after {planned} "
        "steps at the latest.": planned >= num_steps
        for _ in stages[:1]
    } | {
        f"curriculum: `num_async` ({stage.num_async}) of stage `{stage.name}` is more than twice its `batch_size` "
        f"({stage.batch_size}): training goes further off-policy than the report found sound (Fig. 6).": (
            stage.num_async > 2 * stage.batch_size
        )
        for stage in stages
    }
    return [sentence for sentence, applies in warnings.items() if applies] + departures(stages)


def _lies_in(value: float | int, interval: str) -> bool:
    """True where `value` is in an interval written as in mathematics; NaN is in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
