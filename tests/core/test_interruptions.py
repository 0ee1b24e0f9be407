"""Exceptions from outside: a signal handler that raises inside a call, one that is set on a slot's thread.

The interpreter delivers both after calls. So a profile function, which is called there, stands in for them,
and every such point in our code is tried: at the n-th it raises, for n = 1, 2, 3 ... until there is no n-th.
Beside that real signals raise, at points that no profile function sees: as a lock is taken, or given back.
"""

import itertools
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import bgtasks
import bgtasks.core.shutdown
from bgtasks.monitoring.figures import read_stats_by_name
from bgtasks.signals import task_finished
from tests.gate import BOUND, AsyncGate, Gate
from tests.pool import Core, Drained, assert_whole


class Interruption(BaseException):
    """What the signal handler raises."""


PACKAGE = str(Path(bgtasks.__file__).parent)


class Interrupt:
    """A profile function that raises once, as the n-th call in or of the package's code returns."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, arg: Any) -> None:  # pragma: no cover  # as above
        if event.endswith("return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise Interruption


async def nothing() -> None:
    pass


def interrupt_spawn(n: int, task: Any) -> bool:  # pragma: no cover  # the raise upsets the tracer
    """Raise at the n-th point inside a spawn; False if there is none."""
    interrupt = Interrupt(n)
    with Core(conn_max=2, capacity=3) as core:
        sys.setprofile(interrupt)
        try:
            core.spawn("interrupted", task)
        except Interruption:
            pass
        finally:
            sys.setprofile(None)
        core.drain()

        stats = core.stats()
        assert (stats.queued, stats.running) == (0, 0), n
        assert_whole(core)
    return interrupt.left <= 0


@pytest.mark.parametrize("task", [print, nothing])
def test_spawn_that_a_signal_handler_interrupts_leaves_the_pool_whole(task: Any) -> None:
    """Wherever a handler raises inside a spawn, no place, slot or wake-up is lost, and no task forgotten."""
    points = next(n for n in itertools.count() if not interrupt_spawn(n + 1, task))

    assert points > 10


class Runs:
    """Tasks that count their runs."""

    def __init__(self) -> None:
        self.number: Counter[str] = Counter()

    def plain(self, name: str) -> None:
        self.number[name] += 1

    async def coroutine(self, name: str) -> None:
        self.number[name] += 1

    async def call_on_the_slot(self, name: str) -> None:
        await sync_to_async(self.plain)(name)

    def coroutine_of_a_function(self, name: str) -> Any:
        return self.coroutine(name)


def interrupt_slot(n: int, kind: str) -> bool:  # pragma: no cover  # the raise upsets the tracer
    """Raise at the n-th point on a slot's thread between and around tasks; False if there is none."""
    interrupt, runs = Interrupt(n), Runs()
    task = getattr(runs, kind)
    with Core(conn_max=1, capacity=3) as core, Gate() as gate:
        core.spawn("holds", gate)
        gate.wait_entered()
        core.spawn("arms", sys.setprofile, interrupt)
        core.spawn("first", task, "first")
        core.spawn("second", task, "second")
        gate.open()
        core.drain()
        core.spawn("disarms", sys.setprofile, None)
        core.drain()

        stats = core.stats()
        assert stats.spawned == 5
        assert stats.succeeded + stats.failed == 5, n
        assert stats.failed <= 1
        assert max(runs.number.values()) == 1, n
        assert runs.number.total() >= 2 - stats.failed, n
        assert_whole(core)
        assert len(core.logs.above(logging.ERROR)) <= 2
    return interrupt.left <= 0


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # hit as it was returned
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["plain", "coroutine", "call_on_the_slot", "coroutine_of_a_function"])
def test_slot_that_is_interrupted_goes_on(kind: str) -> None:
    """Wherever an exception hits a slot's thread, each task is counted once and run once at most."""
    points = next(n for n in itertools.count() if not interrupt_slot(n + 1, kind))

    assert points > 20


class Alarms:  # pragma: no cover  # the raise upsets the tracer
    """A signal handler that raises in the middle of calls."""

    def __init__(self) -> None:
        self.hits = 0
        self._armed = False

    def __enter__(self) -> "Alarms":
        self._handler = signal.signal(signal.SIGALRM, self._handle)
        self._timer = signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)  # that of pytest-timeout
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        signal.setitimer(signal.ITIMER_REAL, *self._timer)

    def _handle(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise Interruption

    def keep_calling(self, call: Callable[[], object], seconds: float) -> None:
        """Call for so many seconds, whether an alarm has hit or not."""
        until = monotonic() + seconds
        while monotonic() < until:
            try:
                self._armed = True
                call()
                self._armed = False
            except Interruption:
                self.hits += 1


ALARMED: dict[str, Callable[[Core], object]] = {
    "spawn": lambda core: core.spawn("plain", int),
    "spawn a coroutine function": lambda core: core.spawn("coroutine", nothing),
    "drain": lambda core: core.pool.drain(0.001),
    "stats": lambda core: read_stats_by_name(core.queue),
    "pause": lambda core: (core.queue.pause(), core.queue.resume()),
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs alarms")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that hits a finalizer
@pytest.mark.parametrize("what", ALARMED)
def test_real_alarms_leave_no_lock_held(what: str) -> None:
    """Wherever a real signal handler raises inside a call, slots go on, and all tasks are accounted for."""
    with Core(conn_max=2, capacity=3) as core:
        with Alarms() as alarms:
            alarms.keep_calling(lambda: ALARMED[what](core), 1.0)
        core.queue.resume()
        core.drain()

        stats = core.stats()
        assert alarms.hits > 10
        assert (stats.queued, stats.running) == (0, 0)
        assert stats.spawned == stats.succeeded + stats.dropped
        assert_whole(core)


def interrupt_shutdown(n: int) -> bool:  # pragma: no cover  # the raise upsets the tracer
    """Raise at the n-th point inside a shutdown out of time, then go on with it; False if there is none."""
    interrupt = Interrupt(n)
    expected = {"waits": 2, "coroutine": 2, "plain": 1, "asynchronous": 1}
    finished: Counter[tuple[str, str]] = Counter()

    def note(name: str, outcome: str, **named: Any) -> None:
        finished[name, outcome] += 1

    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        core.spawn("plain", gate)
        core.spawn("asynchronous", agate)
        gate.wait_entered()
        agate.wait_entered()
        for _ in range(2):
            core.spawn("waits", print)
            core.spawn("coroutine", nothing())
        waiter = Drained(core.queue)
        task_finished.connect(note)
        sys.setprofile(interrupt)
        try:
            core.close(0)
        except Interruption:
            pass
        finally:
            sys.setprofile(None)
        core.close(0)
        task_finished.disconnect(note)

        stats = core.stats()
        assert (stats.spawned, stats.cancelled) == (6, 6), n
        assert (stats.queued, stats.running) == (0, 0), n
        assert waiter.result(BOUND), n
        assert core.shutdown.complete, n
        lines = core.logs.above(logging.WARNING)
        # It may be said again if the exception comes just as it was said.
        assert 1 <= len(lines) <= 2, n
        for name, count in expected.items():
            assert all(f"{count} {name!r}" in line for line in lines), n
            assert finished[name, "cancelled"] <= count
        # One may have been interrupted as it was told; the coroutine that runs is told of on its slot.
        assert finished.total() - finished["asynchronous", "cancelled"] >= 4, n
        gate.open()
    return interrupt.left <= 0


def test_shutdown_that_is_interrupted_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a signal handler raises inside a shutdown, the next call loses and forgets nothing of it."""
    monkeypatch.setattr(bgtasks.core.shutdown, "STOP_PATIENCE", 0.002)
    points = next(n for n in itertools.count() if not interrupt_shutdown(n + 1))

    assert points > 50
