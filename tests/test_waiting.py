"""Waiting for tasks, and ending pools: drain, shutdown, and the same from asynchronous code."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, override_settings

import bgtasks
from bgtasks import conf, pools
from bgtasks.core.places import State
from bgtasks.signals import task_dropped, task_finished
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import own_threads
from tests.public import (
    SMALL,
    connected,
    full,
    heard,
    is_closed,
    never,
    no_threads,
    shutting_down,
    site,
    warned,
)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


# Waiting.


def test_drain_is_true_when_all_have_ended() -> None:
    """It waits for tasks of all pools, sync and async."""
    with Gate() as gate, AsyncGate() as async_gate, ThreadPoolExecutor(1) as executor:
        bgtasks.spawn("sync", gate)
        pools["email"].spawn("async", async_gate)
        gate.wait_entered()
        async_gate.wait_entered()
        waiting = executor.submit(bgtasks.drain, BOUND)
        gate.open()

        assert bgtasks.drain(0) is False

        async_gate.open()

        assert waiting.result(BOUND) is True
    assert gate.inside == async_gate.inside == 0


def test_drain_of_nothing_is_true() -> None:
    """With nothing spawned it returns at once, whether or not a pool was ever used."""
    assert bgtasks.drain() is True
    assert asyncio.run(bgtasks.adrain()) is True
    bgtasks.stats()
    assert bgtasks.drain() is True
    assert asyncio.run(bgtasks.adrain()) is True
    assert pools["email"].drain() is True


def test_drain_does_not_wait_for_what_is_spawned_later() -> None:
    """A site that never stops spawning can be drained all the same."""

    def spawn_another(**kwargs: Any) -> None:
        # While the first task ends, the next one runs already.
        bgtasks.spawn("second", second)
        second.wait_entered()

    with Gate() as first, Gate() as second, ThreadPoolExecutor(1) as executor:
        with connected(spawn_another, task_finished):
            bgtasks.spawn("first", first)
            first.wait_entered()
            waiting = executor.submit(bgtasks.drain, BOUND)
            wait_until(lambda: pools.default.slots.queue.drains)
            first.open()

            assert waiting.result(BOUND) is True
            assert second.inside == 1


def test_drain_goes_on_accepting() -> None:
    """A pool that is being drained accepts tasks."""
    with Gate() as gate, ThreadPoolExecutor(1) as executor:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        waiting = executor.submit(bgtasks.drain, BOUND)
        wait_until(lambda: pools.default.slots.queue.drains)

        assert bgtasks.spawn("meanwhile", gate) is True

        gate.open()
        waiting.result(BOUND)


def test_drain_is_false_at_its_timeout() -> None:
    """It says that something has not ended."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)

        assert bgtasks.drain(0) is False
        assert bgtasks.drain(timeout=0.01) is False
        assert pools.default.drain(0) is False
        assert asyncio.run(bgtasks.adrain(0)) is False
        assert asyncio.run(pools.default.adrain(timeout=0.01)) is False


def test_drain_of_one_pool_does_not_wait_for_another() -> None:
    """A pool's own drain looks at its own tasks only."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)

        assert pools["email"].drain(BOUND) is True
        assert asyncio.run(pools["email"].adrain(BOUND)) is True


def test_drain_inside_a_task_is_an_error() -> None:
    """A task would wait for itself; it is told so."""
    errors = []

    def task() -> None:
        with pytest.raises(RuntimeError) as raised:
            bgtasks.drain()
        errors.append(str(raised.value))

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == ["task 'wait' would wait for itself in drain()"]


def test_drain_inside_a_thread_of_a_task_is_an_error() -> None:
    """Code that a task runs with sync_to_async or to_thread is a part of the task."""
    errors = []

    def part() -> None:
        with pytest.raises(RuntimeError) as raised:
            bgtasks.drain()
        errors.append(str(raised.value))

    async def task() -> None:
        await sync_to_async(part)()
        await asyncio.to_thread(part)

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == ["task 'wait' would wait for itself in drain()"] * 2


def test_drain_of_another_pool_inside_a_task_waits() -> None:
    """A task may wait for the tasks of another pool."""
    ran: list[Any] = []

    def task() -> None:
        pools["email"].spawn("mail", ran.append, "mail")
        pools["email"].drain(BOUND)
        ran.append("task")

    bgtasks.spawn("task", task)
    bgtasks.drain(BOUND)

    assert ran == ["mail", "task"]


def test_drain_on_the_loop_is_an_error() -> None:
    """An async task would block the loop that it waits for; it is told what to use."""
    errors = []

    async def task() -> None:
        for wait in (bgtasks.drain, pools["email"].drain):
            with pytest.raises(RuntimeError) as raised:
                wait()
            errors.append(str(raised.value))
        with pytest.raises(RuntimeError) as raised:
            await bgtasks.adrain()
        errors.append(str(raised.value))
        assert await pools["email"].adrain(BOUND)

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == [
        "drain() would block the drainer's loop; use 'await adrain()'",
        "drain() would block the drainer's loop; use 'await adrain()'",
        "task 'wait' would wait for itself in drain()",
    ]
    assert bgtasks.stats()["default"].succeeded == 1


def test_adrain_does_not_block_the_loop_of_its_view() -> None:
    """While an async view waits, its loop goes on: here it is the loop that opens the gate."""

    async def view(request: HttpRequest) -> JsonResponse:
        bgtasks.spawn("held", gate)
        waiting = asyncio.create_task(bgtasks.adrain(BOUND))
        await asyncio.sleep(0)
        gate.open()
        return JsonResponse({"complete": await waiting})

    with Gate() as gate, site(view):
        response = async_to_sync(AsyncClient().get)("/")

    assert response.json() == {"complete": True}
    assert bgtasks.stats()["default"].succeeded == 1


def test_cancelled_adrain_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A client that disconnects while its view waits leaves nothing that somebody still has to answer."""

    async def main() -> None:
        waiting = asyncio.create_task(bgtasks.adrain())
        await asyncio.sleep(0)
        assert len(queue.drains) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)  # one turn of the loop, for the callbacks of cancelled futures
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        queue = pools.default.slots.queue
        asyncio.run(main())

        assert not queue.drains
    bgtasks.drain(BOUND)

    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


# Ending.


def test_shutdown_waits_for_accepted_tasks() -> None:
    """Tasks that run and tasks that wait end before it returns True."""
    with Gate() as gate:
        for _ in range(4):
            bgtasks.spawn("task", gate)
        with shutting_down(pools.default) as shutdown:
            gate.open()

    assert shutdown.result(BOUND) is True
    assert bgtasks.stats()["default"].succeeded == 4


def test_spawn_after_shutdown_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A pool that is shut down accepts nothing, and the drop is as visible as any."""
    coroutine = never()
    bgtasks.stats()

    assert bgtasks.shutdown() is True
    with heard(task_dropped) as calls:
        assert bgtasks.spawn("late", coroutine) is False

    assert is_closed(coroutine)
    assert calls == [(pools.default, {"name": "late", "reason": "shutdown"})]
    assert warned(caplog) == ["task 'late' dropped: pool 'default' is shut down"]


def test_spawn_during_shutdown_is_dropped() -> None:
    """From the first moment of a shutdown on, while tasks still run, none is accepted by any pool."""
    pools["email"].stats()
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        with shutting_down(pools.default, pools["email"]) as shutdown:
            assert bgtasks.spawn("late", print) is False
            assert pools["email"].spawn("late", print) is False
            assert not shutdown.done()
            gate.open()

    assert shutdown.result(BOUND) is True


def test_shutdown_ends_the_threads() -> None:
    """Nothing of the package runs after a shutdown."""
    pools.start()

    bgtasks.shutdown()

    wait_until(lambda: not own_threads())


def test_shutdown_again_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A second call, by the server's hook and the interpreter's for instance, changes and reports nothing."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        first = bgtasks.shutdown(timeout=0)
    second = bgtasks.shutdown()
    third = asyncio.run(bgtasks.ashutdown())

    assert (first, second, third) == (False, True, True)
    assert len(warned(caplog)) == 1


def test_shutdown_from_many_threads() -> None:
    """Several calls at once all wait for the tasks, and none fails."""
    barrier = threading.Barrier(9)

    def shutdown() -> bool:
        barrier.wait(BOUND)
        return bgtasks.shutdown()

    with Gate() as gate, ThreadPoolExecutor(8) as executor:
        for _ in range(4):
            bgtasks.spawn("task", gate)
        results = [executor.submit(shutdown) for _ in range(8)]
        barrier.wait(BOUND)
        wait_until(lambda: pools.default.slots.queue.state is not State.OPEN)
        assert not any(result.done() for result in results)
        gate.open()

        assert [result.result(BOUND) for result in results] == [True] * 8
    assert bgtasks.stats()["default"].succeeded == 4


def test_shutdown_from_a_task() -> None:
    """A task may shut its own pool down: the others end, and it is accounted for as well."""
    results = []

    def task() -> None:
        results.append(bgtasks.shutdown())
        results.append(bgtasks.spawn("late", print))

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("shutdown", task)
        wait_until(lambda: pools.default.slots.queue.state is not State.OPEN)
        gate.open()
        bgtasks.drain(BOUND)

    assert results == [True, False]
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.succeeded, stats.dropped) == (3, 2, 1)


@pytest.mark.parametrize("ashutdown", [bgtasks.ashutdown, pools.default.ashutdown])
def test_ashutdown_from_an_async_task(ashutdown: Any) -> None:
    """An async task may shut its own pool down, and goes on to its end with its thread and its loop."""
    results: list[Any] = []

    async def task() -> None:
        await sync_to_async(results.append)("before")
        results.append(await ashutdown())
        results.append(bgtasks.spawn("late", print))
        await sync_to_async(results.append)("after")

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert results == ["before", True, False, "after"]
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.succeeded, stats.dropped) == (2, 1, 1)


def test_shutdown_after_one_from_an_async_task(caplog: pytest.LogCaptureFixture) -> None:
    """The next shutdown ends the threads, and neither waits for nor reports what was cancelled before."""

    async def task() -> None:
        results.append(await bgtasks.ashutdown(timeout=0))

    results: list[Any] = []
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("shutdown", task)
        wait_until(lambda: results and bgtasks.stats()["default"].running == 0)
        results.append(bgtasks.shutdown())

    assert results == [False, True]
    assert warned(caplog) == ["pool 'default' was shut down with 1 tasks cancelled: 1 'held'"]
    assert not pools.drainer.pools


def test_shutdown_on_the_loop_is_an_error() -> None:
    """An async task would block the loop on which others have to end; it is told what to use."""
    errors = []

    async def task() -> None:
        for shutdown in (bgtasks.shutdown, pools.default.shutdown):
            with pytest.raises(RuntimeError) as raised:
                shutdown()
            errors.append(str(raised.value))

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert errors == ["shutdown() would block the drainer's loop; use 'await ashutdown()'"] * 2


def test_refused_shutdown_leaves_the_pools_open() -> None:
    """A shutdown that raises because of where it was called has shut nothing down."""
    errors = []

    async def task() -> None:
        try:
            bgtasks.shutdown()
        except RuntimeError as error:
            errors.append(error)

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert errors
    assert bgtasks.spawn("task", print, end="") is True
    assert pools["email"].spawn("first of its pool", print, end="") is True


def test_ashutdown_does_not_block_the_loop_of_its_view() -> None:
    """While an async view waits, its loop goes on: here it is the loop that opens the gate."""

    async def view(request: HttpRequest) -> JsonResponse:
        bgtasks.spawn("held", gate)
        waiting = asyncio.create_task(bgtasks.ashutdown())
        await asyncio.sleep(0)
        gate.open()
        return JsonResponse({"complete": await waiting})

    with Gate() as gate, site(view):
        response = async_to_sync(AsyncClient().get)("/")

    assert response.json() == {"complete": True}
    assert bgtasks.spawn("late", print) is False


def test_ashutdown_without_a_thread_runs_what_was_accepted(caplog: pytest.LogCaptureFixture) -> None:
    """If no thread can be had, the shutdown is done on the caller's, and the log says so."""

    def open_gate() -> None:
        wait_until(lambda: not pools.drainer.accepting)
        gate.open()

    with ThreadPoolExecutor(1) as executor, full(pools.default) as gate:
        opening = executor.submit(open_gate)
        with no_threads():
            assert asyncio.run(bgtasks.ashutdown()) is True
        opening.result(BOUND)

    assert bgtasks.stats()["default"].succeeded == 6
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == "no thread for the shutdown, which blocks the event loop"
    assert bgtasks.spawn("late", print) is False


def test_ashutdown_without_a_thread_reports_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """What does not end in time is cancelled and named, as with a thread."""
    with full(pools.default), no_threads():
        assert asyncio.run(bgtasks.ashutdown(0)) is False

    assert "pool 'default' was shut down with 6 tasks cancelled: 4 'waits', 2 'held'" in warned(caplog)


def test_ashutdown_without_a_thread_on_the_drainers_loop_is_an_error() -> None:
    """There it would wait for itself. The task fails, and a later shutdown is complete."""

    async def shut_down() -> None:
        try:
            with no_threads():
                await bgtasks.ashutdown()
        except RuntimeError as error:
            errors.append(str(error))
            raise

    errors: list[str] = []
    bgtasks.spawn("shutdown", shut_down)
    bgtasks.drain(BOUND)

    assert errors == ["can't start new thread"]
    assert bgtasks.stats()["default"].failed == 1
    assert bgtasks.shutdown() is True


def test_ashutdown_raises_what_the_shutdown_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong on the thread that does the shutdown is raised in the code that waits for it."""

    def stop() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(pools.drainer, "stop", stop)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(bgtasks.ashutdown())


def test_shutdown_out_of_time_cancels_and_names_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """It returns False, and one warning for each pool has the names and numbers of the cancelled tasks."""
    with full(pools.default):
        assert bgtasks.shutdown(timeout=0) is False

        stats = bgtasks.stats()["default"]
        assert (stats.cancelled, stats.running, stats.queued) == (6, 0, 0)

    assert warned(caplog) == ["pool 'default' was shut down with 6 tasks cancelled: 4 'waits', 2 'held'"]


def test_shutdown_out_of_time_cancels_async_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """An async task is cancelled, and may clean up."""
    cleaned_up = threading.Event()

    async def task() -> None:
        try:
            await gate()
        finally:
            cleaned_up.set()

    with AsyncGate() as gate:
        bgtasks.spawn("async", task)
        gate.wait_entered()

        assert asyncio.run(bgtasks.ashutdown(timeout=0)) is False

    assert cleaned_up.is_set()
    assert warned(caplog) == ["pool 'default' was shut down with 1 tasks cancelled: 1 'async'"]


@override_settings(
    BGTASKS={"default": {"CONN_MAX": 1, "SHUTDOWN_TIMEOUT": 1}, "email": {"SHUTDOWN_TIMEOUT": 3 * BOUND}}
)
def test_shutdown_without_a_timeout_uses_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    """Each pool has its SHUTDOWN_TIMEOUT; here the one second of the default pool runs out."""
    with Gate() as gate, Gate() as email_gate:
        bgtasks.spawn("held", gate)
        pools["email"].spawn("held", email_gate)
        gate.wait_entered()
        email_gate.wait_entered()
        bgtasks.spawn("waits", print)

        def open_email_gate(**kwargs: Any) -> None:
            # The default pool has cancelled what waits: now the task of the email pool may end.
            email_gate.open()

        with connected(open_email_gate, task_finished):
            assert bgtasks.shutdown() is False

    assert bgtasks.stats()["email"].succeeded == 1
    assert warned(caplog) == ["pool 'default' was shut down with 2 tasks cancelled: 1 'waits', 1 'held'"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shutdown_of_one_pool_leaves_the_others_open(asynchronous: bool) -> None:
    """A pool's own shutdown ends that pool only."""
    ran: list[Any] = []
    email = pools["email"]
    email.spawn("mail", ran.append, "mail")

    complete = asyncio.run(email.ashutdown()) if asynchronous else email.shutdown()

    assert complete is True
    assert ran == ["mail"]
    assert email.spawn("late", print) is False
    assert bgtasks.spawn("task", ran.append, "task") is True
    bgtasks.drain(BOUND)
    assert ran == ["mail", "task"]


def test_shutdown_of_one_pool_out_of_time_is_false() -> None:
    """A pool's own shutdown has a timeout and an answer as well."""
    with full(pools["email"]):
        assert pools["email"].shutdown(timeout=0) is False


def test_pool_first_used_after_shutdown_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """A shutdown of the process holds for pools that did not exist yet."""
    bgtasks.shutdown()

    assert pools["email"].spawn("late", print) is False
    assert warned(caplog) == ["task 'late' dropped: pool 'email' is shut down"]
    wait_until(lambda: not own_threads())


def test_pool_that_is_being_built_at_a_shutdown_is_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool that a shutdown could not see, since it was being built, accepts nothing either.

    1. spawner: builds the pool, and has yet to publish it
    2. shutdown: shuts down the pools that there are
    3. spawner: publishes the pool, and has to look whether the process still accepts tasks
    """
    pool_config = conf.pool_config

    def look_up_and_shut_down(name: str) -> Any:
        bgtasks.shutdown()
        return pool_config(name)

    monkeypatch.setattr(conf, "pool_config", look_up_and_shut_down)

    assert pools["email"].spawn("late", print) is False
    assert warned(caplog) == ["task 'late' dropped: pool 'email' is shut down"]


def test_shutdown_with_a_pool_that_was_never_used() -> None:
    """A handle that somebody has asked for, and not used, has nothing to shut down."""
    with override_settings(BGTASKS={"untouched": {}}):
        untouched = pools["untouched"]

        assert bgtasks.shutdown() is True
        assert untouched.shutdown() is True
        assert repr(untouched) == "<Pool 'untouched' not started>"


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_timeout_may_be_for_ever(timeout: float) -> None:
    """Threads cannot wait for so long: it is the longest that they can."""
    for wait in (bgtasks.drain, lambda limit: asyncio.run(bgtasks.adrain(limit)), bgtasks.shutdown):
        bgtasks.spawn("sleeps", time.sleep, 0.05)
        assert wait(timeout)
    bgtasks.pools.restart()
