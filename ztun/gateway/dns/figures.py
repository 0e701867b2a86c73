"""What is counted of one upstream server."""

from __future__ import annotations

from typing import Any


class ServerFigures:
    """queries: times that it was asked, a name again for each try; each ends as one of the others, or was given up.

    timeouts: no answer in the time of that try; failures: it could not be asked, or gave no usable answer.
    """

    __slots__ = ("_latency", "_latency_max", "answers", "failures", "queries", "timeouts")

    def __init__(self) -> None:
        self.queries = 0
        self.answers = 0
        self.timeouts = 0
        self.failures = 0
        self._latency = 0.0
        self._latency_max = 0.0

    def answered(self, seconds: float) -> None:
        """It answered, so long after it was asked; a connection that had to be made first is in that time."""
        self.answers += 1
        self._latency += seconds
        self._latency_max = max(self._latency_max, seconds)

    def describe(self) -> dict[str, Any]:
        """queries, answers, timeouts, failures, and latency of the answers in seconds: count, sum_s, mean_s, max_s."""
        return {
            "queries": self.queries,
            "answers": self.answers,
            "timeouts": self.timeouts,
            "failures": self.failures,
            "latency": {
                "count": self.answers,
                "sum_s": round(self._latency, 6),
                "mean_s": round(self._latency / self.answers, 6) if self.answers else None,
                "max_s": round(self._latency_max, 6) if self.answers else None,
            },
        }
