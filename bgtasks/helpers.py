"""The threads of ``asyncio.to_thread`` and of look-ups on the drainer's loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import ParamSpec, TypeVar, cast

from bgtasks import database
from bgtasks.child import end_child

P = ParamSpec("P")
T = TypeVar("T")

HELPERS_MAX = min(32, (os.cpu_count() or 1) + 4)  # threads, as in asyncio's own executor


class Helpers(ThreadPoolExecutor):
    """Daemon threads: the interpreter waits for those of a ``ThreadPoolExecutor`` as it exits, for ever.

    It is derived from that class since asyncio takes no other executor, and starts no thread of it. CONN_MAX
    does not limit these threads. At least they keep no connection: nobody else would ever close it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None ends one thread
        self._lock = Lock()
        self._helpers: list[Thread] = []  # under the lock, as what follows
        self._idle = 0  # threads without a call, less the calls that wait
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn` on one of the threads, and close what it has opened there.

        Raises:
            RuntimeError: It is shut down, or the machine has no thread for the first call.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the drainer's loop has ended")
            self._idle -= 1
            if self._idle < 0 and len(self._helpers) < HELPERS_MAX:
                self._start()
            self._calls.put(partial(_call_into, future, partial(fn, *args, **kwargs)))
        return future

    def _start(self) -> None:
        thread = Thread(target=self._main, name=f"bgtasks-helper_{len(self._helpers)}", daemon=True)
        try:
            # It must not inherit the context of the first task.
            Context().run(thread.start)
        except RuntimeError:
            if not self._helpers:
                self._idle += 1
                raise
        else:
            self._helpers.append(thread)
            self._idle += 1

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # an idle thread keeps nothing of its last call
            with self._lock:
                self._idle += 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002  # as it is
        """Take no more calls, and let the threads end after those that wait."""
        with self._lock:
            self._closed = True
            helpers = list(self._helpers)
        for _ in helpers:
            self._calls.put(None)
        for thread in helpers if wait else ():
            thread.join()


def _call_into(future: Future[T], fn: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    process = os.getpid()
    result: T | None = None
    error: BaseException | None = None
    try:
        result = fn()
    except BaseException as exception:
        error = exception
    if os.getpid() != process:
        end_child(error)
    database.close()
    if error is None:
        future.set_result(cast(T, result))
    else:
        future.set_exception(error)
    del future, error  # its traceback refers to this frame
