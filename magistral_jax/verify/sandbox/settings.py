"""What the host tells a runner at its start."""

import dataclasses
import json

from magistral_jax.verify.sandbox.execution import Mechanism


@dataclasses.dataclass(frozen=True)
class RunnerSettings:
    """One box."""

    mechanism: Mechanism
    python: bool
    """Load the standard library's modules that programs import, and let them recurse deeply."""
    host_pid: int
    """Process of the host, to die with."""
    uid: int | None
    """User that programs become; None where they have to stay who the runner is."""
    keep_file_user: bool
    """Python programs stay the runner's user in the eyes of files."""
    num_processes: int
    """Limit on processes and threads of the user."""
    readable: tuple[str, ...]
    """Paths for Landlock."""
    writable: tuple[str, ...]

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self) | {"mechanism": self.mechanism.value})

    @staticmethod
    def decode(text: str) -> "RunnerSettings":
        """From JSON."""
        fields = json.loads(text)
        lists = {name: tuple(fields[name]) for name in ("readable", "writable")}
        return RunnerSettings(**fields | lists | {"mechanism": Mechanism(fields["mechanism"])})
