"""Whole simulated runs: against sums by hand, and what must hold in any of them."""

import dataclasses
from collections import Counter

import pytest

from magistral_jax.schedule.machine import Rules
from magistral_jax.simulate.costs import Costs
from magistral_jax.simulate.outcome import Outcome
from magistral_jax.simulate.scenarios import Scenario, best_split, modes, splits, synchronous
from magistral_jax.simulate.workload import Workload, parse_lengths
from magistral_jax.simulate.world import Cluster

RULES = Rules(
    group_size=2,
    batch_size=4,
    num_steps=3,
    num_async=4,
    max_ready=4,
    max_staleness=0,
    checkpoint_every=0,
    filter_zero_variance=True,
)
FREE = Costs(
    decode_seconds=1.0,
    decode_seconds_per_sequence=0.0,
    prefill_seconds_per_token=0.0,
    verify_seconds=0.0,
    verify_spread=0.0,
    train_seconds=5.0,
    train_seconds_per_token=0.0,
    publish_seconds=2.0,
)
TEN = Workload(parse_lengths("constant:tokens=10"), 0.0)
LONG_TAIL = Workload(parse_lengths("lognormal:mean=200,sigma=1,cap=2000"), 20.0, (0.2,))
BUSY = Scenario(
    Rules(
        group_size=4,
        batch_size=16,
        num_steps=8,
        num_async=32,
        max_ready=16,
        max_staleness=3,
        checkpoint_every=5,
        filter_zero_variance=True,
    ),
    Cluster(4, 4, 3),
    Costs(train_seconds=10.0, train_seconds_per_token=0.001, swap_seconds=0.5, verify_seconds=0.3),
    LONG_TAIL,
)


def test_a_synchronous_run_by_hand():
    # 10 steps of 1 s, 5 s of training, 2 s until the weights are there, three times over.
    outcome = Scenario(RULES, Cluster(1, 4, 1), FREE, TEN).run()
    assert [(step.began, step.ended, step.published) for step in outcome.steps] == [
        (10.0, 15.0, 17.0),
        (27.0, 32.0, 34.0),
        (44.0, 49.0, 51.0),
    ]
    assert outcome.steps_per_hour() == outcome.steps_per_hour(0) == pytest.approx(3600 / 17)
    assert outcome.shares["generator"] == pytest.approx({"decoding": 30 / 51, "paused": 0, "idle": 21 / 51, "down": 0})
    assert outcome.shares["trainer"] == pytest.approx({"training": 15 / 51, "publishing": 6 / 51, "waiting": 30 / 51})
    assert outcome.staleness == Counter({0: 12})
    assert outcome.sampled_tokens == 120
    assert outcome.num_completions == 12


def test_an_asynchronous_run_by_hand():
    # The generator never waits: a batch every 10 s, of which training and publish take 7. A batch that is trained at
    # 10 n was begun at 10 (n − 1), when the one before last had been published.
    rules = dataclasses.replace(RULES, num_async=4, max_staleness=4, max_ready=8, num_steps=6)
    outcome = Scenario(rules, Cluster(1, 4, 1), FREE, TEN).run()
    assert [step.began for step in outcome.steps] == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert outcome.shares["generator"]["idle"] == pytest.approx(0)
    assert outcome.staleness == Counter({0: 4, 1: 20})
    # Weights come at 17, 27 …: 7 of the 10 tokens are a version older than the others.
    assert outcome.steps[-1].staleness == pytest.approx(0.7)
    assert outcome.steps[-1].swapped_share == pytest.approx(0.3)


def test_roles_that_share_their_cores_slow_each_other_down():
    # As above, but the trainer works at half speed beside the generator: 10 s. Beside it the generator makes half a
    # step a second; a batch is then 10 + 2 s of training and publish, in which 5 + 2 tokens are made, and 3 alone.
    rules = dataclasses.replace(RULES, num_async=4, max_staleness=4, max_ready=8, num_steps=6)
    costs = dataclasses.replace(FREE, generator_slowdown=2.0, trainer_slowdown=2.0)
    outcome = Scenario(rules, Cluster(1, 4, 1), costs, TEN).run()
    assert [step.began for step in outcome.steps] == [10.0, 25.0, 40.0, 55.0, 70.0, 85.0]


def test_several_minibatches_cost_their_updates_and_are_further_behind():
    costs = dataclasses.replace(FREE, train_seconds=1.0, train_seconds_per_update=1.0)
    outcome = Scenario(RULES, Cluster(1, 4, 1, num_minibatches=4), costs, TEN).run()
    assert outcome.steps[0].ended - outcome.steps[0].began == 5.0
    assert outcome.summary()["updates_behind_mean"] == pytest.approx(1.5)  # the mean of 0, 1, 2, 3


def test_training_takes_its_time_by_tokens():
    costs = dataclasses.replace(FREE, train_seconds=1.0, train_seconds_per_token=0.1)
    outcome = Scenario(RULES, Cluster(1, 4, 1), costs, dataclasses.replace(TEN, prompt_tokens=5.0)).run()
    assert outcome.steps[0].ended - outcome.steps[0].began == pytest.approx(1 + 0.1 * 4 * 15)


@pytest.fixture(scope="module")
def busy() -> Outcome:
    return BUSY.run()


def test_the_books_of_a_busy_run_balance(busy: Outcome):
    outcome = busy
    counts = outcome.counts
    assert counts["trained"] == 8 * 16
    assert counts["zero_variance"] > 0
    assert max(outcome.staleness) <= BUSY.rules.max_staleness
    assert sum(outcome.staleness.values()) == counts["trained"]
    for shares in (outcome.shares["generator"], outcome.shares["trainer"], outcome.shares["verifier"]):
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= -1e-9
    assert 0 < outcome.depths["in_flight"] <= BUSY.rules.num_async
    ends = [step.published for step in outcome.steps]
    assert ends == sorted(ends)


def test_a_simulation_is_a_function_of_its_arguments(busy: Outcome):
    assert BUSY.run() == busy
    assert busy != dataclasses.replace(BUSY, seed=1).run()


def test_generators_that_die_delay_the_run_and_lose_nothing(busy: Outcome):
    costs = dataclasses.replace(BUSY.costs, generator_mtbf=20.0, restart_seconds=5.0)
    mortal = dataclasses.replace(BUSY, costs=costs).run()
    assert mortal.generators_lost > 3
    assert mortal.counts["trained"] == 8 * 16
    assert mortal.seconds > busy.seconds
    assert 0 < mortal.shares["generator"]["down"] < 0.5


def test_the_only_generator_may_die():
    costs = dataclasses.replace(BUSY.costs, generator_mtbf=40.0, restart_seconds=10.0)
    outcome = dataclasses.replace(BUSY, costs=costs, cluster=Cluster(1, 16, 3)).run()
    assert outcome.generators_lost > 0
    assert len(outcome.steps) == 8


def test_failed_graders_cost_their_groups():
    costs = dataclasses.replace(BUSY.costs, verifier_failure_rate=0.1)
    counts = dataclasses.replace(BUSY, costs=costs).run().counts
    # A group of four survives with probability 0.9⁴ = 0.66.
    lost = counts["verifier_failed"] / (counts["verifier_failed"] + counts["zero_variance"] + counts["trained"])
    assert 0.15 < lost < 0.5


def test_asynchrony_pays_on_long_tails():
    outcomes = {name: scenario.run() for name, scenario in modes(BUSY, 4).items()}
    synchronous_, asynchronous, several = outcomes.values()
    assert max(synchronous_.staleness) == 0
    assert asynchronous.steps_per_hour() > 1.2 * synchronous_.steps_per_hour()
    updates = lambda outcome: outcome.summary()["updates_behind_mean"]
    assert updates(several) > updates(asynchronous) > updates(synchronous_) == pytest.approx(0)


def test_drawn_lengths_do_not_depend_on_the_schedule():
    rules = dataclasses.replace(BUSY.rules, filter_zero_variance=False, num_steps=2)
    scenario = dataclasses.replace(BUSY, rules=rules, workload=dataclasses.replace(LONG_TAIL, filtered_share=(0.0,)))
    first = lambda outcome: outcome.steps[0].num_tokens
    assert first(synchronous(scenario).run()) == first(
        synchronous(dataclasses.replace(scenario, cluster=Cluster())).run()
    )


def test_the_best_split_leaves_neither_role_waiting():
    # 8 devices. A batch is 40 tokens in each of 4 slots; a generator with one slot a device makes 1 token a second.
    rules = dataclasses.replace(RULES, num_async=32, max_staleness=9, max_ready=16, num_steps=12)
    costs = dataclasses.replace(FREE, train_seconds=20.0, publish_seconds=0.0, devices_per_generator=2)
    scenario = Scenario(rules, Cluster(1, 1, 1), costs, TEN)
    assert [(n, left) for n, left, _ in splits(scenario, 8)] == [(1, 6), (2, 4), (3, 2)]
    seen = []
    best = best_split(scenario, 8, lambda n, left, outcome: seen.append(outcome.steps_per_hour()))
    # Seconds of a batch, generating and training: 40 and 20/6, 20 and 5, 13⅓ and 10.
    assert seen == pytest.approx([90, 180, 270], rel=0.1)
    assert best is not None
    assert best[:2] == (3, 2)
    assert best_split(scenario, 2, lambda *_: None) is None
