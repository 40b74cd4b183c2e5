"""What a simulation found: a record, and the numbers that are read off it."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One batch."""

    began: float  # seconds
    ended: float
    published: float  # when the generators had its weights
    num_tokens: int  # of completions
    staleness: float  # mean over tokens, in weight versions
    swapped_share: float  # of tokens sampled after a swap inside their completion


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Something that went on for a while, for the timeline."""

    role: str
    row: int  # slot of a generator, or 0
    began: float
    ended: float
    version: int
    generator: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A simulated run.

    `shares` are parts of the time of a role, `depths` means over time, `staleness` counts trained sequences by how many
    versions behind their first token was.
    """

    steps: Sequence[Step]
    num_completions: int
    num_events: int
    sampled_tokens: int
    counts: Mapping[str, int]
    shares: Mapping[str, Mapping[str, float]]
    depths: Mapping[str, float]
    staleness: Counter[int]
    generators_lost: int
    num_minibatches: int
    spans: Sequence[Span] = ()

    @property
    def seconds(self) -> float:
        """From the start to the last publish."""
        return self.steps[-1].published if self.steps else 0.0

    def steps_per_hour(self, first: int = 1) -> float:
        """Speed from the end of step `first` on, when the queues have filled; 0 takes the whole run."""
        if len(self.steps) <= first:
            return 0.0
        begin = self.steps[first - 1].published if first else 0.0
        return 3600 * (len(self.steps) - first) / max(self.seconds - begin, 1e-12)

    def summary(self) -> dict[str, float]:
        """The numbers of a report, by name."""
        seconds = max(self.seconds, 1e-12)
        num_sequences = max(sum(self.staleness.values()), 1)
        tokens = max(sum(step.num_tokens for step in self.steps), 1)
        weighted = lambda name: sum(getattr(step, name) * step.num_tokens for step in self.steps) / tokens
        staleness = weighted("staleness")
        flat = {f"{role}_{state}": share for role, states in self.shares.items() for state, share in states.items()}
        numbers = {
            "steps": len(self.steps),
            "hours": seconds / 3600,
            "steps_per_hour": self.steps_per_hour(),
            "trained_tokens_per_second": tokens / seconds,
            "sampled_tokens_per_second": self.sampled_tokens / seconds,
            "staleness_mean": staleness,
            # A batch of M minibatches is M updates: its m-th is m further from the weights that were published.
            "updates_behind_mean": staleness * self.num_minibatches + (self.num_minibatches - 1) / 2,
            "staleness_of_first_token_mean": sum(k * n for k, n in self.staleness.items()) / num_sequences,
            "staleness_of_first_token_max": max(self.staleness, default=0),
            "swapped_token_share": weighted("swapped_share"),
            "generators_lost": self.generators_lost,
            **{f"{name}_mean": depth for name, depth in self.depths.items()},
            **flat,
        }
        return {name: float(number) for name, number in numbers.items()}
