"""Settings of problem sources and prompts."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how they are put to the policy."""

    train: str = ""
    """Problems to train on: a JSONL or Parquet file, a local Hugging Face dataset folder (`FOLDER?split=NAME`),
    `reasoning-gym:NAME?key=value&…`, or `templated:sums?language=fr,de&…` (docs/languages.md)."""
    mixture: tuple[str, ...] = ()
    """In the place of `train`: several sources with their shares, each as `WEIGHT SOURCE`, like `0.7 math.jsonl`."""
    evaluation: str = ""
    """Held-out problems, likewise."""
    num_train: int = 0
    """Problems taken from the training source, or from each of a mixture; 0 is all (a generated source needs a
    number)."""
    num_evaluation: int = 100
    """Problems of an evaluation; 0 is all."""
    system_prompt: Literal["auto", "none", "math", "code"] = "auto"
    """Instructions before the problem (report Fig. 2, own wording); `auto` takes those for the problem's own kind."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt longer than `generation.max_prompt_tokens`: stop and name it, or drop and count it."""
    max_statement: int = 100_000
    """Longest statement in characters; a row with a longer one is bad. 0 is no limit."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that is malformed, or has the id of an earlier one: stop and name it, or drop and count it."""
    keep_out: tuple[str, ...] = ()
    """Further files of problems that must not be trained on, beside `evaluation`."""
    overlap: float = 0.0
    """Share of the 8-word sequences of a held-out problem from which a training problem that has them is left out; 0
    compares whole statements only. 0.5 is usual."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Training problems of equal statement, or nearly so (`similarity`)."""
    similarity: float = 0.0
    """Jaccard similarity of 4-word sequences from which two training problems with the same numbers in them are
    duplicates; 0 means equal statements only. 0.8 is usual."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Decoding of evaluations (report §5.1)."""

    temperature: float = 0.7
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus mass: 1.0 for math, 0.95 for code."""
    num_samples: int = 8
    """Completions of a problem: pass@1 is their mean, maj@k is over k of them."""
    by: str = ""
    """Column of the problems, such as `language`, for each of whose values `evaluate` gives the scores as well."""


@dataclasses.dataclass(frozen=True)
class TracesConfig:
    """Traces of a teacher, which is `policy.path`, on the problems of `data.train` (report §5.3)."""

    num_samples: int = 8
    """Completions of a problem."""
    max_per_problem: int = 2
    """Most traces of a problem."""
    num: int = 0
    """Traces in all, balanced over languages and lengths; 0 keeps every right one up to `max_per_problem`."""
    chunk: int = 64
    """Problems that are sampled between two saves; a kill costs at most as many."""


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Stages of a run (report §5.2), and pools of problems that follow the policy (docs/curriculum.md)."""

    stages: tuple[str, ...] = ()
    """In a file `[[curriculum.stages]]`, a table each, with `name` and any of `max_length`, `length_cache`,
    `batch_size`, `minibatch_size`, `num_async`, `difficulty`, `mixture`, `num_steps`, `until_pass_rate`,
    `until_growth`, `window`; as one setting each is a JSON object. Empty: one stage, and all problems."""
    begin: str = ""
    """Stage to start with, and with `--resume` to go over to by hand; empty: the first, or the one that it is in."""
    refresh_steps: int = 10
    """Steps of a stage after which its pool is drawn anew by the running pass rates; 0 draws only where one begins."""
    newest_weight: float = 0.5
    """Weight of a problem's newest group in its running pass rate; 1 forgets all before it."""
