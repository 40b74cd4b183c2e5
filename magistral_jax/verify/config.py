"""Settings of the reward (report §2.2), of code verification, of the sandbox and of the verifier pool."""

import dataclasses
from typing import Literal


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
    function: str = ""
    """Own correctness function as `package.module:name`, in the place of the math and code verifiers; empty: theirs."""


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """Verification of programs by tests, report §2.2.2."""

    num_tests: int = 20
    """Tests sampled of those that a problem has, the same ones for all completions of a group; 0 runs all."""
    partial: bool = False
    """Reward the fraction of tests passed in the place of all or nothing (ablation, Fig. 11)."""
    compile_seconds: float = 10.0
    """CPU time of the compiler in seconds; wall time may be three times that."""
    cpu_seconds: float = 4.0
    """CPU time of one test in seconds."""
    wall_seconds: float = 10.0
    """Wall time of one test in seconds; well above `cpu_seconds`, so that a busy machine fails no right program."""
    memory_mib: int = 300
    """Address space of one test in MiB."""
    compiler: str = "g++"
    """C++ compiler, by name or path."""

    @property
    def compile_wall_seconds(self) -> float:
        """Wall time of the compiler. It does not sleep, so this only bounds how long a busy machine may keep it."""
        return 3 * self.compile_seconds


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """What untrusted programs, the compiler and the math grader are confined by."""

    mechanism: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto"
    """`auto` takes the first of bubblewrap and landlock that passes its self-test, and refuses to go on without one;
    `unsafe` confines nothing but resources, and every reward says so."""


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Verifier worker processes."""

    num_workers: int = 2
    """Completions that are graded at a time, each in a process of its own."""
    max_pending: int = 4096
    """Completions that may wait or be graded; who submits more has to wait."""
    deadline: float = 5.0
    """Seconds from dispatch to a worker until it is killed and the verdict is `timeout`; for code, the limits of
    compiler and tests are added."""
    recycle_after: int = 2000
    """Completions after which a worker is replaced by a fresh one."""
    recycle_mib: int = 256
    """MiB by which the resident memory of a worker may grow before it is replaced by a fresh one."""
    memory_mib: int = 1024
    """Address space of a worker in MiB."""
    start_deadline: float = 120.0
    """Seconds in which the workers have to be up, imports included."""
