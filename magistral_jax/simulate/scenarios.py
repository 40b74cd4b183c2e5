"""Several simulations side by side: ways to run one schedule, and ways to deal out one number of devices."""

import dataclasses
from collections.abc import Callable, Iterator

from magistral_jax.schedule.machine import Rules
from magistral_jax.simulate.costs import Costs
from magistral_jax.simulate.outcome import Outcome
from magistral_jax.simulate.workload import Workload
from magistral_jax.simulate.world import Cluster, simulate

MAX_SPLITS = 24


@dataclasses.dataclass(frozen=True)
class Scenario:
    """All that a simulation depends on."""

    rules: Rules
    cluster: Cluster
    costs: Costs
    workload: Workload
    seed: int = 0

    def run(self, traced_generators: int = 0) -> Outcome:
        """Simulate it."""
        return simulate(
            self.rules,
            self.cluster,
            self.costs,
            self.workload,
            seed=self.seed,
            traced_generators=traced_generators,
        )


def synchronous(scenario: Scenario) -> Scenario:
    """One batch is sampled, then trained on, then the next is sampled: nothing overlaps, nothing is stale."""
    batch_size = scenario.rules.batch_size
    rules = dataclasses.replace(scenario.rules, max_staleness=0, num_async=batch_size, max_ready=batch_size)
    return dataclasses.replace(scenario, rules=rules)


def modes(scenario: Scenario, num_minibatches: int) -> dict[str, Scenario]:
    """The schedule as it is, without asynchrony, and with several minibatches a batch (report, Fig. 6)."""
    one = dataclasses.replace(scenario, cluster=dataclasses.replace(scenario.cluster, num_minibatches=1))
    several = dataclasses.replace(
        scenario, cluster=dataclasses.replace(scenario.cluster, num_minibatches=num_minibatches)
    )
    return {
        "synchronous": synchronous(one),
        "asynchronous": one,
        f"asynchronous, {num_minibatches} minibatches": several,
    }


def splits(scenario: Scenario, num_devices: int) -> Iterator[tuple[int, int, Scenario]]:
    """(generators, devices of the trainer, scenario) for the ways to deal out devices, at most `MAX_SPLITS`, evenly.

    Roles with devices of their own do not slow each other down.
    """
    apart = dataclasses.replace(scenario.costs, generator_slowdown=1.0, trainer_slowdown=1.0)
    each = apart.devices_per_generator
    most = (num_devices - 1) // each
    counts = sorted({max(1, round(most * i / MAX_SPLITS)) for i in range(1, MAX_SPLITS + 1)}) if most else []
    for num_generators in counts:
        num_left = num_devices - num_generators * each
        cluster = dataclasses.replace(scenario.cluster, num_generators=num_generators)
        costs = apart.on_trainer_devices(num_left)
        yield num_generators, num_left, dataclasses.replace(scenario, cluster=cluster, costs=costs)


def best_split(
    scenario: Scenario, num_devices: int, on_split: Callable[[int, int, Outcome], None]
) -> tuple[int, int, Outcome] | None:
    """The split with the most steps an hour; None where there are too few devices. `on_split` sees each of them."""
    best: tuple[int, int, Outcome] | None = None
    for num_generators, num_left, candidate in splits(scenario, num_devices):
        outcome = candidate.run()
        on_split(num_generators, num_left, outcome)
        if best is None or outcome.steps_per_hour() > best[2].steps_per_hour():
            best = num_generators, num_left, outcome
    return best
