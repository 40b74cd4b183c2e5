"""The configuration of a run: `load` reads it, `dump` writes it down; `checks` refuses what cannot work.

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
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import tyro

from magistral_jax.curate.config import CurateConfig, TranslateConfig
from magistral_jax.data.config import CurriculumConfig, DataConfig, EvaluationConfig, TracesConfig
from magistral_jax.distributed.config import DistributedConfig
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import MeshConfig, PolicyConfig
from magistral_jax.records import MagistralError
from magistral_jax.schedule.config import ScheduleConfig
from magistral_jax.serve.config import ServeConfig
from magistral_jax.toml_file import read_toml
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
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
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
    translate: TranslateConfig = dataclasses.field(default_factory=TranslateConfig)
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
    return _settings_of_table(read_toml(path, "configuration"), str(path))


def _settings_of_table(table: Mapping[str, Any], origin: str) -> Iterator[_Setting]:
    for name, values in flatten(table):
        yield _Setting(_full_name(name), values, origin)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted names of a table's settings, and their values as they stand on a command line."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else [value]
            yield prefix + key, tuple(map(_word, values))


def _word(value: Any) -> str:
    """A value as it stands on a command line; a table inside a list is a JSON object."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, Mapping) else str(value)


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
