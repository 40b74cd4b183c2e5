"""The benchmark that runs unattended on a card: every line of it at toy size, and what it does when a section fails."""

import importlib
import json
import pathlib
from typing import Any

import pytest


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module; its neighbours are found beside it, as when it is run."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu")


def test_every_section_runs_at_toy_size(gpu: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--toy", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["name"] == "cpu"
    assert result["bandwidth"] > 0
    assert list(result["sections"]) == ["parity", "decode", "blocks", "prefill", "swap", "train"]
    for section in result["sections"].values():
        assert section["rows"]
        assert not any("error" in row for row in section["rows"])
    for name in ("decode", "prefill", "train"):
        assert all(row["tok_per_s"] > 0 for row in result["sections"][name]["rows"])


def test_a_failure_takes_nothing_with_it_and_is_reported(
    gpu: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def fails_later(sizes: Any, card: Any) -> Any:
        yield {"case": "fine", "tok_per_s": 1}
        raise RuntimeError("out of memory")

    def has_a_bad_row(sizes: Any, card: Any) -> Any:
        yield gpu.attempt("wrong", lambda: importlib.import_module("gpu_card").bounded(float("nan"), 1.0))
        yield {"case": "fine", "tok_per_s": 2}

    sections = {"decode": fails_later, "swap": has_a_bad_row, "train": lambda sizes, card: iter([{"case": "fine"}])}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--toy", "--out", str(out), "--sections", *sections]) == 1
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["failures"]) == {"decode", "swap"}
    assert "out of memory" in result["failures"]["decode"]
    assert "nan" in result["failures"]["swap"]
    assert [len(section["rows"]) for section in result["sections"].values()] == [1, 2, 1]
    assert gpu.main(["--toy", "--sections", "nonsense"]) == 2


def test_the_bound_counts_weights_once_and_keys_and_values_of_every_row(gpu: Any):
    # 1 layer, 2 KV heads of 16, keys and values in two bytes: 128 bytes a token; 3 rows of 10 tokens.
    own = gpu.Engine(gpu.TOY)
    assert own.kv_bytes(3, 10) == 128 * 30
    # Embedding (tied) 96·32, attention 32·(4+2+2+4)·16, feed-forward 3·32·48, norms 3·32, in two bytes each.
    assert own.weight_bytes == 2 * (96 * 32 + 32 * 12 * 16 + 3 * 32 * 48 + 3 * 32)


def test_flops_by_hand(gpu: Any):
    # 2 FLOP for each of a layer's and the head's weights, and 2·2·heads·E·T/2 of causal attention, for each token.
    weights = 32 * 12 * 16 + 3 * 32 * 48 + 32 * 96
    assert gpu.forward_flops(gpu.TOY.model, 1, 8) == 8 * (2 * weights + 2 * 64 * 8)
