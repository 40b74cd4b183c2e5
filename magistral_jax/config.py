"""The configuration of a run: `load` reads it, `check` refuses what cannot work, `dump` writes it down.

A section's dataclass stands beside the code that it configures; here they are composed. A TOML file is turned into
flags and parsed by tyro in one list with the command line after it, so that both know the same names, report the same
errors, and the last word wins. Relative paths, in a file too, are relative to the current directory.

Imports no jax: `--help` answers at once, and a typing error costs no start of a backend.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import pathlib
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import tyro

from magistral_jax.curate.config import CurateConfig
from magistral_jax.data.config import DataConfig, EvaluationConfig, TracesConfig
from magistral_jax.distributed.config import DistributedConfig
from magistral_jax.generate.address import is_loopback, is_wildcard, parse_address
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import MeshConfig, PolicyConfig
from magistral_jax.records import MagistralError
from magistral_jax.schedule.config import ScheduleConfig
from magistral_jax.serve.config import ServeConfig
from magistral_jax.train.config import BatchConfig, LossConfig, OptimizerConfig, SftConfig
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run lives. A flag without a section is one of these: `--resume`, `--seed=1`."""

    folder: str = "runs/latest"
    """Folder of the run: config, metrics, rollouts, event log, checkpoints, report."""
    seed: int = 0
    """Seed of everything random; two runs differ in nothing else."""
    resume: bool = False
    """Go on from the last checkpoint in the folder; without it a folder that holds a run is an error."""
    keep_best: bool = True
    """Keep the best checkpoint beside the last two: that of the highest mean reward of the batches trained since the
    checkpoint before. For `sft` the weights of the lowest validation loss are kept, whatever is said here."""
    best: bool = False
    """`export` writes the best checkpoint and not the latest."""
    tensorboard: bool = True
    """Write TensorBoard events beside `metrics.jsonl`."""
    wandb: bool = False
    """Send the metrics to Weights & Biases as well (needs the package `wandb`)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; the defaults are the vetted ones."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    code: CodeConfig = dataclasses.field(default_factory=CodeConfig)
    sandbox: SandboxConfig = dataclasses.field(default_factory=SandboxConfig)
    verifiers: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    curate: CurateConfig = dataclasses.field(default_factory=CurateConfig)
    traces: TracesConfig = dataclasses.field(default_factory=TracesConfig)


# --- reading -----------------------------------------------------------------------------------------------------


def load(argv: Sequence[str], *, prog: str = "magistral-jax") -> Config:
    """Parse `[CONFIG.toml] [--section.key=value …]`; what comes later wins.

    Underscores and hyphens are alike in a flag; `--section.key value` and, for a switch, a bare `--section.key` work.

    Args:
      argv: The words after the command's name.
      prog: The command as the help shows it.

    Raises:
      MagistralError: No such file, broken TOML, an unknown name, or a value of the wrong kind.
      SystemExit: Code 0, after `--help` was printed.
    """
    has_file = bool(argv) and not argv[0].startswith("-")
    flags = list(argv[1:] if has_file else argv)
    if {"-h", "--help"} & set(flags):
        _tyro(["--help"], prog=f"{prog} [CONFIG.toml]")
    settings = [*_settings_of_file(pathlib.Path(argv[0]))] if has_file else []
    return _parse([*settings, *_settings_of_flags(flags)])


def config_from_json(text: str, *, origin: str = "config.json") -> Config:
    """Config that `dump` wrote; a name that is no longer known is an error, as in any other file."""
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise MagistralError(f"{origin}: not valid JSON: {error}.") from error
    return _parse([*_settings_of_table(table, origin)])


def dump(config: Config) -> str:
    """JSON of all settings, defaults included: what a run folder keeps as `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One `name = values` as somebody wrote it; `origin` says where, for messages."""

    name: str
    values: tuple[str, ...]
    origin: str


def _settings_of_file(path: pathlib.Path) -> Iterator[_Setting]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MagistralError(f"{path}: cannot read the configuration: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MagistralError(f"{path}: not valid TOML: {error}.") from error
    return _settings_of_table(table, str(path))


def _settings_of_table(table: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[_Setting]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _settings_of_table(value, origin, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else [value]
            yield _Setting(_full_name(prefix + key), tuple(map(str, values)), origin)


def _settings_of_flags(words: Sequence[str]) -> Iterator[_Setting]:
    """Group words to flags with their values; only a word with two dashes begins a flag, so `-1` is a value."""
    origin = "command line"
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise MagistralError(
                f"{origin}: cannot place `{word}`: the TOML file comes first, then --section.key=value."
            )
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while rest and not equals and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        yield _Setting(_full_name(name), tuple(values), origin)


def _full_name(name: str) -> str:
    """Name with underscores, and with `run.` before a name that needs no section."""
    name = name.replace("-", "_")
    return f"run.{name}" if f"run.{name}" in FIELD_TYPES else name


def _field_types(record: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(record).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _field_types(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


FIELD_TYPES: Mapping[str, Any] = dict(_field_types(Config))
"""Type of every setting by its dotted name."""


def _parse(settings: Sequence[_Setting]) -> Config:
    """Names first, because tyro cannot say which file a name came from; then one parse of everything."""
    for setting in settings:
        if setting.name not in FIELD_TYPES:
            nearest = _nearest_name(setting.name)
            raise MagistralError(f"{setting.origin}: unknown setting `{setting.name}`; the nearest is `{nearest}`.")
    groups = [_to_argv(setting) for setting in settings]
    try:
        return _tyro([word for group in groups for word in group])
    except SystemExit as refusal:
        culprit = next(setting for setting, group in zip(settings, groups, strict=True) if not _is_accepted(group))
        expected = _describe(FIELD_TYPES[culprit.name])
        given = f"`{' '.join(culprit.values)}`" if culprit.values else "nothing"
        raise MagistralError(f"{culprit.origin}: `{culprit.name}` must be {expected}, not {given}.") from refusal


def _to_argv(setting: _Setting) -> list[str]:
    """Words for tyro: the `=` form lets a value begin with a dash; a switch is True when bare, `true` or `True`."""
    values = setting.values
    if FIELD_TYPES[setting.name] is bool:
        values = tuple(value.capitalize() for value in values) or ("True",)
    flag = f"--{setting.name}"
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]


def _is_accepted(words: Sequence[str]) -> bool:
    try:
        _tyro(words)
    except SystemExit:
        return False
    return True


def _tyro(words: Sequence[str], prog: str | None = None) -> Config:
    """Parse; tyro's framed error pages give way to one sentence, and only the help is shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            Config,
            args=words,
            prog=prog,
            use_underscores=True,
            console_outputs=prog is not None,
            config=(tyro.conf.FlagConversionOff,),
        )


def _nearest_name(name: str) -> str:
    """Most similar known name; the part behind the dot counts as much as the whole."""

    def similarity(known: str) -> float:
        pairs = ((known, name), (known.rpartition(".")[2], name.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    return max(FIELD_TYPES, key=similarity)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, str(kind))


# --- checking ----------------------------------------------------------------------------------------------------

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
        sft.validate_every traces.num_samples traces.max_per_problem traces.chunk""",
    "[2, inf)": "batch.group_size batch.row_tokens",
    "[0, inf)": """distributed.process_id data.num_train data.num_evaluation data.max_statement
        curate.num_samples curate.new_tests traces.num sft.patience
        generation.num_pages generation.temperature generation.top_k
        generation.max_restarts
        reward.format reward.correctness reward.length_penalty reward.max_length reward.length_cache reward.language
        code.num_tests batch.minibatch_size loss.eps_high loss.kl_coef loss.entropy_coef optimizer.learning_rate
        policy.lora_rank
        optimizer.warmup_updates optimizer.weight_decay optimizer.clip_norm sft.num_updates
        schedule.checkpoint_every sft.checkpoint_every evaluation.temperature serve.max_pending serve.drain_seconds""",
    "(0, inf)": """distributed.start_seconds distributed.heartbeat_seconds
        verifiers.deadline verifiers.start_deadline code.compile_seconds code.cpu_seconds code.wall_seconds
        optimizer.eps policy.lora_alpha schedule.role_deadline generation.transfer_deadline""",
    "(0, 1]": "generation.top_p evaluation.top_p",
    "[0, 1)": "sft.validation_share loss.eps_low optimizer.b1 optimizer.b2",
    "[0, 1]": """curate.too_hard curate.too_easy curate.agreement data.overlap data.similarity
        sft.thorough_share sft.lucky_share sft.general_share""",
}
INTERVALS: Mapping[str, str] = {name: interval for interval, names in _INTERVALS.items() for name in names.split()}
"""Where each number must lie; a test sees to it that none is missing."""

_ENDLESS = "reasoning-gym:"  # sources that generate as many problems as are asked for


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
    return [sentence for sentence, applies in warnings.items() if applies]


def _lies_in(value: float | int, interval: str) -> bool:
    """True where `value` is in an interval written as in mathematics; NaN is in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
