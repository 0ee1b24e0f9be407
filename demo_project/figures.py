"""Percentiles, in the one way that the dashboard and `manage.py compare` both count them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Summary:
    """What a stretch of requests felt like, in milliseconds; failed requests count with their latency."""

    requests: int
    failed: int
    p50: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, requests: Iterable[tuple[float, bool]]) -> "Summary":
        """Sum up requests given as (latency in ms, success)."""
        pairs = list(requests)
        failed = sum(not ok for _, ok in pairs)
        if not pairs:
            return cls(0, 0)
        latencies = sorted(latency for latency, _ in pairs)
        return cls(len(pairs), failed, percentile(latencies, 50), percentile(latencies, 99), latencies[-1])

    def as_json(self) -> dict[str, float | int | None]:
        """Return the summary as a dict, rounded to hundredths of a millisecond."""
        return {
            key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed (nearest rank).

    Args:
        ascending: the values in ascending order, at least one.
        percent: more than 0, at most 100.
    """
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]
