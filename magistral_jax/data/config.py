"""Settings of problem sources and prompts."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how they are put to the policy."""

    train: str = ""
    """Problems to train on: a JSONL or Parquet file, or `reasoning-gym:NAME?key=value&…`."""
    evaluation: str = ""
    """Held-out problems, likewise."""
    num_train: int = 0
    """Problems taken from the training source; 0 is all (a generated source needs a number)."""
    num_evaluation: int = 100
    """Problems of an evaluation; 0 is all."""
    system_prompt: Literal["auto", "none", "math", "code"] = "auto"
    """Instructions before the problem (report Fig. 2, own wording); `auto` takes those for the problem's own kind."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt longer than `generation.max_prompt_tokens`: stop and name it, or drop and count it."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Decoding of evaluations (report §5.1)."""

    temperature: float = 0.7
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus mass: 1.0 for math, 0.95 for code."""
    num_samples: int = 8
    """Completions of a problem: pass@1 is their mean, maj@k is over k of them."""
