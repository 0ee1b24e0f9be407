"""Reports a drainer's loop that does not answer, since a coroutine blocks it: all others wait for that."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from types import FrameType

from bgtasks.core.drainer import Drainer
from bgtasks.core.log import indented, log
from bgtasks.core.slots import Slot, Slots
from bgtasks.core.task import Task
from bgtasks.monitoring.thread import MonitorThread

LOOK_INTERVAL = 0.5  # seconds between two looks
PATIENCE = 1.0  # seconds that the loop may take to answer

BLOCKED = "the drainer's loop has not answered for %.1f s: %s blocks it, and all coroutines wait, at:\n%s"


class LoopWatch(MonitorThread):
    """A thread that has the loop answer every LOOK_INTERVAL while coroutines run, and ends when none does."""

    role = "loop-watch"

    def __init__(self, drainer: Drainer, built: Callable[[], Iterable[Slots]]) -> None:
        super().__init__()
        self._drainer = drainer
        self._built = built  # what runs the tasks of each pool
        self._asked_at: float | None = None  # monotonic seconds; cleared on the loop as it answers

    def _is_wanted(self) -> bool:
        return self._drainer.loop.used

    def _is_needed(self) -> bool:
        return self._asked_at is not None or any(self._coroutines())

    def _coroutines(self) -> Iterator[Task]:
        """Yield the coroutines that run in all pools."""
        for slots in self._built():
            for slot in slots.all:
                task = slot.task
                if task is not None and task.asynchronous:
                    yield task

    def _run(self, stop: threading.Event) -> None:
        self._asked_at = None
        while not stop.is_set():
            self._drainer.loop.used = False  # first: if a coroutine comes *just* now, `_main` looks again
            if not self._is_needed() or stop.wait(LOOK_INTERVAL):
                return
            self._look()

    def _look(self) -> None:
        loop, asked_at = self._drainer.loop, self._asked_at
        if asked_at is None:
            self._asked_at = monotonic()
            if not loop.call_soon(self._answer, self._asked_at):
                self._asked_at = None  # it has ended
        elif monotonic() - asked_at >= PATIENCE and not loop.blocked:
            self._set_blocked(True)
            self._report(monotonic() - asked_at)

    def _answer(self, asked_at: float) -> None:
        """Called on the loop."""
        self._asked_at = None
        if self._drainer.loop.blocked:
            self._set_blocked(False)
            log(logging.WARNING, "the drainer's loop answers again, after %.1f s", monotonic() - asked_at)

    def _set_blocked(self, blocked: bool) -> None:
        self._drainer.loop.blocked = blocked
        for slots in self._built():
            slots.queue.set_loop_blocked(blocked)

    def _report(self, seconds: float) -> None:
        thread = self._drainer.loop.thread
        frame = None if thread is None else sys._current_frames().get(thread.ident or 0)
        where = indented("".join(traceback.format_stack(frame)))
        task = _task_of(frame)
        del frame  # which keeps the task's variables
        if task is None:
            who = "a callback"
        else:
            who = f"task {task.name!r}"
            limits = [slots.task_timeout for slots in self._built() if any(s.task is task for s in slots.all)]
            task.overran = task.overran or any(
                limit is not None and monotonic() - task.started_at >= limit for limit in limits
            )
        log(logging.ERROR, BLOCKED, seconds, who, where)


def _task_of(frame: FrameType | None) -> Task | None:
    """Return the task whose coroutine runs in `frame`, or in one that has called it."""
    while frame is not None:
        if frame.f_code is Slot.await_task.__code__:
            task = frame.f_locals["task"]
            return task if isinstance(task, Task) else None
        frame = frame.f_back
    return None
