"""Simulations in words: one run as a few lines, several as a table."""

from collections.abc import Mapping, Sequence

from magistral_jax.simulate.outcome import Outcome

_LIMIT_WORDS = {
    "num_async": "in flight (schedule.num_async)",
    "ready_batches": "queue full (schedule.ready_batches)",
    "max_staleness": "staleness (schedule.max_staleness)",
}


def describe(outcome: Outcome) -> str:
    """What a simulated run did, for a reader."""
    summary = outcome.summary()
    shares = {role: _shares(states) for role, states in outcome.shares.items() if role != "admission"}
    limits = {_LIMIT_WORDS[name]: share for name, share in outcome.shares["admission"].items()}
    num_sequences = max(sum(outcome.staleness.values()), 1)
    staleness = {str(k): outcome.staleness[k] / num_sequences for k in sorted(outcome.staleness)}
    ended = {how: count for how, count in outcome.counts.items() if how != "dispatched"}
    lines = {
        "simulated": f"{len(outcome.steps)} steps, {outcome.num_completions:,} completions, {_time(outcome.seconds)}",
        "speed": f"{summary['steps_per_hour']:.4g} steps/hour",
        "tokens": f"{summary['sampled_tokens_per_second']:,.0f} sampled and "
        f"{summary['trained_tokens_per_second']:,.0f} trained a second",
        **{f"{role}s": text for role, text in shares.items()},
        "admission": f"closed by {_shares(limits)}",
        "slots in use": f"{summary['slots_used_share_mean']:.0%}",
        "queues": f"{summary['in_flight_mean']:,.1f} sequences in flight, {summary['ready_groups_mean']:,.1f} groups "
        f"ready, {summary['verify_queue_mean']:,.1f} completions wait for a verifier",
        "staleness": f"{summary['staleness_mean']:.2f} versions, mean over tokens; first tokens {_shares(staleness)}",
        "swaps": f"{summary['swapped_token_share']:.1%} of tokens come after a swap inside their completion",
        "ended": ", ".join(f"{count:,} {how}" for how, count in ended.items()) or "nothing",
    }
    if outcome.generators_lost:
        lines["deaths"] = f"{outcome.generators_lost} generators"
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


COLUMNS: Mapping[str, tuple[str, str]] = {
    "steps/h": ("steps_per_hour", ".4g"),
    "tokens/s": ("trained_tokens_per_second", ",.0f"),
    "generators idle": ("generator_idle", ".0%"),
    "trainer waits": ("trainer_waiting", ".0%"),
    "staleness": ("staleness_mean", ".2f"),
    "at most": ("staleness_of_first_token_max", ".0f"),
    "updates behind": ("updates_behind_mean", ".2f"),
    "tokens after swap": ("swapped_token_share", ".0%"),
}


def side_by_side(outcomes: Mapping[str, Outcome]) -> str:
    """A table of several runs; their speed is also given relative to the first."""
    rows = [["", "speed-up", *COLUMNS]]
    first = next(iter(outcomes.values())).steps_per_hour()
    for name, outcome in outcomes.items():
        summary = outcome.summary()
        speed_up = f"{outcome.steps_per_hour() / first:.2f}x" if first else "-"
        rows.append([name, speed_up, *(format(summary[key], style) for key, style in COLUMNS.values())])
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:,.2f} hours"
