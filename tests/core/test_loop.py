"""The drainer's loop: what tasks and exceptions from outside do to it, and how coroutines run on it."""

import asyncio
import contextlib
import logging
import selectors
import threading
from typing import Any

import pytest
from django.db import connection

from bgtasks.core.drainer import Drainer
from bgtasks.core.loop import Loop
from bgtasks.core.slot import BURST
from bgtasks.helpers import Helpers
from bgtasks.hooks import DjangoHooks
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import (
    SENDER,
    BackgroundThread,
    Core,
    assert_conn_max_is_exact,
    interrupt,
    untraced,
    wait_idle,
)


async def nothing() -> None:
    pass


async def fail() -> None:
    raise ValueError("failed")


def block_loop(core: Core, gate: Gate) -> None:
    """Hold the loop in `gate`, in a callback of no task."""
    core.drainer.loop.call_soon(gate)
    gate.wait_entered()


# What tasks do to the loop.


def test_task_that_blocks_the_loop_delays_the_next_one_and_no_more() -> None:
    """An async def that blocks holds up other coroutines while it does, and they run after it."""
    with Core(conn_max=2) as core, Gate() as gate:

        async def block() -> None:
            gate()

        core.spawn("blocks", block)
        gate.wait_entered()
        core.spawn("next", nothing)
        core.spawn("plain", print, end="")
        gate.open()
        core.drain()

        assert core.stats().succeeded == 3


def test_blocked_loop_does_not_stop_plain_functions() -> None:
    """While a coroutine blocks the loop, the other slots go on with plain functions."""
    with Core(conn_max=2) as core, Gate() as gate:

        async def block() -> None:
            gate()

        core.spawn("blocks", block)
        gate.wait_entered()
        ran = threading.Event()
        core.spawn("plain", ran.set)

        assert ran.wait(BOUND)
        assert gate.inside == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_child_that_raises_out_of_the_loop_does_not_end_it(error: Any) -> None:
    """A SystemExit of an asyncio task that a task has left behind is logged, and the loop goes on."""

    async def child() -> None:
        raise error

    async def leave_behind() -> None:
        children.append(asyncio.get_running_loop().create_task(child()))

    children: list[asyncio.Task[None]] = []
    with Core() as core, AsyncGate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()

        core.spawn("leaves", leave_behind)
        [line] = core.logs.wait("the drainer's loop was interrupted; it goes on")
        core.spawn("next", nothing)
        gate.open()
        core.drain()

        assert error.__name__ in line
        assert isinstance(children[0].exception(), error)
        assert core.stats().succeeded == 3


def test_loop_stopped_by_a_task_goes_on() -> None:
    """A task that calls loop.stop() is reported, and stops nothing."""

    async def stop() -> None:
        asyncio.get_running_loop().stop()

    with Core() as core:
        core.spawn("stops", stop)
        core.spawn("next", nothing)
        core.drain()

        assert core.logs.wait("the drainer's loop was stopped by a task; it goes on")
        assert core.stats().succeeded == 2


@pytest.mark.usefixtures("no_collection")
@untraced
def test_loop_interrupted_while_it_waits_goes_on() -> None:
    """An exception set on its thread from outside is logged, and what waited on the loop goes on."""
    with Core() as core, AsyncGate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        loop, thread = core.drainer.loop.running, core.drainer.loop.thread
        assert thread is not None

        interrupt(thread)
        core.spawn("next", nothing)  # wakes the loop
        [line] = core.logs.wait("the drainer's loop was interrupted; it goes on")
        gate.open()
        core.drain()

        assert "SystemExit" in line
        assert (core.drainer.loop.running, core.drainer.loop.thread) == (loop, thread)
        assert core.stats().succeeded == 2
        assert_conn_max_is_exact(core)


class Breaker:
    """A task that breaks the loop it runs on for good.

    On exit the loop is repaired so far that it can be closed.
    """

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []

    def __enter__(self) -> "Breaker":
        return self

    async def __call__(self) -> None:
        loop = asyncio.get_running_loop()
        self.loops.append(loop)
        vars(loop)["_selector"].close()
        await asyncio.sleep(BOUND)

    def __exit__(self, *exc_info: Any) -> None:
        for loop in self.loops:
            vars(loop)["_selector"] = selectors.DefaultSelector()


def test_loop_that_is_broken_for_good_is_reported_and_holds_up_no_plain_function(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once a second at most, plain functions run, and a shutdown accounts for the coroutines."""
    pause = threading.Event()
    monkeypatch.setattr("bgtasks.core.loop.sleep", lambda seconds: pause.wait(BOUND))
    with Core(conn_max=3) as core, AsyncGate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        with Breaker() as breaker:
            core.spawn("breaks", breaker)
            core.logs.wait("the drainer's loop was interrupted; it goes on")
            ran = threading.Event()
            core.spawn("plain", ran.set)

            assert ran.wait(BOUND)
            assert core.close(0) == 2

            assert len(core.logs.of("the drainer's loop was interrupted; it goes on")) == 1
            assert (core.stats().cancelled, core.stats().succeeded) == (2, 1)
        pause.set()


def test_callback_that_fails_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """What a callback raises that a task has left behind is logged by asyncio, and the loop goes on."""

    async def leave_behind() -> None:
        asyncio.get_running_loop().call_soon(int, "x")

    with Core() as core:
        core.spawn("leaves", leave_behind)
        core.spawn("next", nothing)
        core.drain()

        assert core.stats().succeeded == 2
    assert "Exception in callback" in caplog.text


def test_tasks_left_behind_are_cancelled_when_the_drainer_stops() -> None:
    """What a task has left on the loop gets a CancelledError, and time to end."""
    cancelled = threading.Event()

    async def child() -> None:
        try:
            await asyncio.sleep(BOUND)
        finally:
            cancelled.set()

    async def leave_behind() -> None:
        children.append(asyncio.get_running_loop().create_task(child()))
        await asyncio.sleep(0)

    children: list[asyncio.Task[None]] = []
    with Core() as core:
        core.spawn("leaves", leave_behind)
        core.drain()

    assert cancelled.is_set()
    assert children[0].cancelled()


def test_child_that_raises_when_it_is_cancelled_does_not_keep_the_drainer() -> None:
    """A loop that cannot be emptied is reported and closed."""

    async def child() -> None:
        try:
            await asyncio.sleep(BOUND)
        finally:
            await asyncio.sleep(0)
            raise SystemExit

    async def leave_behind() -> None:
        children.append(asyncio.get_running_loop().create_task(child()))
        await asyncio.sleep(0)

    children: list[asyncio.Task[None]] = []
    with Core() as core:
        core.spawn("leaves", leave_behind)
        core.drain()
        loop = core.drainer.loop.running
        assert loop is not None
        core.close(BOUND)
        core.drainer.stop()
        core.logs.wait("the drainer's loop could not be emptied")

    assert loop.is_closed()
    assert isinstance(children[0].exception(), SystemExit)


# How coroutines run on it.


def test_tasks_that_never_wait_let_the_loop_have_its_turn() -> None:
    """After BURST coroutines that ended at once the loop looks at its timers and its sockets."""
    number = 4 * BURST
    done: list[int] = []
    turns: list[int] = []  # how many tasks were done at each turn of the loop

    def turn() -> None:
        turns.append(len(done))
        if len(done) < number:
            asyncio.get_running_loop().call_soon(turn)

    async def instant(i: int) -> None:
        if not done:
            asyncio.get_running_loop().call_soon(turn)
        done.append(i)

    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        for i in range(number):
            core.spawn("instant", instant, i)
        gate.open()
        core.drain()

        assert done == list(range(number))
        assert max(b - a for a, b in zip([0, *turns], turns, strict=False)) <= BURST


def test_slot_passes_from_coroutines_to_functions_and_back() -> None:
    """One slot runs tasks of both kinds in the order of their spawning, each on its own kind of thread."""
    done: list[tuple[int, str]] = []

    def note(i: int) -> None:
        done.append((i, threading.current_thread().name))

    async def note_async(i: int) -> None:
        note(i)

    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        for i in range(60):
            core.spawn("mixed", note_async if i % 4 < 2 else note, i)
        gate.open()
        core.drain()

    names = ["bgtasks-drainer", "bgtasks-drainer", "bgtasks-core-1", "bgtasks-core-1"]
    assert done == [(i, names[i % 4]) for i in range(60)]


def test_coroutines_need_no_thread_of_a_slot() -> None:
    """The loop takes asynchronous tasks by itself, one for each slot, and wakes no thread of a slot."""
    with Core(conn_max=2, start=False) as core, AsyncGate() as gate:
        looked: list[str] = []  # the slots whose threads have looked for a task
        queue: Any = core.queue
        take = queue.take
        enough = threading.Semaphore(0)

        def look(slot: Any) -> Any:
            looked.append(slot.name)
            enough.release()
            return take(slot)

        queue.take = look
        core.start()
        for _ in range(2):
            assert enough.acquire(timeout=BOUND)  # each looks once as it starts

        for running in (1, 2, 2, 2):
            core.spawn("held", gate)
            gate.wait_entered(running)
        stats = core.stats()
        gate.open()
        core.drain()

        assert (stats.running, stats.queued) == (2, 2)
        assert sorted(looked) == ["bgtasks-core-1", "bgtasks-core-2"]
        assert_conn_max_is_exact(core)


def test_burst_of_coroutines_asks_the_loop_once() -> None:
    """As long as the loop has yet to look, no further spawn wakes it."""
    with Core(conn_max=3) as core, Gate() as held, AsyncGate() as gate:
        asked: list[int] = []
        ask_loop = core.queue.ask_loop
        core.queue.ask_loop = lambda: asked.append(1) is None and ask_loop()
        block_loop(core, held)

        for _ in range(3):
            core.spawn("burst", gate)

        assert len(asked) == 1
        held.open()
        gate.wait_entered(3)


def test_coroutine_put_just_after_the_loop_looked_runs() -> None:
    """A spawner that comes between the loop's last look at the queue and its rest has it look again.

    1. the loop: has taken what waits
    2. a spawner: puts an asynchronous task
    """
    spawned: list[bool] = []
    with Core(conn_max=1) as core:
        claim = core.queue.claim

        def claim_and_spawn() -> Any:
            slot = claim()
            if not spawned:
                spawned.append(core.spawn("just after", nothing))
            return slot

        core.queue.claim = claim_and_spawn
        core.spawn("first", nothing)
        wait_until(lambda: core.stats().succeeded == 2)

        assert spawned == [True]


def test_tasks_of_both_kinds_that_wait_for_a_blocked_loop_run() -> None:
    """Whoever takes a task that is not for him, the loop or a slot's thread, passes it on."""
    with Core(conn_max=2) as core, Gate() as held:
        block_loop(core, held)
        for task in (nothing, print, print, nothing, print, nothing):
            core.spawn("mixed", task)
        held.open()
        core.drain()

        assert core.stats().succeeded == 6
        assert_conn_max_is_exact(core)


def test_coroutine_cancelled_by_a_stranger_has_failed() -> None:
    """A task that cancels everything on the loop fails the others, and loses no slot."""

    async def cancel_all() -> None:
        for runner in asyncio.all_tasks() - {asyncio.current_task()}:
            runner.cancel()

    with Core(conn_max=2) as core, AsyncGate() as gate:
        core.spawn("victim", gate)
        gate.wait_entered()
        core.spawn("cancels", cancel_all)
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert line.startswith("task 'victim' of pool 'core' failed: CancelledError")
        assert (core.stats().failed, core.stats().succeeded) == (1, 1)
        assert_conn_max_is_exact(core)


class BrokenHooks(DjangoHooks):
    """Has one hook that raises, which none may."""

    def __init__(self, hook: str) -> None:
        super().__init__(SENDER)
        setattr(self, hook, self._raise)

    def _raise(self, *args: Any) -> None:
        raise ValueError("broken hook")


@pytest.mark.parametrize(("hook", "outcome"), [("enter", "failed"), ("leave", "succeeded")])
def test_error_outside_of_a_coroutines_own_code_loses_no_slot(hook: Any, outcome: str) -> None:
    """A coroutine that is let down before it begins has failed; after its end it keeps its outcome."""
    with Core(conn_max=1, hooks=BrokenHooks(hook)) as core:
        core.spawn("let down", nothing())
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert "task 'let down'" in line
        assert "broken hook" in line
        assert getattr(core.stats(), outcome) == 1
        assert core.stats().running == 0
        wait_idle(core.slots)


def test_slot_that_cannot_close_its_connections_ends() -> None:
    """A slot that is interrupted in its last step says so, and its thread ends."""
    with Core(conn_max=1, hooks=BrokenHooks("close")) as core:
        core.close(BOUND)

        [line] = core.logs.wait("slot 'bgtasks-core-1' was interrupted as it ended")
        assert "broken hook" in line


@pytest.mark.parametrize("task", [print, nothing], ids=["plain", "asynchronous"])
def test_companion_that_fails_costs_no_task(task: Any) -> None:
    """What fails beside the drainer does not reach a task, and loses no slot."""
    with Core(conn_max=1) as core:
        companion = BackgroundThread(broken=True)
        core.drainer.background = [companion]
        core.spawn("works", task)
        core.drain()
        core.drainer.background = []

        assert companion.heard == ["notify"]
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_companion_is_told_once_for_a_burst() -> None:
    """A slot that goes from one task to the next without being idle tells nobody of that."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.drainer.background = [companion := BackgroundThread()]
        core.spawn("held", gate)
        gate.wait_entered()
        for _ in range(10):
            core.spawn("waits", print, end="")
        gate.open()
        core.drain()

        assert companion.heard == ["notify"]


def test_task_cannot_end_the_helper_threads_of_the_others() -> None:
    """What ``asyncio.run`` does at its end is not for a task to do: ``to_thread`` works for later ones."""

    async def shut_down() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()

    with Core(conn_max=1, drainer=Drainer(new_executor=Helpers)) as core:
        core.spawn("shuts down", shut_down)
        core.spawn("works", asyncio.to_thread, int)
        core.drain()

        assert core.stats().succeeded == 2


@pytest.mark.database
@pytest.mark.django_db
def test_helper_threads_of_tasks_keep_no_connection() -> None:
    """A call by asyncio.to_thread on the drainer's loop closes what it has opened on that thread."""
    names: list[str] = []
    opened: list[Any] = []

    def use() -> None:
        names.append(threading.current_thread().name)
        connection.ensure_connection()
        opened.append(connection.connection)

    async def help_() -> None:
        await asyncio.to_thread(use)

    with Core(conn_max=1, drainer=Drainer(new_executor=Helpers)) as core:
        core.spawn("helps", help_)
        core.drain()

        assert core.stats().succeeded == 1
        assert names[0].startswith("bgtasks-helper")
        assert opened[0].closed


# TASK_TIMEOUT of coroutines. Plain functions that overrun are the watchdog's.


def test_coroutine_past_its_timeout_is_cancelled() -> None:
    """It gets a CancelledError, and counts as timed out."""
    with Core(conn_max=1, task_timeout=0.01) as core, AsyncGate() as gate:
        core.spawn("overruns", gate)
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert line.startswith(
            "task 'overruns' of pool 'core' timed out: CancelledError (it ran for longer than TASK_TIMEOUT; "
        )
        assert (core.stats().timed_out, core.stats().failed, core.stats().running) == (1, 0, 0)
        assert gate.inside == 0


def test_coroutine_within_its_timeout_succeeds() -> None:
    """A limit that is not reached changes nothing, and cancels nothing later."""
    with Core(conn_max=1, task_timeout=BOUND) as core:
        core.spawn("in time", nothing)
        core.spawn("fails", fail)
        core.drain()

        assert (core.stats().succeeded, core.stats().failed, core.stats().timed_out) == (1, 1, 0)


def test_timeout_counts_from_the_start_of_a_function_that_goes_on_as_a_coroutine() -> None:
    """A plain function that returns a coroutine has one limit, whatever part of it is used where."""
    with Core(conn_max=1, task_timeout=0.01) as core, AsyncGate() as gate:

        def go_on() -> Any:
            return gate()

        core.spawn("overruns", go_on)
        core.drain()

        assert (core.stats().timed_out, core.stats().running) == (1, 0)
        assert_conn_max_is_exact(core)


def test_coroutine_that_swallows_its_timeout_is_stuck_until_it_ends() -> None:
    """Nothing can stop it: it shows as stuck, and counts as timed out when it ends."""
    with Core(conn_max=1, task_timeout=0.01) as core, AsyncGate() as held, AsyncGate() as gate:

        async def swallow() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await held()
            await gate()

        core.spawn("overruns", swallow)
        gate.wait_entered()
        stuck, running = core.stats().stuck, core.stats().running
        gate.open()
        core.drain()

        assert (stuck, running) == (1, 1)
        assert (core.stats().timed_out, core.stats().succeeded, core.stats().stuck) == (1, 0, 0)


# Calls on it, from any thread.


def test_call_on_a_loop_that_was_just_closed_is_not_made() -> None:
    """Whoever finds the loop closed that was there when they looked is told that there is none."""
    loop = Loop()
    loop.running = asyncio.new_event_loop()
    loop.running.close()

    assert loop.call_soon(print) is False


def test_call_without_a_loop_is_not_made() -> None:
    """A call for which there is no loop is no error: not made, and not made up for later."""
    with Core(start=False) as core:
        assert core.drainer.loop.call_soon(pytest.fail) is False
        core.drainer.loop.call_later(0, pytest.fail)
        core.drainer.start()
        turned = threading.Event()
        core.drainer.loop.call_later(0, turned.set)

        assert turned.wait(BOUND)


def test_drainer_knows_its_own_thread() -> None:
    """Code on the drainer's loop is told so, and no other code."""
    answers: dict[str, bool] = {}

    with Core() as core:

        async def ask() -> None:
            answers["loop"] = core.drainer.is_own_thread()

        core.spawn("asks", ask)
        core.spawn("asks", lambda: answers.update(slot=core.drainer.is_own_thread()))
        core.drain()

        assert answers == {"loop": True, "slot": False}
        assert core.drainer.is_own_thread() is False
