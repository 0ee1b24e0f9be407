"""The warnings about tasks that were not accepted, or were shed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from math import inf
from time import monotonic

from bgtasks.core.figures import DropReason, ShedReason
from bgtasks.core.lock import free, new_lock
from bgtasks.core.log import escaped, log_bare, logger
from bgtasks.core.queue import TaskQueue
from bgtasks.greenlets import NO_GREENLETS, NO_LOOP, patched

DROP_INTERVAL = 60.0  # seconds between two warnings about drops of tasks of one name
DROP_NAMES = 1000  # names whose drops are told apart; those of all further names share one warning


class DropLog:
    """Warn of drops at once, then at most once every DROP_INTERVAL for each name, with the number left out.

    A full queue would otherwise log once a request.
    """

    def __init__(self, queue: TaskQueue, later: Callable[[float, Callable[[], object]], object]) -> None:
        self._queue = queue
        self._later = later  # calls back after so many seconds, on another thread, or never
        self._lock = new_lock()
        self._names: dict[tuple[type, str], _Drops] = {}  # under the lock, as all in it

    def note(self, name: str, reason: DropReason | ShedReason) -> None:
        """Count that a task called `name` was dropped or shed, and warn if nobody has for a while."""
        try:
            with self._lock:
                key = reason.__class__, name
                drops = self._names.get(key) or self._add(key, reason)
                drops.unsaid += 1
                drops.reason = reason
                count = self._take(drops) if monotonic() >= drops.quiet_until else 0
            if count:
                self._warn(drops, count)
        except BaseException:
            free(self._lock)
            raise

    def flush(self) -> None:
        """Warn now of all drops that were only counted so far: the process ends."""
        try:
            with self._lock:
                names = list(self._names.values())
            for drops in names:
                self._look(drops, at=inf)
        except BaseException:
            free(self._lock)
            raise

    def _add(self, key: tuple[type, str], reason: DropReason | ShedReason) -> _Drops:
        kind, name = key
        if len(self._names) >= DROP_NAMES:
            key, name = (kind, ""), "(of many names)"
        return self._names.setdefault(key, _Drops(name, reason))

    @staticmethod
    def _take(drops: _Drops) -> int:
        """Return how many drops to warn of, and begin to count anew.

        Not after the warning is written: a handler that spawns, and is dropped, must not come back here.
        """
        count, drops.unsaid = drops.unsaid, 0
        drops.quiet_until = monotonic() + DROP_INTERVAL
        return count

    def _look(self, drops: _Drops, *, at: float | None = None) -> None:
        """Warn of what was left out, if the interval is over now, or `at` that monotonic second."""
        at = monotonic() if at is None else at
        with self._lock:
            count = self._take(drops) if drops.unsaid and at >= drops.quiet_until else 0
        if count:
            self._warn(drops, count)

    def _warn(self, drops: _Drops, count: int) -> None:
        self._write(drops.name, drops.reason, count)
        self._later(DROP_INTERVAL, partial(self._look, drops))

    def _write(self, name: str, reason: DropReason | ShedReason, count: int) -> None:
        queue = self._queue
        why = {
            DropReason.FULL: f"pool {queue.pool!r} is full (capacity {queue.capacity})",
            DropReason.SHUTDOWN: f"pool {queue.pool!r} is shut down",
            DropReason.NO_THREAD: NO_GREENLETS
            if patched() == "eventlet"
            else f"pool {queue.pool!r} cannot start a thread",
            DropReason.NO_LOOP: NO_LOOP,
            DropReason.PROPAGATOR: "a propagator could not capture its value",
            ShedReason.EXPIRED: "it has waited for too long",
            ShedReason.DISPLACED: f"pool {queue.pool!r} is full (capacity {queue.capacity}) of newer ones",
        }[reason]
        what = "shed" if isinstance(reason, ShedReason) else "dropped"
        args: tuple[object, ...] = (name, what, why) if count == 1 else (name, what, count, why)
        message = "task %r %s: %s" if count == 1 else "task %r %s %d times more: %s"
        extra = {
            "task": escaped(name),
            "pool": queue.pool,
            "reason": reason.value,
            "queue_length": len(queue.waiting),
        }
        try:
            logger.warning(message, *args, extra=extra)
        except Exception:
            log_bare(logging.WARNING, message, args)


class _Drops:
    """The drops, or the shed ones, of tasks of one name."""

    __slots__ = ("name", "quiet_until", "reason", "unsaid")

    def __init__(self, name: str, reason: DropReason | ShedReason) -> None:
        self.name = name
        self.unsaid = 0  # drops that no warning has told of
        self.reason = reason  # of the last drop
        self.quiet_until = 0.0  # monotonic seconds
