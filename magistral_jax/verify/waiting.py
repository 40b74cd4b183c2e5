"""The order in which waiting jobs are graded. Pure: no clock, no threads.

A batch is made of whole groups, so the job goes first whose group needs the fewest further gradings; among equals, the
one that came first. So that a group that needs many is not put off for ever, every `AGE_TURN`-th job is the one that
has waited longest: with n jobs before it, a job waits for `AGE_TURN` · (n + 1) others at most.
"""

import collections
import heapq

from magistral_jax.verify.ledger import Job

AGE_TURN = 8
_NO_GROUP = -1


class WaitingLine:
    """Jobs that wait for a worker."""

    def __init__(self) -> None:
        self._again: collections.deque[Job] = collections.deque()
        self._waiting: set[Job] = set()
        self._by_age: collections.deque[Job] = collections.deque()  # with some that wait no more
        self._by_group: dict[int, collections.deque[Job]] = {}
        self._num_graded = collections.Counter[int]()
        self._ranking: list[tuple[int, int, int]] = []  # (gradings needed, serial of the group's first, group)
        self._num_taken = 0

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._again) + len(self._waiting)

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self._waiting.add(job)
        self._by_age.append(job)
        members = self._by_group.setdefault(_group(job), collections.deque())
        members.append(job)
        if len(members) == 1:
            self._rank(_group(job))

    def add_again(self, job: Job) -> None:
        """Let a job wait that was taken before: it goes first."""
        self._again.append(job)

    def take(self) -> Job | None:
        """The next job, or None where nobody waits."""
        if self._again:
            return self._again.popleft()
        if not self._waiting:
            return None
        self._num_taken += 1
        job = self._oldest() if self._num_taken % AGE_TURN == 0 else self._most_wanted()
        self._waiting.remove(job)
        if not self._waiting:
            self._by_age.clear()
        group = _group(job)
        self._by_group[group].popleft()  # each group is first in, first out, so its oldest is its first
        if self._by_group[group]:
            self._rank(group)
        else:
            del self._by_group[group]
        return job

    def graded(self, job: Job) -> None:
        """Note that a job is done; its group needs one grading less."""
        group = _group(job)
        if group == _NO_GROUP:
            return
        self._num_graded[group] += 1
        if self._num_graded[group] >= job.item.group_size:
            del self._num_graded[group]
        if group in self._by_group:
            self._rank(group)

    def _oldest(self) -> Job:
        while self._by_age[0] not in self._waiting:
            self._by_age.popleft()
        return self._by_age.popleft()

    def _most_wanted(self) -> Job:
        while True:
            entry = heapq.heappop(self._ranking)
            group = entry[2]
            if group in self._by_group and entry == self._entry(group):  # else the group has changed since
                return self._by_group[group][0]

    def _rank(self, group: int) -> None:
        heapq.heappush(self._ranking, self._entry(group))

    def _entry(self, group: int) -> tuple[int, int, int]:
        first = self._by_group[group][0]
        needed = 1 if group == _NO_GROUP else first.item.group_size - self._num_graded[group]
        return needed, first.serial, group


def _group(job: Job) -> int:
    return job.item.group if job.item.group_size > 1 else _NO_GROUP
