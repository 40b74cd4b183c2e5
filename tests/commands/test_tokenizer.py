"""A tokenizer for a policy from random weights, from the command line."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.data.tokenizer import load_tokenizer

SUMS = "templated:sums?language=fr&terms=2&largest=3"


@pytest.fixture
def folder(tiny: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    """The tiny model's config.json alone, with room for 300 tokens."""
    path = tmp_path / "model"
    path.mkdir()
    settings = json.loads((tiny.model() / "config.json").read_text()) | {"vocab_size": 300}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_a_tokenizer_of_ones_own(tiny: Any, folder: pathlib.Path, capsys: Any):
    settings = {"policy.path": folder, "data.train": SUMS, "data.num_train": 40, "sft.native_share": 0.5}
    tiny.run("tokenizer", settings)
    assert "a tokenizer of 300 tokens" in capsys.readouterr().err
    made = load_tokenizer(folder, 300)
    native, english = "La réponse à la question est donc ", "So the answer to the question is "
    for text in (native, english):
        assert made.decode(made.encode(text)) == text
        assert len(made.encode(text)) < len(text)  # traces in either language are among what it has learnt from
    assert {"<think>", "</think>"} <= made.special_tokens.keys()


def test_a_tokenizer_is_not_replaced(tiny: Any, folder: pathlib.Path, refusal: Callable[..., str]):
    shutil.copy(tiny.model() / "tokenizer_config.json", folder)
    settings = {"policy.path": folder, "data.train": SUMS, "data.num_train": 40}
    assert f"{folder} has a tokenizer already; remove tokenizer_config.json" in refusal("tokenizer", settings)


def test_there_must_be_traces(folder: pathlib.Path, refusal: Callable[..., str]):
    sentence = refusal("tokenizer", {"policy.path": folder, "data.train": ""})
    assert "Neither `sft.traces` nor `data.train` is given" in sentence
    assert not (folder / "tokenizer.json").exists()
