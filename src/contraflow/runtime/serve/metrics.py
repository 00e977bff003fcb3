"""Counts and latencies of a server, as Prometheus reads them."""

from collections import deque

import numpy as np

RECENT = 4096  # requests of which the quantiles are taken
PREFIX, LATENCY = "contraflow_", "request_seconds"
QUANTILES = (0.5, 0.9, 0.99)


class Metrics:
    """Counts requests, errors and clients. All of it is changed by the thread of the event loop alone."""

    def __init__(self):
        self.clients = self.requests = self.errors = 0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._total, self._served = 0.0, 0

    def served(self, seconds: float) -> None:
        """Counts an answer that was ready `seconds` after its request."""
        self._recent.append(seconds)
        self._total += seconds
        self._served += 1

    def text(self, batches: int) -> str:
        """Returns the text of /metrics; `batches` is how many were computed."""
        lines = []
        for name, kind, value, what in (
            ("requests_total", "counter", self.requests, "Observations received."),
            ("errors_total", "counter", self.errors, "Requests that were refused or failed."),
            ("batches_total", "counter", batches, "Batches computed; several requests can share one."),
            ("clients", "gauge", self.clients, "Connections that are open."),
        ):
            lines += [*_head(name, kind, what), f"{PREFIX}{name} {value}"]
        lines += _head(LATENCY, "summary", f"From a request to its answer; quantiles of the last {RECENT}.")
        if self._recent:
            found = np.quantile(self._recent, QUANTILES)
            pairs = zip(QUANTILES, found, strict=True)
            lines += [f'{PREFIX}{LATENCY}{{quantile="{q}"}} {value:.6g}' for q, value in pairs]
        lines += [f"{PREFIX}{LATENCY}_sum {self._total:.6g}", f"{PREFIX}{LATENCY}_count {self._served}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}"]
