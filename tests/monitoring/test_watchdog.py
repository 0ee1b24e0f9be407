"""The watchdog: plain functions past their TASK_TIMEOUT are reported, whatever else hangs."""

import logging
import threading
from typing import Any, Self

import pytest

from bgtasks.monitoring import watchdog
from bgtasks.monitoring.figures import read_stats
from bgtasks.monitoring.watchdog import Watchdog
from bgtasks.repeats import repeats
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, after_call, make_task, wait_idle

pytestmark = pytest.mark.usefixtures("patient")


class Watched(Core):
    """A pool with a watchdog of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.watchdog = Watchdog(lambda: [self.slots, *(other.slots for other in self._others)])
        self.drainer.background = [self.watchdog]

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def is_watched(self) -> bool:
        return any(thread.name == "bgtasks-watchdog" for thread in self.threads())


def test_function_past_its_timeout_is_reported_once_with_its_stack() -> None:
    """A plain function goes on, as nothing can stop it; its name, its slot and where it is are logged."""
    with Watched(conn_max=2, task_timeout=0.01) as core, Gate() as gate:
        core.spawn("first", gate)
        [line] = core.logs.wait("'first'")
        core.spawn("second", gate)
        core.logs.wait("'second'")
        stuck = core.stats().stuck
        gate.open()
        core.drain()

        assert line.startswith(
            "task 'first' of pool 'core' has been running for more than 0.01 s, in slot 'bgtasks-core-"
        )
        assert "gate.py" in line
        assert "in __call__" in line
        assert stuck == 2
        assert len(core.logs.of("'first'")) == 1
        assert (core.stats().succeeded, core.stats().stuck) == (2, 0)


def test_function_that_a_busy_slot_goes_on_with_is_reported() -> None:
    """A slot that goes from one task to the next tells nobody: the watchdog looks again by itself."""
    with Watched(conn_max=1, task_timeout=0.01) as core, Gate() as first, Gate() as second:
        core.spawn("first", first)
        core.logs.wait("'first'")
        core.spawn("second", second)
        first.open()

        assert core.logs.wait("'second'")


def test_function_past_its_timeout_keeps_its_own_outcome() -> None:
    """One that raises after its limit has failed; it did not time out."""
    with Watched(conn_max=1, task_timeout=0.01) as core, Gate() as gate:

        def fail() -> None:
            gate()
            raise ValueError("failed")

        core.spawn("overruns", fail)
        core.logs.wait("has been running for more")
        gate.open()
        core.drain()

        assert (core.stats().failed, core.stats().timed_out) == (1, 0)


def test_function_is_reported_while_the_loop_is_blocked() -> None:
    """A coroutine that blocks the drainer's loop does not keep the watchdog from its work."""
    with Watched(conn_max=2, task_timeout=0.01) as core, Gate() as gate:

        async def block() -> None:
            gate()

        core.spawn("blocks", block)
        gate.wait_entered()
        core.spawn("overruns", gate)

        assert core.logs.wait("task 'overruns' of pool 'core' has been running for more")
        gate.open()


def test_overruns_of_one_name_are_reported_at_once_and_then_counted() -> None:
    """A queue of functions that are all a little too slow does not fill the log with stacks."""
    with Watched(conn_max=1, task_timeout=0.01) as core:
        for _ in range(3):
            with Gate() as gate:
                core.spawn("overruns", gate)
                gate.wait_entered()
                wait_until(lambda: core.stats().stuck == 1)
            core.drain()
        repeats.flush()

        first, again = core.logs.above(logging.ERROR)
        assert first.startswith(
            "task 'overruns' of pool 'core' has been running for more than 0.01 s, in slot"
        )
        assert again == "task 'overruns' of pool 'core' has been running for more than 0.01 s again (2 more)"


def test_coroutines_are_left_to_the_loop() -> None:
    """One past its TASK_TIMEOUT is cancelled there, and not reported as a function."""
    with Watched(conn_max=1, task_timeout=0.01) as core, AsyncGate() as gate:
        core.spawn("overruns", gate)
        core.drain()

        assert core.stats().timed_out == 1
        assert core.logs.of("has been running for more") == []


def test_functions_of_pools_without_a_limit_are_not_watched() -> None:
    """A pool without TASK_TIMEOUT runs its functions as long as they like beside one that has it."""
    with Watched(conn_max=1, task_timeout=0.01, start=False) as core, Gate() as gate:
        other = core.another()
        core.start()
        other.queue.put(make_task("unlimited", gate))
        gate.wait_entered()

        core.spawn("limited", gate)
        core.logs.wait("'limited'")

        assert core.logs.of("'unlimited'") == []
        assert read_stats(other.queue).stuck == 0
        gate.open()


def test_each_pool_has_a_limit_of_its_own() -> None:
    """A function with a short limit is reported in time, though the first to begin is not due for long."""
    with Watched(conn_max=1, task_timeout=10 * BOUND, start=False) as core, Gate() as gate:
        other = core.another()
        other.task_timeout = 0.01
        core.start()
        core.spawn("long", gate)
        gate.wait_entered()
        other.queue.put(make_task("short", gate))

        core.logs.wait("task 'short' of pool 'core-other' has been running for more than 0.01 s")
        assert core.logs.of("'long'") == []
        gate.open()


def test_function_that_begins_just_as_the_watchdog_ends_is_reported() -> None:
    """A function that starts while the watchdog decides to look no more is watched all the same.

    1. the watchdog: looks, and finds no function under a limit
    2. a slot: starts one, and finds the watchdog there
    3. the watchdog: ends, has to look again
    """
    with Watched(conn_max=1, task_timeout=0.01) as core, Gate() as gate:

        def begin() -> None:
            core.spawn("begins", gate)
            gate.wait_entered()

        with after_call(core.watchdog, "_look", begin):
            core.watchdog.notify()

            assert core.logs.wait("task 'begins' of pool 'core' has been running for more")
            gate.open()


def test_function_that_has_just_ended_is_not_reported() -> None:
    """1. the watchdog: finds that it is due. 2. the function: ends. 3. the watchdog: looks once more."""
    with Watched(conn_max=1) as core:
        task = make_task("over")
        task.overran = False

        watchdog._report(core.slots.all[0], task, 1.0)

        assert not task.overran
        assert core.logs.of("'over'") == []


def test_watchdog_ends_when_nothing_runs() -> None:
    """An idle process has no thread that could wake it up."""
    with Watched(conn_max=1, task_timeout=0.01) as core:
        core.spawn("in time", int)
        core.drain()
        wait_idle(core.slots)

        wait_until(lambda: not core.is_watched())
        assert core.logs.of("'in time'") == []


def test_pool_without_a_limit_needs_no_watchdog() -> None:
    """Not even a thread is started."""
    with Watched(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()

        assert not core.watchdog._awake


def test_watchdog_is_started_once_for_many_tasks() -> None:
    """Short tasks that come one by one do not start a thread each: it sleeps until one may be due."""
    with Watched(conn_max=1, task_timeout=10 * BOUND) as core:
        core.spawn("first", int)
        core.drain()
        wait_until(core.watchdog.threads)
        threads = core.watchdog.threads()
        core.spawn("second", int)
        core.drain()
        wait_idle(core.slots)

        assert core.watchdog.threads() == threads


def test_drainer_that_stops_ends_the_watchdog() -> None:
    """It sleeps for as long as the limit is, and ends at once all the same."""
    with Watched(conn_max=1, task_timeout=10 * BOUND) as core:
        core.spawn("task", int)
        wait_until(core.watchdog.threads)
        core.drain()
        core.drainer.stop()

        assert not core.is_watched()


def test_forked_child_has_no_watchdog() -> None:
    """It starts its own with its first task."""
    with Watched(conn_max=1, task_timeout=10 * BOUND) as core:
        core.spawn("task", int)
        wait_until(core.watchdog.threads)
        [thread] = core.watchdog.stop()
        core.watchdog.forget()

        assert core.watchdog.threads() == []
        thread.join(BOUND)
        assert threading.active_count()


def test_watchdog_sleeps_until_the_first_function_is_due() -> None:
    """Not for the whole limit, of which a part is over when it looks."""
    with Watched(conn_max=2, task_timeout=100) as core, Gate() as gate:
        core.spawn("first", gate)
        core.spawn("second", gate)
        gate.wait_entered(2)
        [first, _] = core.queue.running()
        first.started_at -= 99

        pause = core.watchdog._look()

        assert pause is not None
        assert 0 < pause <= 1
        assert core.logs.of("has been running for more") == []
        gate.open()
