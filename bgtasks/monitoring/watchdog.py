"""Reports plain functions that run for longer than their pool's TASK_TIMEOUT. Nothing can stop them."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import Context
from functools import partial

from bgtasks.clock import monotonic
from bgtasks.core.log import log
from bgtasks.core.slot import Slot
from bgtasks.core.slots import Slots
from bgtasks.core.task import Life, Task, current
from bgtasks.monitoring.thread import MonitorThread
from bgtasks.repeats import repeats
from bgtasks.text import indented

OVERRUN = "task %r of pool %r has been running for more than %g s, in slot %r, at:\n%s"
OVERRUN_AGAIN = "task %r of pool %r has been running for more than %g s again (%d more)"


def functions(pools: Iterable[Slots]) -> Iterator[tuple[Slots, Slot, Task]]:
    """Yield each plain function that runs in `pools`: its pool, its slot, and its task."""
    for slots in pools:
        for slot in slots.all:
            task = slot.task
            if task is not None and not task.asynchronous and task.life is Life.RUNNING:
                yield slots, slot, task


class Watchdog(MonitorThread):
    """A thread that looks at running tasks whenever one may be due, and ends when none runs.

    It is not the drainer's loop, which a task may block. It sleeps until the first function that runs is past
    its limit, but never for longer than the shortest limit: one that begins meanwhile is due no earlier.
    """

    role = "watchdog"

    def __init__(self, built: Callable[[], Iterable[Slots]]) -> None:
        super().__init__()
        self._built = built  # what runs the tasks of each pool

    def _is_wanted(self) -> bool:
        return self._shortest_limit() is not None

    def _is_needed(self) -> bool:
        return any(self._functions())

    def _run(self, stop: threading.Event) -> None:
        pause = self._shortest_limit()
        while pause is not None and not stop.wait(min(pause, threading.TIMEOUT_MAX)):
            pause = self._look()

    def _shortest_limit(self) -> float | None:
        limits = [slots.task_timeout for slots in self._built() if slots.task_timeout is not None]
        return min(limits, default=None)

    def _functions(self) -> Iterator[tuple[Slot, Task, float]]:
        """Yield each plain function that runs in a pool with a limit: its slot, its task, and that limit."""
        for slots, slot, task in functions(self._built()):
            if slots.task_timeout is not None:
                yield slot, task, slots.task_timeout

    def _look(self) -> float | None:
        """Report what is past its limit. Return the seconds until the next look; None if nothing runs."""
        pause = self._shortest_limit()  # of what begins from now on
        running = False
        for slot, task, limit in self._functions():
            running = True
            left = task.started_at + limit - monotonic()
            if left > 0:
                pause = left if pause is None else min(pause, left)
            elif not task.overran:
                _report(slot, task, limit)
        return pause if running else None


def _report(slot: Slot, task: Task, limit: float) -> None:
    """Report that `task` runs for longer than `limit` seconds, and where it is."""
    frame = sys._current_frames().get(slot.thread.ident or 0)
    where = indented("".join(traceback.format_stack(frame)))
    if frame is None or slot.task is not task:
        return  # it has ended since we looked
    del frame  # which keeps the task's variables
    task.overran = True
    # As the task itself would say it: what is logged about a mail that hangs is not mailed.
    context = Context()
    context.run(current.set, weakref.ref(task))
    pool = slot.queue.pool
    is_first = repeats.is_first(("overruns", task.name, pool), partial(_report_more, pool, limit))
    level = logging.ERROR if is_first else logging.DEBUG
    context.run(log, level, OVERRUN, task.name, pool, limit, slot.name, where)


def _report_more(pool: str, limit: float, name: str, count: int) -> None:
    extra = {"task": name, "pool": pool, "count": count}
    log(logging.ERROR, OVERRUN_AGAIN, name, pool, limit, count, extra=extra)
