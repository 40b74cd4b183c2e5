"""Fine-tuning with held-out traces: it ends when they are learnt no better, and the best weights are the result."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from magistral_jax.commands.sft_data import split_prompts
from magistral_jax.commands.validation import is_exhausted
from magistral_jax.metrics import read_json_lines
from magistral_jax.policy.hf_folder import load_params
from magistral_jax.records import Problem, Prompt


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([1, 2, 3], 2, True),
        ([1, 2, 0], 2, False),
        ([1, 2], 2, False),
        ([1, 2, 3, 4], 0, False),
        ([], 1, False),
    ],
)
def test_when_to_stop(losses: list[int], patience: int, expected: bool):
    assert is_exhausted([float(loss) for loss in losses], patience) == expected


def test_traces_of_one_problem_stay_together():
    prompts = [
        Prompt(Problem(f"{problem} {i}", problem, "1"), np.zeros(1, np.int32), problem)
        for problem in "abcde"
        for i in (1, 2)
    ]
    train, held_out = split_prompts(prompts, 0.4, seed=0)
    assert len(held_out) == 4
    assert {p.problem.statement for p in train}.isdisjoint(p.problem.statement for p in held_out)
    assert split_prompts(prompts, 0.4, seed=0)[1] == held_out
    assert split_prompts(prompts, 0.0, seed=0) == (prompts, [])
    assert len(split_prompts(prompts, 0.01, seed=0)[1]) == 2  # one problem at least
    assert len(split_prompts(prompts, 0.99, seed=0)[0]) == 2  # and one to train on


def test_it_ends_early_with_the_best_weights(tiny: Any, tmp_path: pathlib.Path, capsys: Any):
    rng = np.random.default_rng(0)
    rows = [{"problem": f"Say {i}", "completion": f"<think>{rng.integers(10**9)}</think>{i}"} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "g.jsonl").write_text('{"problem": "Hello", "completion": "Good day!"}\n')
    folder = tmp_path / "run"
    settings = {
        "run.folder": folder,
        "data.train": "",
        "policy.random_init": True,
        "optimizer.learning_rate": 2e-2,
        "generation.max_new_tokens": 40,
        "sft.traces": tmp_path / "t.jsonl",
        "sft.general": tmp_path / "g.jsonl",
        "sft.general_share": 0.25,
        "sft.num_updates": 200,
        "sft.batch_size": 4,
        "sft.validation_share": 0.25,
        "sft.validate_every": 10,
        "sft.patience": 2,
    }
    tiny.run("sft", settings)  # numbers at random: learning them by heart teaches nothing about the held-out ones
    lines = {line["step"]: line["validation_loss"] for line in read_json_lines(folder / "metrics.jsonl")}
    best = min(lines, key=lambda step: lines[step])
    assert max(lines) == best + 20 < 200
    said = capsys.readouterr().err
    assert "no lower validation loss in 2 measurements: fine-tuning ends" in said
    assert f"of the lowest validation loss, {lines[best]:.4f}" in said
    ours, kept = (load_params(folder / name, tiny.config) for name in ("policy", "best"))
    jax.tree.map(np.testing.assert_array_equal, ours, kept)


def test_other_instructions_alone_are_refused(tiny: Any, tmp_path: pathlib.Path, refusal: Callable[..., str]):
    settings = {"run.folder": tmp_path / "run", "sft.general": tmp_path / "g.jsonl"}
    assert "`sft.general` is mixed into given traces" in refusal("sft", settings)
