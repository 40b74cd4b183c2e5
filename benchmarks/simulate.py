"""What the simulator says, in four tables, and a JSON line with all of it.

  python benchmarks/simulate.py                   modes side by side, and the ratios that other systems published
  python benchmarks/simulate.py --scale 10000     its own speed, with so many generators and 100 completions each
  python benchmarks/simulate.py --runs RUN ...    its prediction for runs that were made, and what they took

Sources and assumptions of the published ratios are in docs/simulate.md.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import time
from typing import Any

from magistral_jax.config import Config, config_from_json
from magistral_jax.schedule.machine import Rules
from magistral_jax.simulate.costs import Costs
from magistral_jax.simulate.measure import costs_of_run, measured_steps
from magistral_jax.simulate.scenarios import Scenario, modes, synchronous
from magistral_jax.simulate.tables import columns, side_by_side
from magistral_jax.simulate.workload import Workload, parse_lengths, workload_of_run
from magistral_jax.simulate.world import Cluster

# ---- modes side by side ----


def long_tail(num_steps: int, filtered: float = 0.0) -> Scenario:
    """128 engines of 32 slots, a trainer on as many devices, and batches of 2,048 sequences."""
    rules = Rules(
        group_size=16,
        batch_size=2048,
        num_steps=num_steps,
        num_async=4096,
        max_ready=2048,
        max_staleness=8,
        checkpoint_every=0,
        filter_zero_variance=True,
    )
    costs = Costs(
        decode_seconds=0.012,
        decode_seconds_per_sequence=0.00012,
        prefill_seconds_per_token=0.00005,
        train_seconds=5.0,
        train_seconds_per_update=1.0,
        train_seconds_per_token=0.000012,
        publish_seconds=2.0,
        trainer_devices=128,
    )
    lengths = parse_lengths("lognormal:mean=4000,sigma=1,cap=32000")
    return Scenario(rules, Cluster(128, 32, 64), costs, Workload(lengths, 300.0, (filtered,)))


def show_modes(num_steps: int) -> dict[str, Any]:
    """Synchronous, asynchronous, and asynchronous with four minibatches, without and with filtered groups."""
    result = {}
    for title, filtered in (("no group filtered", 0.0), ("three groups of ten filtered", 0.3)):
        base = long_tail(num_steps, filtered)
        cluster = dataclasses.replace(base.cluster, num_generators=256)
        shared = dataclasses.replace(base, cluster=cluster, costs=base.costs.on_trainer_devices(256))
        several = {"synchronous, all 256 devices for both": synchronous(shared), **modes(base, 4)}
        outcomes = {name: mode.run() for name, mode in several.items()}
        print(f"\nlong tail (lognormal, mean 4,000, sigma 1, at most 32,000 tokens), {title}")
        print(side_by_side(outcomes))
        result[title] = {name: outcome.summary() for name, outcome in outcomes.items()}
    return result


# ---- what others published ----


@dataclasses.dataclass(frozen=True)
class Published:
    """A system's own comparison of a synchronous and an asynchronous schedule on equally many GPUs."""

    name: str
    num_gpus: int
    generating: int  # GPUs of the asynchronous run that generate
    sync_generate: float  # seconds of a synchronous step on all GPUs
    sync_other: float  # the rest of it
    async_train: float  # seconds of a batch on the GPUs that train
    sync_step: float  # as published
    async_step: float
    max_staleness: int
    flight: float  # batches in flight
    batch_size: int = 8192
    longest: int = 28_000
    doubling: int = 100  # running sequences that make a decode step twice as long as one alone


PUBLISHED = (
    Published("verl one-step-off, FSDP2", 16, 4, 247, 502, 475, 749, 520, 1, 1.0, longest=20_480, doubling=171),
    Published("verl one-step-off, Megatron", 16, 4, 162, 537, 507, 699, 566, 1, 1.0, longest=8_192, doubling=64),
    Published("verl fully async, 32", 32, 16, 357.41, 432.69, 273.5, 790.10, 294.77, 2, 1.5),
    Published("verl fully async, 64", 64, 32, 150.72, 214.56, 160.8, 365.28, 189.26, 2, 1.5),
    Published("verl fully async, 128", 128, 64, 177.85, 178.45, 117.5, 356.30, 150.63, 2, 1.5),
    Published("AReaL 1.5B, 16 nodes", 128, 96, 132.8, 14.8, 59.2, 147.6, 53.3, 16, 4.0, longest=27_000),
    Published("AReaL 7B, 24 nodes", 192, 144, 187.0, 20.8, 83.1, 207.7, 91.4, 16, 4.0, longest=27_000),
)
MEAN_TOKENS = 2500


def scenario_of(row: Published, *, num_generators: int, train_seconds: float, scale: float, steps: int) -> Scenario:
    """The asynchronous run of a row, or with `synchronous` around it the other."""
    rules = Rules(
        group_size=16,
        batch_size=row.batch_size,
        num_steps=steps,
        num_async=int(row.flight * row.batch_size),
        max_ready=row.batch_size,
        max_staleness=row.max_staleness,
        checkpoint_every=0,
        filter_zero_variance=False,
    )
    costs = Costs(
        decode_seconds=scale,
        decode_seconds_per_sequence=scale / row.doubling,
        prefill_seconds_per_token=0.0,
        verify_seconds=0.0,
        train_seconds=train_seconds,
        train_seconds_per_token=0.0,
        publish_seconds=0.0,
    )
    lengths = parse_lengths(f"lognormal:mean={MEAN_TOKENS},sigma=1,cap={row.longest}")
    cluster = Cluster(num_generators, 1024, 1)
    return Scenario(rules, cluster, costs, Workload(lengths, 300.0))


def show_published(num_steps: int) -> dict[str, Any]:
    """Decode speed is set by the synchronous row; the asynchronous step is what comes out."""
    rows = [["", "GPUs", "published sync", "simulated", "published async", "simulated", "published ratio", "simulated"]]
    result = {}
    for row in PUBLISHED:
        make = lambda n, train, scale, steps, row=row: scenario_of(
            row, num_generators=n, train_seconds=train, scale=scale, steps=steps
        )
        unit = synchronous(make(row.num_gpus, 1e-9, 1.0, 3)).run()
        scale = row.sync_generate / (3600 / unit.steps_per_hour())
        sync = 3600 / synchronous(make(row.num_gpus, row.sync_other, scale, num_steps)).run().steps_per_hour()
        outcome = make(row.generating, row.async_train, scale, num_steps).run()
        asynchronous = 3600 / outcome.steps_per_hour(num_steps // 2)
        published, simulated = row.sync_step / row.async_step, sync / asynchronous
        numbers = (row.sync_step, sync, row.async_step, asynchronous)
        rows.append(
            [
                row.name,
                f"{row.num_gpus - row.generating}+{row.generating}",
                *(f"{number:.0f} s" for number in numbers),
                f"{published:.2f}x",
                f"{simulated:.2f}x",
            ]
        )
        result[row.name] = {"published": published, "simulated": simulated, "async_seconds": asynchronous}
    print("\nseconds of a step and ratios, published and simulated (GPUs: training + generating)")
    print(columns(rows))
    return result


# ---- its own speed ----


def show_scale(num_generators: int) -> dict[str, Any]:
    """100 completions for each of many generators."""
    base = long_tail(50)
    rules = dataclasses.replace(
        base.rules, batch_size=2 * num_generators, num_async=4 * num_generators, max_ready=2 * num_generators
    )
    costs = dataclasses.replace(base.costs, train_seconds_per_token=0.02 / num_generators)
    cluster = Cluster(num_generators, 16, num_generators // 4)
    began = time.process_time()
    outcome = dataclasses.replace(base, rules=rules, costs=costs, cluster=cluster).run()
    seconds = time.process_time() - began
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n{num_generators:,} generators, {outcome.num_completions:,} completions, {outcome.num_events:,} events: "
        f"{seconds:.1f} CPU seconds ({1e6 * seconds / outcome.num_completions:.0f} us a completion), {mib:.0f} MiB"
    )
    return {"completions": outcome.num_completions, "cpu_seconds": seconds, "peak_mib": mib}


# ---- its predictions ----


def show_runs(folders: list[pathlib.Path], num_seeds: int) -> dict[str, Any]:
    """Predicted and measured steps an hour of runs, each from its own rates and lengths."""
    rows, result = [["", "measured steps/h", "predicted", "error"]], {}
    for folder in folders:
        config = config_from_json((folder / "config.json").read_text(encoding="utf-8"))
        measured = measured_steps(folder).steps_per_hour
        predicted = predict(folder, config, num_seeds)
        error = predicted / measured - 1
        rows.append([str(folder), f"{measured:.1f}", f"{predicted:.1f}", f"{error:+.1%}"])
        result[str(folder)] = {"measured": measured, "predicted": predicted}
    print()
    print(columns(rows))
    return result


def predict(folder: pathlib.Path, config: Config, num_seeds: int) -> float:
    """Harmonic mean over seeds: hours add up, speeds do not."""
    rules = Rules.of(
        config.schedule,
        group_size=config.batch.group_size,
        batch_size=config.batch.batch_size,
        filter_zero_variance=config.loss.filter_zero_variance,
    )
    generation = config.generation
    cluster = Cluster(
        generation.num_generators,
        generation.num_slots,
        config.verifiers.num_workers,
        on_publish=generation.on_publish,
    )
    scenario = Scenario(rules, cluster, costs_of_run(folder, cluster), workload_of_run(folder))
    measured = measured_steps(folder)
    speeds = [measured.predicted(dataclasses.replace(scenario, seed=seed).run()) for seed in range(num_seeds)]
    return num_seeds / sum(1 / speed for speed in speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="of each simulated run")
    parser.add_argument("--scale", type=int, default=0, help="generators; only this table")
    parser.add_argument("--runs", type=pathlib.Path, nargs="*", default=[], help="run folders; only this table")
    parser.add_argument("--seeds", type=int, default=5, help="simulations of each run")
    words = parser.parse_args()
    if words.scale:
        result = show_scale(words.scale)
    elif words.runs:
        result = show_runs(words.runs, words.seeds)
    else:
        result = {"modes": show_modes(words.steps), "published": show_published(words.steps)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
