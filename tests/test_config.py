"""Configuration: one set of names, one kind of error, and the last word wins."""

import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from magistral_jax.checks import INTERVALS, check
from magistral_jax.config import FIELD_TYPES, Config, config_from_json, dump, load
from magistral_jax.records import MagistralError


def write(folder: pathlib.Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


def error_of(argv: list[str]) -> str:
    with pytest.raises(MagistralError) as caught:
        load(argv)
    return str(caught.value)


def replace(section: str, **values: Any) -> Config:
    """The default configuration but for `values` in one section."""
    config = Config()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_no_arguments_give_the_defaults():
    assert load([]) == Config()


def test_file_then_flags_the_last_wins(tmp_path: pathlib.Path):
    file = write(tmp_path, 'seed = 3\n[loss]\neps_high = 0.3\nadvantage = "group"\n[run]\ntensorboard = false')
    config = load([file, "--loss.eps-high=0.1", "--loss.eps_high=0.26", "--seed", "5"])
    assert config.loss.eps_high == 0.26
    assert config.loss.advantage == "group"
    assert config.run.seed == 5
    assert config.run.tensorboard is False


@pytest.mark.parametrize("flag", ["--resume", "--resume=true", "--run.resume=True", "--run.resume", "--resume=TRUE"])
def test_a_switch_is_read_in_every_spelling(flag: str):
    assert load([flag]).run.resume is True


def test_values_may_begin_with_a_dash_or_be_empty():
    config = load(["--data.train=--odd name", "--policy.path=", "--optimizer.weight_decay", "-1"])
    assert (config.data.train, config.policy.path, config.optimizer.weight_decay) == ("--odd name", "", -1.0)


@pytest.mark.parametrize(
    ("toml", "flag", "message"),
    [
        ("[loss]\neps_hi = 0.3", "--loss.eps_hi=0.3", "unknown setting `loss.eps_hi`; the nearest is `loss.eps_high`."),
        (
            "[loss]\nlearning_rate = 1.0",
            "--loss.learning_rate=1.0",
            "unknown setting `loss.learning_rate`; the nearest is `optimizer.learning_rate`.",
        ),
        ("[loss.eps]\nlow = 1", "--loss.eps.low=1", "unknown setting `loss.eps.low`; the nearest is `loss.eps_low`."),
        ("sed = 1", "--sed=1", "unknown setting `sed`; the nearest is `run.seed`."),
        ("[run]\nseed = 'zero'", "--run.seed=zero", "`run.seed` must be a whole number, not `zero`."),
        (
            "[batch]\nbatch_size = 3.5",
            "--batch.batch-size=3.5",
            "`batch.batch_size` must be a whole number, not `3.5`.",
        ),
        ("[loss]\neps_low = 'x'", "--loss.eps_low=x", "`loss.eps_low` must be a number, not `x`."),
        ("[run]\nwandb = 'perhaps'", "--wandb=perhaps", "`run.wandb` must be true or false, not `perhaps`."),
        ("[data]\ntrain = []", "--data.train", "`data.train` must be a text, not nothing."),
        (
            "[loss]\nadvantage = 'batch'",
            "--loss.advantage=batch",
            "`loss.advantage` must be one of `minibatch`, `group`, `none`, not `batch`.",
        ),
    ],
)
def test_the_same_mistake_gives_the_same_sentence_from_file_and_flag(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], toml: str, flag: str, message: str
):
    file = write(tmp_path, toml)
    assert error_of([file]) == f"{file}: {message}"
    assert error_of(["--run.seed=1", flag]) == f"command line: {message}"
    assert capsys.readouterr() == ("", "")


def test_a_bad_value_in_the_file_is_found_beside_good_flags(tmp_path: pathlib.Path):
    file = write(tmp_path, "[loss]\neps_low = 0.1\n[batch]\ngroup_size = 'many'")
    assert error_of([file, "--loss.eps_low=0.2"]) == f"{file}: `batch.group_size` must be a whole number, not `many`."


def test_missing_file_and_broken_toml_say_where(tmp_path: pathlib.Path):
    missing = str(tmp_path / "absent.toml")
    assert error_of([missing]) == f"{missing}: cannot read the configuration: No such file or directory."
    broken = write(tmp_path, "[loss]\neps_low = \n")
    assert "not valid TOML" in error_of([broken])
    assert "line 2" in error_of([broken])
    assert "cannot read the configuration" in error_of([str(tmp_path)])


def test_a_word_in_the_wrong_place_is_refused():
    assert error_of(["--seed=3", "run.toml"]).startswith("command line: cannot place `run.toml`")


def test_dump_and_read_back_are_inverse(tmp_path: pathlib.Path):
    file = write(tmp_path, "[optimizer]\nlearning_rate = 1.2345678901234567e-7\n[data]\ntrain = '-é \"x\"'")
    config = load([file, "--resume"])
    assert config_from_json(dump(config)) == config
    assert config.optimizer.learning_rate == 1.2345678901234567e-7
    with pytest.raises(MagistralError, match=r"config\.json: unknown setting `loss\.gone`"):
        config_from_json('{"loss": {"gone": 1}}')
    with pytest.raises(MagistralError, match="not valid JSON"):
        config_from_json(dump(config)[:40])


def test_defaults_pass_the_check_without_warning():
    assert check(Config()) == []


def test_every_number_has_an_interval_and_every_interval_a_number():
    assert {name for name, kind in FIELD_TYPES.items() if kind in (int, float)} == set(INTERVALS)


@pytest.mark.parametrize(
    ("section", "values", "names"),
    [
        ("loss", {"eps_low": 1.0}, ["loss.eps_low", "[0, 1)"]),
        ("loss", {"eps_high": float("nan")}, ["loss.eps_high", "nan"]),
        ("optimizer", {"learning_rate": float("inf")}, ["optimizer.learning_rate"]),
        ("optimizer", {"eps": 0.0}, ["optimizer.eps", "(0, inf)"]),
        ("generation", {"temperature": -0.1}, ["generation.temperature"]),
        ("generation", {"top_p": 0.0}, ["generation.top_p"]),
        ("sft", {"thorough_share": 1.5}, ["sft.thorough_share"]),
        ("batch", {"group_size": 1}, ["batch.group_size"]),
        ("verifiers", {"num_workers": 0}, ["verifiers.num_workers"]),
        ("batch", {"group_size": 7}, ["batch.batch_size", "batch.group_size"]),
        ("batch", {"minibatch_size": 96}, ["batch.batch_size", "batch.minibatch_size"]),
        ("batch", {"minibatch_size": 4}, ["batch.minibatch_size", "batch.group_size"]),
        (
            "batch",
            {"row_tokens": 511},
            ["max_prompt_tokens", "max_new_tokens", "batch.row_tokens"],
        ),
        ("generation", {"num_generators": 2}, ["generation.num_generators", "generation.where", "thread"]),
        ("generation", {"devices": "0"}, ["generation.devices", "generation.where", "thread"]),
        ("generation", {"plane": "tcp"}, ["generation.plane", "auto", "thread"]),
        ("generation", {"plane": "shared_memory", "where": "remote"}, ["generation.plane", "remote"]),
        ("generation", {"where": "remote", "listen": "0.0.0.0:1"}, ["generation.token_file", "generation.listen"]),
        (
            "generation",
            {"where": "remote", "listen": "0.0.0.0:1", "token_file": "token", "plane": "transfer"},
            ["generation.listen", "generation.plane", "transfer"],
        ),
        ("generation", {"listen": "here"}, ["`here` is no address"]),
        ("generation", {"num_pages": 32}, ["generation.num_pages", "generation.page_size", "33"]),
        ("reward", {"length_cache": 257}, ["reward.length_cache", "generation.max_new_tokens"]),
        ("reward", {"length_cache": 101, "max_length": 100}, ["reward.length_cache", "reward.max_length"]),
        ("schedule", {"num_async": 300}, ["schedule.num_async", "batch.group_size"]),
        ("data", {"train": "reasoning-gym:chain_sum"}, ["data.num_train", "data.train"]),
        (
            "data",
            {"evaluation": "reasoning-gym:chain_sum", "num_evaluation": 0},
            ["data.num_evaluation", "data.evaluation"],
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(section: str, values: dict[str, Any], names: list[str]):
    with pytest.raises(MagistralError) as caught:
        check(replace(section, **values))
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize(
    ("section", "values", "name"),
    [
        ("schedule", {"num_async": 520}, "schedule.num_async"),
        ("batch", {"minibatch_size": 128}, "batch.minibatch_size"),
        ("generation", {"temperature": 0.0}, "generation.temperature"),
        ("reward", {"max_length": 257}, "reward.max_length"),
    ],
)
def test_unsound_choices_are_warned_of(section: str, values: dict[str, Any], name: str):
    (warning,) = check(replace(section, **values))
    assert name in warning


def test_help_names_every_setting_and_imports_no_jax():
    program = (
        "import sys; from magistral_jax.config import load\n"
        "try: load(['--help'], prog='magistral-jax train')\n"
        "finally: assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert all(f"--{name} " in done.stdout for name in FIELD_TYPES)
    assert "Completions of a prompt (G)." in done.stdout
