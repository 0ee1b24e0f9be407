"""What is logged again and again: at once the first time, then once a minute with the number left out.

A full queue would log once a request, and a mail server that is down once a mail. What is said of a spawn is
handed to another thread, so that a slow handler of the project's LOGGING delays no request.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from math import inf

from bgtasks.clock import monotonic
from bgtasks.core.lock import free, new_lock
from bgtasks.core.log import log
from bgtasks.text import escaped

INTERVAL = 60.0  # seconds between two records of one kind
KINDS_MAX = 1000  # kinds of one sort that are kept separate; all further ones share one record
MANY = "(of many names)"  # in place of the name, in what these share
FLUSH_PATIENCE = 5.0  # seconds that a shutdown waits for a handler which is just writing

Key = tuple[str, str, *tuple[object, ...]]  # the sort of record, the name it is about, and what else differs


class Repeats:
    """Limits what is logged of each kind, and hands lines to a thread that writes them.

    A kind is a key, such as ``("dropped", "send-mail", "default")``.
    """

    def __init__(self) -> None:
        self.notify: Callable[[], bool] = lambda: False  # has a thread `write`; False if there is none
        self.forget()

    def forget(self) -> None:
        """Know of nothing: this is a forked child, or nothing was said yet."""
        # All of it is re-entrant: a signal handler or a ``__del__`` may spawn in the middle of a spawn.
        self._lines: deque[Callable[[], object]] = deque()  # handed over
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the thread
        self._writing = threading.RLock()  # held by whoever writes them
        self._lock = new_lock()
        # Under the lock:
        self._kinds: dict[Key, _Kind] = {}
        self._sizes: Counter[str] = Counter()  # kinds of each sort
        self._unsaid: dict[_Kind, None] = {}  # those of which something was left out

    def is_first(self, key: Key, more: Callable[[str, int], object]) -> bool:
        """Tell whether the caller is to log this now. If not, it is counted.

        Args:
            key: Its kind.
            more: Is called with the name of the kind and the number left out, once the interval is over.
        """
        try:
            with self._lock:
                now = monotonic()
                kind = self._kinds.get(key) or self._add(key)
                if not kind.left_out and now >= kind.quiet_until:
                    kind.quiet_until = now + INTERVAL
                    return True
                kind.left_out += 1
                kind.more = more
                self._unsaid[kind] = None
                wake = kind.left_out == 1 or now >= kind.quiet_until
        except BaseException:
            free(self._lock)
            raise
        if wake and not self.notify() and now >= kind.quiet_until:
            self.write()
        return False

    def _add(self, key: Key) -> _Kind:
        sort, name = key[:2]
        if self._sizes[sort] >= KINDS_MAX:
            key, name = (sort, MANY), MANY
        if key not in self._kinds:
            self._sizes[sort] += 1
            self._kinds[key] = _Kind(name)
        return self._kinds[key]

    def hand_over(self, line: Callable[[], object]) -> None:
        """Have `line` called in the caller's context, on another thread. Without one it is called here."""
        self._lines.append(partial(copy_context().run, line))
        if not self.notify():
            self.write_lines()

    def has_lines(self) -> bool:
        """Tell whether there is something to write, now or when an interval is over."""
        return bool(self._unsaid or self._lines)

    def wake(self) -> None:
        """Have ``write`` wait no longer."""
        self._bell.put(None)

    def write(self, *, wait: bool = False) -> bool:
        """Write what was handed over, and the numbers left out whose interval is over.

        Args:
            wait: Before that, wait until there is something to write.

        Returns:
            False if nothing is left to write.
        """
        if wait:
            self._wait()
        self.write_lines()
        self._write_left_out(monotonic())
        return self.has_lines()

    def flush(self) -> None:
        """Write all, without waiting for an interval: the process ends. Then begin anew."""
        self.write_lines(FLUSH_PATIENCE)
        self._write_left_out(inf)
        try:
            with self._lock:
                self._kinds.clear()
                self._sizes.clear()
        except BaseException:
            free(self._lock)
            raise
        self.wake()  # the thread has nothing left to wait for

    def _wait(self) -> None:
        due = min((kind.quiet_until for kind in tuple(self._unsaid)), default=0.0)
        with suppress(queue.Empty):
            self._bell.get(timeout=max(0.0, due - monotonic()))

    def write_lines(self, patience: float = 0.0) -> None:
        """Write what was handed over. If another thread does so, wait for it `patience` seconds at most."""
        try:
            while patience or self._lines:
                if not self._writing.acquire(timeout=patience):
                    return  # it looks again, as we do, after it has released that
                while self._lines:
                    self._lines.popleft()()
                self._writing.release()
                patience = 0.0
        except BaseException:
            free(self._writing)
            raise

    def _write_left_out(self, at: float) -> None:
        """Write the numbers left out whose interval is over `at` that monotonic second."""
        try:
            for kind in tuple(self._unsaid):
                with self._lock:
                    count = kind.left_out if at >= kind.quiet_until else 0
                    if count:
                        # Not after it is written: a handler that spawns, and is dropped, must not come back.
                        kind.left_out, kind.quiet_until = 0, monotonic() + INTERVAL
                        self._unsaid.pop(kind, None)
                if count:
                    kind.more(kind.name, count)
        except BaseException:
            free(self._lock)
            raise


class _Kind:
    """What was said, and not said, of one kind."""

    __slots__ = ("left_out", "more", "name", "quiet_until")

    more: Callable[[str, int], object]  # of the last one that was left out

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_out = 0
        self.quiet_until = 0.0  # monotonic seconds


repeats = Repeats()  # of the process, as the logger is


def report(level: int, message: str, name: str, error: BaseException | None = None) -> None:
    """Log what code of the project has done wrong, which it may do with every task. Waits for no handler.

    Args:
        level: As ``logging.ERROR``.
        message: What has happened, with a %r for the `name`.
        name: What it is about.
        error: What the code has raised. The first time, its traceback is logged.
    """
    kind = "" if error is None else f": {escaped(type(error).__name__)}"

    def report_more(name: str, count: int) -> None:
        log(level, message + " (%d more)%s", name, count, kind)

    if repeats.is_first((message, name, kind), report_more):
        repeats.hand_over(partial(log, level, message, name, error=error))
