"""The table of variants."""

from magistral_jax.studies.variants import Result, variant_table


def result(variant: str, seed: int, score: float):
    intervals = {"pass_at_1": (score - 0.1, score + 0.1), "maj_at_4": (0.5, 1.0)}
    scores = {"pass_at_1": score, "maj_at_4": 0.75, "intervals": intervals, "format_rate": 1.0}
    return Result(variant, seed, scores | {"mean_completion_length": 10.0 + seed}, seconds=100.0 * (seed + 1))


def test_each_seed_has_a_row_and_several_have_a_mean():
    text = variant_table([result("SFT", 0, 0.25), result("SFT", 1, 0.75), result("RL", 0, 0.5)])
    assert text.splitlines() == [
        "| variant | seed | pass@1 (95 % interval) | maj@4 (95 % interval) | format | tokens | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| SFT | 0 | 0.250 (0.150 to 0.350) | 0.750 (0.500 to 1.000) | 100.0% | 10.0 | 100 |",
        "| SFT | 1 | 0.750 (0.650 to 0.850) | 0.750 (0.500 to 1.000) | 100.0% | 11.0 | 200 |",
        "| **SFT** | mean | 0.500 (seeds: 0.250 to 0.750) | 0.750 (seeds: 0.750 to 0.750) | 100.0% | 10.5 | 150 |",
        "| RL | 0 | 0.500 (0.400 to 0.600) | 0.750 (0.500 to 1.000) | 100.0% | 10.0 | 100 |",
    ]
