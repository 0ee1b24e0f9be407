"""Waiting for tasks, and ending pools: one pool or all of them, from plain and from asynchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import cast

from bgtasks.building import Built
from bgtasks.clock import monotonic
from bgtasks.core.drainer import Drainer
from bgtasks.core.log import log
from bgtasks.core.places import DrainWaiter
from bgtasks.core.shutdown import shut_down
from bgtasks.core.task import current_task


class Waitable(ABC):
    """What one pool and all pools together have in common: code can wait for their tasks, and end them."""

    def __init__(self, drainer: Drainer) -> None:
        self.drainer = drainer

    @abstractmethod
    def parts(self) -> Sequence[Built]:
        """Return what each pool is made of, as far as it is in use."""

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every task that was spawned before this call has ended. More may be spawned meanwhile.

        ``bgtasks.drain()`` waits for the tasks of all pools, and the method of a pool for its own tasks.

        >>> bgtasks.drain(timeout=30)
        True

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            True once all of them have ended, False if the time ran out before.

        Raises:
            TypeError: `timeout` is not a number.
            RuntimeError: Called inside a task, which would wait for itself, or on the drainer's event loop,
                which it would block.
        """
        timeout = check_timeout(timeout)
        if self.drainer.is_own_thread():
            raise RuntimeError("drain() would block the drainer's loop; use 'await adrain()'")
        deadline = None if timeout is None else monotonic() + timeout
        signal: SimpleQueue[None] = SimpleQueue()
        with self._waiters(partial(signal.put, None)) as waiters:
            while any(waiter.pending for waiter in waiters):
                try:
                    signal.get(timeout=None if deadline is None else max(0.0, deadline - monotonic()))
                except Empty:
                    return False
        return True

    async def adrain(self, timeout: float | None = None) -> bool:
        """Wait as ``drain`` does, without blocking the event loop.

        >>> async def main():
        ...     return await bgtasks.adrain(timeout=30)
        >>> asyncio.run(main())
        True

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            True once every task spawned before this call has ended, False if the time ran out before.

        Raises:
            TypeError: `timeout` is not a number.
            RuntimeError: Called inside a task, which would wait for itself.
        """
        timeout = check_timeout(timeout)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        with self._waiters(tell) as waiters, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(waiter.pending for waiter in waiters):
                    await ended.wait()
                    ended.clear()
        return not any(waiter.pending for waiter in waiters)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Accept no more tasks, wait for the accepted ones, and cancel what is left.

        A second call waits until the first one has finished.

        Args:
            timeout: Seconds to wait at most; None stands for the SHUTDOWN_TIMEOUT of each pool.

        Returns:
            True if no task was cancelled. Otherwise False, and a warning names the cancelled tasks.

        Raises:
            TypeError: `timeout` is not a number. Nothing is shut down.
            RuntimeError: Called on the drainer's event loop. Use ``ashutdown`` there.
        """
        timeout = check_timeout(timeout)
        self.refuse_on_loop()
        now = monotonic()
        plan = {
            part.shutdown: now + (part.slots.shutdown_timeout if timeout is None else timeout)
            for part in self.parts()
        }
        return shut_down(plan) == 0

    async def ashutdown(self, timeout: float | None = None) -> bool:
        """Shut down as ``shutdown`` does, without blocking the event loop.

        If no thread can be started, it blocks the loop, so that every accepted task runs or is reported.

        Args:
            timeout: Seconds to wait at most; None stands for the SHUTDOWN_TIMEOUT of each pool.

        Returns:
            True if no task was cancelled. Otherwise False, and a warning names the cancelled tasks.

        Raises:
            TypeError: `timeout` is not a number. Nothing is shut down.
            RuntimeError: No thread can be started, and this is the drainer's event loop.
        """
        timeout = check_timeout(timeout)
        for part in self.parts():
            part.slots.queue.close()
        try:
            ended = _on_new_thread(partial(self.shutdown, timeout))
        except RuntimeError as error:
            if self.drainer.is_own_thread():
                raise  # it would wait for itself; the shutdown at exit reports what is left
            log(logging.ERROR, "no thread for the shutdown, which blocks the event loop", error=error)
            return self.shutdown(timeout)
        return await asyncio.wrap_future(ended)

    @contextlib.contextmanager
    def _waiters(self, tell: Callable[[], object]) -> Generator[list[DrainWaiter], None, None]:
        """Have `tell` called when what now waits or runs has ended in a pool, for each pool."""
        own = current_task()
        parts = self.parts()
        for part in parts:
            if own is not None and own in part.slots.queue.running():
                raise RuntimeError(f"task {own.name!r} would wait for itself in drain()")
            if part.slots.queue.queued:
                self.drainer.ensure(part.slots)
        waiters: list[DrainWaiter] = []
        try:
            for part in parts:
                waiters.append(part.slots.queue.drain_waiter(tell))  # noqa: PERF401  # each is forgotten
            yield waiters
        finally:
            for part, waiter in zip(parts, waiters, strict=False):
                part.slots.queue.forget(waiter)

    def refuse_on_loop(self) -> None:
        """Raise RuntimeError on the drainer's loop, which a shutdown would block."""
        if self.drainer.is_own_thread():
            raise RuntimeError("shutdown() would block the drainer's loop; use 'await ashutdown()'")


def check_timeout(timeout: float | None) -> float | None:
    """Return a `timeout` that threads can wait for; one that is no number raises before anything is done."""
    whatever = cast(object, timeout)
    if whatever is not None and (isinstance(whatever, bool) or not isinstance(whatever, int | float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return None if timeout is None else min(timeout, threading.TIMEOUT_MAX)


def _on_new_thread(call: Callable[[], bool]) -> Future[bool]:
    """Make a `call` on a thread of its own: the executor of a loop may be full of other people's work."""
    ended: Future[bool] = Future()
    context = copy_context()

    def run() -> None:
        ended.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            ended.set_result(context.run(call))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="bgtasks-shutdown", daemon=True).start()
    return ended
