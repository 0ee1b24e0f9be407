"""How a pool ends: no new tasks, a time for the accepted ones, and a report of what is left."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Mapping
from functools import partial
from math import inf

from bgtasks.clock import monotonic
from bgtasks.core.drainer import STOP_PATIENCE, Drainer, join
from bgtasks.core.figures import Outcome
from bgtasks.core.log import log
from bgtasks.core.queue import TaskQueue
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task, current_task
from bgtasks.text import counts_of

START_PATIENCE = 0.1  # seconds for threads to be started, before a shutdown checks whether they can be


class Shutdown:
    """The shutdown of one pool.

    It may be asked for again, by another thread or after an exception: every step starts from what it finds,
    and the earliest deadline is in force.
    """

    def __init__(self, slots: Slots, drainer: Drainer) -> None:
        self.slots = slots
        self.lock = threading.RLock()  # held by whoever shuts the pool down
        self.complete = False  # under the lock
        self._drainer = drainer
        self.deadline = inf  # monotonic seconds, when it gives up; see hasten
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the one who shuts down
        self._asked: list[Task] = []  # running tasks that were asked to end; under the lock
        self._cancelled: list[Task] = []  # what was given up; under the lock
        self._told = 0  # of these, how many the listeners know of; under the lock

    def hasten(self, deadline: float) -> None:
        """Give up at `deadline` (monotonic seconds), unless it does so before."""
        self.deadline = min(deadline, self.deadline)
        self._signal.put(None)

    def wait(self, own: Task | None) -> None:
        """Wait until nothing but `own` waits or runs, or the time is over; then cancel what waits."""
        slots, tasks = self.slots, self.slots.queue
        slots.wind_up(self.deadline, self._cancelled)
        waiter = tasks.drain_waiter(partial(self._signal.put, None), except_for={own})
        while waiter.pending and (left := self.deadline - monotonic()) > 0:
            if tasks.queued and not self._has_threads():
                break  # nobody is there to run them
            # The start of threads may fail behind our back, and then nobody would wake us.
            self._sleep(left if slots.all else min(left, START_PATIENCE))
        tasks.forget(waiter)
        tasks.cancel_waiting(self._cancelled)
        self._tell()
        self._asked += [task for task in tasks.running() if task is not own]
        for slot in slots.all:
            if (task := slot.task) is not None and task in self._asked and task.asynchronous:
                slots.loop.call_soon(slot.stop_task, task, Outcome.CANCELLED)

    def give_up(self, patience: float) -> None:
        """Wait until `patience` (monotonic seconds) for cancelled coroutines, and give up what still runs."""
        tasks = self.slots.queue
        hopeless = tasks.read(TaskQueue.tasks) - {task for task in self._asked if task.asynchronous}
        waiter = tasks.drain_waiter(partial(self._signal.put, None), except_for=hopeless)
        while waiter.pending and (left := patience - monotonic()) > 0:
            self._sleep(left)
        tasks.forget(waiter)
        self.slots.abandon(self._cancelled)
        tasks.give_up(self._asked, self._cancelled)
        self._tell()

    def _has_threads(self) -> bool:
        return bool(self.slots.all) or (self._drainer.ensure(self.slots) and not self._drainer.failing)

    def _sleep(self, seconds: float) -> None:
        """Sleep until what is waited for has ended, the deadline is brought forward, or time is over."""
        with contextlib.suppress(queue.Empty):
            self._signal.get(timeout=seconds)

    def _tell(self) -> None:
        """Tell the listeners of the cancelled tasks that they do not know of yet."""
        while self._told < len(self._cancelled):
            task = self._cancelled[self._told]
            task.discard()
            self._told += 1
            self.slots.hooks.finished(task, Outcome.CANCELLED, None)

    def conclude(self, own: Task | None) -> tuple[int, list[threading.Thread]]:
        """Report in one warning what was cancelled, and let the threads end.

        Returns:
            How many tasks were cancelled, and the threads to join.
        """
        pool = self.slots.queue.pool
        by_themselves = [task for task in self._asked if task.outcome is Outcome.CANCELLED]
        tasks = dict.fromkeys([*self._cancelled, *by_themselves])
        if tasks:
            names = counts_of(task.name for task in tasks)
            log(logging.WARNING, "pool %r was shut down with %d tasks cancelled: %s", pool, len(tasks), names)
        # No call in between, so it is said again as a whole or not at all.
        self._cancelled, self._asked, self._told = [], [], 0
        if own is not None and own in self.slots.queue.running():
            return len(tasks), []  # it goes on, and may need its slot; the next call, at exit, ends that
        threads = self._drainer.remove(self.slots)
        self.complete = True
        return len(tasks), threads


def shut_down(plan: Mapping[Shutdown, float]) -> int | None:
    """Shut pools down, side by side, each until its deadline in monotonic seconds.

    Returns:
        The number of cancelled tasks. None if a task asks for a shutdown that is under way: it would
        only hold that up.
    """
    own = current_task()
    shutdowns = sorted(plan, key=lambda shutdown: shutdown.slots.queue.pool)  # everybody locks in this order
    for shutdown in shutdowns:
        shutdown.slots.queue.close()
        if own is None:
            shutdown.hasten(plan[shutdown])  # another thread may be at it
    with contextlib.ExitStack() as stack:
        for shutdown in shutdowns:
            if not shutdown.lock.acquire(blocking=own is None):
                return None
            stack.callback(shutdown.lock.release)
            shutdown.hasten(plan[shutdown])
        left = [shutdown for shutdown in shutdowns if not shutdown.complete]
        for shutdown in sorted(left, key=lambda shutdown: shutdown.deadline):
            shutdown.wait(own)
        patience = monotonic() + STOP_PATIENCE
        for shutdown in left:
            shutdown.give_up(patience)
        ends = [shutdown.conclude(own) for shutdown in left]
        join([thread for _, threads in ends for thread in threads], STOP_PATIENCE)
        return sum(number for number, _ in ends)
