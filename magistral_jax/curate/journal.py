"""Results of costly work, saved a chunk at a time, so that a run that was killed goes on where it was.

A chunk is computed from its own inputs alone and is written as a whole, so an interrupted run and an uninterrupted one
end with the same file.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from magistral_jax.records import MagistralError

T = TypeVar("T")


def in_chunks(
    items: Sequence[T],
    compute: Callable[[int, Sequence[T]], list[dict[str, Any]]],
    *,
    journal: pathlib.Path,
    key: Callable[[T], str],
    chunk: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One record for each item, from the journal where it has them, else computed and written there.

    Args:
      items: In a fixed order.
      compute: Gets the place of the first of some items, and these; gives their records, which are JSON values.
      journal: One line for each item, in order.
      key: Id of an item; its record has it as `id`.
      chunk: Items of one call of `compute`.
      on_progress: Gets the number of items that are done, and of all.

    Raises:
      MagistralError: The journal was written for other items.
    """
    records = _whole_chunks(journal, len(items), chunk)
    for item, record in zip(items, records, strict=False):
        if record.get("id") != key(item):
            raise MagistralError(
                f"{journal}: was written for other problems: found {record.get('id')}, not {key(item)}"
            )
    on_progress(len(records), len(items))
    with journal.open("a", encoding="utf-8", newline="\n") as file:
        for start in range(len(records), len(items), chunk):
            lines = [json.dumps(record) + "\n" for record in compute(start, items[start : start + chunk])]
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
            records += map(json.loads, lines)  # the same whether they were computed or read
            on_progress(len(records), len(items))
    return records


def _whole_chunks(journal: pathlib.Path, total: int, chunk: int) -> list[dict[str, Any]]:
    """Records of the chunks that are complete; what was written of another one is cut off."""
    if not journal.exists():
        return []
    lines = journal.read_bytes().splitlines(keepends=True)
    while lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if len(lines) < total:
        lines = lines[: len(lines) - len(lines) % chunk]
    os.truncate(journal, sum(map(len, lines)))
    return [json.loads(line) for line in lines[:total]]


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a whole file, or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    os.replace(partial, path)
