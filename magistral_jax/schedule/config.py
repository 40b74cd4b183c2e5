"""Settings of the asynchronous loop."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Admission and staleness (§3, Fig. 6)."""

    num_steps: int = 40
    """Batches to train on; one publish each."""
    num_async: int = 512
    """n_async: sequences in flight (dispatched and not yet graded). Sound: n_async / n_batch ≤ 2."""
    ready_batches: float = 1.0
    """Graded groups wait in a queue of this many batches; no prompt is dispatched while it is full."""
    max_staleness: int = 8
    """Hard bound: the trainer waits rather than let an unfinished group fall this many versions behind."""
    checkpoint_every: int = 20
    """Steps between checkpoints; 0 is only at the end and on Ctrl-C."""
    role_deadline: float = 600.0
    """Seconds that the loop waits for any event before it stops, says which role is silent, and saves."""
