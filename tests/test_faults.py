"""Faults around the pool: what breaks, blocks or is in the way there costs no task and no slot."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from typing import Any, cast

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections
from django.test import override_settings

import bgtasks
from bgtasks.core import slot as slot_module
from bgtasks.core.drainer import Drainer
from bgtasks.core.shutdown import Shutdown, shut_down
from bgtasks.helpers import Helpers
from bgtasks.hooks import DjangoHooks
from bgtasks.monitoring.figures import read_stats_by_name
from bgtasks.monitoring.watchdog import Watchdog
from bgtasks.signals import task_dropped, task_finished, task_spawned, task_started
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import SENDER, Core, assert_conn_max_is_exact


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody wait for what does not end when it is told to."""
    for module in ("drainer", "shutdown"):
        monkeypatch.setattr(f"bgtasks.core.{module}.STOP_PATIENCE", 0.01)


class CountingHooks(DjangoHooks):
    """Counts how often connections are looked at."""

    def __init__(self) -> None:
        super().__init__(SENDER)
        self.cleaned = 0

    def clean(self) -> None:
        super().clean()
        self.cleaned += 1


def test_connections_are_not_looked_at_in_the_middle_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a task waits between two ORM calls, its transaction and its cursors are left alone."""
    monkeypatch.setattr(slot_module, "STALE_AFTER", -1.0)  # whatever is idle is stale
    hooks = CountingHooks()
    seen: list[int] = []

    async def two_calls() -> None:
        await sync_to_async(lambda: seen.append(hooks.cleaned))()
        await asyncio.sleep(0)
        await sync_to_async(lambda: seen.append(hooks.cleaned))()

    with Core(conn_max=1, hooks=hooks) as core:
        core.spawn("two calls", two_calls)
        core.drain()

        assert seen == [1, 1]
        assert hooks.cleaned == 2


def test_connections_of_a_slot_that_a_stranger_has_used_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that comes too late, for a task that has ended, does not spare the next task the look."""
    monkeypatch.setattr(slot_module, "STALE_AFTER", -1.0)
    hooks = CountingHooks()
    seen: list[int] = []

    async def call() -> None:
        await sync_to_async(lambda: seen.append(hooks.cleaned))()

    with Core(conn_max=1, hooks=hooks) as core:
        [slot] = core.slots.all
        slot.calls.submit(print, end="").result(BOUND)
        slot.wake()
        wait_until(lambda: slot._stale)  # it has gone to sleep again, and was woken
        core.spawn("call", call)
        core.drain()

        assert seen == [2]


def test_blocked_loop_keeps_no_function_from_an_idle_slot() -> None:
    """While a coroutine blocks the loop, and another waits for it, plain functions run in the other slots."""
    with Core(conn_max=4) as core, Gate() as block, Gate() as gate:

        async def blocks() -> None:
            block()

        core.spawn("blocks", blocks)
        block.wait_entered()
        core.spawn("waits for the loop", asyncio.sleep, 0)
        core.spawn("plain", gate)
        core.spawn("plain", gate)

        gate.wait_entered(2)

        gate.open()
        block.open()
        core.drain()
        assert core.stats().succeeded == 4


@pytest.mark.parametrize("task", [lambda: 1 / 0, AsyncGate(bound=0)])
def test_record_factory_that_raises_costs_no_slot(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], task: Any
) -> None:
    """If the project's logging cannot even make a record, the end of a task is said in plain words."""
    with Core(conn_max=1) as core:
        logging.setLogRecordFactory(cast("Callable[..., logging.LogRecord]", lambda *args, **kwargs: 1 / 0))
        try:
            core.spawn("fails", task)
            core.drain()
        finally:
            logging.setLogRecordFactory(logging.LogRecord)

        assert core.stats().failed == 1
        assert "task 'fails' of pool 'core' failed" in capfd.readouterr().err
        assert_conn_max_is_exact(core)


def test_task_that_asks_for_a_shutdown_under_way_does_not_disturb_it() -> None:
    """A task that calls shutdown() while the process shuts down lets the others end."""
    asked = threading.Event()
    answers: list[bool] = []

    with override_settings(BGTASKS={"default": {"CONN_MAX": 3}}), AsyncGate() as agate, Gate() as gate:

        def ask() -> None:
            gate()
            answers.append(bgtasks.shutdown())
            asked.set()
            agate.open()

        bgtasks.spawn("others", agate)
        bgtasks.spawn("asks", ask)
        agate.wait_entered()
        gate.wait_entered()
        main = ThreadPoolExecutor(1)
        shutdown = main.submit(bgtasks.shutdown)
        while bgtasks.spawn("not any more", print, end=""):  # pragma: no cover  # it may be closed already
            pass
        gate.open()

        assert shutdown.result(BOUND) is True
        assert asked.wait(BOUND)
        assert answers == [False]
        assert bgtasks.stats()["default"].succeeded >= 2
        main.shutdown()


def test_ashutdown_does_not_wait_for_the_loops_executor() -> None:
    """Under uvicorn ashutdown is the only hook: requests that fill the executor do not keep it back."""
    with override_settings(BGTASKS={"default": {}}), Gate() as gate:

        async def serve() -> bool:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            request = loop.run_in_executor(None, gate)
            done = await bgtasks.ashutdown()
            gate.open()
            await request
            return done

        bgtasks.spawn("spawned", print, end="")

        assert asyncio.run(serve()) is True


@pytest.mark.django_db(transaction=True)
def test_connections_of_to_thread_are_closed() -> None:
    """What a task opens on a thread of its own choice is outside of the bound, but not left open."""
    opened = []

    def query() -> None:
        connection.ensure_connection()
        opened.append(connections["default"])

    with Core(conn_max=1, drainer=Drainer(new_executor=Helpers)) as core:
        core.spawn("leaves its thread", asyncio.to_thread, query)
        core.drain()

        assert [wrapper.connection for wrapper in opened] == [None]


def test_coroutine_that_cancels_itself_at_its_end_has_succeeded() -> None:
    """What was logged as succeeded is counted so, whatever becomes of the asyncio task around it."""

    async def cancel_myself() -> None:
        asyncio.current_task().cancel()

    with Core(conn_max=1) as core:
        core.spawn("cancels itself", cancel_myself)
        core.drain()

        assert core.stats().succeeded == 1


def test_fork_leaves_coroutines_that_tasks_have_left_behind() -> None:
    """A process whose loop still has something to do is not idle: the loop goes on over a fork."""
    with Core(conn_max=1) as core, AsyncGate() as agate:
        left: list[asyncio.Task[Any]] = []

        async def leave_behind() -> None:
            left.append(asyncio.create_task(agate()))

        core.spawn("leaves a child", leave_behind)
        core.drain()
        agate.wait_entered()

        core.forks.before_fork()
        core.forks.after_fork_in_parent()

        agate.open()
        agate.wait_left()
        assert not left[0].cancelled()


@pytest.mark.usefixtures("impatient")
def test_shutdown_of_many_pools_has_one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are given up side by side: what does not end is waited for until one and the same moment."""
    until: list[float] = []
    give_up = Shutdown.give_up

    def noted(shutdown: Shutdown, patience: float) -> None:
        until.append(patience)
        give_up(shutdown, patience)

    monkeypatch.setattr(Shutdown, "give_up", noted)
    with Core(conn_max=1) as core, Gate() as gate, Core(conn_max=1, drainer=core.drainer) as other:
        core.spawn("held", gate)
        other.spawn("held", gate)
        gate.wait_entered(2)

        now = monotonic()
        assert shut_down({core.shutdown: now, other.shutdown: now}) == 2

        assert len(until) == 2
        assert len(set(until)) == 1
        gate.open()


class Payload(bytearray):
    """A large argument that a weak reference can be made to."""


MEGABYTE = 1 << 20


async def fail_async(payload: Payload) -> None:
    raise ValueError(len(payload))


@pytest.mark.usefixtures("impatient")
def test_no_argument_outlives_its_task() -> None:
    """Memory that large arguments take is free as soon as their task has ended, in whatever way it did."""
    freed: list[threading.Event] = []  # one for each argument

    def spawn(task: Any) -> bool:
        payload = Payload(MEGABYTE)
        freed.append(threading.Event())
        weakref.finalize(payload, freed[-1].set)
        return core.spawn("large", task, payload)

    with Core(conn_max=2, capacity=4, task_timeout=0.01) as core, Gate() as gate, AsyncGate() as agate:
        for task in (len, fail_async, agate, lambda payload: payload[2 * MEGABYTE]):  # agate times out
            for _ in range(10):
                assert spawn(task)
                core.drain()
        core.slots.task_timeout = None
        spawn(gate)
        gate.wait_entered()
        spawn(agate)
        agate.wait_entered()
        accepted = sum(spawn(gate) for _ in range(10))  # 4 wait, 6 are dropped
        held = [event for event in freed if not event.is_set()]
        core.close(0)
        gate.open()

        # A free-threaded Python frees an object when the thread next runs that made it: this one.
        wait_until(lambda: all(event.is_set() for event in freed))

    stats = core.stats()
    assert accepted == 4
    assert len(held) == 6
    assert (stats.succeeded, stats.failed, stats.timed_out) == (10, 20, 10)
    assert (stats.dropped, stats.cancelled) == (6, 6)


def test_clock_that_jumps_changes_no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day may go back and forth by years: what is measured is measured by another clock."""
    days = itertools.cycle([0, 4e9, -1e9, 1e9])
    real = time.time
    monkeypatch.setattr("bgtasks.hooks.time", lambda: real() + next(days))
    with Core(conn_max=1, capacity=1, task_timeout=0.01) as core, Gate() as gate, AsyncGate() as agate:
        core.drainer.background.append(Watchdog(lambda: [core.slots]))
        core.spawn("times out", agate)
        core.drain()
        core.spawn("overruns", gate)
        core.logs.wait("'overruns' of pool 'core' has been running for more")
        core.spawn("waits", print, end="")
        for _ in range(3):
            core.spawn("dropped", print)
        gate.open()
        core.drain()

        stats, names = read_stats_by_name(core.queue)
        assert (stats.timed_out, stats.succeeded, stats.dropped) == (1, 2, 3)
        assert len(core.logs.of("'dropped'")) == 1  # the others within a minute
        assert all(0 <= name.runs.seconds < BOUND and 0 <= name.waits.seconds < BOUND for name in names)


def test_clock_of_a_machine_that_slept_ends_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the clock that measures jumps ahead, as after a sleep of the machine, what is due is done, once."""
    with Core(conn_max=2, task_timeout=1000 * BOUND) as core, Gate() as gate:
        watchdog = Watchdog(lambda: [core.slots])
        core.spawn("overruns", gate)
        gate.wait_entered()
        watchdog._look()
        assert core.stats().stuck == 0

        monkeypatch.setattr("bgtasks.monitoring.watchdog.monotonic", lambda: monotonic() + 2000 * BOUND)
        watchdog._look()
        watchdog._look()

        assert core.stats().stuck == 1
        gate.open()
        core.drain()
        assert len(core.logs.of("'overruns' of pool 'core' has been running for more")) == 1
        assert core.stats().succeeded == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit()])
def test_handlers_and_receivers_that_raise_at_every_step_lose_no_task(
    monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """With every log handler and every receiver broken, each task still has its one outcome."""

    def broken(*args: Any, **named: Any) -> None:
        raise error

    handler = logging.Handler(logging.DEBUG)
    handler.emit = broken
    signals = (task_spawned, task_started, task_finished, task_dropped)
    monkeypatch.setattr(logging, "lastResort", None)
    with Core(conn_max=2, capacity=2, task_timeout=0.01) as core, Gate() as gate, AsyncGate() as agate:
        logging.getLogger("bgtasks").addHandler(handler)
        for signal in signals:
            signal.connect(broken)
        try:
            tasks: list[Any] = [partial(print, end=""), asyncio.sleep, lambda: 1 / 0, agate]
            for task in tasks:
                core.spawn("works", task, *([0] if task is asyncio.sleep else []))
                core.drain()
            core.slots.task_timeout = None
            for _ in range(2):
                core.spawn("held", gate)
            gate.wait_entered(2)
            with contextlib.suppress(SystemExit):
                while core.spawn("waits", gate):
                    pass
            core.close(0)
        finally:
            for signal in signals:
                signal.disconnect(broken)
            logging.getLogger("bgtasks").removeHandler(handler)
        gate.open()

        stats = core.stats()
        assert (stats.succeeded, stats.failed, stats.timed_out) == (2, 1, 1)
        assert (stats.dropped, stats.cancelled) == (1, 4)
        assert stats.spawned == 9
