"""Plots of runs of any length, with any metric missing."""

import pathlib
from typing import Any

import numpy as np
import pytest

from magistral_jax.studies.plots import PANELS, draw_evaluation, draw_panel, write_plots

PANEL = PANELS[0]


def curves(metrics: list[dict[str, Any]]) -> list[Any]:
    figure = draw_panel(PANEL, metrics)
    assert figure is not None
    return list(figure.axes[0].lines)


def test_panels_have_one_name_each_and_do_not_repeat_a_metric():
    names = [name for panel in PANELS for name in panel.series]
    assert len(names) == len(set(names))
    assert len({panel.name for panel in PANELS}) == len({panel.title for panel in PANELS}) == len(PANELS)


def test_a_short_run_is_drawn_as_it_is_and_a_gap_stays_a_gap():
    (line,) = curves([{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 4, "reward": 0.7}])
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(line.get_ydata(), [0.5, np.nan, 0.7])


def test_a_long_run_gets_a_running_mean_over_the_raw_curve():
    values = np.arange(40.0)
    raw, smooth = curves([{"step": i, "reward": v} for i, v in enumerate(values)])
    np.testing.assert_array_equal(raw.get_ydata(), values)
    expected = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(40)]  # radius 40 // 20
    np.testing.assert_allclose(smooth.get_ydata(), expected)


def test_nothing_to_draw_gives_no_figure():
    assert draw_panel(PANEL, []) is None
    assert draw_panel(PANEL, [{"step": 1, "other": 1.0}, {"step": 2, "reward": None}]) is None
    assert draw_evaluation({}) is None
    assert draw_evaluation({"eval_before": None, "eval_after": {"num_problems": 3}}) is None


@pytest.mark.parametrize("keys", [["eval_before"], ["eval_after"], ["eval_before", "eval_after"]])
def test_bars_stand_at_the_scores_with_their_intervals(keys: list[str]):
    scores = {"pass_at_1": 0.4, "maj_at_8": 0.6, "intervals": {"pass_at_1": [0.3, 0.55]}, "num_problems": 9}
    figure = draw_evaluation(dict.fromkeys(keys, scores))
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["pass@1", "maj@8"]
    assert [bar.get_height() for bar in axes.patches] == [0.4, 0.6] * len(keys)  # pyright: ignore[reportAttributeAccessIssue]
    (whiskers,) = axes.containers[1][2]
    np.testing.assert_allclose([segment[:, 1] for segment in whiskers.get_segments()], [[0.3, 0.55], [0.6, 0.6]])


def test_files_of_an_earlier_report_go(tmp_path: pathlib.Path):
    paths = write_plots(tmp_path, [{"step": 1, "reward": 0.1, "entropy": 2.0}], {})
    assert {title: path.name for title, path in paths.items()} == {
        "Reward": "reward.png",
        "Entropy of the policy": "entropy.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())
    write_plots(tmp_path, [{"step": 1, "reward": 0.1}], {})
    assert [path.name for path in tmp_path.iterdir()] == ["reward.png"]
