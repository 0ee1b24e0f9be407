"""Steps under a pool's lock, and those who wait for tasks to end."""

from __future__ import annotations

import contextlib
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import wraps
from time import monotonic
from typing import Concatenate, ParamSpec, TypeVar

from bgtasks.core.lock import acquire, new_lock
from bgtasks.core.places import Seat
from bgtasks.core.task import Task

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q", bound="Steps")


class DrainWaiter:
    """What a drain waits for: with the names of a ``concurrent.futures.Future``, but without a lock.

    A signal handler that raises in the middle of a wait would leave that held, and slots would wait for it.
    """

    def __init__(self, pending: set[Task], forget: Callable[[DrainWaiter], None]) -> None:
        self.pending = pending  # under the pool's lock
        self._forget = forget
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._callbacks: list[Callable[[DrainWaiter], object]] = []

    def done(self) -> bool:
        """Tell whether all tasks have ended."""
        return not self.pending

    def result(self, timeout: float | None = None) -> bool:
        """Wait until all tasks have ended, and return True.

        Raises:
            TimeoutError: They have not within `timeout` seconds.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while self.pending:
            try:
                self._bell.get(timeout=None if deadline is None else max(0.0, deadline - monotonic()))
            except queue.Empty:
                raise TimeoutError from None
        return True

    def add_done_callback(self, callback: Callable[[DrainWaiter], object]) -> None:
        """Have `callback` called when all tasks have ended, once or twice. It may raise RuntimeError."""
        self._callbacks.append(callback)
        if not self.pending:
            callback(self)

    def cancel(self) -> None:
        """Wait no longer."""
        self._forget(self)

    def set_result(self) -> None:
        """Wake whoever waits."""
        self._bell.put(None)
        for callback in self._callbacks:
            with contextlib.suppress(RuntimeError):  # of an event loop that is closed
                callback(self)


def step(method: Callable[Concatenate[Q, P], T]) -> Callable[Concatenate[Q, P], T]:
    """Have `method` run under the queue's lock, as one step, and then do what follows from it.

    A slot is woken if tasks wait, and drains hear of what has ended. A step calls no other one.
    """

    @wraps(method)
    def run(self: Q, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            if not self.lock.acquire(False):
                acquire(self.lock)
            try:
                result = method(self, *args, **kwargs)
                seat = self.to_wake()
            finally:
                self.lock.release()
            if seat is not None:
                seat.bell.put(None)
            if self.drains:
                self.announce()
        except BaseException:
            self.repair()
            raise
        return result

    return run


class Steps(ABC):
    """What has a lock, under which its steps are done, and tells those who wait what has ended."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.drains: dict[DrainWaiter, None] = {}  # written under the lock, copied without it

    @abstractmethod
    def to_wake(self) -> Seat | None:
        """Return the idle slot whose bell shall be rung, after the step, if tasks wait."""

    @abstractmethod
    def repair(self) -> None:
        """Go on after an exception from outside in a step of this thread: nobody may miss a wake-up."""

    @abstractmethod
    def accepted(self) -> set[Task]:
        """Return the tasks that wait or run. Part of a step."""

    @step
    def drain_waiter(self, *, except_for: Iterable[Task | None] = ()) -> DrainWaiter:
        """Return what waits until every task that now waits or runs has ended."""
        pending = self.accepted()
        waiter = DrainWaiter(pending.difference(except_for), self.forget)
        self.drains[waiter] = None
        return waiter

    @step
    def forget(self, waiter: DrainWaiter) -> None:
        """Tell `waiter` nothing any more."""
        self.drains.pop(waiter, None)

    def strike(self, task: Task) -> None:
        """Have nobody wait for `task` any more. Part of a step."""
        for waiter in list(self.drains):
            waiter.pending.discard(task)

    def announce(self) -> None:
        """Wake those who wait for nothing any more."""
        reached = [waiter for waiter in list(self.drains) if not waiter.pending]
        for waiter in reached:
            waiter.set_result()
        if reached:
            with self.lock:
                for waiter in reached:
                    self.drains.pop(waiter, None)
