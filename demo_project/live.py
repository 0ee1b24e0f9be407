"""What the dashboard shows, kept in this process's memory.

Nothing here takes a database connection: the dashboard has to stay alive while the site starves.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias

from django.db import connection
from django.dispatch import receiver

import bgtasks
from bgtasks.signals import task_shed

from .figures import Summary

logger = logging.getLogger(__name__)

Sample: TypeAlias = tuple[
    float, float, bool
]  # when the request was due (epoch seconds), its latency in ms, success


@dataclass
class Burst:
    """Many sign-ups at once: what became of their tasks, and what visitors felt meanwhile."""

    key: uuid.UUID
    how: str
    label: str
    asked: int
    started: float = field(default_factory=time.time)
    ended: float | None = None  # set once no task is left
    begun: int = 0
    done: int = 0
    raised: int = 0
    refused: int = 0
    shed: int = 0  # accepted, and too old when it was their turn
    oldest: float | None = None  # seconds from the sign-up to the latest mail
    samples: list[Sample] = field(
        default_factory=list
    )  # the requests that were due between started and ended

    @property
    def waiting(self) -> int:
        """How many of its tasks have neither begun nor been given up."""
        return self.asked - self.begun - self.refused - self.shed

    def as_json(self) -> dict[str, Any]:
        """Return the burst as the dashboard and `manage.py compare` read it."""
        return {
            "key": str(self.key),
            "how": self.how,
            "label": self.label,
            "asked": self.asked,
            "started": self.started,
            "ended": self.ended,
            "done": self.done,
            "raised": self.raised,
            "refused": self.refused,
            "shed": self.shed,
            "oldest": self.oldest,
            "requests": Summary.of((latency, ok) for _, latency, ok in self.samples).as_json(),
        }


class Board:
    """The figures of one server process.

    Tasks write from their threads, the probe's reports and the dashboard's questions come on the event loop;
    one lock guards it all and is never held for longer than it takes to copy.
    """

    HISTORY = 8000  # samples kept for a dashboard that is opened late: two minutes of 60 requests a second

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._samples: deque[tuple[int, Sample]] = deque(maxlen=self.HISTORY)  # with a running number
        self._number = 0  # of the newest sample
        self._failed = 0  # requests of the probe that failed
        self._waiting: tuple[int, float] = (0, 0.0)  # requests without an answer, age of the oldest in ms
        self._mails = 0
        self._bursts: deque[Burst] = deque(maxlen=20)

    def mail_delivered(self) -> None:
        """Count a mail."""
        with self._lock:
            self._mails += 1

    def report(self, samples: Iterable[Sample], waiting: int, oldest_ms: float) -> None:
        """Take over what the probe has seen since its last report.

        Args:
            samples: the requests that ended.
            waiting: how many have no answer yet.
            oldest_ms: how long the oldest of those has been waiting, in milliseconds.
        """
        with self._lock:
            self._waiting = (waiting, oldest_ms)
            for sample in samples:
                due, _, ok = sample
                self._number += 1
                self._failed += not ok
                self._samples.append((self._number, sample))
                for burst in self._bursts:
                    if burst.started <= due and (burst.ended is None or due <= burst.ended):
                        burst.samples.append(sample)

    def begin(self, key: uuid.UUID, how: str, label: str, asked: int) -> Burst:
        """Open the account of a burst."""
        burst = Burst(key, how, label, asked)
        with self._lock:
            self._bursts.append(burst)
        return burst

    def watched(self, burst: Burst, task: Callable[[int], None]) -> Callable[[int], None]:
        """Return the task, reporting its end to the burst's account. The same for every means."""

        def watched_task(pk: int) -> None:
            self._count(burst, "begun")
            try:
                task(pk)
            except BaseException:
                self._count(burst, "raised")
                raise
            self._count(burst, "done")

        return watched_task

    def refused(self, burst: Burst) -> None:
        """Note a task of the burst that was not accepted."""
        self._count(burst, "refused")

    def shed(self) -> None:
        """Note a task that was too old to run. Bursts expire in their order, so it is one of the oldest."""
        with self._lock:
            waiting = (burst for burst in self._bursts if burst.how == "fresh" and burst.waiting)
            if burst := next(waiting, None):
                self._count(burst, "shed")

    def _count(self, burst: Burst, figure: Literal["begun", "done", "raised", "refused", "shed"]) -> None:
        with self._lock:
            setattr(burst, figure, getattr(burst, figure) + 1)
            if figure == "done":
                burst.oldest = time.time() - burst.started
            if burst.done + burst.raised + burst.refused + burst.shed == burst.asked:
                burst.ended = time.time()

    def find(self, key: uuid.UUID) -> Burst | None:
        """Return the burst of that key, if it is still remembered."""
        with self._lock:
            return next((burst for burst in self._bursts if burst.key == key), None)

    def as_json(self, after: int) -> dict[str, Any]:
        """Return everything the dashboard shows, with the samples that came after number `after`."""
        with self._lock:
            fresh = [sample for number, sample in self._samples if number > after]
            waiting, oldest_ms = self._waiting
            latest = {burst.how: burst for burst in self._bursts}  # one of each means, the newest
            bursts = [burst.as_json() for burst in latest.values()]
            figures = {"last": self._number, "failed": self._failed, "mails": self._mails}
        return figures | {
            "now": time.time(),
            "samples": fresh,
            "waiting": {"requests": waiting, "oldest_ms": oldest_ms},
            "bursts": bursts,
            "threads": threading.active_count(),
            "pool": database_pool(),
            "tasks": background_tasks(),
        }


@cache
def _pool() -> Any:
    """Return psycopg's connection pool, or None where there is none. Asking for it takes no connection."""
    return getattr(connection, "pool", None)


def database_pool() -> dict[str, int] | None:
    """Return how the database's connection pool is used, or None if there is none."""
    pool = _pool()
    if pool is None:
        return None
    stats = pool.get_stats()
    size = stats.get("pool_size", 0)
    return {
        "size": stats.get("pool_max", size),
        "used": size - stats.get("pool_available", 0),
        "waiting": stats.get("requests_waiting", 0),
        "errors": stats.get("requests_errors", 0),
    }


def background_tasks() -> dict[str, int]:
    """Return the figures of the default bgtasks pool."""
    stats = bgtasks.stats()["default"]
    names = ("capacity", "conn_max", "queued", "running", "succeeded", "failed", "dropped", "shed")
    return {name: getattr(stats, name) for name in names}


board = Board()


@receiver(task_shed)
def note_shed(**_named: object) -> None:
    """Tell the board; only the tasks of a burst with an expiry are ever shed."""
    board.shed()
