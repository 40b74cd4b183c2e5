"""Settings of the generation engine."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Engine and sampling."""

    num_slots: int = 64
    """Sequences decoded at one time."""
    page_size: int = 16
    """Tokens of a KV page."""
    num_pages: int = 0
    """Pages of the pool; 0 makes enough for every slot at full length. With fewer, the youngest sequence gives way when
    none are free, and is read again later."""
    max_prompt_tokens: int = 256
    """Longest prompt in tokens; a longer one is an error that names it."""
    max_new_tokens: int = 256
    """Longest completion in tokens, stop token included."""
    decode_block: int = 8
    """Decode steps per dispatch (K): weights are swapped and slots refilled between blocks."""
    prefill_rows: int = 8
    """Prompts read in one dispatch, of which there is one between two decode blocks."""
    prefill_chunk: int = 512
    """Tokens of a prompt read in one dispatch; a longer prompt takes several, and decoding goes on between them."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts (§5.2: 1.0)."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    top_k: int = 0
    """Most probable tokens to draw from; 0 is off."""
    on_publish: Literal["in_place", "recompute", "drain"] = "in_place"
    """What happens to running sequences when weights arrive (§3): keep their KV cache, rebuild it, or finish first."""
    kv_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the KV cache."""
    where: Literal["thread", "process"] = "thread"
    """Where training rollouts are sampled: in a thread of the trainer's process, or in processes of their own (Linux),
    which may have other devices and may die without the run's end."""
    num_generators: int = 1
    """Engines, each with `num_slots` and a page pool; more than one only as processes."""
    devices: str = ""
    """GPUs of the generator processes, as ids for CUDA_VISIBLE_DEVICES, separated by commas and dealt out in turn, one
    to each. Empty: they share the trainer's; then set XLA_PYTHON_CLIENT_MEM_FRACTION for all of them."""
    max_restarts: int = 3
    """Generator processes that may die and be replaced over a run; the next death ends it, with a checkpoint."""
