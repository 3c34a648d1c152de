"""``/metrics``: what the server does, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sentcompress.serving.scheduler import Scheduler

PREFIX = "sentcompress"
COUNTED = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/"}
"""Endpoints that are counted one by one: clients can name any number of others."""


class Metrics(Collector):
    """The figures of a scheduler, and a count of requests.

    Args:
        scheduler: asked at each scrape.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests", "Requests that were answered", ["path", "status"], registry=self._registry
        )
        self._registry.register(self)

    def count(self, path: str, status: int) -> None:
        """Count a request, by the endpoint and the status of its answer."""
        self._requests.labels(path if path in COUNTED else "other", str(status)).inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        now = self._scheduler.figures()
        held = now.engine
        counters: dict[str, tuple[str, int | None]] = {
            "prompt_tokens": ("Tokens of prompts", now.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts that had been read before", now.cached_tokens),
            "completion_tokens": ("Tokens written", now.new_tokens),
            "recalled_sentences": ("Sentences recalled, for each new token", held.recalled_sentences),
        }
        gauges: dict[str, tuple[str, float | None]] = {
            "requests_waiting": ("Texts in the queue", now.waiting),
            "batch_size": ("Texts that are being written", now.running),
            "tokens_per_second": (
                "Tokens written per second, over the last 10 seconds",
                now.tokens_per_second,
            ),
            "cache_full_bytes": ("Bytes that the LLM's own caches would hold", held.full_bytes),
        }
        for name, (help_text, count) in counters.items():
            if count is not None:
                yield CounterMetricFamily(f"{PREFIX}_{name}", help_text, value=count)
        for name, (help_text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"{PREFIX}_{name}", help_text, value=value)
        sizes = GaugeMetricFamily(f"{PREFIX}_cache_bytes", "Bytes of caches", labels=["place"])
        sizes.add_metric(["device"], held.device_bytes)
        sizes.add_metric(["host"], held.host_bytes)
        yield sizes
