"""How the processes of one trainer find one another. Imports no jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """A trainer of several processes (usually one a host): the same command with the same settings in each of them."""

    coordinator: str = ""
    """HOST:PORT of process 0, free there and open to the others; `auto` asks the environment (SLURM, Open MPI, Cloud
    TPU, or Kubernetes with its Python package); empty is a single process."""
    num_processes: int = 1
    """Processes of the trainer; not read where `coordinator` is `auto` or empty."""
    process_id: int = 0
    """Which of them this is, from 0: the one setting in which they differ. Process 0 does all but the training step."""
    start_seconds: float = 300.0
    """Longest wait for the others at the start."""
    heartbeat_seconds: float = 100.0
    """A process that is silent for this long is given up, and the run ends; one that dies is noticed at once."""
