"""Shape of a decoder of the Mistral, Llama and Qwen families. Imports no jax, so that `--help` stays fast."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture; read from `config.json` of a model folder, never guessed."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 4096
    """Longest sequence the model was made for, in tokens."""
    tie_embeddings: bool = False
    """The output head is the transposed embedding table."""
    qkv_bias: bool = False
    """Bias on q, k and v (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of q and k (Qwen3)."""
    sliding_window: int | None = None
    """A token attends to this many tokens, itself included (Mistral 7B v0.1); None is all."""
    rope_scaling: "RopeScaling | None" = None
    """Long-context frequency scaling (Llama 3)."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices of the trainer; the product of the four is their number, over all processes of the trainer."""

    data: int = 1
    """Copies of the parameters, each with its own rows of a microbatch."""
    fsdp: int = 1
    """Parts into which parameters and optimizer state are split, each with its own rows as well."""
    sequence: int = 1
    """Parts into which each row is split, for long sequences; parameters and optimizer state are split as well."""
    tensor: int = 1
    """Parts into which heads, feed-forward width and vocabulary are split."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Which model is trained and in which precision."""

    path: str = ""
    """Model folder (Hugging Face layout: config.json, safetensors, tokenizer.json)."""
    random_init: bool = False
    """Start from random weights: only the architecture and the tokenizer of the folder are read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; parameters and optimizer stay in float32."""
    remat: Literal["none", "full", "dots", "dots_no_batch", "outputs"] = "none"
    """What of a layer is kept for the backward pass, the rest being computed again: everything, its input only, results
    of matrix products, of those with weights, or the outputs of attention and feed-forward."""
    unroll: int = 1
    """Layers in one turn of the loop over them; 0 is all. All of them at once are a tenth faster on a CPU with a small
    model, as nothing is copied to and from stacks; the program grows with it."""
    attention: Literal["auto", "reference", "blocked", "cudnn", "splash"] = "auto"
    """How attention over packed rows is computed: plainly (for checks), in blocks by XLA on any platform, by cuDNN
    (NVIDIA, bfloat16), or by the splash kernel (TPU). `auto` takes the fastest that works, and says which."""
    lora_rank: int = 0
    """Rank of low-rank adapters, which are then all that is trained; 0 trains every parameter. The frozen parameters
    are kept in `policy.dtype`."""
    lora_alpha: float = 32.0
    """The adapters' change of a matrix is multiplied by lora_alpha / lora_rank."""
    lora_targets: Literal["attention", "mlp", "all"] = "all"
    """Which matrices of a layer are adapted."""
    logprob_chunk: int = 256
    """Tokens whose logits exist at one time, in training and scoring."""
