"""What a pool had to do in the last minutes: for a chart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

STEP = 3.0  # seconds of a point
POINTS = 100  # of a chart

Points = dict[str, list[int]]


class History:
    """The largest figures of a pool in each STEP, up to POINTS of them."""

    def __init__(self) -> None:
        self._last = 0  # the number of the last point
        self._queued: deque[int] = deque(maxlen=POINTS)
        self._running: deque[int] = deque(maxlen=POINTS)

    def add(self, now: float, queued: int, running: int) -> None:
        """Note how many tasks wait and run `now` (monotonic seconds). Until then it was as the last time."""
        number = int(now / STEP)
        missing = min(number - self._last - 1, POINTS)
        for points, value in ((self._queued, queued), (self._running, running)):
            if not points or number > self._last:
                points.extend([points[-1]] * missing if points else ())
                points.append(value)
            else:
                points[-1] = max(points[-1], value)
        self._last = max(number, self._last)

    def read(self) -> Points:
        """Return the points up to the last moment that was noted, without the zeros at the beginning."""
        return {
            "queued": _without_start(self._queued.copy()),
            "running": _without_start(self._running.copy()),
        }


def _without_start(points: Iterable[int]) -> list[int]:
    values = list(points)
    start = next((place for place, value in enumerate(values) if value), len(values))
    return values[start:]


def shifted(points: Sequence[int], age: float, *, goes_on: bool) -> list[int]:
    """Return POINTS points up to now, of some that were noted `age` seconds ago.

    Since then it was as it was then, if it `goes_on`, and else there was nothing.
    """
    shift = max(0, min(POINTS, round(age / STEP)))
    last = points[-1] if points and goes_on else 0
    values = [*points, *[last] * shift][-POINTS:]
    return [0] * (POINTS - len(values)) + values


def total(histories: Iterable[Points]) -> Points:
    """Add up what has POINTS points each."""
    each = list(histories)
    return {
        what: [sum(values) for values in zip(*(of[what] for of in each), strict=True)] or [0] * POINTS
        for what in ("queued", "running")
    }
