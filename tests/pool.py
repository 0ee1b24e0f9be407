"""A pool of a test's own, and what the tests of the core force and wait for."""

import ctypes
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from time import monotonic
from typing import Any

import pytest

from bgtasks import conf
from bgtasks.building import Built
from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import Outcome
from bgtasks.core.log import logger
from bgtasks.core.queue import TaskQueue
from bgtasks.core.shutdown import Shutdown, shut_down
from bgtasks.core.slots import Slots
from bgtasks.core.task import Hooks, Task
from bgtasks.forks import Forks
from bgtasks.monitoring.figures import PoolStats, read_stats
from bgtasks.monitoring.pace import MeasuredPace
from bgtasks.pool import Pool
from bgtasks.pools import pools
from bgtasks.repeats import repeats
from tests.gate import BOUND, Gate, wait_until

NAME = "core"  # of every pool that is made here


class Sender:
    """Sends the signals of hooks that a test makes."""

    name = NAME


SENDER = Sender()


class Logs(logging.Handler):
    """What the logger `bgtasks` says from INFO up between entry and exit, formatted as a user reads it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[Any] = []  # written under _changed
        self._lines: list[str] = []  # each with its traceback; written under _changed
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
            self._records.append(record)
            self._lines.append(line)
            self._changed.notify_all()

    @property
    def lines(self) -> list[str]:
        """Return the lines, when what was handed over to another thread is written."""
        repeats.write_lines(BOUND)
        return self._lines

    @property
    def records(self) -> list[Any]:
        """Return the records of the lines."""
        repeats.write_lines(BOUND)
        return self._records

    def of(self, part: str) -> list[str]:
        """Return the lines that contain `part`."""
        lines = self.lines
        with self._changed:
            return [line for line in lines if part in line]

    def above(self, level: int) -> list[str]:
        """Return the lines of `level` and more."""
        lines = self.lines
        with self._changed:
            return [
                line for line, record in zip(lines, self._records, strict=True) if record.levelno >= level
            ]

    def wait(self, part: str, count: int = 1) -> list[str]:
        """Wait until `count` lines contain `part`, and return those that do."""
        self.wait_until(lambda lines: sum(part in line for line in lines) >= count)
        return self.of(part)

    def wait_until(self, predicate: Callable[[list[str]], bool]) -> None:
        """Wait until the lines fulfil `predicate`."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self._lines), BOUND):  # pragma: no branch
                raise AssertionError(f"waited {BOUND} s for a line, logged: {self._lines}")


class Raising(logging.Handler):
    """Cannot write a record."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self._error


class Calling(logging.Handler):
    """Calls a function the first time that it handles a record."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self._functions = [function]

    def emit(self, record: logging.LogRecord) -> None:
        if self._functions:
            self._functions.pop()()


class BackgroundThread:
    """A thread beside the drainer that only notes what it hears."""

    def __init__(self, *threads: threading.Thread, broken: bool = False) -> None:
        self.heard: list[str] = []
        self._threads = threads
        self._broken = broken

    def notify(self) -> None:
        self.heard.append("notify")
        if self._broken:
            raise MemoryError

    def stop(self) -> list[threading.Thread]:
        self.heard.append("stop")
        return []

    def threads(self) -> list[threading.Thread]:
        return [*self._threads]

    def forget(self) -> None:
        self.heard.append("forget")


def held(queue: TaskQueue) -> list[Task]:
    """Return the tasks that wait, those that are checked out first."""
    return queue.held()


class Drained:
    """A drain that waits for what is in the queue now."""

    def __init__(self, queue: TaskQueue, *, except_for: Iterable[Task] = ()) -> None:
        self.hook: Callable[[], object] = lambda: None  # called when all have ended
        self._queue = queue
        self._told = threading.Event()
        self._waiter = queue.drain_waiter(self._tell, except_for=except_for)

    def _tell(self) -> None:
        self.hook()
        self._told.set()

    def done(self) -> bool:
        """Tell whether all have ended, and we were told so."""
        return not self._waiter.pending and self._told.is_set()

    def result(self, timeout: float) -> bool:
        """Wait for that."""
        return self._told.wait(timeout) and self.done()

    def cancel(self) -> None:
        """Wait no longer."""
        self._queue.forget(self._waiter)


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
        self.drainer.pace = self.pace = MeasuredPace(self.drainer)
        self.forks = Forks(self.drainer)
        self.pool = Pool(NAME, self.drainer)
        self.hooks = self.pool.hooks if hooks is None else hooks
        self.queue = TaskQueue(NAME, capacity, conn_max)
        self.slots = self._slots_of(self.queue, slots, task_timeout)
        self.shutdown = Shutdown(self.slots, self.drainer)
        self.pool.use(Built(self.slots, self.shutdown, conf.POOL))
        self.spawn = self.pool.spawn
        self.stats = partial(read_stats, self.queue)
        self.logs = Logs()
        self._start = start
        self._others: list[Shutdown] = []

    def _slots_of(self, queue: TaskQueue, slots: Callable[..., Slots], task_timeout: float | None) -> Slots:
        return slots(
            queue,
            self.hooks,
            self.drainer.loop,
            self.drainer.pace,
            task_timeout=task_timeout,
            shutdown_timeout=BOUND,
            notify=self.drainer.notify,
        )

    def __enter__(self) -> "Core":
        self._before = set(threading.enumerate())
        self.logs.__enter__()
        self.drainer.add(self.slots)
        if self._start:
            self.start()
        return self

    def start(self) -> None:
        """Have all threads there, and every slot idle or at work."""
        self.drainer.start()
        self.drainer.open(dict(self.drainer.pools))

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: Any) -> None:
        deadline = monotonic() + (BOUND if exc_type is None else 0)
        try:
            shut_down(dict.fromkeys([self.shutdown, *self._others], deadline))
            self.drainer.stop()
            left = self.threads()
            for thread in left:
                with suppress(RuntimeError):  # one of another pool is only being started
                    thread.join(BOUND)
        finally:
            self.logs.__exit__()
        if exc_type is None:  # pragma: no branch  # unless the test fails
            alive = [thread for thread in left if thread.is_alive()]
            assert not alive, "\n".join(map(stack_of, alive))

    def close(self, seconds: float) -> int | None:
        """Shut the pool down within `seconds`, and return how many tasks that cancelled."""
        return shut_down({self.shutdown: monotonic() + seconds})

    def another(self, *, name: str = "core-other", conn_max: int = 1) -> Slots:
        """Return the slots of another pool on the same drainer, which opens them at its next start."""
        other = self._slots_of(TaskQueue(name, 1024, conn_max), Slots, None)
        self.drainer.add(other)
        self._others.append(Shutdown(other, self.drainer))
        return other

    def drain(self) -> None:
        """Wait until every task spawned so far has ended."""
        assert Drained(self.queue).result(BOUND)

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
            and thread.name != "bgtasks-log-writer"
            and thread not in pools.drainer.threads()
            and not any(thread in each.threads() for each in pools.drainer.background)
        ]


def assert_conn_max_is_exact(core: Core) -> None:
    """Assert that CONN_MAX tasks, no fewer and no more, run at once."""
    with Gate() as gate:
        for _ in range(core.queue.conn_max * 3):
            core.spawn("held", gate)
        gate.wait_entered(core.queue.conn_max)
    core.drain()

    assert gate.peak == core.queue.conn_max


def assert_whole(core: Core) -> None:
    """Assert that the pool runs and holds as many tasks as it has slots and places, and not one more."""
    with Gate() as gate:
        accepted = 0
        for _ in range(core.queue.conn_max):
            accepted += core.spawn("held", gate)
        gate.wait_entered(core.queue.conn_max)
        while core.spawn("waits", gate):
            accepted += 1

        assert accepted == core.queue.conn_max + core.queue.capacity
    core.drain()
    assert_conn_max_is_exact(core)


def own_threads() -> set[str]:
    """Return the names of the threads of bgtasks. One that has nothing left to do needs a moment to end."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("bgtasks-")}


def stack_of(thread: threading.Thread) -> str:  # pragma: no cover  # for a failing test
    """Return where a thread is, as text."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread!r} at:\n{''.join(traceback.format_stack(frame))}"


def make_task(name: str = "task", function: Any = print, *args: Any, asynchronous: bool = False) -> Task:
    """Return a task for a queue that nothing drains."""
    return Task(name, function, args, {}, asynchronous, Context(), None)


@contextmanager
def after_call(owner: Any, name: str, hook: Callable[[], object]) -> Iterator[None]:
    """Call `hook` once, after the next call of the method `name` of `owner`: a step of another thread."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if vars(owner).pop(name, None) is not None:  # or another thread has called it as well
            hook()
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        vars(owner).pop(name, None)


@contextmanager
def receiving(signal: Any) -> Iterator[list[tuple[str, str | None]]]:
    """Collect what a signal of bgtasks sends, as (name, outcome)."""
    received: list[tuple[str, str | None]] = []

    def receive(sender: Any, name: str, outcome: str | None = None, **named: Any) -> None:
        received.append((name, outcome))

    signal.connect(receive)
    try:
        yield received
    finally:
        signal.disconnect(receive)


class FailingStart:
    """Lets only so many slots of the core be started: the machine has no thread left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        start = threading.Thread.start

        def fail_or_start(thread: threading.Thread) -> None:
            if thread.name.startswith("bgtasks-core"):
                if self.left == 0:
                    raise RuntimeError("can't start new thread")
                self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fail_or_start)


def wait_idle(slots: Slots) -> None:
    """Wait until every slot is idle."""
    wait_until(lambda: len(slots.queue.idle) == len(slots.all))


def exit_() -> None:
    """Raise what a signal handler or a watchdog may raise anywhere."""
    raise SystemExit


def interrupt(thread: threading.Thread, error: type[BaseException] = SystemExit) -> None:
    """Set an exception on `thread` from outside, as a watchdog or a debugger does."""
    hit = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error)
    )
    assert hit == 1


def balance(stats: PoolStats) -> int:
    """Return the right side of the equation that every snapshot keeps."""
    ended: int = sum(getattr(stats, outcome.label) for outcome in Outcome)
    return stats.queued + stats.running + ended + stats.dropped


def counted(lines: list[str]) -> int:
    """Return how many drops the lines report in all."""
    return sum(int(match[1]) if (match := re.search(r"dropped (\d+) times", line)) else 1 for line in lines)


untraced = pytest.mark.skipif(
    sys.version_info < (3, 12) and sys.gettrace() is not None,
    reason="while an exception waits for a blocked thread, CPython 3.11 hangs in the next traced call",
)
