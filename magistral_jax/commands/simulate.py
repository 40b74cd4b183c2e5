"""`magistral-jax simulate`: the schedule of a configuration against a cost model, to size a cluster."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from magistral_jax.checks import check
from magistral_jax.config import Config, config_from_json, load
from magistral_jax.records import MagistralError
from magistral_jax.schedule.machine import Rules
from magistral_jax.simulate.costs import Costs, costs_from, load_costs
from magistral_jax.simulate.measure import costs_of_run, measured_steps
from magistral_jax.simulate.outcome import Outcome
from magistral_jax.simulate.scenarios import Scenario, best_split, modes
from magistral_jax.simulate.tables import columns, describe, side_by_side
from magistral_jax.simulate.workload import Workload, parse_lengths, workload_of_run
from magistral_jax.simulate.world import Cluster

_PROG = "magistral-jax simulate"


@dataclasses.dataclass(frozen=True)
class Words:
    """Run the schedule of a configuration, the same code as in training, against a cost model.

    CONFIG is a TOML file, or the folder of a run: then its own lengths and rates are taken, and what is predicted
    stands beside what was measured. Every setting may follow as `--section.key=value`; those that play a part are in
    `batch`, `schedule`, `generation` (slots, generators, on_publish) and `verifiers` (workers). Every rate may follow
    as `--cost.name=value`.
    """

    config: tyro.conf.Positional[pathlib.Path]
    """TOML file, or folder of a run."""
    lengths: str = ""
    """Lengths of completions: the folder of a run, or `lognormal:mean=2000,sigma=1,cap=16000`, `uniform:low=1,high=99`,
    `constant:tokens=500`; each takes `growth`, the relative growth per version. No length exceeds
    `generation.max_new_tokens`."""
    rates: str = ""
    """Costs: a TOML file with the names of `cost`, or the folder of a run, whose metrics are fitted."""
    prompt_tokens: float = 0.0
    """Mean tokens of a prompt; 0 takes that of the run, or `generation.max_prompt_tokens`."""
    filtered: float = -1.0
    """Share of groups with equal rewards; below 0 takes that of the run, or none."""
    modes: int = 0
    """Show side by side: synchronous, asynchronous, and asynchronous with so many minibatches a batch."""
    devices: int = 0
    """Deal out so many devices between generators and trainer in different ways, and name the best."""
    seed: int = 0
    """Of everything random."""
    out: str = ""
    """Folder for `simulation.json` and the timeline (`timeline.png`, `timeline.svg`)."""
    timeline_generators: int = 3
    """Generators that the timeline shows."""
    cost: Costs = dataclasses.field(default_factory=Costs)


def simulate(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name."""
    if not words or {"-h", "--help"} & set(words):
        tyro.cli(Words, args=["--help"], prog=_PROG, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    chosen, config, run = parse(words)
    scenario = _scenario(chosen, config, run)
    outcome = scenario.run(traced_generators=chosen.timeline_generators if chosen.out else 0)
    _say(describe(outcome))
    if run:
        _say(_prediction(run, outcome))
    if chosen.modes:
        several = {name: mode.run() for name, mode in modes(scenario, chosen.modes).items()}
        _say("\n" + side_by_side(several))
    if chosen.devices:
        _say("\n" + _sweep(scenario, chosen.devices))
    if chosen.out:
        _write(pathlib.Path(chosen.out), scenario, outcome)


def _scenario(words: Words, config: Config, run: pathlib.Path | None) -> Scenario:
    """What is to be simulated."""
    batch, generation = config.batch, config.generation
    rules = Rules.of(
        config.schedule,
        group_size=batch.group_size,
        batch_size=batch.batch_size,
        filter_zero_variance=config.loss.filter_zero_variance,
    )
    cluster = Cluster(
        num_generators=generation.num_generators,
        num_slots=generation.num_slots,
        num_workers=config.verifiers.num_workers,
        num_minibatches=batch.batch_size // (batch.minibatch_size or batch.batch_size),
        on_publish=generation.on_publish,
    )
    return Scenario(rules, cluster, words.cost, _workload(words, config, run), words.seed)


def _workload(words: Words, config: Config, run: pathlib.Path | None) -> Workload:
    longest = config.generation.max_new_tokens
    source = pathlib.Path(words.lengths) if words.lengths else run
    if source is not None and source.is_dir():
        workload = workload_of_run(source)
    else:
        text = words.lengths or f"lognormal:mean={longest / 4},sigma=1"
        workload = Workload(parse_lengths(text, float(longest)), float(config.generation.max_prompt_tokens))
    if words.prompt_tokens:
        workload = dataclasses.replace(workload, prompt_tokens=words.prompt_tokens)
    if words.filtered >= 0:
        workload = dataclasses.replace(workload, filtered_share=(words.filtered,))
    if config.loss.filter_zero_variance and workload.filtered_share[-1] >= 1:
        raise MagistralError("Every group would be filtered and no batch would ever come together; give --filtered.")
    return workload


def _prediction(run: pathlib.Path, outcome: Outcome) -> str:
    """What the run took, beside what the simulation takes for the same steps."""
    measured = measured_steps(run)
    real, predicted = measured.steps_per_hour, measured.predicted(outcome)
    return (
        f"prediction  {predicted:.4g} steps/hour; measured {real:.4g} over {len(measured.steps)} steps without "
        f"compilation: {predicted / real - 1:+.1%}"
    )


def _sweep(scenario: Scenario, num_devices: int) -> str:
    rows = [["generators", "trainer devices", "steps/h", "generators idle", "trainer waits", "staleness"]]

    def note(num_generators: int, num_left: int, outcome: Outcome) -> None:
        names = ("generator_idle", "trainer_waiting")
        shares = [f"{outcome.summary()[name]:.0%}" for name in names]
        speed, staleness = f"{outcome.steps_per_hour():.4g}", f"{outcome.summary()['staleness_mean']:.2f}"
        rows.append([str(num_generators), str(num_left), speed, *shares, staleness])

    best = best_split(scenario, num_devices, note)
    if best is None:
        each = scenario.costs.devices_per_generator
        raise MagistralError(f"`devices` is {num_devices}: a generator takes {each}, and the trainer needs one.")
    num_generators, num_left, outcome = best
    sentence = (
        f"best: {num_generators} generators of {scenario.costs.devices_per_generator} and {num_left} devices for the "
        f"trainer, {outcome.steps_per_hour():.4g} steps/hour"
    )
    return f"{columns(rows)}\n{sentence}"


def _write(folder: pathlib.Path, scenario: Scenario, outcome: Outcome) -> None:
    from magistral_jax.simulate.timeline import save_timeline  # matplotlib takes longer than all else here

    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "rules": dataclasses.asdict(scenario.rules),
        "cluster": dataclasses.asdict(scenario.cluster),
        "costs": dataclasses.asdict(scenario.costs),
        "summary": outcome.summary(),
        "counts": dict(outcome.counts),
        "staleness": dict(sorted(outcome.staleness.items())),
        "steps": [dataclasses.asdict(step) for step in outcome.steps],
    }
    path = folder / "simulation.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _say("written: " + ", ".join(map(str, [path, *save_timeline(outcome, folder)])))


def _say(text: str) -> None:
    print(text)  # noqa: T201 (the result)


# ---- the command line -----------------------------------------------------------------------------------------------

_KINDS: dict[str, type] = {"prompt_tokens": float, "filtered": float} | dict.fromkeys(
    ("modes", "devices", "seed", "timeline_generators"), int
)


def parse(words: Sequence[str]) -> tuple[Words, Config, pathlib.Path | None]:
    """The words of this command, the configuration, and the run folder if one was given.

    Raises:
      MagistralError: A word is unknown, missing or of the wrong kind, or a setting is out of range.
    """
    if words[0].startswith("--"):
        raise MagistralError(f"expected `{_PROG} CONFIG.toml` or `{_PROG} RUN`, with settings behind it.")
    given, rest = pathlib.Path(words[0]), list(words[1:])
    own: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    settings: list[str] = []
    names = {field.name for field in dataclasses.fields(Words)} - {"config", "cost"}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and (name in names or name.startswith("cost.")):
            if not equals and not rest:
                raise MagistralError(f"command line: `--{name}` needs a value.")
            value = value if equals else rest.pop(0)
            if name in names:
                own[name] = _value(name, value)
            else:
                costs[name.removeprefix("cost.")] = _json(value)
        else:
            settings.append(word)
    run = given if given.is_dir() else None
    config = _config(given, run, settings)
    cost = costs_from(costs, "command line", _costs(own.get("rates", ""), run, config))
    return Words(given, cost=cost, **own), config, run


def _config(given: pathlib.Path, run: pathlib.Path | None, settings: Sequence[str]) -> Config:
    if run is None:
        config = load([str(given), *settings], prog=_PROG)
    else:
        path = run / "config.json"
        if not path.exists():
            raise MagistralError(f"{run} holds no run: config.json is missing.")
        if settings:
            raise MagistralError(
                f"command line: {run} is a run, whose settings stand; for others give its TOML file, with "
                f"--lengths={run} --rates={run}."
            )
        config = config_from_json(path.read_text(encoding="utf-8"), origin=str(path))
    check(config)
    return config


def _costs(rates: str, run: pathlib.Path | None, config: Config) -> Costs:
    """The costs that are changed one by one: of the file or run that was named, of the run, or the defaults."""
    path = pathlib.Path(rates) if rates else run
    if path is None:
        return Costs()
    if not path.is_dir():
        return load_costs(path)
    if (path / "config.json").exists():  # of the run that was measured, which may have been another one
        config = config_from_json((path / "config.json").read_text(encoding="utf-8"), origin=str(path / "config.json"))
    generation = config.generation
    return costs_of_run(path, Cluster(generation.num_generators, generation.num_slots, config.verifiers.num_workers))


def _value(name: str, value: str) -> Any:
    kind = _KINDS.get(name, str)
    try:
        number = kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise MagistralError(f"command line: `{name}` must be {expected}, not `{value}`.") from None
    is_allowed = kind is str or name == "filtered" or number >= 0
    if not is_allowed or (name == "filtered" and not number < 1):
        raise MagistralError(f"command line: `{name}` is {value}; it is out of range.")
    return number


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
