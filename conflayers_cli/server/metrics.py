"""Figures for Prometheus; nothing of a text is in them."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from conflayers_cli.generation.response import GenerationResponse, GenerationResult

if TYPE_CHECKING:
    from conflayers_cli.server.scheduler import Scheduler

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"conflayers_{name}", help_, labels, registry=registry)

        def histogram(name: str, help_: str) -> Histogram:
            return Histogram(f"conflayers_{name}", help_, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests answered", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens that were not read")
        self.tokens = counter("generated_tokens", "Tokens generated")
        self.steps = counter("steps", "Passes over running texts, or over parts of prompts")
        self.drafted = counter("drafted_tokens", "Tokens drafted", "drafter")
        self.accepted = counter("accepted_tokens", "Drafted tokens that were kept", "drafter")
        self.ended = counter("texts", "Texts ended", "reason")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival")
        self.between_tokens = histogram("time_between_steps_seconds", "Of one text")
        self.running = Gauge("conflayers_running_texts", "Being decoded", registry=registry)
        self.waiting = Gauge("conflayers_waiting_texts", "In the queue", registry=registry)
        self.prefix_bytes = Gauge(
            "conflayers_prefix_cache_bytes", "Kept of earlier texts", registry=registry
        )

    def watch(self, scheduler: Scheduler) -> None:
        """Have the gauges say what the scheduler has."""
        self.running.set_function(lambda: scheduler.num_running)
        self.waiting.set_function(lambda: scheduler.num_waiting)

    def count_step(self, responses: Sequence[GenerationResponse]) -> None:
        """Count a step, in the engine's thread."""
        self.steps.inc()
        for response in responses:
            if response.step is not None:
                self.tokens.inc(len(response.step.tokens))
            if response.result is not None:
                self._count_result(response.result)

    def _count_result(self, result: GenerationResult) -> None:
        self.prompt_tokens.inc(result.prompt_tokens)
        self.cached_tokens.inc(result.cached_prompt_tokens)
        self.ended.labels(result.finish_reason).inc()
        for name, count in result.stats.by_drafter.items():
            self.drafted.labels(name).inc(count.drafted)
            self.accepted.labels(name).inc(count.accepted)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class TextTimes:
    """Notes when the tokens of one text come.

    Args:
        metrics: where.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before = monotonic()
        self._first = True

    def note(self) -> None:
        """Tokens have come."""
        now = monotonic()
        which = self._metrics.first_token if self._first else self._metrics.between_tokens
        which.observe(now - self._before)
        self._before, self._first = now, False
