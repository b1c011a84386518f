"""The numbers of `/metrics`, in Prometheus' text form. The numbers belong to one server: nothing is global."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# An answer takes from milliseconds (an error) to hours (32k tokens of a large model).
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)


class _TeacherGauges(Collector):
    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"potstill_{name}", "Of the teacher.", value)


class Metrics:
    """`unfinished` says how many samples are begun or wait; `gauges` are numbers of the teacher's own."""

    def __init__(self, unfinished: Callable[[], int], gauges: Callable[[], dict[str, float]]) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "status")
        self._requests = Counter("potstill_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "potstill_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("potstill_tokens", "Tokens of finished samples.", ("kind",), registry=self._registry)
        self._drafts = Counter(
            "potstill_drafts", "Tokens drafted in finished samples.", ("fate",), registry=self._registry
        )
        self.num_drafts = self.num_accepted = 0
        gauge = Gauge("potstill_unfinished_samples", "Samples begun or waiting.", registry=self._registry)
        gauge.set_function(unfinished)
        self._registry.register(_TeacherGauges(gauges))

    def count_tokens(self, *, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def count_drafts(self, *, accepted: int, drafted: int) -> None:
        """Count the drafts of a sample by speculative decoding."""
        self.num_drafts += drafted
        self.num_accepted += accepted
        self._drafts.labels("accepted").inc(accepted)
        self._drafts.labels("rejected").inc(drafted - accepted)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def middleware(self, app: ASGIApp, routes: frozenset[str]) -> ASGIApp:
        """Counts what `app` answers; paths other than `routes` count as one, so that nobody can invent series."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            route = scope["path"] if scope["path"] in routes else "other"
            status = 500
            begun = time.perf_counter()

            async def watched(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                self._requests.labels(route, str(status)).inc()
                self._seconds.labels(route).observe(time.perf_counter() - begun)

        return counted
