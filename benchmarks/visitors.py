"""What the visitors of a site feel: the samples of the demo's probe, summed up for a stretch of time."""

import json
import threading
import time
from typing import Any, TypeAlias

from demo_project.figures import Summary

REQUEST_TIMEOUT = 10.0  # seconds, after which a request has failed
PATIENCE = 60.0  # seconds that the probe may be late

Stretch: TypeAlias = tuple[float, float]  # from and to, epoch seconds


class Visitors:
    """The samples of a running probe, read as they come.

    A request belongs to the stretch it was due in, however late its answer.
    """

    def __init__(self, process: Any) -> None:
        self.samples: list[tuple[float, float, bool]] = []  # due, latency in ms, success; the reader appends
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            due, latency, ok = json.loads(line)
            self.samples.append((due, latency, ok))

    def catch_up(self, until: float) -> None:
        """Wait until the probe, which may be late, has had answers to what was due before `until`."""
        deadline = time.time() + PATIENCE
        while max(self.samples, default=(0.0,))[0] < until and time.time() < deadline:
            time.sleep(0.1)

    def leave(self) -> None:
        """Let the probe wait for its last answers, and read them."""
        self._process.stdin.close()
        self._reader.join(REQUEST_TIMEOUT + 10)

    def during(self, stretch: Stretch) -> Summary:
        """Sum up the requests that were due in a stretch of time."""
        start, end = stretch
        return Summary.of((latency, ok) for due, latency, ok in self.samples if start <= due < end)
