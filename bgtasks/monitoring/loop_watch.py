"""Reports a drainer's loop that does not answer, while all coroutines wait for it, and replaces a deaf one.

A loop is blocked by a coroutine that does not await, or deaf since a task has closed its file descriptors.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FrameType

from bgtasks.clock import monotonic
from bgtasks.core.drainer import Drainer
from bgtasks.core.log import log
from bgtasks.core.loop import Loop
from bgtasks.core.slot import Slot
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.monitoring.thread import MonitorThread
from bgtasks.text import indented

LOOK_INTERVAL = 0.25  # seconds between two looks
PATIENCE = 1.0  # seconds that the loop may take to answer

DEAF_LOOKS = 8  # in a row that find it in its selector, though it was called; then it is replaced

NO_ANSWER = "the drainer's loop has not answered for %.1f s, and all coroutines wait: %s, at:\n%s"
DEAF = (
    "the drainer's loop cannot be woken: a task may have closed its file descriptors. It has been replaced; "
    "coroutines that ran on the old one have failed"
)


class LoopWatch(MonitorThread):
    """A thread that has the loop answer every LOOK_INTERVAL while coroutines run, and ends when none does."""

    role = "loop-watch"

    def __init__(self, drainer: Drainer, built: Callable[[], Iterable[Slots]]) -> None:
        super().__init__()
        self._drainer = drainer
        self._built = built  # what runs the tasks of each pool
        self._asked_at: float | None = None  # monotonic seconds; cleared on the loop as it answers
        self._deaf_looks = 0  # in a row

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
        while not stop.wait(LOOK_INTERVAL):
            self._drainer.loop.used = False  # first: if a coroutine comes *just* now, `_main` looks again
            if not self._is_needed():
                return
            self._look()

    def _look(self) -> None:
        loop, asked_at = self._drainer.loop, self._asked_at
        if asked_at is None:
            self._asked_at = monotonic()
            if not loop.call_soon(self._answer, self._asked_at):
                self._asked_at = None  # it has ended
        elif loop.blocked:
            self._deaf_looks = self._deaf_looks + 1 if _is_idle(self._frame()) else 0
            if self._deaf_looks >= DEAF_LOOKS:
                self._replace()
        elif monotonic() - asked_at >= PATIENCE:
            self._set_blocked(True)
            self._report(monotonic() - asked_at)

    def _replace(self) -> None:
        self._drainer.replace_loop()
        self._asked_at = None
        self._set_blocked(False)
        log(logging.ERROR, DEAF)

    def _answer(self, asked_at: float) -> None:
        """Called on the loop."""
        self._asked_at = None
        if self._drainer.loop.blocked:
            self._set_blocked(False)
            log(logging.WARNING, "the drainer's loop answers again, after %.1f s", monotonic() - asked_at)

    def _set_blocked(self, blocked: bool) -> None:
        self._drainer.loop.blocked = blocked
        self._deaf_looks = 0
        for slots in self._built():
            slots.queue.set_loop_blocked(blocked)

    def _frame(self) -> FrameType | None:
        thread = self._drainer.loop.thread
        return None if thread is None else sys._current_frames().get(thread.ident or 0)

    def _report(self, seconds: float) -> None:
        frame = self._frame()
        where, task, idle = indented("".join(traceback.format_stack(frame))), _task_of(frame), _is_idle(frame)
        del frame  # which keeps the task's variables
        if task is not None:
            why = f"task {task.name!r} blocks it"
            self._note_overrun(task)
        else:
            why = "it may be deaf" if idle else "a callback blocks it"
        log(logging.ERROR, NO_ANSWER, seconds, why, where)

    def _note_overrun(self, task: Task) -> None:
        limits = [slots.task_timeout for slots in self._built() if any(s.task is task for s in slots.all)]
        task.overran = task.overran or any(
            limit is not None and monotonic() - task.started_at >= limit for limit in limits
        )


def _task_of(frame: FrameType | None) -> Task | None:
    """Return the task whose coroutine runs in `frame`, or in one that has called it."""
    while frame is not None:
        if frame.f_code is Slot.await_task.__code__:
            task = frame.f_locals["task"]
            return task if isinstance(task, Task) else None
        frame = frame.f_back
    return None


def _is_idle(frame: FrameType | None) -> bool:
    """Tell whether a loop whose thread is at `frame` waits in its selector, or cannot run."""
    where = [str(frame.f_globals.get("__name__")) for frame, _ in islice(traceback.walk_stack(frame), 2)]
    return where[:1] == [Loop.__module__] or where == ["selectors", "asyncio.base_events"]
