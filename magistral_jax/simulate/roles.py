"""The other roles of a simulation: verifier workers, the trainer, and who of many generators has least to do."""

import heapq


class Verifiers:
    """Workers that take completions in the order in which they come."""

    def __init__(self, num_workers: int) -> None:
        self._free_at = [0.0] * num_workers
        self.busy_seconds = self.queue_seconds = 0.0

    def grade(self, now: float, seconds: float) -> float:
        """Take a completion that needs so long; returns when its grade is there."""
        begin = max(now, heapq.heappop(self._free_at))
        heapq.heappush(self._free_at, begin + seconds)
        self.busy_seconds += seconds
        self.queue_seconds += begin - now
        return begin + seconds


class Trainer:
    """Works off seconds of work; while it is slowed down, slower."""

    def __init__(self) -> None:
        self.slowdown = 1.0
        self.busy_seconds = 0.0
        self._time = self._left = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether there is work left."""
        return self._left > 0

    def begin(self, now: float, seconds: float) -> None:
        """Take a batch."""
        self._time, self._left = now, max(seconds, 1e-12)

    def advance(self, now: float) -> None:
        """Let time pass."""
        if self.is_busy:
            self.busy_seconds += now - self._time
            self._left = max(self._left - (now - self._time) / self.slowdown, 0.0)
            if self._left < 1e-9:
                self._left = 0.0
        self._time = now

    def end(self) -> float:
        """When the batch is done if nothing changes."""
        return self._time + self._left * self.slowdown


class LeastLoaded:
    """Members by their load: the least loaded, longest so, in constant time."""

    def __init__(self) -> None:
        self._load: dict[int, int] = {}
        self._members: dict[int, dict[int, None]] = {}  # load -> members, in the order in which they came to it
        self._least = 0

    def set(self, member: int, load: int) -> None:
        """Add a member, or change its load."""
        self.remove(member)
        self._load[member] = load
        self._members.setdefault(load, {})[member] = None
        self._least = min(self._least, load)

    def remove(self, member: int) -> None:
        """Forget a member, if it is there."""
        load = self._load.pop(member, None)
        if load is not None:
            del self._members[load][member]
            if not self._members[load]:
                del self._members[load]

    def least(self) -> int | None:
        """Member with the least load; None where there is nobody."""
        if not self._load:
            return None
        while self._least not in self._members:
            self._least += 1
        return next(iter(self._members[self._least]))
