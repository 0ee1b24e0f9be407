"""A paused pool accepts and does not run."""

import threading

from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, Drained, after_call


def test_paused_pool_accepts_and_does_not_run() -> None:
    """What is spawned in a paused pool waits, and runs once the pool is resumed."""
    with Core(conn_max=2) as core:
        ran = threading.Event()
        assert core.queue.pause()
        for _ in range(3):
            assert core.spawn("waits", ran.set) is True

        assert (core.stats().queued, core.stats().running) == (3, 0)
        assert not ran.is_set()

        core.queue.resume()
        core.drain()
        assert core.stats().succeeded == 3


def test_pool_whose_slots_have_not_started_may_be_paused() -> None:
    """The first task of a paused pool starts the slots, which do not run it before the pool is resumed."""
    with Core(conn_max=2, start=False) as core:
        core.queue.pause()
        core.spawn("waits", print, end="")
        wait_until(lambda: core.slots.all)

        assert (core.stats().queued, core.stats().running) == (1, 0)

        core.queue.resume()
        core.drain()
        assert core.stats().succeeded == 1


def test_paused_pool_is_full_at_its_capacity() -> None:
    """A pause does not lift the bound."""
    with Core(conn_max=1, capacity=2) as core:
        core.queue.pause()
        accepted = [core.spawn("waits", print, end="") for _ in range(3)]

        core.queue.resume()

    assert accepted == [True, True, False]


def test_what_runs_goes_on_when_the_pool_is_paused() -> None:
    """A pause lets the running tasks end, and no slot takes another one."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as other:
        core.spawn("held", gate)
        core.spawn("held on the loop", other)
        gate.wait_entered()
        other.wait_entered()
        core.spawn("waits", print, end="")
        ended = Drained(core.queue)
        core.queue.pause()
        gate.open()
        other.open()
        gate.wait_left()
        other.wait_left()

        assert core.stats().queued == 1
        assert not ended.done()

        core.queue.resume()
        assert ended.result(BOUND)


def test_shutdown_ends_a_pause() -> None:
    """What a paused pool has accepted runs when the process ends: the alternative is to lose it."""
    with Core(conn_max=1) as core:
        ran = threading.Event()
        core.queue.pause()
        core.spawn("waits", ran.set)

        assert core.close(BOUND) == 0
        assert ran.is_set()


def test_pool_that_is_shut_down_is_not_paused() -> None:
    """A pause that comes after the shutdown has begun is none."""
    with Core(conn_max=1) as core:
        core.queue.close()

        assert not core.queue.pause()
        assert not core.queue.paused


def test_task_that_is_put_as_the_pool_is_resumed_runs() -> None:
    """1. spawner: puts a task, which nobody may take. 2. resume. 3. spawner: sees that slots are there."""
    with Core(conn_max=1) as core:
        ran = threading.Event()
        core.queue.pause()
        with after_call(core.queue, "put", core.queue.resume):
            core.spawn("task", ran.set)

        assert ran.wait(BOUND)


def test_paused_pool_steps_aside_for_a_fork(patient: None) -> None:
    """A pool that is paused and empty leaves no thread alive while a fork happens, and stays paused."""
    with Core(conn_max=2) as core:
        core.queue.pause()
        core.forks.before_fork()
        threads = core.threads()
        core.forks.after_fork_in_parent()
        assert not threads

        core.spawn("waits", print, end="")
        core.start()
        assert (core.stats().queued, core.queue.paused) == (1, True)
        core.queue.resume()
