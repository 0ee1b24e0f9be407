"""Writes what is logged of spawns, so that no spawn waits for a handler of the project's LOGGING."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bgtasks import database
from bgtasks.core.drainer import Drainer
from bgtasks.greenlets import patched
from bgtasks.monitoring.thread import MonitorThread
from bgtasks.repeats import Repeats


class LogWriter(MonitorThread):
    """A thread that is there while ``repeats`` has something to write, now or within a minute.

    It is not started where threads are greenlets, nor once the process shuts down: it might not get a turn.
    """

    role = "log-writer"

    def __init__(self, drainer: Drainer, may_start: Callable[[], bool], repeats: Repeats) -> None:
        self._drainer = drainer
        self._may_start = may_start
        self._repeats = repeats
        super().__init__()
        repeats.notify = self.notify_writer

    def notify_writer(self) -> bool:
        """Have the thread there, and look; False if that is impossible."""
        self.notify()
        if self._awake:
            self._repeats.wake()
        return self._awake

    def forget(self) -> None:
        """Know of no thread, and of nothing to write: this is a forked child, or nothing was said yet."""
        super().forget()
        self._repeats.forget()

    def stop(self) -> list[threading.Thread]:
        """Let the thread end soon, after what was handed over, and return it for joining if it is there."""
        threads = super().stop()
        if threads:
            self._repeats.wake()
        return threads

    def _is_wanted(self) -> bool:
        return self._drainer.accepting and self._is_needed() and patched() is None and self._may_start()

    def _is_needed(self) -> bool:
        return self._repeats.has_lines()

    def _start(self, stop: threading.Event) -> None:
        super()._start(stop)
        if not self._awake:
            self._repeats.write()  # there was a bare thread, and no other

    def _main(self, stop: threading.Event) -> None:
        super()._main(stop)
        if not self._awake:
            self._repeats.write_lines()  # handed over *just* before, and no other thread can be started

    def _run(self, stop: threading.Event) -> None:
        try:
            while self._repeats.write(wait=True) and not stop.is_set():
                pass
        finally:
            database.close()  # a handler may use the ORM
