"""Tasks that are not accepted: the answer, the signal, the counter, and warnings in a bounded number."""

import gc
import logging
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
from django.test import override_settings

import bgtasks
from bgtasks import pools, testing
from bgtasks.core.figures import DropReason, ShedReason
from bgtasks.core.log import logger
from bgtasks.core.queue import TaskQueue
from bgtasks.drops import warn
from bgtasks.repeats import repeats
from bgtasks.signals import task_dropped, task_spawned
from tests.gate import BOUND, Gate
from tests.pool import Calling, Core, Logs
from tests.public import (
    SMALL,
    connected,
    full,
    function,
    heard,
    is_closed,
    never,
    refuse_threads,
    warned,
)


@pytest.fixture
def queue() -> Any:
    return TaskQueue("mail", 5, 1)


# In a pool.


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


def test_spawn_past_capacity_returns_false() -> None:
    """Running tasks hold no place in the queue; with every place taken, the next task is dropped."""
    with full(pools.default):
        assert bgtasks.spawn("one too many", print) is False

        stats = bgtasks.stats()["default"]
        assert (stats.running, stats.queued, stats.dropped) == (2, 4, 1)


def test_drop_is_logged_with_pool_and_capacity(caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the task, the pool and its capacity."""
    with full(pools["email"]):
        pools["email"].spawn("one too many", print)

    assert warned(caplog) == ["task 'one too many' dropped: pool 'email' is full (capacity 2)"]


def test_drop_is_signalled() -> None:
    """task_dropped says which pool dropped which task and why, after task_spawned."""
    with full(pools.default), heard(task_spawned, task_dropped) as calls:
        bgtasks.spawn("one too many", print)

    assert calls == [
        (pools.default, {"name": "one too many"}),
        (pools.default, {"name": "one too many", "reason": "full"}),
    ]


def test_dropped_coroutine_object_is_closed() -> None:
    """A dropped coroutine object gives no warning that it was never awaited."""
    coroutine = never()

    with full(pools.default), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert bgtasks.spawn("one too many", coroutine) is False
        assert is_closed(coroutine)
        del coroutine
        gc.collect()

    assert caught == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_broken_receivers_do_not_reach_the_spawner(error: Any) -> None:
    """Whatever a receiver of task_spawned or task_dropped raises, spawn answers."""

    def receiver(**kwargs: Any) -> None:
        raise error("receiver")

    with full(pools.default), connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("one too many", print) is False
    bgtasks.drain(BOUND)
    with connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("task", function, [], value=7) is True


def test_full_queue_drops_nothing_that_goes_elsewhere() -> None:
    """While tasks are captured for a test, or run inline, they need no place in the queue."""
    with full(pools.default), testing.captured() as tasks:
        assert bgtasks.spawn("captured", print) is True

        assert tasks.names == ["captured"]
        assert bgtasks.stats()["default"].dropped == 0


def test_exact_capacity_with_many_spawners() -> None:
    """64 threads that spawn at once do not get one task more in than there are places."""
    barrier = threading.Barrier(64)

    def spawn() -> bool:
        barrier.wait(BOUND)
        return bgtasks.spawn("task", gate)

    with Gate() as gate:
        for _ in range(2):
            bgtasks.spawn("held", gate)
        gate.wait_entered(2)
        with ThreadPoolExecutor(64) as executor:
            accepted = sum(future.result(BOUND) for future in [executor.submit(spawn) for _ in range(64)])

    assert accepted == 4


def test_spawn_without_a_thread_to_be_had_returns_false(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no thread can be started, the task is dropped, closed and reported, and its place is free again."""
    refuse_threads(monkeypatch)
    coroutine = never()

    with heard(task_dropped) as calls:
        assert bgtasks.spawn("task", coroutine) is False

    assert calls == [(pools.default, {"name": "task", "reason": "no_thread"})]
    assert warned(caplog) == ["task 'task' dropped: pool 'default' cannot start a thread"]
    assert is_closed(coroutine)
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.dropped, stats.queued) == (1, 1, 0)


# The warnings. How often they are written is a matter of bgtasks.repeats.


def test_first_drop_is_warned_of_at_once(queue: TaskQueue, logs: Logs) -> None:
    """The warning of the first drop names the task, the pool and the reason."""
    warn(queue, "send-mail", DropReason.FULL)

    assert logs.lines == ["task 'send-mail' dropped: pool 'mail' is full (capacity 5)"]
    assert logs.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (DropReason.FULL, "pool 'mail' is full (capacity 5)"),
        (DropReason.SHUTDOWN, "pool 'mail' is shut down"),
        (DropReason.NO_THREAD, "pool 'mail' cannot start a thread"),
        (DropReason.NO_LOOP, "gevent has replaced threads, so there is no event loop for asynchronous tasks"),
        (DropReason.PROPAGATOR, "a propagator could not capture its value"),
    ],
)
def test_warning_says_why(queue: TaskQueue, logs: Logs, reason: Any, why: Any) -> None:
    """Each reason has its words, and is in the record for a machine."""
    warn(queue, "send-mail", reason)

    assert logs.lines == [f"task 'send-mail' dropped: {why}"]
    record = logs.records[0]
    assert (record.task, record.pool, record.reason) == ("send-mail", "mail", reason.value)
    assert record.queue_length == 0


def test_further_drops_are_counted_and_told_at_the_end(queue: TaskQueue, logs: Logs) -> None:
    """The second warning says how many were left out, with the last reason. A shed task is told apart."""
    warn(queue, "send-mail", DropReason.FULL)
    warn(queue, "send-mail", DropReason.FULL)
    warn(queue, "send-mail", DropReason.SHUTDOWN)
    warn(queue, "send-mail", ShedReason.EXPIRED)
    warn(queue, "resize", DropReason.FULL)

    repeats.flush()

    assert logs.lines == [
        "task 'send-mail' dropped: pool 'mail' is full (capacity 5)",
        "task 'send-mail' shed: it expired while it waited in pool 'mail'",
        "task 'resize' dropped: pool 'mail' is full (capacity 5)",
        "task 'send-mail' dropped again (2 more): pool 'mail' is shut down",
    ]


def test_handler_that_spawns_into_the_full_pool_goes_on() -> None:
    """A handler that spawns what it logs gets False."""
    spawned: list[bool] = []
    with Core(capacity=1, conn_max=1) as core, Gate() as gate:
        calling = Calling(lambda: spawned.append(core.spawn("log-to-db", gate)))
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", gate)
        logger.addHandler(calling)
        try:
            assert core.spawn("one too many", gate) is False
            repeats.write_lines(BOUND)
        finally:
            logger.removeHandler(calling)

        assert spawned == [False]
        assert len(core.logs.of("'log-to-db'")) == 1
        assert core.stats().dropped == 2


def test_slow_handler_holds_up_no_spawn(queue: TaskQueue) -> None:
    """The warning of a drop is written by another thread, and spawn answers while a handler hangs."""
    answered = threading.Event()
    waited: list[bool] = []
    calling = Calling(lambda: waited.append(answered.wait(BOUND)))
    logger.addHandler(calling)
    try:
        with full(pools.default):
            assert bgtasks.spawn("one too many", print) is False
            assert bgtasks.using(expires=60).spawn("one too many", print) is False
            answered.set()
            repeats.write_lines(BOUND)
    finally:
        logger.removeHandler(calling)

    assert waited == [True]


def test_warning_is_written_in_the_context_of_the_spawner(queue: TaskQueue) -> None:
    """A filter that adds the id of the request finds it, though another thread writes."""
    request_id: ContextVar[str] = ContextVar("request_id", default="none")
    seen: list[str] = []
    calling = Calling(lambda: seen.append(request_id.get()))
    logger.addHandler(calling)
    token = request_id.set("r-1")
    try:
        warn(queue, "send-mail", DropReason.FULL)
        repeats.write_lines(BOUND)
    finally:
        request_id.reset(token)
        logger.removeHandler(calling)

    assert seen == ["r-1"]


def test_drop_beside_a_factory_that_sets_our_attributes(
    queue: TaskQueue, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record factory that sets `task` or `pool` costs a drop's warning nothing."""

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        vars(record).update(task=None, pool=None, reason=None, queue_length=None)
        return record

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(factory)
    try:
        warn(queue, "send-mail", DropReason.FULL)
        repeats.write_lines(BOUND)
    finally:
        logging.setLogRecordFactory(before)

    assert (logs.records[0].task, logs.records[0].pool) == ("send-mail", "mail")


FORGED = "mail\nERROR forged line \x1b[31mred"


def test_name_cannot_forge_a_line(queue: TaskQueue, logs: Logs) -> None:
    """A line break or a terminal escape in a name is written as such."""
    warn(queue, FORGED, DropReason.FULL)

    assert repr(FORGED) in logs.lines[0]
    assert "\n" not in logs.lines[0]
    assert "\x1b" not in logs.lines[0]
