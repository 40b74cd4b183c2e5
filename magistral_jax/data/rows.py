"""Rows of data files; in: a path, out: rows, each with its place for error sentences.

Read are JSON lines, Parquet, and local folders of Hugging Face datasets: what `save_to_disk` writes, and a copy of a
repository from the Hub. What is wrong with a whole file is an error; what is wrong with one row goes to `on_bad_row`.
"""

import dataclasses
import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from magistral_jax.records import MagistralError

SOURCES = (
    "a .jsonl file, a .parquet file, a Hugging Face dataset folder, reasoning-gym:NAME?key=value&… or "
    "templated:sums?key=value&…"
)


def refuse(sentence: str) -> NoReturn:
    """What happens to a bad row unless the caller wants something else.

    Raises:
      MagistralError: Always, with this sentence.
    """
    raise MagistralError(sentence)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row and where it stands."""

    path: pathlib.Path
    line: int
    """From 1; of a file that has no lines, the number of the row."""
    columns: dict[str, Any]

    @property
    def place(self) -> str:
        """For error sentences."""
        return f"{self.path}, line {self.line}"


def read_source(source: str, on_bad_row: Callable[[str], None] = refuse) -> Iterator[Row]:
    """Rows of a file or of a dataset folder, `FOLDER` or `FOLDER?split=NAME`.

    Args:
      source: The path.
      on_bad_row: Gets a sentence about each row that cannot be read, which is then passed over.

    Raises:
      MagistralError: There is no such file or folder, it is not what its name says, or it has no rows.
    """
    place, _, query = source.partition("?")
    path = pathlib.Path(place)
    if not path.is_dir():
        yield from _read_file(pathlib.Path(source), on_bad_row)
        return
    settings = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if unknown := settings.keys() - {"split"}:
        raise MagistralError(f"{source}: a dataset folder has no parameter {min(unknown)!r}; expected split")
    for file in dataset_files(path, settings.get("split", "")):
        yield from _read_file(file, on_bad_row)


def read_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a `.jsonl` or `.parquet` file; blank lines are passed over."""
    for row in _read_file(path, refuse):
        yield row.line, row.columns


# ---- folders --------------------------------------------------------------------------------------------------------

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]{8,})?$")


def dataset_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Files of one split of a dataset folder, in order.

    Args:
      folder: What `datasets.save_to_disk` wrote, or a folder with data files named like `train-00000-of-00001.parquet`
        or `train.jsonl`, directly in it or in its folder `data`.
      split: Its name; empty where there is only one.

    Raises:
      MagistralError: It is no such folder, or has not this split; the sentence names those there are.
    """
    splits = _saved_splits(folder) or _loose_splits(folder)
    if not splits:
        raise MagistralError(
            f"{folder}: not a dataset folder; expected what `save_to_disk` writes (dataset_dict.json or state.json), "
            "or .parquet, .arrow or .jsonl files in it or in its folder data"
        )
    if not split and len(splits) > 1:
        names = ", ".join(splits)
        raise MagistralError(f"{folder}: has the splits {names}; name one, as in {folder}?split={next(iter(splits))}")
    if split and split not in splits:
        raise MagistralError(f"{folder}: has no split {split!r}; there are {', '.join(splits)}")
    return splits[split or next(iter(splits))]


def _saved_splits(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Of `save_to_disk`: a folder for each split, or one split without a name of its own."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits", [])
        return {name: _saved_files(folder / name) for name in names}
    return {folder.name: _saved_files(folder)} if (folder / "state.json").is_file() else {}


def _saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        names = [entry["filename"] for entry in _read_json(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError):
        raise MagistralError(f"{folder / 'state.json'}: names no data files; the dataset is damaged") from None
    return [folder / name for name in names]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MagistralError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise MagistralError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _loose_splits(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Of data files, by what stands in their names before the number of the shard."""
    for place in (folder, folder / "data"):
        splits: dict[str, list[pathlib.Path]] = {}
        for path in sorted(place.glob("*")):
            if path.suffix in _READERS:
                splits.setdefault(_SHARD.sub("", path.stem), []).append(path)
        if splits:
            return splits
    return {}


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_file(path: pathlib.Path, on_bad_row: Callable[[str], None]) -> Iterator[Row]:
    if path.is_dir():
        raise MagistralError(f"{path}: is a folder; expected a file that ends in .jsonl or .parquet")
    if not path.is_file():
        raise MagistralError(f"{path}: no such file; a source is {SOURCES}")
    if path.suffix not in _READERS:
        raise MagistralError(f"{path}: expected a file that ends in .jsonl or .parquet")
    has_rows = False
    for row in _READERS[path.suffix](path, on_bad_row):
        has_rows = True
        yield row
    if not has_rows:
        raise MagistralError(f"{path}: the file has no rows")


def _read_jsonl(path: pathlib.Path, on_bad_row: Callable[[str], None]) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                columns = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, UnicodeDecodeError
                on_bad_row(f"{path}, line {number}: not valid JSON: {error}")
                continue
            if isinstance(columns, dict):
                yield Row(path, number, columns)
            else:
                on_bad_row(f"{path}, line {number}: expected a JSON object, found {type(columns).__name__}")


def _read_parquet(path: pathlib.Path, on_bad_row: Callable[[str], None]) -> Iterator[Row]:
    del on_bad_row  # a Parquet file is whole or it is not
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(path, number, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MagistralError(f"{path}: not a readable Parquet file: {error}") from None


def _read_arrow(path: pathlib.Path, on_bad_row: Callable[[str], None]) -> Iterator[Row]:
    """The stream format, which the library `datasets` writes."""
    del on_bad_row
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(path, number, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MagistralError(f"{path}: not a readable Arrow stream: {error}") from None


_READERS: dict[str, Callable[[pathlib.Path, Callable[[str], None]], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
