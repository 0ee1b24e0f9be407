"""What the tests of the public names share."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from django.test import override_settings
from django.urls import path

import bgtasks
from bgtasks import pools
from bgtasks.core.places import State
from bgtasks.repeats import repeats
from tests.gate import BOUND, Gate, wait_until

SMALL = {"default": {"CAPACITY": 4, "CONN_MAX": 2}, "email": {"CAPACITY": 2, "CONN_MAX": 1}}


@contextmanager
def full(pool: Any) -> Iterator[Any]:
    """Fill `pool`: its slots run a gate, and its queue has no place left."""
    stats = pool.stats()
    with Gate() as gate:
        for _ in range(stats.conn_max):
            assert pool.spawn("held", gate)
        gate.wait_entered(stats.conn_max)
        for _ in range(stats.capacity):
            assert pool.spawn("waits", gate)
        yield gate


@contextmanager
def heard(*signals: Any) -> Iterator[Any]:
    """Collect what receivers of `signals` are called with: sender and named arguments."""
    calls = []

    def receiver(*, signal: Any, sender: Any, **named: Any) -> None:
        calls.append((sender, named))

    for each in signals:
        each.connect(receiver)
    try:
        yield calls
    finally:
        for each in signals:
            each.disconnect(receiver)


@contextmanager
def connected(receiver: Callable[..., Any], *signals: Any) -> Iterator[None]:
    """Connect `receiver` to `signals` for a while."""
    for each in signals:
        each.connect(receiver)
    try:
        yield
    finally:
        for each in signals:
            each.disconnect(receiver)


@contextmanager
def site(view: Any) -> Iterator[None]:
    """Serve `view` at the root of the tests' site."""
    with override_settings(ROOT_URLCONF=(path("", view),)):
        yield


@contextmanager
def shutting_down(*waited_for: Any, shutdown: Callable[..., Any] = bgtasks.shutdown) -> Iterator[Any]:
    """Run `shutdown` on a thread, and go on when the queues of the pools `waited_for` are closed."""
    queues = [pool.slots.queue for pool in waited_for]
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(shutdown)
        wait_until(lambda: all(queue.state is not State.OPEN for queue in queues))
        yield future


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings, when what was handed over to another thread is written."""
    repeats.write_lines(BOUND)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def never() -> None:
    """Be a coroutine object that must be closed without having run."""
    pytest.fail("it ran")  # pragma: no cover  # it is what must not happen


def is_closed(coroutine: Any) -> bool:
    return inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


def function(ran: list[Any], *, value: Any) -> None:
    ran.append(value)


async def coroutine_function(ran: list[Any], *, value: Any) -> None:
    await asyncio.sleep(0)
    ran.append(value)


def refuse_threads(monkeypatch: pytest.MonkeyPatch, refused: Any = lambda: None) -> None:
    """Stand in for a machine without a free thread. If it is the drainer that asks, `refused` is called."""

    def start_new_thread(function: Any, *args: Any) -> None:
        if function == pools.drainer._start_wanted:
            refused()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("bgtasks.core.drainer._thread.start_new_thread", start_new_thread)


@contextmanager
def no_threads() -> Iterator[None]:
    """Let no thread start: there is no memory for such a stack."""
    before = threading.stack_size(1 << 60)
    try:
        yield
    finally:
        threading.stack_size(before)
