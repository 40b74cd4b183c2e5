"""`magistral-jax recipe FILE`: the variants of a recipe over several seeds, step by step, and one table of them."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from magistral_jax.checks import check
from magistral_jax.commands.evaluate import measure_policy
from magistral_jax.commands.recipe_file import Recipe, read_recipe
from magistral_jax.commands.recipe_steps import StepStoppedError, do_step, seconds_of
from magistral_jax.commands.setup import load_evaluation_problems, load_model, load_prompts, make_sampler, say
from magistral_jax.config import Config, load
from magistral_jax.metrics import replace_text
from magistral_jax.records import MagistralError
from magistral_jax.studies.variants import Result, variant_table

EVALUATION_FILE = "evaluation_after.json"
_DESCRIPTION = """Do the steps of a recipe: each is an ordinary `traces`, `sft` or `train` in a folder of its own. Steps
that are done are not done again, and the same command goes on after Ctrl-C or a kill. At the end stands a table of all
variants and seeds that are done by then: table.md and table.json of the recipe's folder."""


def recipe(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name. Ends with code 130 where it was stopped.

    Raises:
      MagistralError: The recipe or a setting in it is wrong, or a step was done with other settings.
    """
    parser = argparse.ArgumentParser(prog="magistral-jax recipe", description=_DESCRIPTION)
    parser.add_argument("recipe", metavar="RECIPE.toml", type=pathlib.Path)
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of the runs (default: 0)")
    parser.add_argument("--folder", type=pathlib.Path, help="in the place of the recipe's own")
    args = parser.parse_args(words)
    chosen = read_recipe(args.recipe)
    if args.folder:
        chosen = dataclasses.replace(chosen, folder=args.folder)
    if unknown := set(args.variant or []) - chosen.variants.keys():
        known = ", ".join(chosen.variants)
        raise MagistralError(f"{args.recipe}: has no variant `{min(unknown)}`; expected one of {known}.")
    lasts = [last for name, last in chosen.variants.items() if name in (args.variant or chosen.variants)]
    try:
        do_steps(chosen, lasts, args.seeds)
    except StepStoppedError:
        say("stopped; the same command goes on")
        sys.exit(130)
    sys.stdout.write(write_table(chosen))


def do_steps(chosen: Recipe, lasts: Sequence[str], seeds: Sequence[int]) -> None:
    """Every step up to the last ones, each once, and the scores of these."""
    steps = {
        chosen.place(step, seed): (step, seed) for seed in seeds for last in lasts for step in chosen.steps_to(last)
    }
    configs = {folder: config_of(chosen, *which) for folder, which in steps.items()}  # all mistakes before the first
    for folder, (name, _) in steps.items():
        if name in lasts and not configs[folder].data.evaluation:
            raise MagistralError(f"step {name}: `data.evaluation` is empty; expected problems to measure it on.")
    for number, (folder, (name, seed)) in enumerate(steps.items(), 1):
        step = chosen.steps[name]
        say(f"step {number} of {len(steps)}: {step.command} in {folder}")
        do_step(step.command, configs[folder], folder, needs=[chosen.place(need, seed) for need in step.needs])
        if name in lasts:
            measure(configs[folder], folder)


def config_of(chosen: Recipe, name: str, seed: int) -> Config:
    """Settings of a step, checked.

    Raises:
      MagistralError: They are wrong; the sentence names the step.
    """
    command, *words = chosen.command_line(name, seed)
    try:
        config = load(words, prog=f"magistral-jax {command}")
        check(config)
    except MagistralError as error:
        raise MagistralError(f"step {name}: {error}") from error
    if config.distributed.coordinator:
        raise MagistralError(
            f"step {name}: `distributed.coordinator` is {config.distributed.coordinator}, but a recipe runs in one "
            f"process; expected it empty (a trainer of several runs each step by `magistral-jax {command}`)."
        )
    return config


def measure(config: Config, folder: pathlib.Path) -> None:
    """Scores of the policy of a step, unless it has measured them itself."""
    if (folder / EVALUATION_FILE).exists():
        return
    policy = dataclasses.replace(config.policy, path=str(folder / "policy"), random_init=False)
    config = dataclasses.replace(config, policy=policy)
    model = load_model(config)
    prompts = load_prompts(config, model.tokenizer, load_evaluation_problems(config))
    measure_policy(config, folder, model, make_sampler(config, model), prompts, "after")


def write_table(chosen: Recipe) -> str:
    """`table.md` and `table.json` of all variants and seeds in the recipe's folder that are done; returns the text."""
    found = sorted(int(path.name[4:]) for path in chosen.folder.glob("seed*") if path.name[4:].isdigit())
    results, shared = [], {}
    for variant, last in chosen.variants.items():
        for seed in found if chosen.steps[last].per_seed else [0]:
            path = chosen.place(last, seed) / EVALUATION_FILE
            if path.exists():
                seconds = {step: seconds_of(chosen.place(step, seed)) for step in chosen.steps_to(last)}
                own = {step: taken for step, taken in seconds.items() if chosen.steps[step].per_seed or step == last}
                shared |= {step: taken for step, taken in seconds.items() if not chosen.steps[step].per_seed}
                results.append(Result(variant, seed, json.loads(path.read_text(encoding="utf-8")), sum(own.values())))
    text = variant_table(results)
    if shared:
        text += f"\nShared by all seeds: {', '.join(f'{step} {taken:.0f} s' for step, taken in shared.items())}.\n"
    replace_text(chosen.folder / "table.md", text)
    rows = {"results": [dataclasses.asdict(result) for result in results], "shared_seconds": shared}
    replace_text(chosen.folder / "table.json", json.dumps(rows, indent=2) + "\n")
    return text
