"""Exceptions from outside: a signal handler that raises inside a spawn, one that is set on a slot's thread.

The interpreter delivers both after calls. So a profile function, which is called there, stands in for them,
and every such point in our code is tried: at the n-th it raises, for n = 1, 2, 3 ... until there is no n-th.
"""

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import bgtasks
import bgtasks.drainer
from bgtasks.signals import task_finished
from tests.core import Core
from tests.gate import BOUND, AsyncGate, Gate
from tests.test_slots import assert_conn_max_is_exact


class Interruption(BaseException):
    """What the signal handler raises."""


ENTRIES = {"__enter__", "acquire"}
PACKAGE = str(Path(bgtasks.__file__).parent)


def enters(
    function: Callable[..., Any],
) -> bool:  # pragma: no cover  # no tracer sees what a profile function does
    """Tell whether a C function is the entry into a `with` block."""
    return getattr(function, "__name__", "") in ENTRIES


class Interrupt:
    """A profile function that raises once, as the n-th call in or of the package's code returns."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, arg: Any) -> None:  # pragma: no cover  # as above
        # The interpreter delivers nothing between the entry into a `with` and its block.
        if event.endswith("return") and frame.f_code.co_filename.startswith(PACKAGE) and not enters(arg):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise Interruption


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


async def one_call_on_the_slot() -> None:
    await sync_to_async(print)(end="")


def interrupt_slot(n: int, task: Any) -> bool:  # pragma: no cover  # the raise upsets the tracer
    """Raise at the n-th point on a slot's thread between and around tasks; False if there is none."""
    interrupt = Interrupt(n)
    with Core(conn_max=1, capacity=3) as core, Gate() as gate:
        core.spawn("holds", gate)
        gate.wait_entered()
        core.spawn("arms", sys.setprofile, interrupt)
        core.spawn("first", task)
        core.spawn("second", task)
        gate.open()
        core.drain()
        core.spawn("disarms", sys.setprofile, None)
        core.drain()

        stats = core.stats()
        assert stats.spawned == 5
        assert stats.succeeded + stats.failed == 5, n
        assert stats.failed <= 1
        assert_whole(core)
        assert len(core.logs.above(logging.ERROR)) <= 2
    return interrupt.left <= 0


@pytest.mark.parametrize("task", [print, nothing, one_call_on_the_slot])
def test_slot_that_is_interrupted_goes_on(task: Any) -> None:
    """Wherever an exception hits a slot's thread, all tasks are accounted for, and it works on."""
    points = next(n for n in itertools.count() if not interrupt_slot(n + 1, task))

    assert points > 20


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
        landmark = core.queue.all_ended()
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
        assert landmark.result(BOUND), n
        assert core.slots.closed, n
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
    monkeypatch.setattr(bgtasks.drainer, "STOP_PATIENCE", 0.002)
    points = next(n for n in itertools.count() if not interrupt_shutdown(n + 1))

    assert points > 50
