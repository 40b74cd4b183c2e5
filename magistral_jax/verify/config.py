"""Settings of the reward (report §2.2) and of the verifier pool."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Reward shaping, report §2.2."""

    format: float = 0.1
    """Reward for the right format; a completion that fails it gets 0 in total (§2.2.1)."""
    correctness: float = 0.9
    """Reward for a correct answer (§2.2.2)."""
    length_penalty: float = 0.1
    """Largest length penalty, subtracted at `max_length` tokens and beyond (§2.2.3, Eq. 1)."""
    max_length: int = 0
    """l_max of Eq. 1 in completion tokens; 0 takes the sampling limit `generation.max_new_tokens`."""
    length_cache: int = 0
    """l_cache of Eq. 1 in tokens: the penalty grows from l_max − l_cache to l_max; 0 switches it off."""
    language: float = 0.1
    """Bonus where problem, thoughts and answer are in one language (§2.2.4); 0 switches the classifier off."""
    think_open: str = "<think>"
    """Tag that opens the thoughts."""
    think_close: str = "</think>"
    """Tag that closes the thoughts."""


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Verifier worker processes."""

    num_workers: int = 2
    """Processes; each grades one completion at a time."""
    deadline: float = 5.0
    """Seconds from dispatch to a worker until it is killed and the verdict is `timeout`."""
    recycle_after: int = 2000
    """Completions after which a worker is replaced by a fresh one."""
    memory_mib: int = 1024
    """Address space of a worker in MiB."""
    start_deadline: float = 120.0
    """Seconds in which the workers have to be up, imports included."""
