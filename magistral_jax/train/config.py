"""Settings of loss, batch and optimizer."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """GRPO with the report's five changes (§2.1); each has its ablation."""

    eps_low: float = 0.2
    """Lower clip bound: ratio ≥ 1 − eps_low."""
    eps_high: float = 0.28
    """Upper clip bound (clip-higher): ratio ≤ 1 + eps_high. Ablation: set to eps_low."""
    advantage: Literal["minibatch", "group", "none"] = "minibatch"
    """Where centred rewards are divided by their standard deviation (Fig. 7)."""
    normalization: Literal["token", "sequence"] = "token"
    """One division by all completion tokens of the minibatch, or a mean per sequence first (GRPO's original)."""
    filter_zero_variance: bool = True
    """Drop groups whose rewards are all equal and refill the batch."""
    kl_coef: float = 0.0
    """Weight of a KL penalty to the initial policy (k3 estimate); 0 loads no reference."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (Fig. 12 ablation); 0 is off."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-6
    """Peak step size."""
    warmup_updates: int = 0
    """Updates over which the step size rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Schedule after the warm-up; cosine falls to 0 at the last update of the run."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay per unit step size, on matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 is off."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained parameters. bfloat16 takes half the memory; updates are then rounded stochastically, so
    that small ones are not lost, and gradients still add up in float32."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the two moments; bfloat16 ones are rounded stochastically too."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How sequences become batches and rows."""

    group_size: int = 8
    """Completions of a prompt (G)."""
    batch_size: int = 256
    """n_batch: sequences per publish (§3)."""
    minibatch_size: int = 0
    """n_minibatch: sequences per gradient step; 0 equals batch_size (§3: the sound regime)."""
    row_tokens: int = 512
    """Tokens of a packed row; also the longest trainable sequence."""
    rows_per_microbatch: int = 1
    """Rows in one backward pass: row_tokens × rows_per_microbatch is the token budget of the collation."""


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (cold start)."""

    num_updates: int = 1000
    """Gradient steps."""
    batch_size: int = 64
    """Traces per gradient step."""
    traces: str = ""
    """JSONL of traces (`problem`, `completion`); empty makes traces for the sums of `data.train`."""
    thorough_share: float = 0.4
    """Share of made traces that think step by step; the rest guess hastily."""
    lucky_share: float = 0.2
    """Share of the hasty guesses that are right."""
    native_share: float = 1.0
    """Share of made traces of templated problems that think and answer in the language of the problem; the rest do so
    in English."""
    checkpoint_every: int = 200
    """Gradient steps between checkpoints; 0 is only at the end and on Ctrl-C."""
    general: str = ""
    """JSONL of other instructions (`problem`, `completion`) that are mixed into the traces, without a system prompt."""
    general_share: float = 0.1
    """Their share of all traces."""
    validation_share: float = 0.0
    """Share of the problems whose traces are held out; the weights of the lowest loss on them are the result."""
    validate_every: int = 100
    """Gradient steps between two measurements of that loss."""
    patience: int = 0
    """Measurements without a new lowest loss after which fine-tuning ends; 0 goes on."""
