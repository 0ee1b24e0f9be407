"""A thread that lives only while it has something to do."""

from __future__ import annotations

import _thread
import logging
import threading
from contextlib import suppress
from contextvars import Context
from typing import ClassVar

from bgtasks.core.log import log


class MonitorThread:
    """A thread beside the drainer. Implements bgtasks.core.drainer.BackgroundThread.

    Slots call ``notify`` as they begin to work, so it waits for nothing: a bare thread starts the real one.
    ``Thread.start`` waits for the new thread, which takes milliseconds while others hold the GIL.
    """

    role: ClassVar[str]  # the thread's name is made of it

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know of no thread: this is a forked child, or nothing was started yet."""
        # Held as the thread starts, is told to end, and ends. Re-entrant, as a signal handler may shut down.
        self._lock = threading.RLock()
        self._let_go()

    def _let_go(self) -> None:
        self._thread: threading.Thread | None = None  # under _lock
        self._awake = False  # the thread is there, or being started; written under _lock, and by notify
        self._stop = threading.Event()  # of the thread that is there, or the next one; under _lock

    # What a subclass says.

    def _is_wanted(self) -> bool:
        """Tell whether the thread has to be there while tasks run. Called as a slot begins to work."""
        raise NotImplementedError

    def _run(self, stop: threading.Event) -> None:
        """Do the work, until nothing is left to do or `stop` is set. Called on the thread."""
        raise NotImplementedError

    def _is_needed(self) -> bool:
        """Tell whether there is something to do. Called on the thread after its work."""
        raise NotImplementedError

    # For the drainer and its slots.

    def notify(self) -> None:
        """Have the thread there. Any thread may call this, and it waits for nothing."""
        if self._awake or not self._is_wanted():
            return
        self._awake = True  # two callers at once start two bare threads, of which one starts the thread
        try:
            _thread.start_new_thread(self._start, (self._stop,))
        except BaseException as error:
            self._awake = False
            if not isinstance(error, RuntimeError):  # the interpreter is exiting, or no thread is left
                raise

    def stop(self) -> list[threading.Thread]:
        """Let the thread end soon, and return it for joining if it is there."""
        with self._lock:
            threads = self.threads()
            self._stop.set()
            self._let_go()
        return threads

    def threads(self) -> list[threading.Thread]:
        """Return the thread, if it is there."""
        thread = self._thread
        return [] if thread is None else [thread]

    # The bare thread, and the real one. Each knows by its `stop` whether it was told to end.

    def _start(self, stop: threading.Event) -> None:
        with self._lock, suppress(RuntimeError):  # the interpreter is exiting, or no thread is left
            if self._stop is not stop or self._thread is not None:
                return
            try:
                thread = threading.Thread(
                    target=self._main, args=(stop,), name=f"bgtasks-{self.role}", daemon=True
                )
                Context().run(thread.start)
                self._thread = thread  # to be joined, which it can be only now
            finally:
                self._awake = self._thread is not None

    def _main(self, stop: threading.Event) -> None:
        try:
            self._run(stop)
        except BaseException as error:
            log(logging.ERROR, "the %s was interrupted", self.role, error=error)
        with self._lock:
            if self._stop is not stop:
                return
            self._thread, self._awake = None, False
        # A slot may have begun to work *just* before, and have found us here.
        if self._is_needed():
            self.notify()
