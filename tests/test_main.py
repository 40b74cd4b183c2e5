"""The command line: help at once, and one sentence with exit code 2 for whatever the user may get wrong."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import magistral_jax
from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.main import main
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import save_folder, tensor_table

COMMANDS = ("train", "sft", "evaluate", "generate", "export")


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)


# --- help ------------------------------------------------------------------------------------------------------------


HELP_PROBE = """
import sys, time
from magistral_jax.main import main
try:
    main(["train", "--help"])
except SystemExit as end:
    assert not end.code
heavy = [name for name in ("jax", "flax", "optax", "orbax", "torch", "sympy", "matplotlib") if name in sys.modules]
print(time.process_time(), *heavy)
"""


def test_help_is_fast_and_imports_no_jax():
    # Seconds of processor time, since the machine may be busy with other things.
    result = run_python("-c", HELP_PROBE)
    assert result.returncode == 0, result.stderr
    seconds, *heavy = result.stdout.splitlines()[-1].split()
    assert heavy == []
    assert float(seconds) < 1.0


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]):
    for words in ([], ["--help"], ["-h"]):
        main(words)
        usage = capsys.readouterr().out
        assert usage.startswith("usage: magistral-jax COMMAND")
        assert all(f"\n  {command} " in usage for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]):
    main(["--version"])
    assert capsys.readouterr().out == f"magistral-jax {magistral_jax.__version__}\n"


def test_every_command_lists_every_setting(capsys: pytest.CaptureFixture[str]):
    for command in ("train", "export"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert not exit_.value.code
        text = capsys.readouterr().out
        assert f"magistral-jax {command}" in text
        assert "--batch.group_size" in text
        assert "--policy.path" in text


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sound model folder with the byte tokenizer."""
    config = ModelConfig(
        vocab_size=264, d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8, max_positions=256
    )
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {}
    for entry in tensor_table(config):
        tree = params
        for key in entry.path[:-1]:
            tree = tree.setdefault(key, {})
        shape = (1, *entry.shape) if entry.is_stacked else entry.shape
        tree[entry.path[-1]] = rng.normal(size=shape).astype(np.float32)
    save_folder(tmp_path / "model", params, config, model_type="mistral")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def problems(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2", "answer": "3"}\n')
    return path


@pytest.fixture
def held_out(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"problem": "2 + 2", "answer": "4"}\n')
    return path


@pytest.fixture
def mistake(
    tmp_path: pathlib.Path,
    model: pathlib.Path,
    problems: pathlib.Path,
    held_out: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs `train` with something wrong: exit code 2, one sentence, and nothing written anywhere."""

    def run(*flags: str) -> str:
        usual = {
            "policy.path": model,
            "data.train": problems,
            "data.evaluation": held_out,
            "data.system_prompt": "none",
            "generation.max_prompt_tokens": 16,
            "generation.max_new_tokens": 16,
            "run.folder": tmp_path / "run",
        }
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            main(["train", *(f"--{name}={value}" for name, value in usual.items()), *flags])
        assert exit_.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (sentence,) = output.err.splitlines()
        assert sentence.startswith("error: ")
        assert snapshot(tmp_path) == before
        return sentence

    return run


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["trian", "configs/quickstart.toml"])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: unknown command `trian`; expected one of train, ")
    assert all(command in sentence for command in COMMANDS)


def test_the_process_ends_with_code_2_and_no_traceback(tmp_path: pathlib.Path):
    code = "from magistral_jax.main import main; main()"
    result = run_python("-c", code, "evaluate", f"--policy.path={tmp_path / 'none'}", "--data.evaluation=x.jsonl")
    assert result.returncode == 2
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert str(tmp_path / "none") in sentence


def test_an_unknown_setting(mistake: Callable[..., str], tmp_path: pathlib.Path):
    assert "unknown setting `loss.eps_hgih`; the nearest is `loss.eps_high`" in mistake("--loss.eps_hgih=0.3")


def test_an_unknown_setting_in_a_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.toml"
    file.write_text("[batch]\ngroup_sise = 4\n")
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(file)])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence == f"error: {file}: unknown setting `batch.group_sise`; the nearest is `batch.group_size`."


def test_a_missing_model_folder(mistake: Callable[..., str], tmp_path: pathlib.Path):
    assert str(tmp_path / "none" / "config.json") in mistake(f"--policy.path={tmp_path / 'none'}")


def test_no_model_at_all(mistake: Callable[..., str]):
    assert "`policy.path` is empty" in mistake("--policy.path=")


def test_a_missing_weights_file(mistake: Callable[..., str], model: pathlib.Path):
    (model / "model.safetensors").unlink()
    assert "no weights there; expected model.safetensors" in mistake()


def test_a_truncated_safetensors_file(mistake: Callable[..., str], model: pathlib.Path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: truncated or damaged" in mistake()


def test_a_tokenizer_that_is_larger_than_the_vocabulary(mistake: Callable[..., str], model: pathlib.Path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    sentence = mistake()
    assert "the tokenizer has ids up to 263, the model's vocab_size is 100" in sentence


def test_a_broken_line(mistake: Callable[..., str], problems: pathlib.Path):
    problems.write_text(problems.read_text() + '{"problem": "1 + 3", "ans\n')
    assert f"{problems}, line 3: not valid JSON" in mistake()


def test_a_row_without_an_answer(mistake: Callable[..., str], held_out: pathlib.Path):
    held_out.write_text('{"problem": "1 + 3", "answer": "4"}\n{"problem": "1 + 4"}\n')
    assert f"{held_out}, line 2: no answer" in mistake("--data.num_evaluation=0")


def test_a_prompt_longer_than_the_limit(mistake: Callable[..., str], problems: pathlib.Path):
    problems.write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "' + "1 + " * 9 + '1", "answer": "10"}\n')
    sentence = mistake()
    assert "problem problems:2: its prompt has 39 tokens, the limit is 16 (generation.max_prompt_tokens)" in sentence


def test_a_disk_that_is_full_of_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def write_too_much(config: Any) -> None:
        with pathlib.Path("/dev/full").open("w") as file:
            file.write("x")

    monkeypatch.setattr("magistral_jax.main._command", lambda name: write_too_much)
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: the disk is full ([Errno 28]")


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("magistral_jax.main._command", lambda name: interrupt)
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_settings_that_disagree(mistake: Callable[..., str]):
    sentence = mistake("--batch.batch_size=12", "--batch.group_size=8")
    assert "`batch.batch_size` (12) must be a multiple of `batch.group_size` (8)" in sentence


def test_a_model_that_is_too_short(mistake: Callable[..., str]):
    sentence = mistake("--generation.max_new_tokens=400")
    assert "exceed the 256 positions of the model" in sentence


def test_a_corrected_command_can_be_given_again(mistake: Callable[..., str], tmp_path: pathlib.Path):
    # The mistake has left no folder behind that "holds a run already".
    first = mistake("--policy.path=nowhere")
    assert mistake("--policy.path=nowhere") == first
    assert not (tmp_path / "run").exists()
