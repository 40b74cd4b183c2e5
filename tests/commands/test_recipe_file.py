"""What a recipe file means, and what is said about one that means nothing."""

import pathlib

import pytest

from magistral_jax.commands.recipe_file import read_recipe
from magistral_jax.records import MagistralError

GOOD = """
folder = "runs"
[settings]
data.train = "sums.jsonl"
data.mixture = ["0.5 a.jsonl", "0.5 b.jsonl"]
[steps.traces]
command = "traces"
policy.path = "teacher"
[steps.sft]
command = "sft"
config = "sft.toml"
per_seed = true
sft.traces = "{traces}/traces.jsonl"
data.train = ""
[steps.rl]
command = "train"
per_seed = true
policy.path = "{sft}/policy"
run.tensorboard = false
[variants]
"SFT + RL" = "rl"
"""


def read(tmp_path: pathlib.Path, text: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read_recipe(path)


def test_a_step_is_a_command_line(tmp_path: pathlib.Path):
    recipe = read(tmp_path, GOOD)
    assert recipe.command_line("sft", 3) == [
        "sft",
        "sft.toml",
        "--data.train=sums.jsonl",  # of all steps, and what is the step's own comes after it
        "--data.mixture",
        "0.5 a.jsonl",
        "0.5 b.jsonl",
        "--sft.traces=runs/traces/traces.jsonl",
        "--data.train=",
        "--run.seed=3",
        "--run.folder=runs/seed3/sft",
    ]
    assert recipe.command_line("traces", 3)[-2:] == ["--policy.path=teacher", "--run.folder=runs/traces"]
    assert recipe.command_line("rl", 0)[-4:-1] == [
        "--policy.path=runs/seed0/sft/policy",
        "--run.tensorboard=False",
        "--run.seed=0",
    ]


def test_a_step_comes_after_those_that_it_names(tmp_path: pathlib.Path):
    recipe = read(tmp_path, GOOD)
    assert recipe.steps_to("rl") == ["traces", "sft", "rl"]
    assert recipe.steps_to("traces") == ["traces"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('folder = "runs"', "", "`folder` is missing"),
        ("[settings]", "[setings]", "unknown `setings`; a recipe has folder, settings, steps and variants"),
        ('command = "sft"', 'command = "evaluate"', "step sft: `command` is `evaluate`; expected one of sft, traces"),
        ("per_seed = true", 'per_seed = "yes"', "step sft: expected a text in `config`, and true or false"),
        ("{traces}", "{trace}", "step sft: `{trace}` is no step; expected one of traces, sft, rl"),
        ('"teacher"', '"{traces}"', "the steps traces > traces wait for one another"),
        ('"teacher"', '"{rl}/policy"', "step traces: is made once, but needs `rl`, which has a run for each seed"),
        ('= "rl"', '= "ppo"', "the variant SFT + RL ends with `ppo`; expected one of traces, sft, rl"),
        ('= "rl"', '= "traces"', "ends with `traces`, from which no policy comes"),
        ('"SFT + RL" = "rl"', "", "`variants` is missing"),
        ("[steps.rl]", "[steps.rl", "not valid TOML"),
    ],
)
def test_mistakes_are_named(old: str, new: str, sentence: str, tmp_path: pathlib.Path):
    assert old in GOOD
    with pytest.raises(MagistralError, match=r"recipe\.toml") as error:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert sentence in str(error.value)


def test_a_file_that_is_not_there(tmp_path: pathlib.Path):
    with pytest.raises(MagistralError, match=r"none\.toml: cannot read the recipe: No such file"):
        read_recipe(tmp_path / "none.toml")


def test_the_recipe_that_is_shipped_has_the_reports_three_variants():
    recipe = read_recipe(pathlib.Path(__file__).parents[2] / "configs/small_laptop.toml")
    assert {"SFT", "RL", "SFT + RL"} <= recipe.variants.keys()
    assert recipe.steps_to(recipe.variants["SFT + RL"]) == ["teacher", "traces", "sft", "sft_rl"]
