"""A pool of a test's own, and what the tests of the core force and wait for."""

import ctypes
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextvars import Context
from time import monotonic
from typing import Any

from bgtasks.drainer import Drainer
from bgtasks.log import DropLog, logger
from bgtasks.pools import Pool, pools
from bgtasks.queue import Task, TaskQueue
from bgtasks.shell import Shell
from bgtasks.slots import Hooks, Slots
from tests.gate import BOUND

NAME = "core"  # of every pool that is made here


class Logs(logging.Handler):
    """What the logger `bgtasks` says from INFO up between entry and exit, formatted as a user reads it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[Any] = []  # written under _changed
        self.lines: list[str] = []  # each with its traceback; written under _changed
        self._changed = threading.Condition()

    def __enter__(self) -> "Logs":
        logger.addHandler(self)
        self._level = logger.level
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        logger.setLevel(self._level)
        logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        # Its text stays in exc_text. The exception is not kept: tests look at whether anything keeps it.
        record.exc_info = None
        with self._changed:
            self.records.append(record)
            self.lines.append(line)
            self._changed.notify_all()

    def of(self, part: str) -> list[str]:
        """Return the lines that contain `part`."""
        with self._changed:
            return [line for line in self.lines if part in line]

    def above(self, level: int) -> list[str]:
        """Return the lines of `level` and more."""
        with self._changed:
            return [
                line for line, record in zip(self.lines, self.records, strict=True) if record.levelno >= level
            ]

    def wait(self, part: str, count: int = 1) -> list[str]:
        """Wait until `count` lines contain `part`, and return those that do."""
        self.wait_until(lambda lines: sum(part in line for line in lines) >= count)
        return self.of(part)

    def wait_until(self, predicate: Callable[[list[str]], bool]) -> None:
        """Wait until the lines fulfil `predicate`."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self.lines), BOUND):  # pragma: no branch
                raise AssertionError(f"waited {BOUND} s for a line, logged: {self.lines}")


class Companion:
    """A thread beside the drainer that only notes what it hears."""

    def __init__(self, *threads: threading.Thread, broken: bool = False) -> None:
        self.heard: list[str] = []
        self._threads = threads
        self._broken = broken

    def stir(self) -> None:
        self.heard.append("stir")
        if self._broken:
            raise MemoryError

    def halt(self) -> list[threading.Thread]:
        self.heard.append("halt")
        return []

    def threads(self) -> list[threading.Thread]:
        return [*self._threads]

    def forget(self) -> None:
        self.heard.append("forget")


class Core:
    """The pieces of one pool, put together as Pool does it, on a drainer of their own.

    On exit the pool is shut down, and an assertion fails if that leaves one of its threads.

    Example:
        with Core(conn_max=1) as core, Gate() as gate:
            core.spawn("held", gate)
            gate.wait_entered()
    """

    def __init__(
        self,
        *,
        capacity: int = 1024,
        conn_max: int = 2,
        task_timeout: float | None = None,
        start: bool = True,
        hooks: Hooks | None = None,
        drainer: Drainer | None = None,
        slots: Callable[..., Slots] = Slots,
    ) -> None:
        self.drainer = Drainer() if drainer is None else drainer
        self.pool = Pool(NAME, self.drainer)
        self.queue = TaskQueue(NAME, capacity, conn_max)
        self.hooks = Shell(self.pool) if hooks is None else hooks
        self.slots = slots(
            self.queue, self.hooks, self.drainer, task_timeout=task_timeout, shutdown_timeout=BOUND
        )
        self.pool._slots = self.slots
        self.pool._drops = DropLog(self.queue, self.drainer.call_later)
        self.spawn = self.pool.spawn
        self.stats = self.queue.stats
        self.logs = Logs()
        self._start = start
        self._others: list[Slots] = []

    def __enter__(self) -> "Core":
        self._before = set(threading.enumerate())
        self.logs.__enter__()
        self.drainer.add(self.slots)
        if self._start:
            self.drainer.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: Any) -> None:
        deadline = monotonic() + (BOUND if exc_type is None else 0)
        try:
            self.drainer.close(dict.fromkeys([self.slots, *self._others], deadline))
            self.drainer.stop()
            left = self.threads()
            for thread in left:
                thread.join(BOUND)
        finally:
            self.logs.__exit__()
        if exc_type is None:  # pragma: no branch  # unless the test fails
            alive = [thread for thread in left if thread.is_alive()]
            assert not alive, "\n".join(map(stack_of, alive))

    def close(self, seconds: float) -> int | None:
        """Shut the pool down within `seconds`, and return how many tasks that cancelled."""
        return self.drainer.close({self.slots: monotonic() + seconds})

    def another(self, *, name: str = "core-other", conn_max: int = 1) -> Slots:
        """Return the slots of another pool on the same drainer, which opens them at its next start."""
        queue = TaskQueue(name, 1024, conn_max)
        other = Slots(queue, self.hooks, self.drainer, task_timeout=None, shutdown_timeout=BOUND)
        self.drainer.add(other)
        self._others.append(other)
        return other

    def drain(self) -> None:
        """Wait until every task spawned so far has ended."""
        assert self.queue.all_ended().result(BOUND)

    def threads(self) -> list[threading.Thread]:
        """Return the threads of bgtasks that were started since entry and live.

        But for those of the process's own pools: an earlier test may have asked for them *just* before
        it ended, and a bare thread starts them whenever it gets its turn.
        """
        return [
            thread
            for thread in threading.enumerate()
            if thread not in self._before
            and thread.name.startswith("bgtasks")
            and thread not in pools.drainer.threads()
            and thread is not pools.publisher._thread
        ]


def own_threads() -> set[str]:
    """Return the names of the threads of bgtasks. One that has nothing left to do needs a moment to end."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("bgtasks-")}


def stack_of(thread: threading.Thread) -> str:  # pragma: no cover  # for a failing test
    """Return where a thread is, as text."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread!r} at:\n{''.join(traceback.format_stack(frame))}"


def make_task(name: str = "task", function: Any = print, *args: Any, asynchronous: bool = False) -> Task:
    """Return a task for a queue that nothing drains."""
    return Task(name, function, args, {}, asynchronous=asynchronous, context=Context(), captured=None)


class Forced:
    """A collection that lets a test put another thread's step between two of ours: each hook runs once."""

    _hooks: dict[str, Callable[[], object]]

    def force(self, step: str, hook: Callable[[], object]) -> None:
        """Call `hook` the next time that `step` is reached: "before append", "after len" ..."""
        self._hooks[step] = hook

    def _at(self, step: str) -> None:
        if step in self._hooks:
            self._hooks.pop(step)()


class ForcedDeque(Forced, deque[Any]):
    """A deque of that kind."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self._hooks = {}

    def append(self, item: Any) -> None:
        self._at("before append")
        super().append(item)
        self._at("after append")

    def pop(self) -> Any:  # type: ignore[override]  # no caller has an index
        self._at("before pop")
        item = super().pop()
        self._at("after pop")
        return item

    def popleft(self) -> Any:
        item = super().popleft()
        self._at("after popleft")
        return item

    def remove(self, item: Any) -> None:
        self._at("before remove")
        super().remove(item)
        self._at("after remove")

    def __len__(self) -> int:
        length = super().__len__()
        if hasattr(self, "_hooks"):  # pragma: no branch  # some versions of Python ask while it is made
            self._at("after len")
        return length


class ForcedSet(Forced, set[Any]):
    """A set of that kind."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self._hooks = {}

    def add(self, item: Any) -> None:
        self._at("before add")
        super().add(item)
        self._at("after add")

    def remove(self, item: Any) -> None:
        self._at("before remove")
        super().remove(item)
        self._at("after remove")


def exit_() -> None:
    """Raise what a signal handler or a watchdog may raise anywhere."""
    raise SystemExit


def interrupt(thread: threading.Thread, error: type[BaseException] = SystemExit) -> None:
    """Set an exception on `thread` from outside, as a watchdog or a debugger does."""
    hit = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error)
    )
    assert hit == 1
