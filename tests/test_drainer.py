"""The drainer: its loop and what tasks do to it, time limits, shutdown, forks, threads that do not start."""

import _thread
import asyncio
import contextlib
import logging
import selectors
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from time import monotonic
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import bgtasks.drainer
import bgtasks.queue
from bgtasks import signals
from bgtasks.drainer import BURST, Drainer, Life
from bgtasks.queue import State, Task
from bgtasks.shell import Shell
from bgtasks.slots import Slot, Slots
from tests.core import Companion, Core, ForcedDeque, make_task
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.test_slots import FailingStart, assert_conn_max_is_exact


async def nothing() -> None:
    pass


async def fail_async() -> None:
    raise ValueError("failed")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody wait for what does not end when it is told to."""
    monkeypatch.setattr(bgtasks.drainer, "STOP_PATIENCE", 0.01)


@pytest.fixture
def started_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the drainer started by a thread that coverage sees, where it takes a bare one."""

    def start_new_thread(function: Callable[..., Any], args: Any) -> None:
        threading.Thread(target=function, args=args).start()

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)


@contextlib.contextmanager
def receiving(signal: Any) -> Iterator[Any]:
    """Collect what a signal of bgtasks sends, as (name, outcome)."""
    received: list[tuple[str, str | None]] = []

    def receive(sender: Any, name: str, outcome: str | None = None, **named: Any) -> None:
        received.append((name, outcome))

    signal.connect(receive)
    try:
        yield received
    finally:
        signal.disconnect(receive)


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


class Breaker:
    """A task that breaks the loop it runs on for good.

    On exit it repairs the loop, so that what ran on it can be ended and Python does not warn of it.
    """

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []

    async def __call__(self) -> None:
        self.break_loop()
        await asyncio.sleep(BOUND)

    def break_loop(self) -> None:
        """Break the loop that runs."""
        loop = asyncio.get_running_loop()
        self.loops.append(loop)
        vars(loop)["_selector"].close()

    def __enter__(self) -> "Breaker":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for loop in self.loops:
            vars(loop)["_selector"] = selectors.DefaultSelector()
            loop.call_soon(loop.stop)
            loop.run_forever()  # what it was told before it broke
            left = asyncio.all_tasks(loop)
            for runner in left:
                runner.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left))
            loop.close()


def test_loop_that_is_broken_for_good_is_replaced() -> None:
    """If the loop cannot run any more its tasks have failed, and later ones run on a new one."""
    with Breaker() as breaker, Core(conn_max=3) as core, AsyncGate() as gate, Gate() as plain:
        core.spawn("plain", plain)
        plain.wait_entered()
        [plain_task] = core.queue.running()
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("breaks", breaker)
        assert core.queue.all_ended(except_for=[plain_task]).result(BOUND)

        core.spawn("next", nothing)
        core.spawn("next", nothing)
        plain.open()
        core.drain()

        assert core.logs.of("the drainer's loop has died; it is replaced")

        stats = core.stats()
        assert (stats.failed, stats.succeeded, stats.running) == (2, 3, 0)
        assert core.drainer._loop not in breaker.loops
        assert_conn_max_is_exact(core)


def test_end_of_a_task_whose_loop_died_is_told() -> None:
    """Of a task that failed with its loop a receiver hears, and its line in the log names it."""
    with receiving(signals.task_finished) as finished:
        with Breaker() as breaker, Core(conn_max=1) as core:
            core.spawn("breaks", breaker)
            core.drain()

            assert len(core.logs.of("task 'breaks' of pool 'core' failed: the loop died under it")) == 1

    assert finished == [("breaks", "failed")]


def test_loop_that_breaks_while_the_drainer_stops_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """A drainer that was stopped when its loop has died ends, and does not come back.

    1. the drainer's thread: its loop has died, it makes a new one
    2. somebody stops the drainer
    3. the drainer's thread: has the lock, and finds that it is not wanted any more
    """
    new_event_loop = asyncio.new_event_loop

    def stop_and_make() -> asyncio.AbstractEventLoop:
        monkeypatch.setattr(asyncio, "new_event_loop", new_event_loop)
        core.drainer.stop()
        return new_event_loop()

    with Breaker() as breaker, Core(conn_max=1) as core:
        thread = core.drainer._thread
        monkeypatch.setattr(asyncio, "new_event_loop", stop_and_make)
        core.drainer.call_later(0, breaker.break_loop)
        thread.join(BOUND)

        assert not thread.is_alive()
        assert core.drainer.life is Life.STOPPED
        core.close(0)


def test_coroutine_lent_as_the_loop_is_replaced_runs() -> None:
    """A coroutine that no loop has begun when the loop dies has not failed with it, and runs once.

    1. the drainer's thread: its loop has died, it is about to put a new one in its place
    2. a slot: lends a coroutine to the loop
    3. the drainer's thread: looks for what ran on the dead one
    """
    ran: list[str] = []

    async def run(name: str) -> None:
        ran.append(name)

    class Replacing(Drainer):
        def _new_loop(self) -> asyncio.AbstractEventLoop:
            loop = super()._new_loop()
            if breaker.loops:
                core.spawn("lent", lambda: run("lent"))
                wait_until(lambda: any(slot.lending is not None for slot in core.slots.all))
            return loop

    with Breaker() as breaker, Core(conn_max=3, drainer=Replacing()) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("breaks", breaker)
        core.logs.wait("task 'breaks' of pool 'core' failed: the loop died under it")
        gate.open()
        core.drain()

        assert ran == ["lent"]
        assert (core.stats().failed, core.stats().succeeded) == (1, 2)
        assert_conn_max_is_exact(core)


def test_coroutine_that_a_dead_loop_was_to_take_runs() -> None:
    """A coroutine that was left to a loop which then dies runs on the next one, once.

    1. the drainer's thread: its loop has died, with no task on it; it is about to put a new one in its place
    2. a spawner: has the dead one take a coroutine
    3. the drainer's thread: goes on with the new one
    """
    ran: list[str] = []

    async def run(name: str) -> None:
        ran.append(name)

    class Replacing(Drainer):
        def _new_loop(self) -> asyncio.AbstractEventLoop:
            loop = super()._new_loop()
            if breaker.loops:
                core.spawn("polled", run, "polled")
                assert core.slots.polled
            return loop

    with Breaker() as breaker, Core(conn_max=2, drainer=Replacing()) as core:
        core.drainer.call_later(0, breaker.break_loop)
        core.logs.wait("the drainer's loop has died; it is replaced")
        wait_until(lambda: ran and len(core.slots.idle) == 2)
        core.spawn("next", run, "next")
        core.drain()

        assert ran == ["polled", "next"]
        assert core.stats().succeeded == 2
        assert_conn_max_is_exact(core)


def test_function_under_a_limit_is_watched_when_the_loop_was_replaced() -> None:
    """The timer of a plain function that runs when the loop dies is set anew on the next one."""
    with Breaker() as breaker, Core(conn_max=2, task_timeout=10 * BOUND) as core, Gate() as gate:
        core.spawn("overruns", gate)
        gate.wait_entered()
        core.slots.task_timeout = 0.01  # from here on: the timer of the first loop is far away
        core.spawn("breaks", breaker)

        assert core.logs.wait("task 'overruns' of pool 'core' runs for longer than")
        gate.open()


def test_call_for_a_loop_that_was_just_replaced_is_made_on_the_next() -> None:
    """Whoever finds the loop closed that it has looked up *just* before uses the one in its place."""
    with Core() as core:
        drainer, loop = core.drainer, core.drainer._loop
        closed = asyncio.new_event_loop()
        closed.close()
        call_soon_threadsafe = closed.call_soon_threadsafe

        def replace(*args: Any, **kwargs: Any) -> Any:
            drainer._loop = loop
            return call_soon_threadsafe(*args, **kwargs)

        setattr(closed, "call_soon_threadsafe", replace)  # noqa: B010  # a method
        drainer._loop = closed
        turned = threading.Event()

        assert drainer._call_soon(turned.set) is True

        assert turned.wait(BOUND)


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
    """One slot runs tasks of both kinds in the order of their spawning."""
    done: list[int] = []

    async def append(i: int) -> None:
        done.append(i)

    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        for i in range(60):
            core.spawn("mixed", append if i % 4 < 2 else done.append, i)
        gate.open()
        core.drain()

        assert done == list(range(60))


def test_tasks_left_behind_are_cancelled_when_the_drainer_stops() -> None:
    """What a task has left on the loop gets a CancelledError, and time to give in."""
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
        loop = core.drainer._loop
        core.close(BOUND)
        core.drainer.stop()
        core.logs.wait("the drainer's loop could not be emptied")

    assert loop.is_closed()
    assert isinstance(children[0].exception(), SystemExit)


class BrokenShell(Shell):
    """Has one hook that raises, which none may."""

    def __init__(self, hook: str) -> None:
        super().__init__(object())
        setattr(self, hook, self._raise)

    def _raise(self, *args: Any) -> None:
        raise ValueError("broken hook")


@pytest.mark.parametrize(("hook", "outcome"), [("enter", "failed"), ("leave", "succeeded")])
def test_error_outside_of_a_coroutines_own_code_loses_no_slot(hook: Any, outcome: str) -> None:
    """A coroutine that is let down before it begins has failed; after its end it keeps its outcome."""
    with Core(conn_max=1, hooks=BrokenShell(hook)) as core:
        core.spawn("let down", nothing())
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert line.startswith("task 'let down' of pool 'core' failed outside its own code\n  Traceback")
        assert "broken hook" in line
        assert getattr(core.stats(), outcome) == 1
        assert core.stats().running == 0


def test_slot_that_cannot_close_its_connections_ends() -> None:
    """A slot that is interrupted in its last step says so, and its thread ends."""
    with Core(conn_max=1, hooks=BrokenShell("close")) as core:
        core.close(BOUND)

        [line] = core.logs.wait("slot 'bgtasks-core-1' was interrupted as it ended")
        assert "broken hook" in line


def test_coroutine_cancelled_by_a_stranger_before_it_begins_has_failed() -> None:
    """A task that cancels everything on the loop fails the others, and loses no slot."""

    async def cancel_all() -> None:
        for runner in asyncio.all_tasks() - {asyncio.current_task()}:
            runner.cancel()

    with Gate() as gate:
        held = threading.Event()

        def hold(name: str, **named: Any) -> None:
            if name == "victim":
                held.set()
                gate()

        signals.task_started.connect(hold)
        try:
            with Core(conn_max=2) as core:
                core.spawn("victim", nothing)
                assert held.wait(BOUND)
                core.spawn("cancels", cancel_all)
                core.logs.wait("task 'victim' of pool 'core' failed outside its own code")
                gate.open()
                core.drain()

                assert (core.stats().failed, core.stats().succeeded) == (1, 1)
        finally:
            signals.task_started.disconnect(hold)


def test_helper_threads_of_tasks_keep_no_connection() -> None:
    """A call by asyncio.to_thread on the drainer's loop closes what it has opened on that thread."""
    closed: list[str] = []
    names: list[str] = []

    async def help_() -> None:
        names.append((await asyncio.to_thread(threading.current_thread)).name)

    drainer = Drainer(close=lambda: closed.append(threading.current_thread().name))
    with Core(conn_max=1, drainer=drainer) as core:
        core.spawn("helps", help_)
        core.drain()

        assert closed == names
        assert names[0].startswith("bgtasks-helper")


# TASK_TIMEOUT.


def test_coroutine_past_its_timeout_is_cancelled() -> None:
    """It gets a CancelledError, and counts as timed out."""
    with Core(conn_max=1, task_timeout=0.01) as core, AsyncGate() as gate:
        core.spawn("overruns", gate)
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert line.startswith("task 'overruns' of pool 'core' timed out: CancelledError\n  Traceback")
        assert (core.stats().timed_out, core.stats().failed, core.stats().running) == (1, 0, 0)
        assert gate.inside == 0


def test_coroutine_within_its_timeout_succeeds() -> None:
    """A limit that is not reached changes nothing, and cancels nothing later."""
    with Core(conn_max=1, task_timeout=BOUND) as core:
        core.spawn("in time", nothing)
        core.spawn("fails", fail_async)
        core.drain()

        assert (core.stats().succeeded, core.stats().failed, core.stats().timed_out) == (1, 1, 0)


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


def test_function_past_its_timeout_is_reported_once_with_its_stack() -> None:
    """A plain function goes on, as nothing can stop it; its name, its slot and where it is are logged."""
    with Core(conn_max=2, task_timeout=0.01) as core, Gate() as gate:
        core.spawn("first", gate)
        [line] = core.logs.wait("'first'")
        core.spawn("second", gate)
        core.logs.wait("'second'")
        stuck = core.stats().stuck
        gate.open()
        core.drain()

        assert line.startswith("task 'first' of pool 'core' runs for longer than 0.01 s and holds slot")
        assert "gate.py" in line
        assert "in __call__" in line
        assert stuck == 2
        assert len(core.logs.of("'first'")) == 1
        assert (core.stats().succeeded, core.stats().stuck) == (2, 0)


def test_function_past_its_timeout_keeps_its_own_outcome() -> None:
    """One that raises after its limit has failed; it did not time out."""
    with Core(conn_max=1, task_timeout=0.01) as core, Gate() as gate:

        def fail() -> None:
            gate()
            raise ValueError("failed")

        core.spawn("overruns", fail)
        core.logs.wait("runs for longer")
        gate.open()
        core.drain()

        assert (core.stats().failed, core.stats().timed_out) == (1, 0)


def test_functions_of_pools_without_a_limit_are_not_watched() -> None:
    """A pool without TASK_TIMEOUT runs its functions as long as they like beside one that has it."""
    with Core(conn_max=1, task_timeout=0.01) as core, Gate() as gate:
        other = core.another()
        core.drainer.start()
        other.queue.put(make_task("unlimited", gate))
        other.wake()
        gate.wait_entered()

        core.spawn("limited", gate)
        core.logs.wait("'limited'")

        assert core.logs.of("'unlimited'") == []
        assert other.queue.stats().stuck == 0
        gate.open()
        core.drainer.close({other: monotonic() + BOUND})


class HookedDrainer(Drainer):
    """Calls a function once, between its look at the running functions and what it does about them."""

    def __init__(self) -> None:
        super().__init__()
        self.after_look: Callable[[], None] | None = None

    def _timed_functions(self) -> Any:
        found = super()._timed_functions()
        hook, self.after_look = self.after_look, None
        if hook is not None:
            hook()
        return found


def test_function_that_begins_just_after_the_look_is_reported() -> None:
    """A function that starts while the drainer decides to look no more is watched all the same.

    1. the drainer: looks, and finds no function under a limit
    2. a slot: starts one, finds that the drainer is looking, and leaves it to it
    3. the drainer: stops looking, has to look again
    """
    drainer = HookedDrainer()
    with Core(conn_max=1, task_timeout=0.01, drainer=drainer) as core, Gate() as gate:

        def begin() -> None:
            core.spawn("begins", gate)
            gate.wait_entered()

        drainer.after_look = begin

        drainer.watch()

        assert core.logs.wait("task 'begins' of pool 'core' runs for longer")


def test_drainer_stops_looking_when_nothing_is_due() -> None:
    """No timer is left once no function under a limit runs."""
    with Core(conn_max=1, task_timeout=BOUND * 10) as core:
        core.spawn("in time", print, end="")
        core.drain()
        wait_until(lambda: core.slots.all[0].task is None)
        looked = threading.Event()
        core.drainer._call_soon(looked.set)
        assert looked.wait(BOUND)
        core.drainer._watching = False

        core.drainer.watch()
        looked.clear()
        core.drainer._call_soon(looked.set)
        assert looked.wait(BOUND)

        assert core.drainer._watching is False


# Asynchronous tasks that the loop takes by itself.


class Watched(Slots):
    """Slots that note who is woken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.woken: list[Slot] = []

    def awake(self, slot: Slot) -> Task | None:
        self.woken.append(slot)
        return super().awake(slot)

    @classmethod
    def of(cls, core: Core) -> "Watched":
        """Return the slots of `core`, which were made of this class."""
        assert isinstance(core.slots, cls)
        return core.slots


def test_coroutine_needs_no_thread_of_a_slot() -> None:
    """The loop itself takes an asynchronous task for an idle slot; no thread of a slot is woken for it."""
    with Core(conn_max=2, slots=Watched) as core, AsyncGate() as gate:
        for _ in range(4):
            core.spawn("held", gate)
        gate.wait_entered(2)
        stats = core.stats()
        gate.open()
        core.drain()

        assert (stats.running, stats.queued) == (2, 2)
        assert Watched.of(core).woken == []
        assert_conn_max_is_exact(core)


def test_burst_of_coroutines_costs_its_spawner_one_call_to_the_loop() -> None:
    """As long as the loop has yet to look, nobody asks it again."""
    with Core(conn_max=3) as core, Gate() as held, AsyncGate() as gate:
        core.drainer.call_later(0, held)
        held.wait_entered()
        loop = core.drainer._loop
        calls: list[Any] = []
        call_soon_threadsafe = loop.call_soon_threadsafe

        def count(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return call_soon_threadsafe(*args, **kwargs)

        setattr(loop, "call_soon_threadsafe", count)  # noqa: B010  # a method
        for _ in range(3):
            core.spawn("burst", gate)
        setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)  # noqa: B010
        held.open()
        gate.wait_entered(3)
        gate.open()
        core.drain()

        assert len(calls) == 1


def test_coroutine_put_just_after_the_loop_looked_is_taken_by_it() -> None:
    """A spawner that comes between the loop's last look at the queue and its rest asks it again.

    1. the loop: finds nothing more to take
    2. a spawner: puts an asynchronous task
    """
    spawned: list[bool] = []

    class Interleaved(Watched):
        def wake(self) -> bool:
            result = super().wake()
            if threading.current_thread().name == "bgtasks-drainer" and not spawned:
                spawned.append(core.spawn("just after", nothing))
            return result

    with Core(conn_max=1, slots=Interleaved) as core:
        core.spawn("first", nothing)
        wait_until(lambda: core.stats().succeeded == 2)

        assert Watched.of(core).woken == []


def test_function_that_the_loop_finds_is_left_to_a_slot() -> None:
    """The loop that looks for asynchronous tasks and meets a plain function wakes a slot for it."""
    ran: list[threading.Thread] = []
    with Core(conn_max=2) as core:
        core.queue.put(make_task("plain", lambda: ran.append(threading.current_thread())))
        assert core.drainer.poll(core.slots) is True
        core.drain()

        assert ran[0] in core.slots.threads()
        assert_conn_max_is_exact(core)


def test_loop_that_looks_too_late_takes_nothing() -> None:
    """A loop in whose place another one has come leaves the slots to that one."""
    with Core(conn_max=1) as core, Gate() as held:
        core.drainer.call_later(0, held)
        held.wait_entered()
        own = core.drainer._loop
        core.spawn("left", nothing)
        other = core.drainer._loop = asyncio.new_event_loop()
        woken: list[Slots] = []
        setattr(core.slots, "wake", lambda: woken.append(core.slots))  # noqa: B010  # a method
        held.open()
        wait_until(lambda: woken)

        assert core.stats().queued == 1
        del core.slots.wake
        core.drainer._loop = own
        other.close()
        core.slots.wake()
        core.drain()


def test_loop_that_looks_during_a_fork_starts_no_thread(patient: None) -> None:
    """A coroutine that waits for the loop does not hold up a fork, nor has it a thread started meanwhile.

    1. spawner: puts an asynchronous task, and asks the loop to take it
    2. a fork seizes the slots, all of which are idle, and tells every thread to end
    3. the loop: comes to look
    """
    with Core(conn_max=1) as core, Gate() as held:
        core.drainer.companion = companion = Companion()
        core.drainer.call_later(0, held)
        held.wait_entered()
        core.spawn("left", nothing)
        loop = core.drainer._loop
        loop.call_soon_threadsafe(companion.heard.append, "looked")
        forking = threading.Thread(target=core.drainer.before_fork)
        forking.start()
        wait_until(lambda: companion.heard)
        held.open()
        forking.join(BOUND)

        assert companion.heard == ["halt", "looked"]
        assert core.threads() == []
        core.drainer.after_fork_in_parent()
        core.drain()
        assert core.stats().succeeded == 1


def test_loop_that_looks_after_a_shutdown_starts_no_thread(impatient: None) -> None:
    """The thread beside the drainer has taken back what it published; nothing has it come again."""
    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held, Gate() as looked:
        core.drainer.companion = companion = Companion()
        core.drainer.call_later(0, held)
        held.wait_entered()
        core.spawn("swept", nothing)
        core.drainer._loop.call_soon_threadsafe(looked)
        threads = core.slots.threads()
        core.drainer.close({core.slots: monotonic()})
        for thread in threads:
            thread.join(BOUND)  # it may have been woken before
        companion.heard.clear()
        held.open()
        looked.wait_entered()

        assert companion.heard == []
        assert core.stats().cancelled == 1


def test_companion_that_cannot_be_stirred_costs_the_loop_no_slot() -> None:
    """What fails beside the drainer does not reach the task."""
    with Core(conn_max=1) as core:
        core.drainer.companion = companion = Companion(broken=True)
        core.spawn("works", nothing)
        core.drain()

        assert companion.heard == ["stir"]
        assert core.stats().succeeded == 1
        core.drainer.companion = None
        assert_conn_max_is_exact(core)


class Ending:
    """A loop that is told to end just as it is asked for something."""

    def __init__(self, drainer: Drainer) -> None:
        self._drainer = drainer

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> None:
        self._drainer._loop = None


class Closed:
    """A loop that is closed."""

    def __init__(self, drainer: Drainer) -> None:
        pass

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Event loop is closed")


def test_coroutine_left_to_a_loop_that_was_stopped_runs_with_the_next_start(impatient: None) -> None:
    """A loop that is told to end before it comes to look leaves its tasks to the one that is started next."""
    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held:
        core.drainer.call_later(0, held)
        held.wait_entered()
        core.spawn("left", nothing)
        assert core.slots.polled
        core.drainer.stop()

        core.drainer.start()
        core.drain()
        wait_until(lambda: core.slots.idle)
        core.spawn("next", nothing)
        core.drain()

        assert core.stats().succeeded == 2
        held.open()


@pytest.mark.parametrize("make_loop", [lambda drainer: None, Closed, Ending])
def test_coroutine_that_the_loop_may_not_come_to_is_left_to_a_slot(make_loop: Any) -> None:
    """Where the loop is not there, or is told to end as it is asked, a slot's thread is woken."""

    class Leaving(Drainer):
        def poll(self, group: Slots) -> bool:
            own, self._loop = self._loop, make_loop(self)
            try:
                return super().poll(group)
            finally:
                self._loop = own

    with Core(conn_max=1, slots=Watched, drainer=Leaving()) as core:
        core.spawn("left", nothing)
        core.drain()

        assert len(Watched.of(core).woken) == 1
        assert core.slots.polled is False


# Shutdown.


def test_close_waits_for_what_was_accepted() -> None:
    """Until its deadline a shutdown lets everything end that runs or waits, and says nothing of it."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        core.spawn("plain", gate)
        core.spawn("asynchronous", agate)
        gate.wait_entered()
        agate.wait_entered()
        core.spawn("waits", print, end="")
        closing = threading.Thread(target=core.close, args=(BOUND,))
        closing.start()

        gate.open()
        agate.open()
        closing.join(BOUND)

        assert core.stats().succeeded == 3
        assert core.logs.above(logging.WARNING) == []
        assert core.queue.state is State.CLOSED


def test_close_accepts_nothing_more() -> None:
    """A task that is spawned after the shutdown began is dropped."""
    with Core() as core:
        core.close(BOUND)

        assert core.spawn("too late", print) is False

        assert core.stats().dropped == 1
        assert core.logs.of("task 'too late' dropped: pool 'core' is shut down")


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


def test_function_given_up_by_a_shutdown_is_not_counted_again(impatient: None) -> None:
    """When it ends after all it stays cancelled."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        thread = core.slots.all[0].thread
        core.close(0)

        gate.open()
        thread.join(BOUND)

        assert not thread.is_alive()
        assert (core.stats().cancelled, core.stats().succeeded) == (1, 0)


def test_coroutine_that_swallows_its_cancellation_is_given_up(impatient: None) -> None:
    """A shutdown does not wait for a coroutine that will not end."""
    with Core(conn_max=1) as core, AsyncGate() as held, AsyncGate() as gate:

        async def swallow() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await held()
            await gate()

        core.spawn("swallows", swallow)
        held.wait_entered()

        assert core.close(0) == 1
        gate.wait_entered()

        assert (core.stats().cancelled, core.stats().running) == (1, 0)


def test_coroutine_that_ends_well_when_it_is_cancelled_has_succeeded(patient: None) -> None:
    """One that makes use of its last moment to finish is not reported as cancelled."""
    with Core(conn_max=1) as core, AsyncGate() as held:

        async def finish() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await held()

        core.spawn("finishes", finish)
        held.wait_entered()

        assert core.close(0) == 0

        assert (core.stats().cancelled, core.stats().succeeded) == (0, 1)


def test_waiting_coroutine_object_is_closed_by_a_shutdown() -> None:
    """Python does not warn of a coroutine object that was cancelled before it began."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        coroutine = nothing()
        core.spawn("waits", coroutine)
        gate_thread = threading.Thread(target=core.close, args=(0,))
        gate_thread.start()
        gate.open()
        gate_thread.join(BOUND)

        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)


def test_task_that_a_slot_is_just_taking_is_given_up_and_reported(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown that is out of time while a slot takes a task waits until it can see it.

    1. slot: takes the task out of the waiting ones
    2. shutdown: sweeps, and finds that a task is on its way
    3. slot: puts it among the running ones
    """
    looked, taken = threading.Event(), threading.Event()
    monkeypatch.setattr(bgtasks.queue, "sleep", lambda _: (looked.set(), taken.wait(BOUND)))
    closed: list[int | None] = []
    with Core(conn_max=1) as core, Gate() as gate:
        core.queue.waiting = core.queue.inbox = ForcedDeque()
        closing = threading.Thread(target=lambda: closed.append(core.close(0)))

        def close() -> None:
            closing.start()
            assert looked.wait(BOUND)

        core.queue.waiting.force("after popleft", close)
        core.spawn("just taken", gate)
        gate.wait_entered()
        taken.set()
        closing.join(BOUND)

        assert closed == [1]
        assert core.logs.of("pool 'core' was shut down with 1 tasks cancelled: 1 'just taken'")


def test_second_close_has_nothing_to_do(impatient: None) -> None:
    """A shutdown that is complete is not repeated, nor reported again."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        assert core.close(0) == 1

        assert core.close(BOUND) == 0

        assert len(core.logs.above(logging.WARNING)) == 1


def interrupted_wait(*args: Any) -> None:
    """Stand in for a wait in which a signal handler raises SystemExit."""
    raise SystemExit


@pytest.mark.parametrize("seconds", [BOUND, 0], ids=["while it waits", "while it cancels"])
def test_close_goes_on_after_an_exception(
    impatient: None, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A shutdown that a signal handler ended by SystemExit is finished by the next one, nothing left out."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        core.spawn("plain", gate)
        core.spawn("asynchronous", agate)
        gate.wait_entered()
        agate.wait_entered()
        core.spawn("waits", gate)
        with monkeypatch.context() as patch:
            patch.setattr("bgtasks.drainer.wait", interrupted_wait)
            with pytest.raises(SystemExit):
                core.close(seconds)

        assert core.close(0) == 3

        [line] = core.logs.above(logging.WARNING)
        assert all(f"1 '{name}'" in line for name in ("plain", "asynchronous", "waits"))
        assert core.stats().cancelled == 3
        assert core.slots not in core.drainer._groups
        assert core.slots.all == []


@pytest.mark.parametrize(("first", "second"), [(0, BOUND * 10), (BOUND * 10, 0)])
def test_earliest_deadline_is_in_force(
    impatient: None, monkeypatch: pytest.MonkeyPatch, first: Any, second: Any
) -> None:
    """A shutdown that goes on where another was interrupted does not wait anew, but may be more urgent."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        with monkeypatch.context() as patch:
            patch.setattr("bgtasks.drainer.wait", interrupted_wait)
            with pytest.raises(SystemExit):
                core.close(first)

        assert core.close(second) == 1


def test_second_close_waits_for_the_first(impatient: None) -> None:
    """Whoever comes second is there until the first is done, and has cancelled nothing."""
    returned: list[int | None] = []
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        with core.slots.closing:  # the first is under way
            second = threading.Thread(target=lambda: returned.append(core.close(0)))
            second.start()
            while core.queue.close():  # pragma: no cover  # it may have closed it already
                pass
            assert returned == []
            core.close(0)
        second.join(BOUND)

        assert returned == [0]


def test_urgent_close_hastens_the_one_under_way(impatient: None) -> None:
    """A shutdown that has no time left, such as that of a second signal, does not wait for another's time."""
    first: Future[int | None] = Future()
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()
        waits = core.queue.all_ended
        waiting = threading.Event()
        core.queue.all_ended = lambda **kwargs: (waiting.set(), waits(**kwargs))[1]
        thread = threading.Thread(target=lambda: first.set_result(core.close(100 * BOUND)))
        thread.start()
        assert waiting.wait(BOUND)

        assert core.close(0) == 0  # the other one gives up, and reports

        assert first.result(BOUND) == 1
        thread.join(BOUND)


def test_close_called_by_a_task_does_not_wait_for_it(patient: None) -> None:
    """A task that shuts its own pool down goes on, and ends as it likes; the others are waited for."""
    closed: Future[int | None] = Future()

    with Core(conn_max=2) as core, Gate() as gate:
        core.spawn("other", gate)
        gate.wait_entered()

        def shut_down() -> None:
            gate.open()
            closed.set_result(core.close(BOUND))

        core.spawn("own", shut_down)

        assert closed.result(BOUND) == 0
        core.drain()
        assert core.stats().succeeded == 2


def test_close_called_by_a_coroutine_leaves_it_its_slot(patient: None) -> None:
    """A coroutine that shuts its own pool down goes on, with its calls on the slot's thread."""
    with Core(conn_max=1) as core:

        async def shut_down() -> None:
            assert await asyncio.to_thread(core.close, BOUND) == 0
            await sync_to_async(print)(end="")

        core.spawn("own", shut_down)
        core.drain()

        assert core.stats().succeeded == 1
        assert core.close(BOUND) == 0
        assert core.slots.all == []


def test_close_called_by_a_coroutine_reports_the_others_once(impatient: None) -> None:
    """What it has cancelled is not reported again by the shutdown at exit."""
    with Core(conn_max=1) as core:

        async def shut_down() -> None:
            core.spawn("waits", print)
            assert await asyncio.to_thread(core.close, 0) == 1

        core.spawn("own", shut_down)
        core.drain()

        assert core.close(BOUND) == 0
        assert len(core.logs.of("were cancelled") + core.logs.of("tasks cancelled")) == 1
        assert (core.stats().succeeded, core.stats().cancelled) == (1, 1)


def test_close_called_by_a_task_does_not_wait_for_a_close_under_way() -> None:
    """A task that asks for a shutdown which waits for it would hold it up for good."""
    asked: Future[int | None] = Future()

    with Core(conn_max=1) as core, Gate() as gate:

        def shut_down() -> None:
            gate()
            asked.set_result(core.close(BOUND))

        core.spawn("own", shut_down)
        gate.wait_entered()
        with core.slots.closing:  # held by the shutdown under way
            gate.open()

            assert asked.result(BOUND) is None
        core.drain()


def test_close_waits_for_a_spawner_in_the_middle(patient: None) -> None:
    """A shutdown that finds a place taken and no task in it waits for the spawner to make up its mind.

    1. spawner: finds the queue open, takes a permit
    2. shutdown: closes the queue, and finds no task that it could wait for
    3. spawner: appends, finds the queue closed, and takes its task back
    """
    with Core(conn_max=1) as core:
        core.queue.waiting = core.queue.inbox = ForcedDeque()
        closed: list[int | None] = []
        closing = threading.Thread(target=lambda: closed.append(core.close(BOUND)))
        looked = threading.Event()
        all_ended = core.queue.all_ended

        def look(**kwargs: Any) -> Future[bool]:
            if core.queue.all_ended is look and looked_twice():
                looked.set()
            return all_ended(**kwargs)

        looks = iter(range(10**9))

        def looked_twice() -> bool:
            return next(looks) >= 1

        core.queue.all_ended = look

        def close_elsewhere() -> None:
            closing.start()
            assert looked.wait(BOUND)

        core.queue.waiting.force("before append", close_elsewhere)

        assert core.spawn("in the middle", print) is False
        closing.join(BOUND)

        assert closed == [0]
        assert core.stats().dropped == core.stats().spawned == 1


def test_pools_are_closed_side_by_side(impatient: None) -> None:
    """A shutdown of several pools asks all of them to end before it gives any of them up."""
    with Core(conn_max=1) as core, Gate() as gate, AsyncGate() as agate:
        other = core.another()
        core.drainer.start()
        core.spawn("plain", gate)
        other.queue.put(make_task("other", agate, asynchronous=True))
        other.wake()
        gate.wait_entered()
        agate.wait_entered()

        assert core.drainer.close({core.slots: monotonic(), other: monotonic()}) == 2

        assert core.logs.of("pool 'core' was shut down with 1 tasks cancelled: 1 'plain'")
        assert core.logs.of("pool 'core-other' was shut down with 1 tasks cancelled: 1 'other'")


def test_close_wakes_a_slot_for_a_task_that_nobody_has_woken_one_for() -> None:
    """A task whose spawner was ended between the append and the wake is run by the shutdown."""
    ran = threading.Event()
    with Core(conn_max=1) as core:
        core.queue.put(make_task("forgotten", ran.set))

        assert core.close(BOUND) == 0

        assert ran.is_set()


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


# Stopping.


def test_stop_ends_all_threads_and_start_brings_them_back(patient: None) -> None:
    """A drainer that was stopped has no thread; started again it works."""
    with Core(conn_max=2) as core:
        assert len(core.threads()) == 3

        core.drainer.stop()
        stopped = core.threads()
        core.drainer.start()

        assert stopped == []
        assert_conn_max_is_exact(core)


def test_stop_and_start_twice_are_once() -> None:
    """Neither does anything if there is nothing to do."""
    with Core(conn_max=1) as core:
        core.drainer.start()
        assert len(core.threads()) == 2
        core.drainer.stop()

        core.drainer.stop()

        assert len(core.logs.of("the drainer has started")) == 1
        assert len(core.logs.of("the drainer has stopped")) == 1


def test_coroutine_that_has_no_loop_any_more_is_cancelled(impatient: None) -> None:
    """A slot that still works when the drainer has stopped gives up the coroutine that it takes next."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        coroutine = nothing()
        core.spawn("waits", coroutine)
        core.drainer.stop()
        gate.open()
        core.drain()

        assert (core.stats().succeeded, core.stats().cancelled) == (1, 1)
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)


def test_loop_that_was_closed_since_we_looked_is_no_loop() -> None:
    """A slot that finds the loop closed as it is about to use it is told that there is none."""
    with Core(start=False) as core:
        loop = asyncio.new_event_loop()
        loop.close()
        core.drainer._loop = loop

        assert core.drainer._call_soon(print) is False

        core.drainer._loop = None


def test_start_that_comes_after_the_shutdown_starts_nothing() -> None:
    """Who was asked to start the drainer, and gets to it when the pools are shut down, leaves it.

    1. a spawn or a fork: has a bare thread start the drainer
    2. shutdown: closes all pools
    3. the bare thread: gets its turn
    """
    with Core(start=False) as core:
        core.close(0)
        core.drainer._start_aside(core.drainer._start_token)

        assert core.drainer.life is Life.STOPPED
        assert core.threads() == []


def test_call_later_without_a_loop_is_never() -> None:
    """A call for which there is no loop is not made, and is no error."""
    with Core(start=False) as core:
        core.drainer.call_later(0, pytest.fail)
        core.drainer.start()
        turned = threading.Event()
        core.drainer.call_later(0, turned.set)

        assert turned.wait(BOUND)


def test_drainer_knows_its_own_thread_and_loop() -> None:
    """Code on the drainer's loop is told so, and no other code."""
    answers: list[bool] = []

    with Core() as core:

        async def ask() -> None:
            answers.append(core.drainer.is_own_thread())
            answers.append(core.drainer.is_own_loop(asyncio.get_running_loop()))

        core.spawn("asks", ask)
        core.spawn("asks", lambda: answers.append(core.drainer.is_own_thread()))
        core.drain()

        assert sorted(answers) == [False, True, True]
        assert core.drainer.is_own_thread() is False


# Threads that do not start.


def fail_to_start(*args: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_spawn_that_cannot_start_the_drainer_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread to run it a task is dropped for that reason, and the next spawn tries again."""
    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", fail_to_start)
            assert core.spawn("dropped", print) is False

        assert core.stats().dropped == core.stats().spawned == 1
        assert core.logs.of("task 'dropped' dropped: pool 'core' cannot start a thread")
        assert core.spawn("runs", print, end="") is True
        core.drain()
        assert core.stats().succeeded == 1


def test_drainer_that_may_not_start_starts_nothing() -> None:
    """In a process that is not to have threads, start does nothing, and a spawn is dropped."""
    may_start = [False]
    with Core(start=False, drainer=Drainer(lambda: may_start[0])) as core:
        core.drainer.start()

        assert core.spawn("dropped", print) is False

        assert core.threads() == []
        may_start[0] = True
        assert core.spawn("works", print, end="") is True
        core.drain()


def test_first_spawn_starts_the_drainer() -> None:
    """A drainer that has no threads gets them by a spawn that does not wait for them."""
    with Core(start=False) as core:
        assert core.spawn("first", print, end="") is True
        core.drain()

        assert core.stats().succeeded == 1


def test_only_one_spawner_starts_the_drainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a start is under way no other is begun."""
    started: list[Any] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: started.append(args))
    with Core(start=False) as core:
        assert core.drainer.ensure(core.slots) is True
        assert core.drainer.ensure(core.slots) is True

        assert len(started) == 1
        [(start, args)] = started
        start(*args)  # as the thread does
        core.drainer.stop()
        assert core.drainer.ensure(core.slots) is True
        assert len(started) == 2


@pytest.mark.parametrize("number", [0, 1], ids=["no thread", "a thread for one pool only"])
def test_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """If not one slot of a pool can be started, start raises, all threads end, and later it works."""
    with Core(start=False, conn_max=1) as core:
        other = core.another()
        with monkeypatch.context() as patch:
            FailingStart(patch, number)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                core.drainer.start()
        left = core.threads()
        for thread in left:
            thread.join(BOUND)

        assert not [thread for thread in left if thread.is_alive()]
        assert core.drainer.life is Life.STOPPED
        core.drainer.start()
        core.spawn("works", nothing)
        core.drain()
        core.drainer.close({other: monotonic() + BOUND})


def test_loop_thread_that_does_not_start_leaves_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the drainer's own thread cannot be started its loop is closed: Python would warn of it."""
    start = threading.Thread.start

    def fail_or_start(thread: threading.Thread) -> None:
        if thread.name == "bgtasks-drainer":
            raise RuntimeError("can't start new thread")
        start(thread)  # pragma: no cover  # of others, if any

    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail_or_start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                core.drainer.start()

        assert core.threads() == []
        assert core.drainer._loop is None


def test_loop_that_cannot_be_made_is_an_error_of_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process out of file descriptors gets the error of that, and may try again."""

    def fail() -> None:
        raise OSError(24, "Too many open files")

    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "new_event_loop", fail)
            with pytest.raises(OSError, match="Too many open files"):
                core.drainer.start()

        assert core.drainer.life is Life.STOPPED
        core.drainer.start()


def test_start_that_fails_behind_a_spawn_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, started_by_a_thread: Any
) -> None:
    """The task waits, an ERROR says why, and the next spawn starts the drainer for both."""
    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            FailingStart(patch, 0)
            token_back = threading.Event()
            core.drainer._start_token = ForcedDeque(core.drainer._start_token)
            core.drainer._start_token.force("after append", token_back.set)
            assert core.spawn("first", print, end="") is True
            [line] = core.logs.wait("the drainer could not be started")
            assert token_back.wait(BOUND)

        core.spawn("second", print, end="")
        core.drain()

        assert "can't start new thread" in line
        assert core.stats().succeeded == 2


def test_spawn_into_a_pool_without_slots_starts_them() -> None:
    """A pool that came when the drainer ran gets its slots by its first spawn, which does not wait."""
    ran = threading.Event()
    with Core(conn_max=1) as core:
        other = core.another()
        other.queue.put(make_task("first", ran.set))

        assert other.wake() is False
        assert core.drainer.ensure(other) is True

        assert ran.wait(BOUND)


def test_pool_that_cannot_be_opened_later_leaves_the_others_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no thread for the slots of a pool that came late, start raises, and the rest works on."""
    with Core(conn_max=1) as core:
        other = core.another()
        with monkeypatch.context() as patch:
            FailingStart(patch, 0)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                core.drainer.start()

        assert other.all == []
        assert_conn_max_is_exact(core)


def test_pool_that_is_added_later_is_opened() -> None:
    """A pool that is built while the drainer runs gets its slots with the next start, and no others twice."""
    with Core(conn_max=1) as core:
        other = core.another(conn_max=2)

        core.drainer.start()

        assert len(other.all) == 2
        assert len(core.threads()) == 4
        core.drainer.close({other: monotonic() + BOUND})


# Forks: the hooks are called as os.fork does it.


def test_idle_drainer_steps_aside_before_a_fork(patient: None) -> None:
    """No thread of ours lives while an idle process forks."""
    with Core(conn_max=2) as core:
        core.spawn("works", nothing)
        core.drain()

        core.drainer.before_fork()
        during = core.threads()
        core.drainer.after_fork_in_parent()

        assert during == []
        assert core.drainer.life is Life.STOPPED
        core.spawn("next", nothing)
        core.drain()
        assert core.stats().succeeded == 2


@pytest.mark.parametrize("gate", [Gate, AsyncGate])
def test_busy_drainer_is_left_alone_by_a_fork(gate: Any) -> None:
    """A fork in the middle of a task does not touch it, nor the threads."""
    with Core(conn_max=2) as core, gate() as held:
        core.spawn("held", held)
        held.wait_entered()
        before = core.threads()

        core.drainer.before_fork()
        during = core.threads()
        core.drainer.after_fork_in_parent()

        assert during == before
        assert core.drainer.life is Life.RUNNING
        held.open()
        core.drain()
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_coroutine_left_behind_is_not_cancelled_by_a_fork() -> None:
    """A drainer on whose loop a child of a task still runs does not step aside."""
    event: Future[asyncio.Event] = Future()

    async def child() -> None:
        released = asyncio.Event()
        event.set_result(released)
        await released.wait()

    async def leave_behind() -> None:
        children.append(asyncio.get_running_loop().create_task(child()))

    children: list[asyncio.Task[None]] = []
    with Core(conn_max=1) as core:
        core.spawn("leaves", leave_behind)
        core.drain()
        released = event.result(BOUND)

        core.drainer.before_fork()
        life = core.drainer.life
        core.drainer.after_fork_in_parent()

        assert life is Life.RUNNING
        core.drainer.call_later(0, released.set)


def test_pool_whose_neighbour_is_busy_gets_its_slots_back() -> None:
    """If one pool is busy the drainer stays, and the slots that were seized of the others work on."""
    with Core(conn_max=2) as core, Gate() as gate:
        other = core.another()
        core.drainer.start()
        other.queue.put(make_task("held", gate))
        other.wake()
        gate.wait_entered()

        core.drainer.before_fork()
        core.drainer.after_fork_in_parent()

        assert_conn_max_is_exact(core)
        gate.open()
        core.drainer.close({other: monotonic() + BOUND})


def test_fork_on_a_slots_own_thread_does_not_wait_for_it() -> None:
    """A task that forks, as by subprocess or multiprocessing, goes on."""
    with Core(conn_max=2) as core:

        def fork() -> None:
            core.drainer.before_fork()
            core.drainer.after_fork_in_parent()

        core.spawn("forks", fork)
        core.drain()

        assert core.stats().succeeded == 1
        assert core.drainer.life is Life.RUNNING
        assert_conn_max_is_exact(core)


def test_fork_on_the_drainers_own_thread_does_not_wait_for_it() -> None:
    """A callback that forks on the loop leaves the drainer as it is, though no task runs."""
    with Core(conn_max=2) as core:
        lives: Future[Life] = Future()

        def fork() -> None:
            core.drainer.before_fork()
            lives.set_result(core.drainer.life)
            core.drainer.after_fork_in_parent()

        core.drainer.call_later(0, fork)

        assert lives.result(BOUND) is Life.RUNNING
        assert_conn_max_is_exact(core)


def test_task_spawned_during_a_fork_runs_after_it(patient: None) -> None:
    """While a fork is under way nothing is started, and a task that comes then is not forgotten."""
    with Core(conn_max=1) as core:
        core.drainer.before_fork()
        assert core.spawn("meanwhile", nothing) is True
        core.drainer.start()
        during = core.threads()
        core.drainer.after_fork_in_parent()
        core.drain()

        assert during == []
        assert core.stats().succeeded == 1


def test_task_spawned_by_the_start_that_a_fork_has_held_up_runs(started_by_a_thread: Any) -> None:
    """A start that met a fork and was turned away does not lose the task it was for.

    1. spawner: appends a task, and has a thread start the drainer
    2. a fork begins
    3. the thread: finds the fork under way, and does not start
    4. the fork is over: a task waits, but somebody seems to be starting already
    5. the thread: gives the start token back, has to look again
    """
    with Core(start=False, conn_max=1) as core:
        drainer = core.drainer
        drainer._start_token = ForcedDeque(drainer._start_token)
        drainer._start_token.force("before append", drainer.after_fork_in_parent)
        drainer._start_token.force("after pop", drainer.before_fork)

        assert core.spawn("first", print, end="") is True

        core.drain()
        assert core.stats().succeeded == 1


def test_nested_forks_end_with_the_last(patient: None) -> None:
    """Two forks at once: the drainer comes back when the second is over, and not before."""
    with Core(conn_max=1) as core:
        core.drainer.before_fork()
        core.drainer.before_fork()
        core.spawn("meanwhile", nothing)
        core.drainer.after_fork_in_parent()
        between = core.drainer.life, core.threads()
        core.drainer.after_fork_in_parent()
        core.drain()

        assert between == (Life.ASIDE, [])
        assert core.stats().succeeded == 1


def test_fork_before_any_start_starts_nothing() -> None:
    """A drainer that never ran has nothing to bring back."""
    with Core(start=False) as core:
        core.drainer.before_fork()
        core.drainer.after_fork_in_parent()

        assert core.drainer.life is Life.STOPPED
        assert core.threads() == []


def test_fork_waits_for_a_slot_that_is_about_to_rest(patient: None) -> None:
    """A slot that has ended its last task and is not idle yet needs a moment, which a fork gives it.

    1. slot: has counted its task as ended, is about to go idle
    2. fork: finds nothing queued and nothing running, but the slot missing; looks again
    3. slot: goes idle
    """
    with Core(conn_max=1) as core:
        idle = core.slots.idle = ForcedDeque(core.slots.idle)
        resting, rest = threading.Event(), threading.Event()

        def hold() -> None:
            resting.set()
            rest.wait(BOUND)

        idle.force("before append", hold)
        core.spawn("last", print, end="")
        assert resting.wait(BOUND)
        # At its first look the slot is not there, as nobody has let it go before the second.
        idle.force("before pop", lambda: idle.force("before pop", rest.set))

        core.drainer.before_fork()
        during = core.threads()
        core.drainer.after_fork_in_parent()

        assert during == []


def test_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that does not come to rest in time is left alone, and the fork goes on."""
    monkeypatch.setattr(bgtasks.drainer, "FORK_PATIENCE", 0)
    with Core(conn_max=2) as core:
        idle = core.slots.idle = ForcedDeque(core.slots.idle)
        resting, rest = threading.Event(), threading.Event()

        def hold() -> None:
            resting.set()
            rest.wait(BOUND)

        idle.force("before append", hold)
        core.spawn("last", print, end="")
        assert resting.wait(BOUND)

        core.drainer.before_fork()
        life = core.drainer.life
        rest.set()
        core.drainer.after_fork_in_parent()

        assert life is Life.RUNNING
        assert_conn_max_is_exact(core)


def test_child_has_an_empty_queue_and_closes_what_waited() -> None:
    """In a child the drainer starts from nothing; coroutine objects that waited in the parent are closed."""
    with Core(conn_max=1) as core:
        core.drainer.before_fork()
        coroutine = nothing()
        core.spawn("meanwhile", coroutine)

        core.drainer.after_fork_in_child()

        assert core.drainer.life is Life.STOPPED
        assert core.drainer._groups == []
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)
        core.close(0)
