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
    kv_dtype: Literal["float32", "bfloat16", "int8", "float8_e4m3fn"] = "float32"
    """Precision of the KV cache; 8 bits come with a scale for each token and head."""
    attention: Literal["auto", "reference", "xla", "native", "tpu"] = "auto"
    """How KV pages are read: by plain gathering (slow, for checks), by XLA on any platform, by our kernel for CPUs
    (compiled once, by the C++ compiler of this machine), or by the TPU kernel that jax ships. `auto` takes the fastest
    that works, and says which."""
    tensor: int = 1
    """Devices of one engine, over which heads, feed-forward width and vocabulary are split: those after the trainer's
    where there are enough, else the first ones, shared with it; of a generator in another process, its first ones."""
    where: Literal["thread", "process", "remote"] = "thread"
    """Where training rollouts are sampled: in a thread of the trainer's process, in processes of their own (Linux),
    which may have other devices and may die without the run's end, or by generators that join over the network
    (`magistral-jax generator HOST:PORT` on each host)."""
    num_generators: int = 1
    """Engines, each with `num_slots` and a page pool; more than one only as processes. Of generators that join it is
    how many are waited for, at most `schedule.role_deadline`, and how many are let in."""
    plane: Literal["auto", "shared_memory", "tcp", "transfer"] = "auto"
    """How weights reach generators in other processes: memory of this host, bytes over the generator's connection, or
    device to device (`jax.experimental.transfer`). `auto` is shared memory on one host and tcp between hosts."""
    transfer_deadline: float = 10.0
    """Seconds after which a transfer of weights that does not get on is given up, and a third of those after which a
    generator that does not answer at all is; large transfers get the time of their bytes at 100 MB/s on top."""
    listen: str = "127.0.0.1:0"
    """Address at which generators join, as HOST:PORT; port 0 takes a free one. Only from this host unless told
    otherwise."""
    token_file: str = ""
    """File with the secret that a joining generator must know; needed where `listen` is not a loopback address."""
    devices: str = ""
    """GPUs of the generator processes, as ids for CUDA_VISIBLE_DEVICES, separated by commas and dealt out in turn,
    `tensor` to each. Empty: they share the trainer's; then set XLA_PYTHON_CLIENT_MEM_FRACTION for all of them."""
    max_restarts: int = 3
    """Generators that may be lost over a run; the next loss ends it, with a checkpoint."""
