"""docs/paper_map.md names things that exist."""

import importlib
import pathlib
import re

import pytest

import magistral_jax

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [
    line for line in (ROOT / "docs/paper_map.md").read_text(encoding="utf-8").splitlines() if "`magistral_jax." in line
]


@pytest.mark.parametrize("row", ROWS)
def test_symbols_and_tests_of_a_row_exist(row: str) -> None:
    symbol, test = re.findall(r"`([\w./]+)`", row)[-2:]
    assert (ROOT / test).exists(), f"{test} is missing"
    parts = symbol.split(".")
    found, depth = magistral_jax, 1
    while depth < len(parts):
        try:
            found = importlib.import_module(".".join(parts[: depth + 1]))
        except ModuleNotFoundError:
            break
        depth += 1
    for name in parts[depth:]:
        fields = getattr(found, "__dataclass_fields__", {})
        assert name in fields or hasattr(found, name), f"{symbol} is missing"
        found = getattr(found, name, None)


def test_there_are_rows() -> None:
    assert len(ROWS) > 10
