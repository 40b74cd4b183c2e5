"""Host records that cross module borders, and the axis letters of every array in the package.

Nothing here imports jax: verifier workers load this module. The device-side records (Batch, TrainState,
WeightedSum) are in `pytrees`.

Axis letters, used in every jaxtyping signature:
  B rows, T tokens of a row, V vocabulary, D model width, F feed-forward width, H query heads, K key-value heads,
  E head size, L layers, G completions of a group, N rollouts, S slots, P pages of the pool, C tokens of a page,
  W pages of one slot's page table, M microbatches.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32


class MagistralError(Exception):
    """A mistake that the user can mend: printed as one sentence, exit code 2, no traceback."""


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""One task with a checkable answer.

    `answer` is the reference answer of a math problem (no `\boxed`); `extra` holds every other column of the row.
    """

    id: str
    statement: str
    answer: str
    kind: Literal["math", "code"] = "math"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem as the policy sees it: the token ids are the record, the text is for people."""

    problem: Problem
    token_ids: Int32[np.ndarray, " T"]
    text: str


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch truncation off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion as it was sampled; never re-tokenised.

    The stop token is part of `completion_ids` unless the completion was cut (`truncated`).
    `behavior_logprob` is in nats, under the weights `weight_version[t]` and the sampling temperature, before top-k
    and top-p truncation.
    """

    request_id: int
    prompt_ids: Int32[np.ndarray, " T"]
    completion_ids: Int32[np.ndarray, " N"]
    behavior_logprob: Float32[np.ndarray, " N"]
    weight_version: Int32[np.ndarray, " N"]
    truncated: bool
    engine: int = 0  # which of a run's engines sampled it, replacements counted on,
    engine_step: int = 0  # and in which of that engine's steps it ended

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


class Verdict(enum.Enum):
    """What a verifier found out. Only the first group says anything about the completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    BAD_FORMAT = "bad_format"
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    # The machinery failed, not the completion: retried, counted, never trained on.
    SANDBOX_ERROR = "sandbox_error"

    @property
    def is_infrastructure_failure(self) -> bool:
        """True where no reward may be given, because the verifier itself failed."""
        return self is Verdict.SANDBOX_ERROR


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward with every part kept beside its sum (report §2.2)."""

    verdict: Verdict
    format: float
    correctness: float
    length: float
    language: float
    path: str  # which rule decided the verdict, e.g. "string", "rational", "sympy"
    seconds: float  # time in the worker
    language_note: str = ""  # "consistent", "inconsistent" or "too_short"; "" where it was not looked at
    sandbox: str = ""  # what confined the verifier, e.g. "bubblewrap"; "unsafe" where nothing but resources was limited

    @property
    def total(self) -> float:
        """The scalar that advantages are made from."""
        return self.format + self.correctness + self.length + self.language


@dataclasses.dataclass(frozen=True)
class Graded:
    """A rollout with its reward: one member of a group."""

    rollout: Rollout
    reward: Reward


@dataclasses.dataclass(frozen=True)
class WeightVersion:
    """Receipt of one publish: what the trainer sent, to be equal to what the generator holds."""

    version: int
    fingerprint: int
    generator: int = 0  # which of several holds it
