"""A recipe: steps that build on one another, and which of them make a variant; in: a TOML file, out: command lines.

    folder = "runs/small"                 # each step has a folder of its own in it

    [settings]                            # of every step
    data.train = "train.jsonl"

    [steps.traces]
    command = "traces"
    policy.path = "runs/teacher/policy"

    [steps.student]
    command = "sft"
    per_seed = true                       # once for each seed, in runs/small/seed0/student
    sft.traces = "{traces}/traces.jsonl"  # the folder of the step `traces`: what it names comes before it

    [variants]
    "SFT only" = "student"                # by the step that it ends with

Whatever is not `command`, `config` or `per_seed` is a setting of the command, as in any configuration.
"""

import dataclasses
import graphlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from magistral_jax.config import flatten
from magistral_jax.records import MagistralError
from magistral_jax.toml_file import read_toml

_REFERENCE = re.compile(r"\{(\w+)\}")
_COMMANDS = ("sft", "traces", "train")


@dataclasses.dataclass(frozen=True)
class Step:
    """One command with its settings."""

    command: str
    per_seed: bool
    words: tuple[str, ...]
    """As on a command line; `{name}` stands for the folder of another step."""

    @property
    def needs(self) -> list[str]:
        """Steps that its settings name."""
        return [name for word in self.words for name in _REFERENCE.findall(word)]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    folder: pathlib.Path
    steps: Mapping[str, Step]
    variants: Mapping[str, str]
    """The last step of each."""

    def place(self, name: str, seed: int) -> pathlib.Path:
        """Folder of a step."""
        return self.folder / f"seed{seed}" / name if self.steps[name].per_seed else self.folder / name

    def command_line(self, name: str, seed: int) -> list[str]:
        """Command of a step and its words; a step that all seeds share has the seed of its own settings."""
        step = self.steps[name]
        words = [_REFERENCE.sub(lambda found: str(self.place(found[1], seed)), word) for word in step.words]
        own = [f"--run.seed={seed}"] if step.per_seed else []
        return [step.command, *words, *own, f"--run.folder={self.place(name, seed)}"]

    def steps_to(self, name: str) -> list[str]:
        """All steps that a step needs, in order, and the step itself."""
        before = [each for need in self.steps[name].needs for each in self.steps_to(need)]
        return list(dict.fromkeys([*before, name]))


def read_recipe(path: pathlib.Path) -> Recipe:
    """Read a recipe.

    Raises:
      MagistralError: The file cannot be read, or says something that no recipe can; the sentence names the place.
    """
    table = read_toml(path, "recipe")
    if wrong := table.keys() - {"folder", "settings", "steps", "variants"}:
        raise MagistralError(f"{path}: unknown `{min(wrong)}`; a recipe has folder, settings, steps and variants.")
    if not isinstance(folder := table.get("folder"), str):
        raise MagistralError(f"{path}: `folder` is missing; expected the path of a folder for all runs of the recipe.")
    shared = list(_words(_table(table, "settings", path)))
    sections = _table(table, "steps", path)
    steps = {name: _read_step(_table(sections, name, path), f"{path}, step {name}", shared) for name in sections}
    recipe = Recipe(pathlib.Path(folder), steps, _table(table, "variants", path))
    _check(recipe, path)
    return recipe


def _table(parent: Mapping[str, Any], name: str, path: pathlib.Path) -> dict[str, Any]:
    table = parent.get(name, {})
    if not isinstance(table, dict):
        raise MagistralError(f"{path}: `{name}` is `{table}`; expected a table.")
    return table


def _read_step(table: dict[str, Any], place: str, shared: list[str]) -> Step:
    command, config, per_seed = (table.pop(key, default) for key, default in _STEP_KEYS.items())
    if command not in _COMMANDS:
        raise MagistralError(f"{place}: `command` is `{command}`; expected one of {', '.join(_COMMANDS)}.")
    if not isinstance(per_seed, bool) or not isinstance(config, str):
        raise MagistralError(f"{place}: expected a text in `config`, and true or false in `per_seed`.")
    return Step(command, per_seed, ((config,) if config else ()) + (*shared, *_words(table)))


_STEP_KEYS = {"command": "", "config": "", "per_seed": False}


def _words(table: Mapping[str, Any]) -> Iterator[str]:
    """Settings as on a command line."""
    for name, values in flatten(table):
        yield from (f"--{name}={values[0]}",) if len(values) == 1 else (f"--{name}", *values)


def _check(recipe: Recipe, path: pathlib.Path) -> None:
    """Refuse names of steps that do not exist, circles, and what a variant cannot end with."""
    known = ", ".join(recipe.steps)
    for name, step in recipe.steps.items():
        for need in step.needs:
            if need not in recipe.steps:
                raise MagistralError(f"{path}, step {name}: `{{{need}}}` is no step; expected one of {known}.")
            if recipe.steps[need].per_seed and not step.per_seed:
                raise MagistralError(
                    f"{path}, step {name}: is made once, but needs `{need}`, which has a run for each seed; expected "
                    "`per_seed = true`."
                )
    try:
        graphlib.TopologicalSorter({name: step.needs for name, step in recipe.steps.items()}).prepare()
    except graphlib.CycleError as error:
        raise MagistralError(f"{path}: the steps {' > '.join(error.args[1])} wait for one another.") from None
    if not recipe.variants:
        raise MagistralError(f"{path}: `variants` is missing; expected names, each with the step that it ends with.")
    for variant, last in recipe.variants.items():
        if last not in recipe.steps:
            raise MagistralError(f"{path}: the variant {variant} ends with `{last}`; expected one of {known}.")
        if recipe.steps[last].command == "traces":
            raise MagistralError(f"{path}: the variant {variant} ends with `{last}`, from which no policy comes.")
