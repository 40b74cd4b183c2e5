"""Saved chunks: computed once, cut where a kill left them in pieces, refused where they belong to other problems."""

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from magistral_jax.curate.journal import in_chunks
from magistral_jax.records import MagistralError

ITEMS = [f"p{i}" for i in range(10)]


class Work:
    """Squares of places; notes what it was asked for."""

    def __init__(self, fails_at: int = -1):
        self.asked: list[tuple[int, int]] = []
        self._fails_at = fails_at

    def __call__(self, start: int, items: Sequence[str]) -> list[dict[str, Any]]:
        if start == self._fails_at:
            raise KeyboardInterrupt
        self.asked.append((start, len(items)))
        return [{"id": item, "square": (start + place) ** 2} for place, item in enumerate(items)]


def run(path: pathlib.Path, work: Work, items: Sequence[str] = ITEMS) -> list[dict[str, Any]]:
    return in_chunks(items, work, journal=path, key=lambda item: item, chunk=4)


def test_a_run_that_was_interrupted_anywhere_ends_like_one_that_was_not(tmp_path: pathlib.Path):
    whole, work = tmp_path / "whole.jsonl", Work()
    expected = run(whole, work)
    assert [record["square"] for record in expected] == [i**2 for i in range(10)]
    assert work.asked == [(0, 4), (4, 4), (8, 2)]

    stopped = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(stopped, Work(fails_at=4))
    again = Work()
    assert run(stopped, again) == expected
    assert again.asked == [(4, 4), (8, 2)]
    for size in range(0, len(whole.read_bytes()), 7):  # killed while writing
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(whole.read_bytes()[:size])
        assert run(cut, Work()) == expected
        assert cut.read_bytes() == whole.read_bytes()


def test_what_is_complete_is_not_computed_again(tmp_path: pathlib.Path):
    run(tmp_path / "j.jsonl", Work())
    again = Work()
    run(tmp_path / "j.jsonl", again)
    assert again.asked == []


def test_a_journal_of_other_problems_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "j.jsonl"
    run(path, Work())
    with pytest.raises(MagistralError, match=r"j\.jsonl: was written for other problems: found p0, not q"):
        run(path, Work(), ["q", *ITEMS[1:]])
