"""The pace of plain functions: slots may have to do nothing for a moment between two tasks.

Who says for how long is ``bgtasks.monitoring.pace``. This module is what slots do then.
"""

from __future__ import annotations

from collections.abc import Collection
from time import sleep

from bgtasks.clock import monotonic

GRAIN = 0.001  # seconds; shorter waits add up until they are worth a sleep
STEP = 0.05  # seconds that a slot sleeps before it checks whether it still has to


class Pace:
    """The time from the start of one plain function to the start of the next, in all slots of the process."""

    def __init__(self) -> None:
        self.interval = 0.0  # seconds, 0.0 for none; written on the loop, read by slots
        self._next = 0.0  # monotonic seconds; two slots that write it at once start together, that is all

    def applies(self) -> bool:
        """Tell whether a slot that goes from one plain function to another has to ``wait``."""
        return self.interval > 0

    def free(self) -> None:
        """Let slots go as fast as they can."""
        self.interval = 0.0

    def wait(self, waiting: Collection[object]) -> None:
        """Wait until the next plain function may start, for as long as one is `waiting`. Called by slots."""
        now, interval = monotonic(), self.interval
        start = self._next = max(self._next + interval, now)
        if start - now < GRAIN:
            return
        while (left := start - monotonic()) > 0:
            if not waiting or self.interval < interval / 2:
                self._next = monotonic()  # what was planned is too far away by now
                return
            sleep(min(left, STEP))
