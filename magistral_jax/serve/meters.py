"""Prometheus metrics of a service."""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from magistral_jax.serve.engine_thread import EngineStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Meters:
    """What is counted about requests, and what the engine counts, in a registry of their own.

    Args:
      read_stats: Gives the counts of the engine.
    """

    content_type = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(self, read_stats: Callable[[], EngineStats]) -> None:
        self._read_stats = read_stats
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "magistral_requests",
            "Requests answered, by route and status; 499: the client went away.",
            ["route", "status"],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "magistral_time_to_first_token_seconds",
            "From the admission of a request to its first sampled tokens.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "magistral_request_seconds",
            "From the admission of a request to the end of its last completion.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, read when they are asked for."""
        stats = self._read_stats()
        gauges = {
            "sequences_running": ("Sequences in a slot.", stats.num_running),
            "sequences_waiting": ("Sequences without a slot.", stats.num_waiting),
            "prompts_scoring": ("Prompts whose log-probs are wanted.", stats.num_scoring),
            "slots": ("Slots of the engine.", stats.num_slots),
            "pages_free": ("KV pages that nobody holds.", stats.free_pages),
            "pages": ("KV pages of the pool.", stats.num_pages),
            "weight_version": ("Version of the weights in use.", stats.version),
            "paused": ("1 while generation is paused.", int(stats.is_paused)),
        }
        counters = {
            "engine_steps": ("Steps of the engine.", stats.num_steps),
            "prompt_tokens": ("Prompt tokens read; a shared prompt counts once.", stats.prompt_tokens),
            "sampled_tokens": ("Tokens sampled.", stats.sampled_tokens),
            "scored_tokens": ("Prompt tokens whose log-probs were computed.", stats.scored_tokens),
            "preemptions": ("Sequences that gave way for want of pages.", stats.num_preempted),
            "weight_swaps": ("Times that weights were taken into use.", stats.num_swaps),
        }
        for name, (purpose, value) in gauges.items():
            yield GaugeMetricFamily(f"magistral_{name}", purpose, value=value)
        for name, (purpose, value) in counters.items():
            yield CounterMetricFamily(f"magistral_{name}", purpose, value=value)
