"""The drainer's thread and its event loop, on which the asynchronous tasks of all pools run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial
from time import sleep
from typing import Any

from bgtasks.clock import monotonic
from bgtasks.core.log import log

CLOSE_PATIENCE = 0.2  # seconds for what tasks have left behind on the loop
BROKEN_PAUSE = 1.0  # seconds before a loop is run again that may be broken, and would do nothing but log


class Loop:
    """An event loop on a thread of its own, which any thread may have call something."""

    def __init__(
        self,
        new_executor: Callable[[], ThreadPoolExecutor] = ThreadPoolExecutor,
        may_run: Callable[[], bool] = lambda: True,
    ) -> None:
        self._new_executor = new_executor  # for asyncio.to_thread, and for look-ups
        self.may_run = may_run  # False where the loop would share its thread with all others
        # Called as the code of a task ends, with what it raised. In the child of a task that has forked, it
        # ends the process, which must not run the tasks of its parent.
        self.end_if_forked: Callable[[BaseException | None], object] = lambda _: None
        self.blocked = False  # it does not answer; written by whoever watches it
        self.used = False  # since whoever watches it has cleared that
        # Written under the drainer's lock, read without it.
        self.running: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        # Loops that were deaf, each with its tasks. To free them would run the ends of user code, and close
        # descriptors whose numbers are others' by now.
        self._left: dict[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]] = {}

    def start(self) -> None:
        """Start the thread and its loop.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is exiting.
        """
        loop = asyncio.new_event_loop()
        executor = self._new_executor()
        loop.set_default_executor(executor)
        with contextlib.suppress(AttributeError):  # of a loop that is not written in Python
            setattr(loop, "shutdown_default_executor", _keep_executor)  # noqa: B010  # a method
            setattr(loop, "time", monotonic)  # noqa: B010
        arguments = loop, executor
        thread = threading.Thread(target=self._main, args=arguments, name="bgtasks-drainer", daemon=True)
        before = self.running, self.thread
        self.running, self.thread = loop, thread
        try:
            Context().run(thread.start)
        except BaseException:
            self.running, self.thread = before
            loop.close()
            raise

    def stop(self) -> list[threading.Thread]:
        """Tell the thread to end, and return it for joining if it is there."""
        loop, thread = self.running, self.thread
        self.running = self.thread = None
        if loop is None or thread is None:
            return []
        loop.call_soon_threadsafe(loop.stop, context=Context())
        return [thread]

    def replace(self) -> None:
        """Have another loop, and thread, in place of one that is deaf. Raises as ``start`` does."""
        deaf = self.running
        self.start()
        if deaf is not None:
            self._left[deaf] = asyncio.all_tasks(deaf)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Have `callback` called on the loop; False if the loop is not there."""
        loop = self.running
        if loop is None:
            return False
        self.used = True
        try:
            # In a context of its own: the default, the caller's, would be kept, and seen, by the loop.
            loop.call_soon_threadsafe(callback, *args, context=Context())
        except RuntimeError:
            return False  # it has been closed since we looked
        return True

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback` on the loop in `delay` seconds, unless the loop stops before."""
        loop = self.running
        if loop is not None:
            self.call_soon(partial(loop.call_later, delay, callback, *args, context=Context()))

    def _main(self, loop: asyncio.AbstractEventLoop, executor: ThreadPoolExecutor) -> None:
        while self.running is loop:
            try:
                loop.run_forever()
            except BaseException as error:
                # asyncio lets SystemExit and KeyboardInterrupt pass, of coroutines that tasks left behind.
                log(logging.ERROR, "the drainer's loop was interrupted; it goes on", error=error)
                if not isinstance(error, SystemExit | KeyboardInterrupt):
                    sleep(BROKEN_PAUSE)
            else:
                if self.running is loop:
                    log(logging.ERROR, "the drainer's loop was stopped by a task; it goes on")
        if loop in self._left:
            return
        _close(loop)
        executor.shutdown()  # its threads end before this one does: a fork waits for that


async def _keep_executor(timeout: float | None = None) -> None:  # noqa: ARG001, ASYNC109  # as asyncio's
    """Leave the executor of all tasks alone, whoever asks: it ends with the loop."""


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what tasks have left behind on the `loop`, and close it."""
    try:
        left = asyncio.all_tasks(loop)
        for runner in left:
            runner.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_PATIENCE))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except BaseException as error:
        log(logging.ERROR, "the drainer's loop could not be emptied", error=error)
    finally:
        loop.close()
