"""The server's own Prometheus metrics, as the page `/metrics` shows them. Every label's values are a fixed set."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, with the time of the first request
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Meters:
    """The instruments of one application."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_route = ("route", "status")
        self.requests = self._counter("requests", "Requests that were answered, by route and status.", by_route)
        self.refused = self._counter("refused", "Requests that were refused or failed, by why.", ("kind",))
        self.audio_s = self._counter("audio_seconds", "Seconds of audio that were transcribed for callers.")
        self.body_bytes = self._counter("body_bytes", "Bytes of bodies that came in.")
        self.seconds = Histogram(
            "murmur_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = self._gauge("in_flight", "Requests that are being answered.")
        self.windows = self._gauge("windows", "Encoder windows of admitted requests.", ("state",))
        self.webhooks = self._gauge("webhooks", "Requests with a webhook, by how far they are.", ("state",))
        self.ready = self._gauge("ready", "1 where every model has decoded something lately.")

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"murmur_http_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"murmur_http_{name}", help, labels, registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)
