"""A paused pool accepts and does not run."""

import asyncio
import gc
import threading
from functools import partial
from typing import Any

import pytest

from bgtasks.queue import State
from tests.core import Companion, Core, ForcedDeque
from tests.gate import BOUND, AsyncGate, Gate


def test_paused_pool_accepts_and_does_not_run() -> None:
    """What is spawned in a paused pool waits, and runs once the pool is resumed."""
    with Core(conn_max=2) as core:
        ran = threading.Event()
        core.slots.pause()
        for _ in range(3):
            assert core.spawn("waits", ran.set) is True

        assert (core.stats().queued, core.stats().running) == (3, 0)
        assert not ran.is_set()

        core.slots.resume()
        core.drain()
        assert core.stats().succeeded == 3


def test_paused_pool_is_full_at_its_capacity() -> None:
    """A pause does not lift the bound."""
    with Core(conn_max=1, capacity=2) as core:
        core.slots.pause()
        accepted = [core.spawn("waits", print, end="") for _ in range(3)]

        core.slots.resume()

    assert accepted == [True, True, False]


def test_what_runs_goes_on_when_the_pool_is_paused() -> None:
    """A pause lets the running tasks end, and no slot takes another one."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as other:
        core.spawn("held", gate)
        core.spawn("held on the loop", other)
        gate.wait_entered()
        other.wait_entered()
        core.spawn("waits", print, end="")
        ended = core.queue.all_ended(except_for=[])
        core.slots.pause()
        gate.open()
        other.open()
        gate.wait_left()
        other.wait_left()

        assert core.stats().queued == 1
        assert not ended.done()

        core.slots.resume()
        assert ended.result(BOUND)


def test_shutdown_ends_a_pause() -> None:
    """What a paused pool has accepted runs when the process ends: the alternative is to lose it."""
    with Core(conn_max=1) as core:
        ran = threading.Event()
        core.slots.pause()
        core.spawn("waits", ran.set)

        assert core.close(BOUND) == 0
        assert ran.is_set()


def test_pool_that_is_shut_down_is_not_paused() -> None:
    """A pause that comes after the shutdown has begun is none."""
    with Core(conn_max=1) as core:
        core.queue.close()
        core.slots.pause()

        assert not core.slots.paused


def test_pool_that_is_shut_down_while_it_is_paused_is_not_paused() -> None:
    """1. pause: takes the idle slot out. 2. shutdown: closes the queue. 3. pause: sees that."""
    with Core(conn_max=1) as core:
        ran = threading.Event()
        core.slots.idle = ForcedDeque(core.slots.idle)
        core.slots.idle.force("before pop", core.queue.close)
        core.spawn("first", ran.set)
        assert ran.wait(BOUND)
        core.slots.pause()

        assert core.queue.state is State.CLOSING
        assert not core.slots.paused


def test_slot_that_rests_as_the_pool_is_resumed_goes_on() -> None:
    """A slot that looks for its place of rest while the pool is being resumed is not forgotten there.

    1. slot: sees the pause    2. resume: finds no slot to let go    3. slot: lies down, looks again
    """
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        core.slots.pause()
        core.slots._held = ForcedDeque()
        core.slots._held.force("before append", core.slots.resume)
        gate.open()

        core.drain()


def test_slot_that_is_resumed_as_it_rests_goes_on_once() -> None:
    """1. slot: lies down. 2. resume: lets it go and wakes it. 3. slot: finds itself gone, and lets it be."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        core.slots.pause()
        core.slots._held = ForcedDeque()
        core.slots._held.force("after append", core.slots.resume)
        gate.open()

        core.drain()
        assert core.stats().succeeded == 2


def test_paused_pool_steps_aside_for_a_fork(patient: None) -> None:
    """A pool that is paused and empty leaves no thread alive while a fork happens, and stays paused."""
    with Core(conn_max=2) as core:
        core.slots.pause()
        core.drainer.before_fork()
        threads = core.threads()
        core.drainer.after_fork_in_parent()
        assert not threads

        core.spawn("waits", print, end="")
        core.drainer.start()
        assert (core.stats().queued, core.slots.paused) == (1, True)
        core.slots.resume()


@pytest.mark.parametrize("task", [gc.isenabled, partial(asyncio.sleep, 0)])
def test_companion_hears_of_a_slot_that_was_idle(task: Any) -> None:
    """The thread beside the drainer is stirred when an idle slot gets a task, and told of the end."""
    with Core(conn_max=1) as core:
        core.drainer.companion = companion = Companion()
        core.spawn("task", task)
        core.drain()
        core.drainer.stop()
        core.drainer.after_fork_in_child()

    assert companion.heard == ["stir", "halt", "forget"]
