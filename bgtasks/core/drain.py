"""Steps under a pool's lock, and drains, which wait until certain tasks have ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from bgtasks.core.lock import acquire, new_lock
from bgtasks.core.task import Task

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q", bound="Steps")


class DrainWaiter:
    """The tasks that somebody waits for, and how to tell that they have ended."""

    def __init__(self, pending: set[Task], tell: Callable[[], object]) -> None:
        self.pending = pending  # under the pool's lock
        self.tell = tell  # called once all have ended, perhaps twice; it must not raise


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
                wake = self.to_wake()
            finally:
                self.lock.release()
            if wake is not None:
                wake()
            if self.drains:
                self.tell_drains()
        except BaseException:
            self.repair()
            raise
        return result

    return run


class Steps(ABC):
    """What has a lock, under which its steps are done, and tells drains what has ended."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.drains: dict[DrainWaiter, None] = {}  # a dictionary for its order, and its atomic operations

    @abstractmethod
    def to_wake(self) -> Callable[[], object] | None:
        """Return what wakes an idle slot, to be called after the step; None if no task waits for one."""

    @abstractmethod
    def repair(self) -> None:
        """Go on after an exception from outside in a step of this thread: no slot may miss its task."""

    @abstractmethod
    def tasks(self) -> set[Task]:
        """Return the tasks that wait or run. Part of a step."""

    @step
    def drain_waiter(
        self, tell: Callable[[], object], *, except_for: Iterable[Task | None] = ()
    ) -> DrainWaiter:
        """Have `tell` called once every task that now waits or runs has ended."""
        waiter = DrainWaiter(self.tasks().difference(except_for), tell)
        self.drains[waiter] = None
        return waiter

    @step
    def forget(self, waiter: DrainWaiter) -> None:
        """Tell `waiter` nothing any more."""
        self.drains.pop(waiter, None)

    def mark_ended(self, task: Task) -> None:
        """Have nobody wait for `task` any more. Part of a step."""
        for waiter in list(self.drains):
            waiter.pending.discard(task)

    def tell_drains(self) -> None:
        """Tell those who wait for nothing any more."""
        for waiter in list(self.drains):
            if not waiter.pending:
                waiter.tell()
                self.drains.pop(waiter, None)
