"""A curriculum as data: its table of stages, read and checked, and what the report says of such tables (§5.2).

In a TOML file a stage is a table, `[[curriculum.stages]]`; as one setting, on the command line and in a run's
`config.json`, it is the same table as a JSON object. What a stage leaves out is the run's own setting.
"""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.records import MagistralError

STAGES_FILE = "stages.json"
"""Of a run folder: its table of stages, for the report."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum."""

    name: str
    max_length: int
    """l_max of Eq. 1 in completion tokens, and the sampling limit of what the stage dispatches."""
    length_cache: int
    """l_cache of Eq. 1 in tokens."""
    batch_size: int
    """n_batch: sequences per publish."""
    minibatch_size: int
    """n_minibatch: sequences per gradient step."""
    num_async: int
    """n_async: sequences in flight."""
    difficulty: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest running pass rate of the problems in its pool; one whose rate is unknown is in."""
    mixture: tuple[str, ...] = ()
    """Sources with their shares, as in `data.mixture`; empty: the run's own."""
    num_steps: int = 0
    """Steps after which it ends; 0 is no limit."""
    until_pass_rate: float = 0.0
    """It ends earlier once the mean pass rate over `window` steps is this; 0 is off."""
    until_growth: float = 0.0
    """It ends earlier once mean length grows by less than this share from one `window` to the next; 0 is off."""
    window: int = 10
    """Steps."""

    @property
    def free_length(self) -> int:
        """l_max − l_cache: tokens up to which a completion has no length penalty."""
        return self.max_length - self.length_cache

    @property
    def has_end(self) -> bool:
        """Whether it ends by a rule of its own."""
        return bool(self.num_steps or self.until_pass_rate or self.until_growth)


def read_stages(texts: Sequence[str], run: Stage, *, group_size: int) -> tuple[Stage, ...]:
    """The stages of a curriculum.

    Args:
      texts: Each a JSON object with `name` and any of the other fields of `Stage`.
      run: The run's own settings, for what a stage leaves out; its `max_length` is the longest that there may be.
      group_size: Completions of a group.

    Raises:
      MagistralError: Names the stage and the field that is unknown, of the wrong kind, or out of its range.
    """
    stages = tuple(_read(text, number, run) for number, text in enumerate(texts, 1))
    names = [stage.name for stage in stages]
    for stage in stages:
        _check(stage, run, group_size)
        if names.count(stage.name) > 1:
            raise MagistralError(f"curriculum: there are two stages of the name `{stage.name}`; expected one of each.")
    if stages and stages[-1].has_end:
        raise MagistralError(
            f"curriculum: the last stage, `{stages[-1].name}`, must have no `num_steps` and no `until_…`: it lasts "
            "until `schedule.num_steps`."
        )
    return stages


def departures(stages: Sequence[Stage]) -> list[str]:
    """Where a table departs from the report's three invariants; one sentence each.

    Source: Magistral (arXiv:2506.10910), section 5.2: data gets harder, l_max − l_cache grows, batches shrink.
    """
    found = []
    for before, after in itertools.pairwise(stages):
        where = f"curriculum: from stage `{before.name}` to `{after.name}`"
        if any(now > then for then, now in zip(before.difficulty, after.difficulty, strict=True)):
            found.append(
                f"{where} problems get easier (`difficulty` {_window(before)} to {_window(after)}); in the report they "
                "get harder (§5.2)."
            )
        if after.free_length < before.free_length:
            found.append(
                f"{where} `max_length` − `length_cache` shrinks ({before.free_length} to {after.free_length}); in the "
                "report it grows (§5.2)."
            )
        for field in ("batch_size", "minibatch_size"):
            then, now = getattr(before, field), getattr(after, field)
            if now > then:
                found.append(f"{where} `{field}` grows ({then} to {now}); in the report it shrinks (§5.2).")
    return found


def _window(stage: Stage) -> str:
    return "[{:g}, {:g}]".format(*stage.difficulty)


_FIELDS = {field.name: field for field in dataclasses.fields(Stage)}
_INHERITED = ("max_length", "length_cache", "batch_size", "minibatch_size", "num_async")
_KINDS: Mapping[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
}


def _read(text: str, number: int, run: Stage) -> Stage:
    try:
        table = json.loads(text)
    except json.JSONDecodeError:
        table = None
    if not isinstance(table, dict):
        raise MagistralError(f"curriculum: stage {number} is `{text}`; expected a table, as a JSON object.")
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise MagistralError(f"curriculum: stage {number} has no `name`; expected a text.")
    values: dict[str, Any] = {key: getattr(run, key) for key in _INHERITED}
    for key, value in table.items():
        if key not in _FIELDS:
            nearest = max(_FIELDS, key=lambda known: difflib.SequenceMatcher(None, known, key).ratio())
            raise MagistralError(
                f"curriculum: stage `{name}` has an unknown field `{key}`; the nearest is `{nearest}`."
            )
        values[key] = _value(name, key, value)
    stage = Stage(**values)
    return stage if stage.minibatch_size else dataclasses.replace(stage, minibatch_size=stage.batch_size)


def _value(stage: str, key: str, value: Any) -> Any:
    """A field's value, as its type in `Stage`."""
    if key == "difficulty":
        is_right = isinstance(value, list) and len(value) == 2 and all(_is(number, int | float) for number in value)
        expected = "two numbers, the lowest and the highest pass rate"
    elif key == "mixture":
        is_right = isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)
        expected = "a list of texts, each a weight, a space and a source"
    else:
        kind, expected = _KINDS[_FIELDS[key].type]
        is_right = _is(value, kind)
    if not is_right:
        raise MagistralError(f"curriculum: `{key}` of stage `{stage}` is {value!r}; it must be {expected}.")
    if isinstance(value, list):
        return tuple(map(float, value)) if key == "difficulty" else tuple(value)
    return float(value) if _FIELDS[key].type is float else value


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(stage: Stage, run: Stage, group_size: int) -> None:
    low, high = stage.difficulty
    demands: Mapping[str, bool] = {
        f"`max_length` ({stage.max_length}) must lie between 1 and `generation.max_new_tokens` ({run.max_length})": (
            1 <= stage.max_length <= run.max_length
        ),
        f"`length_cache` ({stage.length_cache}) must lie between 0 and `max_length` ({stage.max_length})": (
            0 <= stage.length_cache <= stage.max_length
        ),
        f"`batch_size` ({stage.batch_size}) must be a multiple of `batch.group_size` ({group_size})": (
            stage.batch_size > 0 and stage.batch_size % group_size == 0
        ),
        f"`minibatch_size` ({stage.minibatch_size}) must be a multiple of `batch.group_size` ({group_size}) that "
        f"divides `batch_size` ({stage.batch_size})": (
            stage.minibatch_size > 0
            and stage.minibatch_size % group_size == 0
            and stage.batch_size % stage.minibatch_size == 0
        ),
        f"`num_async` ({stage.num_async}) must be a multiple of `batch.group_size` ({group_size})": (
            stage.num_async > 0 and stage.num_async % group_size == 0
        ),
        f"`difficulty` ([{low}, {high}]) must be two numbers between 0 and 1, the lower first": 0 <= low <= high <= 1,
        f"`num_steps` ({stage.num_steps}) must not be negative": stage.num_steps >= 0,
        f"`until_pass_rate` ({stage.until_pass_rate}) must lie between 0 and 1": 0 <= stage.until_pass_rate <= 1,
        f"`until_growth` ({stage.until_growth}) must be a finite share, and not negative": (
            0 <= stage.until_growth < float("inf")
        ),
        f"`window` ({stage.window}) must be at least 1": stage.window >= 1,
    }
    for demand, is_met in demands.items():
        if not is_met:
            raise MagistralError(f"curriculum: stage `{stage.name}`: {demand}.")
