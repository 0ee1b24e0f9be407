"""The last failures and drops of one pool, kept as text to be looked at. Nothing of the tasks themselves."""

from __future__ import annotations

from collections import deque
from time import time
from typing import NamedTuple

from bgtasks.core.lock import free, new_lock

LAST = 20  # groups of failures, and drops, of a pool that are kept
MESSAGE_MAX = 200  # characters of the message of an exception that are kept


class Failure(NamedTuple):
    """Failures of one name, outcome, type and place in the code. What is not counted is of the last one."""

    at: float  # seconds since the epoch
    name: str
    outcome: str
    error: str  # the type
    message: str
    where: str  # the file and the line that have raised; "" if nothing was raised there
    traceback: str  # without the values of variables
    wait_s: float
    run_s: float
    times: int = 1
    since: float = 0.0  # when the first one that is counted was, in seconds since the epoch


class Drop(NamedTuple):
    """One of the last tasks that were not accepted."""

    at: float  # seconds since the epoch
    name: str
    reason: str


class Recent:
    """What is kept of one pool. To append to a deque needs no lock."""

    def __init__(self) -> None:
        self.drops: deque[Drop] = deque(maxlen=LAST)
        self._lock = new_lock()
        self._failures: dict[
            tuple[str, ...], Failure
        ] = {}  # the one that failed last at the end; under _lock

    @property
    def failures(self) -> list[Failure]:
        """The groups of failures, the one that failed last at the end."""
        return list(self._failures.copy().values())

    def add_failure(self, failure: Failure) -> None:
        """Count `failure` with those of its kind. The group whose last one is the oldest may give way."""
        key = failure.name, failure.outcome, failure.error, failure.where
        try:
            with self._lock:
                known = self._failures.pop(key, None)
                if known is None and len(self._failures) >= LAST:
                    del self._failures[next(iter(self._failures))]
                times, since = (1, failure.at) if known is None else (known.times + 1, known.since)
                self._failures[key] = failure._replace(times=times, since=since)
        except BaseException:
            free(self._lock)  # a signal handler has raised
            raise

    def add_drop(self, name: str, reason: str) -> None:
        """Keep that a task called `name` was not accepted."""
        self.drops.append(Drop(time(), name, reason))
