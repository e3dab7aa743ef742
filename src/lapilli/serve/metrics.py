"""Metrics for Prometheus: the names that vLLM's users know, under the prefix `lapilli:`."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # it makes the metrics
    from collections.abc import Iterator

    from lapilli.serve.answers import Answers
    from lapilli.serve.service import Service

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts and times of one server, in a registry of their own."""

    def __init__(self, service: "Service") -> None:
        self._registry = registry = CollectorRegistry()
        names = ("model_name",)
        self._labels = {"model_name": service.model_name}

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"lapilli:{name}", text, names, registry=registry, buckets=SECONDS)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"lapilli:{name}", text, (*names, *more), registry=registry)

        self._first_token = histogram("time_to_first_token_seconds", "Until the first token.")
        self._between = histogram("inter_token_latency_seconds", "Between tokens, mean of one.")
        self._whole = histogram("e2e_request_latency_seconds", "Of whole requests.")
        self._queue = histogram("request_queue_time_seconds", "Until blocks were reserved.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts, visual ones included.")
        self._visual = counter("visual_tokens", "Tokens of pictures in prompts.")
        self._completion = counter("generation_tokens", "Generated tokens.")
        self._success = counter("request_success", "Finished requests.", "finished_reason")
        self._failed = counter("request_errors", "Refused or failed requests.", "status")
        registry.register(EngineCollector(service, self._labels))

    def count(self, answers: "Answers") -> None:
        """Count a request that is over."""
        labels, times, usage = self._labels, answers.timings, answers.usage
        self._prompt.labels(**labels).inc(usage.prompt)
        self._visual.labels(**labels).inc(usage.visual)
        self._completion.labels(**labels).inc(usage.completion)
        self._success.labels(**labels, finished_reason=answers.reason).inc()
        if times.first_token:
            self._first_token.labels(**labels).observe(times.first_token)
            self._queue.labels(**labels).observe(times.queue)
        if times.total:
            self._whole.labels(**labels).observe(times.total)
            if usage.completion > 1 and times.first_token:
                decoding = times.total - times.first_token
                self._between.labels(**labels).observe(decoding / (usage.completion - 1))

    def count_error(self, status: int) -> None:
        """Count a request that was refused or failed."""
        self._failed.labels(**self._labels, status=str(status)).inc()

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """What the engine and its caches say of themselves when they are asked."""

    def __init__(self, service: "Service", labels: dict[str, str]) -> None:
        self._service = service
        self._labels = labels

    def collect(self) -> "Iterator[GaugeMetricFamily | CounterMetricFamily]":
        """Yield the metrics of now."""
        service, engine = self._service, self._service.chat.engine
        pool, features = engine.pool, engine.features.stats
        pictures = service.media.pictures.stats
        used = 1 - pool.available / pool.capacity if pool.capacity else 0.0
        gauges = {
            "num_requests_running": ("Requests that are worked on.", service.num_running),
            "num_requests_waiting": ("Requests that wait for their turn.", service.num_waiting),
            "kv_cache_usage_perc": ("Share of the blocks that are in use.", used),
        }
        counters = {
            "prefix_cache_queries": ("Tokens looked up.", pool.stats.tokens),
            "prefix_cache_hits": ("Tokens found.", pool.stats.cached_tokens),
            "mm_cache_queries": ("Features looked up.", features.hits + features.misses),
            "mm_cache_hits": ("Features found.", features.hits),
            "picture_cache_queries": ("Pictures looked up.", pictures.hits + pictures.misses),
            "picture_cache_hits": ("Pictures found prepared.", pictures.hits),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"lapilli:{name}", text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"lapilli:{name}", text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
