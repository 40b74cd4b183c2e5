"""Costs, lengths and the rates of a run: what a user gives, and what is said to a mistake."""

import dataclasses
import json
import pathlib
import statistics

import pytest

from magistral_jax.records import MagistralError
from magistral_jax.schedule.machine import Rules
from magistral_jax.simulate.costs import Costs, costs_from, load_costs
from magistral_jax.simulate.measure import costs_of_run, measured_steps
from magistral_jax.simulate.scenarios import Scenario
from magistral_jax.simulate.workload import parse_lengths, workload_of_run
from magistral_jax.simulate.world import Cluster


def test_decode_steps_by_a_line_and_by_a_table():
    assert Costs(decode_seconds=1.0, decode_seconds_per_sequence=0.5).step_seconds(3) == [1.0, 1.5, 2.0, 2.5]
    table = Costs(decode_table=((1.0, 1.0), (3.0, 2.0), (5.0, 6.0)))
    assert table.step_seconds(6) == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert Costs(decode_table=((4.0, 2.0),)).step_seconds(5) == [2.0] * 6


def test_costs_from_a_file(tmp_path: pathlib.Path):
    path = tmp_path / "rates.toml"
    path.write_text("train_seconds = 7\ndecode_table = [[1, 0.01], [64, 0.02]]\n")
    costs = load_costs(path)
    assert (costs.train_seconds, costs.decode_table) == (7.0, ((1.0, 0.01), (64.0, 0.02)))
    assert costs.publish_seconds == Costs().publish_seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_second = 1", "unknown rate `train_second`; there are "),
        ("train_seconds = -1", "`train_seconds` must be a number of at least 0, not `-1`"),
        ("train_seconds = 'x'", "`train_seconds` must be a number of at least 0, not `x`"),
        ("train_seconds = true", "`train_seconds` must be a number of at least 0, not `True`"),
        ("trainer_devices = 1.5", "`trainer_devices` must be a whole number of at least 1"),
        ("verify_spread = 2.0", "at least 0 and at most 1, not `2.0`"),
        ("decode_table = [[2, 1.0], [1, 1.0]]", "`decode_table` must be a list of"),
        ("decode_table = 3", "`decode_table` must be a list of"),
        ("a = [", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_rates_is_one_sentence(tmp_path: pathlib.Path, text: str, message: str):
    path = tmp_path / "rates.toml"
    path.write_text(text)
    with pytest.raises(MagistralError) as error:
        load_costs(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    with pytest.raises(MagistralError, match="cannot read the rates"):
        load_costs(tmp_path / "none.toml")


def test_a_trainer_of_another_size():
    costs = Costs(train_seconds=8.0, train_seconds_per_token=0.4, trainer_devices=2)
    assert costs.on_trainer_devices(8).train_seconds == 2.0
    assert dataclasses.replace(costs, trainer_scaling=0.5).on_trainer_devices(8).train_seconds_per_token == 0.2


def test_named_lengths():
    assert [parse_lengths("uniform:low=10,high=20")(u, 0) for u in (0.0, 0.5)] == [10, 15]
    growing = parse_lengths("constant:tokens=100,growth=0.1", 120.0)
    assert [growing(0.3, version) for version in (0, 1, 2)] == [100, 110, 120]  # 121 is over the limit
    lengths = parse_lengths("lognormal:mean=1000,sigma=1,cap=16000")
    drawn = [lengths((i + 0.5) / 20000, 0) for i in range(20000)]
    assert statistics.fmean(drawn) == pytest.approx(1000, rel=0.02)
    assert drawn[10000] == pytest.approx(1000 * 2.718281828**-0.5, rel=0.01)  # the median of a lognormal
    assert max(drawn) == 16000
    assert lengths(0.0, 0) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gauss:mean=1", "expected a run folder or one of lognormal, uniform, constant"),
        ("lognormal:median=1", "`lognormal` has no `median`; there are mean, sigma, cap, growth"),
        ("lognormal:mean=x", "`mean` of `lengths` must be a number of at least 0, not `x`"),
        ("lognormal:mean=0", "must be above 0"),
    ],
)
def test_a_mistake_in_the_lengths_is_one_sentence(text: str, message: str):
    with pytest.raises(MagistralError) as error:
        parse_lengths(text)
    assert message in str(error.value)


# ---- from a run ----

CLUSTER = Cluster(num_generators=1, num_slots=4, num_workers=1)


def write_run(folder: pathlib.Path, *, steps: int = 8) -> pathlib.Path:
    """A run on shared cores: 100 tokens/s while the trainer rests, 40 beside it, 0.01 s a trained token.

    Each step trains for 8 s on 4 sequences of 150 tokens and 50 of prompt; the first compiles for a minute.
    """
    folder.mkdir(exist_ok=True)
    metrics, rollouts, filtered = [], [], 0
    for step in range(1, steps + 1):
        train, alone = 8.0, 2.0 * step
        filtered += 2 * (step % 2)
        row = {
            "step": step,
            "step_seconds": (60.0 if step == 1 else train) + alone,
            "train_seconds": 60.0 if step == 1 else train,
            "generator_idle_share": 0.0,
            "in_flight": 8.0,
            "verify_seconds": 0.01,
            "total_zero_variance": float(filtered),
        }
        row["sampled_tokens_per_second"] = (100 * alone + 40 * row["train_seconds"]) / row["step_seconds"]
        row["tokens_per_second"] = 800 / row["step_seconds"]
        metrics.append(row)
        rollouts += [{"step": step, "completion_tokens": 100 * step + i, "prompt_tokens": 50} for i in range(4)]
    for name, rows in (("metrics.jsonl", metrics), ("rollouts.jsonl", rollouts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rates_are_read_off_a_run(tmp_path: pathlib.Path):
    costs = costs_of_run(write_run(tmp_path), CLUSTER)
    assert costs.step_seconds(4)[4] == pytest.approx(4 / 100)  # a token for each of four slots, 100 a second
    assert costs.generator_slowdown == pytest.approx(2.5)
    assert costs.train_seconds_per_token == pytest.approx(0.01)
    assert costs.trainer_slowdown == 1.0  # it never ran alone: folded into its rate
    measured = measured_steps(tmp_path)
    assert measured.steps == tuple(range(1, 8))  # without the one that compiled
    assert measured.seconds == pytest.approx(sum(8 + 2 * step for step in range(2, 9)))


def test_the_work_of_a_run_is_met_step_by_step(tmp_path: pathlib.Path):
    workload = workload_of_run(write_run(tmp_path))
    assert workload.prompt_tokens == 50
    assert [workload.lengths(u, 2) for u in (0.0, 0.3, 0.99)] == [300, 301, 303]
    assert workload.lengths(0.0, 99) == 800  # what came last holds on
    assert workload.filtered_share[:3] == pytest.approx((1 / 3, 0, 1 / 3))
    assert workload.is_filtered(0.2, 0)
    assert not workload.is_filtered(0.2, 1)


def test_a_prediction_is_held_against_the_same_steps(tmp_path: pathlib.Path):
    measured = measured_steps(write_run(tmp_path))
    rules = Rules(
        group_size=2,
        batch_size=4,
        num_steps=8,
        num_async=4,
        max_ready=4,
        max_staleness=0,
        checkpoint_every=0,
        filter_zero_variance=False,
    )
    costs = Costs(decode_seconds=1.0, decode_seconds_per_sequence=0.0, verify_seconds=0.0, publish_seconds=0.0)
    workload = dataclasses.replace(workload_of_run(tmp_path), lengths=parse_lengths("constant:tokens=9"))
    outcome = Scenario(rules, CLUSTER, dataclasses.replace(costs, prefill_seconds_per_token=0.0), workload).run()
    assert measured.predicted(outcome) == pytest.approx(outcome.steps_per_hour())


def test_a_folder_without_a_run_is_said(tmp_path: pathlib.Path):
    with pytest.raises(MagistralError, match="holds no rollouts"):
        workload_of_run(tmp_path)
    with pytest.raises(MagistralError, match="0 steps; at least 3 are needed"):
        costs_of_run(tmp_path, CLUSTER)


def test_costs_given_one_by_one_come_last():
    costs = costs_from({"train_seconds": 3}, "command line", Costs(publish_seconds=9.0))
    assert (costs.train_seconds, costs.publish_seconds) == (3.0, 9.0)
