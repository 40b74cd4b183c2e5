"""`magistral-jax simulate` from the command line to its files."""

import json
import pathlib
import subprocess
import sys

import pytest

from magistral_jax.config import Config, dump
from magistral_jax.main import main

SETTINGS = """
[generation]
num_slots = 4
max_new_tokens = 60
max_prompt_tokens = 20
[batch]
group_size = 2
batch_size = 8
row_tokens = 128
[schedule]
num_steps = 4
num_async = 16
"""


@pytest.fixture
def config(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(SETTINGS)
    return str(path)


def test_a_run_is_described_compared_dealt_out_and_drawn(
    config: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = [config, "--lengths=lognormal:mean=30,sigma=1", "--cost.train_seconds=0.5", "--filtered", "0.1"]
    main(["simulate", *words, "--modes=2", "--devices=3", f"--out={out}", "--schedule.max-staleness=3"])
    text = capsys.readouterr().out
    for word in ("4 steps", "steps/hour", "generators  ", "trainers", "staleness", "closed by in flight"):
        assert word in text
    assert "\nsynchronous " in text
    assert "\nasynchronous, 2 minibatches " in text
    assert "best: " in text
    record = json.loads((out / "simulation.json").read_text())
    assert record["rules"]["max_staleness"] == 3
    assert record["costs"]["train_seconds"] == 0.5
    assert len(record["steps"]) == record["summary"]["steps"] == 4
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "timeline.svg").read_text()
    assert svg.count("<path") > 20


def test_a_run_folder_is_predicted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(dump(Config()))
    rows = [
        {
            "step": step,
            "step_seconds": 10.0,
            "train_seconds": 8.0,
            "sampled_tokens_per_second": 500.0,
            "tokens_per_second": 400.0,
            "in_flight": 64.0,
        }
        for step in range(1, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = json.dumps({"step": 1, "completion_tokens": 9, "prompt_tokens": 6})
    (tmp_path / "rollouts.jsonl").write_text(line + "\n")
    config = json.loads(dump(Config()))
    config["schedule"]["num_steps"], config["batch"]["batch_size"] = 3, 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["simulate", str(tmp_path)])
    assert "measured 360 over 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes=2"], "expected `magistral-jax simulate CONFIG.toml`"),
        (["CONFIG", "--modes=two"], "`modes` must be a whole number, not `two`"),
        (["CONFIG", "--modes=-1"], "`modes` is -1; it is out of range"),
        (["CONFIG", "--seed"], "`--seed` needs a value"),
        (["CONFIG", "--cost.speed=1"], "unknown rate `speed`"),
        (["CONFIG", "--filtered=1"], "`filtered` is 1; it is out of range"),
        (["CONFIG", "--devices=1"], "a generator takes 1, and the trainer needs one"),
        (["CONFIG", "--schedule.num_step=1"], "unknown setting `schedule.num_step`"),
        (["CONFIG", "--rates=nowhere.toml"], "cannot read the rates"),
        (["."], "config.json is missing"),
        (["nowhere.toml"], "cannot read the configuration"),
    ],
)
def test_a_mistake_is_one_sentence(
    config: str,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SystemExit) as end:
        main(["simulate", *(config if word == "CONFIG" else word for word in words)])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_help_and_simulation_import_no_jax(config: str):
    code = (
        "import sys; from magistral_jax.main import main; main(['simulate', sys.argv[1]]); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code, config], check=False, timeout=120).returncode == 0
