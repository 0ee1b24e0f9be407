"""How a pool ends: what it waits for, what it cancels and reports, and who may ask for it when.

tests/core/test_shutdown.py is about the ends of whole processes.
"""

import _thread
import asyncio
import contextlib
import logging
import threading
from collections import Counter
from concurrent.futures import Future
from time import monotonic
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from bgtasks import signals
from bgtasks.core.figures import Outcome
from bgtasks.core.places import State
from bgtasks.core.shutdown import Shutdown, shut_down
from bgtasks.monitoring.figures import read_stats
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import BackgroundThread, Core, FailingStart, make_task, receiving


async def nothing() -> None:
    pass


async def swallow(held: AsyncGate, then: AsyncGate) -> None:
    """Do not end when cancelled, but when `then` is opened."""
    with contextlib.suppress(asyncio.CancelledError):
        await held()
    await then()


class Closing:
    """A shutdown of the kit's pool on a thread of its own."""

    def __init__(self, core: Core, seconds: float) -> None:
        self.cancelled: Future[int | None] = Future()
        self._thread = threading.Thread(target=lambda: self.cancelled.set_result(core.close(seconds)))

    def __enter__(self) -> "Closing":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._thread.join(BOUND)


def note_sleeps(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that is set when a shutdown is about to sleep."""
    sleep, sleeps = Shutdown._sleep, threading.Event()

    def note_and_sleep(shutdown: Shutdown, *args: Any, **kwargs: Any) -> None:
        sleeps.set()
        sleep(shutdown, *args, **kwargs)

    monkeypatch.setattr(Shutdown, "_sleep", note_and_sleep)
    return sleeps


# What it waits for.


def test_close_waits_for_what_was_accepted() -> None:
    """Until its deadline a shutdown lets everything end that runs or waits, and says nothing of it."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        core.spawn("plain", gate)
        core.spawn("asynchronous", agate)
        gate.wait_entered()
        agate.wait_entered()
        core.spawn("waits", print, end="")
        core.spawn("waits", nothing)
        with Closing(core, BOUND) as closing:
            wait_until(lambda: core.queue.state is State.CLOSING)
            gate.open()
            agate.open()

        assert closing.cancelled.result(0) == 0
        assert core.stats().succeeded == 4
        assert core.logs.above(logging.WARNING) == []
        assert core.queue.state is State.CLOSED


def test_close_accepts_nothing_more() -> None:
    """A task that is spawned after the shutdown began is dropped."""
    with Core() as core:
        core.close(BOUND)

        assert core.spawn("too late", print) is False

        assert core.stats().dropped == 1
        assert core.logs.of("task 'too late' dropped: pool 'core' is shut down")


def test_close_ends_the_slots_and_leaves_the_loop(patient: None) -> None:
    """The slots of a pool that was shut down are gone. The loop serves the other pools."""
    with Core(conn_max=2) as core:
        core.close(BOUND)

        assert [thread.name for thread in core.threads()] == ["bgtasks-drainer"]
        assert core.slots.all == []


def test_close_starts_the_threads_for_what_waits() -> None:
    """Tasks that wait while there are no threads, as after a fork, are run by the shutdown."""
    ran = threading.Event()
    with Core(start=False) as core:
        core.queue.put(make_task("waits", ran.set))

        assert core.close(BOUND) == 0

        assert ran.is_set()


def test_close_does_not_wait_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody can be there to run them, waiting tasks are cancelled at once."""

    def fail(*args: Any) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    with Core(start=False) as core:
        core.queue.put(make_task("waits"))

        assert core.close(BOUND * 10) == 1

        assert core.logs.of("pool 'core' was shut down with 1 tasks cancelled: 1 'waits'")


def test_close_does_not_wait_for_threads_that_fail_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait on if the start fails that it has relied on, as on Python 3.12.1 at its exit.

    1. a spawner: puts a task, and has a bare thread start the slots
    2. shutdown: finds that threads are being started, and waits for the task
    3. the bare thread: can start none
    """
    start_new_thread, sleeps = _thread.start_new_thread, note_sleeps(monkeypatch)

    def fail(*args: Any) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    def start_late(function: Any, args: Any) -> None:
        bare()
        function(*args)

    def start_one(*args: Any) -> None:
        monkeypatch.setattr(_thread, "start_new_thread", fail)
        start_new_thread(start_late, args)

    with Core(start=False) as core, Gate() as bare:
        FailingStart(monkeypatch, 0)
        monkeypatch.setattr(_thread, "start_new_thread", start_one)
        core.spawn("waits", print)
        with Closing(core, BOUND * 10) as closing:
            assert sleeps.wait(BOUND)
            bare.open()

            assert closing.cancelled.result(BOUND) == 1

        assert core.logs.of("threads could not be started")


def test_close_of_an_unused_pool_starts_nothing() -> None:
    """There is nothing to wait for, and nothing to say."""
    with Core(start=False) as core:
        assert core.close(BOUND) == 0

        assert core.threads() == []
        assert core.logs.above(logging.WARNING) == []


# What it cancels.


def test_close_reports_everything_it_cancels_in_one_warning(impatient: None) -> None:
    """What waits and coroutines that run are cancelled, functions that run given up: all are named."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        core.spawn("plain", gate)
        core.spawn("asynchronous", agate)
        gate.wait_entered()
        agate.wait_entered()
        core.spawn("waits", gate)
        core.spawn("waits", gate)

        assert core.close(0) == 4

        [line] = core.logs.above(logging.WARNING)
        assert line.startswith("pool 'core' was shut down with 4 tasks cancelled: 2 'waits', 1 ")
        assert "1 'plain'" in line
        assert "1 'asynchronous'" in line
        assert (core.stats().cancelled, core.stats().running, core.stats().queued) == (4, 0, 0)
        agate.wait_left()  # the shutdown, impatient, does not


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_function_given_up_by_a_shutdown_is_not_counted_again(fails: bool, impatient: None) -> None:
    """When it ends after all it stays cancelled."""
    with Core(conn_max=1) as core, Gate() as gate:

        def end_late() -> None:
            gate()
            if fails:
                raise ValueError("failed")

        core.spawn("plain", end_late)
        gate.wait_entered()
        thread = core.slots.all[0].thread
        core.close(0)

        gate.open()
        thread.join(BOUND)

        assert not thread.is_alive()
        stats = core.stats()
        assert (stats.cancelled, stats.succeeded, stats.failed, stats.running) == (1, 0, 0, 0)


def test_function_given_up_by_a_shutdown_may_go_on_as_nothing(impatient: None) -> None:
    """A coroutine that it returns after all is not run, and Python does not warn of it."""
    with Core(conn_max=1) as core, Gate() as gate:
        coroutine = nothing()

        def go_on() -> Any:
            gate()
            return coroutine

        core.spawn("plain", go_on)
        gate.wait_entered()
        [thread] = core.slots.threads()
        core.close(0)

        gate.open()
        thread.join(BOUND)

        assert core.stats().cancelled == 1
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


def test_coroutine_that_swallows_its_cancellation_is_given_up(impatient: None) -> None:
    """A shutdown does not wait for a coroutine that will not end, and what it does later is not counted."""
    with Core(conn_max=1) as core, AsyncGate() as held, AsyncGate() as gate:
        core.spawn("swallows", swallow, held, gate)
        held.wait_entered()

        assert core.close(0) == 1
        gate.wait_entered()
        gate.open()
        gate.wait_left()

        stats = core.stats()
        assert (stats.cancelled, stats.succeeded, stats.running) == (1, 0, 0)


def test_coroutine_that_ends_well_when_it_is_cancelled_has_succeeded(patient: None) -> None:
    """One that makes use of its last moment to finish is not reported as cancelled."""
    with Core(conn_max=1) as core, AsyncGate() as held:

        async def finish() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await held()
            await sync_to_async(print)(end="")

        core.spawn("finishes", finish)
        held.wait_entered()

        assert core.close(0) == 0

        assert (core.stats().cancelled, core.stats().succeeded) == (0, 1)


def test_waiting_coroutine_object_is_closed_by_a_shutdown(impatient: None) -> None:
    """Python does not warn of a coroutine object that was cancelled before it began."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        coroutine = nothing()
        core.spawn("waits", coroutine)

        assert core.close(0) == 2

        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)


def test_coroutine_that_the_loop_has_not_begun_is_cancelled(impatient: None) -> None:
    """It never begins, however late the loop comes to look; and no thread beside the drainer comes again."""
    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held, Gate() as looked:
        core.drainer.background = [companion := BackgroundThread()]
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        core.spawn("waits", nothing)
        core.drainer.loop.call_soon(looked)
        threads = core.slots.threads()

        assert core.close(0) == 1
        for thread in threads:
            thread.join(BOUND)  # it may have been woken before
        companion.heard.clear()
        held.open()
        looked.wait_entered()

        assert companion.heard == []
        assert (core.stats().cancelled, core.stats().succeeded) == (1, 0)


def test_coroutine_cancelled_before_its_first_step_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 begins each with a step of the loop, and a shutdown may come before it."""
    monkeypatch.setattr("bgtasks.core.slot._new_runner", asyncio.Task)

    def cancel() -> None:
        [task] = core.queue.running()
        core.slots.all[0].stop_task(task, Outcome.CANCELLED)

    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held:
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        core.spawn("waits", nothing)
        core.drainer.loop.call_soon(cancel)  # right after the one that claims it
        held.open()
        core.drain()

        assert core.stats().cancelled == 1
        assert core.logs.above(logging.ERROR) == []


def test_coroutine_that_was_lent_and_has_not_begun_is_cancelled(impatient: None) -> None:
    """What a plain function has returned does not begin behind a shutdown that has given it up."""
    began: list[int] = []

    async def begin() -> None:  # pragma: no cover  # that is the point
        began.append(1)

    def go_on() -> Any:
        return begin()

    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held, Gate() as looked:
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        core.spawn("returns a coroutine", go_on)
        wait_until(lambda: any(task.asynchronous for task in core.queue.running()))
        core.drainer.loop.call_soon(looked)

        assert core.close(0) == 1
        held.open()
        looked.wait_entered()

        assert began == []
        assert core.stats().cancelled == 1


# Who asks for it, and when.


def test_second_close_has_nothing_to_do(impatient: None) -> None:
    """A shutdown that is complete is not repeated, nor reported again."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        assert core.close(0) == 1

        assert core.close(BOUND) == 0

        assert len(core.logs.above(logging.WARNING)) == 1


def interrupted_sleep(*args: Any, **kwargs: Any) -> None:
    """Stand in for the sleep of a shutdown in which a signal handler raises SystemExit."""
    raise SystemExit


@pytest.mark.parametrize("seconds", [BOUND, 0], ids=["while it waits", "while it cancels"])
def test_close_goes_on_after_an_exception(
    impatient: None, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A shutdown that a signal handler ended by SystemExit is finished by the next one, nothing left out."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate, AsyncGate() as then:
        core.spawn("plain", gate)
        core.spawn("asynchronous", swallow, agate, then)
        gate.wait_entered()
        agate.wait_entered()
        core.spawn("waits", gate)
        with monkeypatch.context() as patch:
            patch.setattr(Shutdown, "_sleep", interrupted_sleep)
            with pytest.raises(SystemExit):
                core.close(seconds)

        assert core.close(0) == 3

        [line] = core.logs.above(logging.WARNING)
        assert all(f"1 '{name}'" in line for name in ("plain", "asynchronous", "waits"))
        assert core.stats().cancelled == 3
        assert core.slots.all == []


@pytest.mark.parametrize(("first", "second"), [(0, BOUND * 10), (BOUND * 10, 0)])
def test_earliest_deadline_is_in_force(
    impatient: None, monkeypatch: pytest.MonkeyPatch, first: Any, second: Any
) -> None:
    """A shutdown that goes on where another was interrupted does not wait anew, but may be more urgent."""
    with Core(conn_max=1) as core, AsyncGate() as held, AsyncGate() as then:
        core.spawn("swallows", swallow, held, then)
        held.wait_entered()
        with monkeypatch.context() as patch:
            patch.setattr(Shutdown, "_sleep", interrupted_sleep)
            with pytest.raises(SystemExit):
                core.close(first)

        assert core.close(second) == 1


def test_second_close_waits_for_the_first(impatient: None) -> None:
    """Whoever comes second is there until the first is done, and has cancelled nothing."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        with core.shutdown.lock:  # the first is under way
            second = Closing(core, 0).__enter__()
            wait_until(lambda: core.queue.state is State.CLOSING)
            assert not second.cancelled.done()
            assert core.close(0) == 1

        assert second.cancelled.result(BOUND) == 0
        second.__exit__()


def test_urgent_close_hastens_the_one_under_way(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shutdown that has no time left, such as that of a second signal, does not wait for another's time."""
    sleeps = note_sleeps(monkeypatch)
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        with Closing(core, 100 * BOUND) as first:
            assert sleeps.wait(BOUND)

            assert core.close(0) == 0  # the other one gives up, and reports

            assert first.cancelled.result(BOUND) == 1


def test_pools_are_closed_side_by_side(impatient: None) -> None:
    """A shutdown of several pools asks all of them to end before it gives any of them up."""
    with Core(conn_max=1) as core, Gate() as gate, AsyncGate() as agate:
        other = core.another()
        core.start()
        core.spawn("plain", gate)
        other.queue.put(make_task("other", agate, asynchronous=True))
        gate.wait_entered()
        agate.wait_entered()

        assert shut_down({core.shutdown: monotonic(), Shutdown(other, core.drainer): monotonic()}) == 2

        assert core.logs.of("pool 'core' was shut down with 1 tasks cancelled: 1 'plain'")
        assert core.logs.of("pool 'core-other' was shut down with 1 tasks cancelled: 1 'other'")


def test_pool_out_of_time_takes_none_from_the_others() -> None:
    """Pools that are shut down together keep their own times, whichever is the first to be waited for."""
    with Core(conn_max=1) as core, Gate() as gate, Gate() as other_gate:
        other = core.another(name="core-a")  # comes first by its name
        core.start()
        other.queue.put(make_task("in time", other_gate))
        core.spawn("too late", gate)
        core.spawn("waits", print)
        other_gate.wait_entered()
        gate.wait_entered()
        plan = {core.shutdown: monotonic(), Shutdown(other, core.drainer): monotonic() + BOUND}
        closed: Future[int | None] = Future()
        closing = threading.Thread(target=lambda: closed.set_result(shut_down(plan)))
        closing.start()
        wait_until(lambda: core.stats().cancelled == 1)  # what waited, as soon as the time is over
        other_gate.open()
        closing.join(BOUND)

        assert closed.result(0) == 2
        assert read_stats(other.queue).succeeded == 1


# A task that asks for it.


def test_close_called_by_a_task_does_not_wait_for_it(patient: None) -> None:
    """A task that shuts its own pool down goes on, and ends as it likes; the others are waited for."""
    closed: Future[int | None] = Future()

    with Core(conn_max=2) as core, Gate() as gate, Gate() as after:
        core.spawn("other", gate)
        gate.wait_entered()

        def close() -> None:
            gate.open()
            closed.set_result(core.close(BOUND))
            after()

        core.spawn("own", close)

        assert closed.result(BOUND) == 0
        after.wait_entered()
        assert core.stats().running == 1
        after.open()
        wait_until(lambda: core.stats().succeeded == 2)


def test_task_that_has_closed_its_pool_is_waited_for() -> None:
    """What a task does after it has shut its pool down is not cut off by the shutdown at exit."""
    with Core(conn_max=1) as core, Gate() as after:

        def close() -> None:
            core.close(BOUND)
            after()

        core.spawn("own", close)
        after.wait_entered()
        assert [task.name for task in core.queue.running()] == ["own"]

        with Closing(core, BOUND) as closing:
            after.open()

        assert closing.cancelled.result(0) == 0
        assert core.stats().succeeded == 1
        assert core.slots.all == []


def test_close_called_by_a_coroutine_leaves_it_its_slot(patient: None) -> None:
    """A coroutine that shuts its own pool down goes on, with its calls on the slot's thread."""
    with Core(conn_max=1) as core:

        async def close() -> None:
            assert await asyncio.to_thread(core.close, BOUND) == 0
            await sync_to_async(print)(end="")

        core.spawn("own", close)
        core.drain()

        assert core.stats().succeeded == 1
        assert core.close(BOUND) == 0
        assert core.slots.all == []


def test_close_called_by_a_coroutine_reports_the_others_once(impatient: None) -> None:
    """What it has cancelled is not reported again by the shutdown at exit."""
    with Core(conn_max=1) as core:

        async def close() -> None:
            core.spawn("waits", print)
            assert await asyncio.to_thread(core.close, 0) == 1

        core.spawn("own", close)
        core.drain()

        assert core.close(BOUND) == 0
        assert len(core.logs.of("tasks cancelled")) == 1
        assert (core.stats().succeeded, core.stats().cancelled) == (1, 1)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "asynchronous"])
def test_close_called_by_a_task_does_not_wait_for_a_close_under_way(asynchronous: bool) -> None:
    """A task that asks for a shutdown which waits for it would hold it up for good."""
    asked: Future[int | None] = Future()

    with Core(conn_max=1) as core, Gate() as gate:

        def close() -> None:
            gate()
            asked.set_result(core.close(BOUND))

        core.spawn("own", asyncio.to_thread(close) if asynchronous else close)
        gate.wait_entered()
        with core.shutdown.lock:  # held by the shutdown under way
            gate.open()

            assert asked.result(BOUND) is None
        core.drain()


# The signals, where a shutdown and a slot both see an end.


@pytest.mark.parametrize("task", [print, nothing])
def test_end_is_told_once(task: Any) -> None:
    """A receiver hears of the start and of the end of a task, whatever its kind, once."""
    with receiving(signals.task_started) as started, receiving(signals.task_finished) as finished:
        with Core() as core:
            core.spawn("works", task)
            core.drain()

    assert started == [("works", None)]
    assert finished == [("works", "succeeded")]


def test_end_of_a_cancelled_task_is_told_once(impatient: None) -> None:
    """Of a task that shutdown gave up, waiting or running, a receiver hears that it was cancelled, once."""
    with receiving(signals.task_finished) as finished:
        with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
            core.spawn("plain", gate)
            core.spawn("asynchronous", agate)
            gate.wait_entered()
            agate.wait_entered()
            core.spawn("waits", gate)
            core.close(0)

    assert Counter(finished) == {
        ("plain", "cancelled"): 1,
        ("asynchronous", "cancelled"): 1,
        ("waits", "cancelled"): 1,
    }


def test_coroutine_cancelled_while_its_start_is_told_is_cancelled(impatient: None) -> None:
    """A shutdown that comes while the receivers of task_started run cancels the task before it begins."""
    with Gate() as gate:

        def hold(**named: Any) -> None:
            gate()

        signals.task_started.connect(hold)
        try:
            with Core(conn_max=1) as core:
                coroutine = nothing()
                core.spawn("asynchronous", coroutine)
                gate.wait_entered()

                assert core.close(0) == 1
                gate.open()

                assert core.stats().cancelled == 1
        finally:
            signals.task_started.disconnect(hold)

    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


@pytest.mark.parametrize("task", [print, nothing], ids=["plain", "asynchronous"])
def test_task_whose_end_is_being_told_is_not_cancelled(task: Any, impatient: None) -> None:
    """A shutdown that comes while the receivers of task_finished run counts the task as what it was."""
    with Gate() as gate:

        def hold(**named: Any) -> None:
            gate()

        signals.task_finished.connect(hold)
        try:
            with receiving(signals.task_finished) as finished, Core(conn_max=1) as core:
                core.spawn("works", task)
                gate.wait_entered()

                assert core.close(0) == 0

                stats = core.stats()
                assert (stats.succeeded, stats.cancelled, stats.running) == (1, 0, 0)
                gate.open()
        finally:
            signals.task_finished.disconnect(hold)

    assert finished == [("works", "succeeded")]
