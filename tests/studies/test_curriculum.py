"""The stages of a run as its page shows them."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from magistral_jax.data.curriculum import STAGES_FILE, Stage
from magistral_jax.studies.curriculum import curriculum_html, invariants, stage_spans
from magistral_jax.studies.plots import stage_changes

EASY = Stage("easy", max_length=16, length_cache=4, batch_size=32, minibatch_size=32, num_async=32)
HARD = Stage("<hard>", max_length=32, length_cache=4, batch_size=16, minibatch_size=16, num_async=32)


def steps(*stages: int, rates: tuple[float | None, ...] = ()) -> list[dict[str, Any]]:
    return [
        {"step": number, "stage": float(stage), "pool_size": 100.0 - number, "graded_pass_rate": rate}
        for number, (stage, rate) in enumerate(zip(stages, rates or (0.5,) * len(stages), strict=True), 1)
    ]


def test_the_invariants_are_kept_in_words_with_figures():
    metrics = steps(1, 1, 2, 2, rates=(0.5, 0.9, None, 0.3))
    (harder, longer, smaller) = invariants(stage_spans([EASY, HARD], metrics))
    assert harder[0] is longer[0] is smaller[0] is True
    assert harder[1].startswith("Kept: data gets harder")
    assert harder[1].endswith(": 0.70 → 0.30.")
    assert longer[1].endswith(": 12 → 28.")
    assert smaller[1].endswith(": 32 / 32 → 16 / 16.")


def test_what_is_violated_or_unknown_is_said():
    called_back = stage_spans([EASY, HARD], steps(1, 2, 1, rates=(0.2, 0.4, 0.4)))
    assert [stage.name for stage, _ in called_back] == ["easy", "<hard>", "easy"]
    assert [(is_kept, sentence.split(":")[0]) for is_kept, sentence in invariants(called_back)] == [
        (False, "Violated")
    ] * 3
    ((harder, sentence), *_) = invariants(stage_spans([EASY, HARD], steps(1, 2, rates=(0.2, None))))
    assert harder is None
    assert sentence.startswith("Unknown: data gets harder")
    larger = dataclasses.replace(HARD, minibatch_size=64, batch_size=64)
    *_, (smaller, _) = invariants(stage_spans([EASY, larger], steps(1, 2)))
    assert smaller is False


@pytest.mark.parametrize("table", [None, "[", '{"a": 1}', '[{"nam": 1}]'])
def test_a_run_without_stages_has_no_such_table(tmp_path: pathlib.Path, table: str | None):
    if table is not None:
        (tmp_path / STAGES_FILE).write_text(table)
    assert curriculum_html(tmp_path, steps(1, 2)) == ""


def test_the_page_shows_each_stage_and_escapes_its_name(tmp_path: pathlib.Path):
    (tmp_path / STAGES_FILE).write_text(json.dumps([dataclasses.asdict(stage) for stage in (EASY, HARD)]))
    page = curriculum_html(tmp_path, steps(1, 1, 2, 2))
    assert "<td>&lt;hard&gt;</td><td>3 to 4</td><td>97 → 96</td>" in page
    assert "<td>32 − 4 = 28</td><td>16 / 16</td>" in page
    assert page.count("<li>") == 3


def test_the_curves_mark_where_a_stage_begins():
    assert stage_changes(steps(1, 1, 2, 2, 3)) == [3, 5]
    assert stage_changes([{"step": 1}, {"step": 2}]) == []
