"""The table of stages: read, refused by name, and compared with the report's invariants."""

import dataclasses
import json
from typing import Any

import pytest

from magistral_jax.data.curriculum import Stage, departures, read_stages

RUN = Stage("run", max_length=64, length_cache=8, batch_size=32, minibatch_size=0, num_async=64)


def read(*tables: Any) -> tuple[Stage, ...]:
    texts = [table if isinstance(table, str) else json.dumps(table) for table in tables]
    return read_stages(texts, RUN, group_size=4)


def test_what_a_stage_leaves_out_is_the_runs_own():
    first, last = read({"name": "first", "batch_size": 16, "num_steps": 3}, {"name": "last", "difficulty": [0, 0.5]})
    assert first == Stage("first", 64, 8, 16, 16, 64, num_steps=3)
    assert last == Stage("last", 64, 8, 32, 32, 64, difficulty=(0.0, 0.5))
    assert first.free_length == 56
    assert read() == ()


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        (["[]"], "stage 1 is `[]`; expected a table"),
        (["name=x"], "stage 1 is `name=x`; expected a table"),
        ([{"batch_size": 8}], "stage 1 has no `name`"),
        ([{"name": "a", "lenght_cache": 8}], "stage `a` has an unknown field `lenght_cache`; the nearest is `length_c"),
        ([{"name": "a", "batch_size": 8.5}], "`batch_size` of stage `a` is 8.5; it must be a whole number"),
        ([{"name": "a", "num_steps": True}], "`num_steps` of stage `a` is True; it must be a whole number"),
        ([{"name": "a", "mixture": "x.jsonl"}], "`mixture` of stage `a` is 'x.jsonl'; it must be a list of texts"),
        ([{"name": "a", "difficulty": [0.1]}], "`difficulty` of stage `a` is [0.1]; it must be two numbers"),
        ([{"name": "a", "difficulty": [0.6, 0.5]}], "stage `a`: `difficulty` ([0.6, 0.5])"),
        ([{"name": "a", "max_length": 65}], "stage `a`: `max_length` (65) must lie between 1 and `generation.max_new"),
        ([{"name": "a", "max_length": 7}], "stage `a`: `length_cache` (8) must lie between 0 and `max_length` (7)"),
        ([{"name": "a", "batch_size": 6}], "stage `a`: `batch_size` (6) must be a multiple of `batch.group_size` (4)"),
        ([{"name": "a", "minibatch_size": 12}], "stage `a`: `minibatch_size` (12) must be a multiple"),
        ([{"name": "a", "num_async": 2}], "stage `a`: `num_async` (2)"),
        ([{"name": "a", "until_pass_rate": 1.5}], "stage `a`: `until_pass_rate` (1.5)"),
        ([{"name": "a", "until_growth": -0.1}], "stage `a`: `until_growth` (-0.1)"),
        ([{"name": "a", "window": 0}], "stage `a`: `window` (0) must be at least 1"),
        ([{"name": "a"}, {"name": "a"}], "there are two stages of the name `a`"),
        ([{"name": "a"}, {"name": "b", "num_steps": 3}], "the last stage, `b`, must have no `num_steps`"),
    ],
)
def test_a_wrong_table_is_refused_with_stage_and_field(tables: list[Any], sentence: str, refuses: Any):
    with refuses("curriculum: ", sentence):
        read(*tables)


def test_departures_from_the_reports_invariants_are_named():
    start = Stage("a", max_length=64, length_cache=16, batch_size=32, minibatch_size=32, num_async=64)
    harder = dataclasses.replace(start, name="b", length_cache=8, batch_size=16, minibatch_size=16)
    assert departures([start, harder]) == []
    wrong = dataclasses.replace(start, name="c", length_cache=20, batch_size=64, difficulty=(0.5, 1.0))
    parts = ["problems get easier", "shrinks (48 to 44)", "`batch_size` grows (32 to 64)", "`minibatch_size` grows"]
    wrong = dataclasses.replace(wrong, minibatch_size=64)
    found = departures([dataclasses.replace(start, difficulty=(0.2, 0.9)), wrong])
    assert len(found) == 4
    for part, sentence in zip(parts, found, strict=True):
        assert part in sentence
        assert "from stage `a` to `c`" in sentence
