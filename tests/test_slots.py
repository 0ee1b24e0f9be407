"""Slots: how many run at once, what a task can do to them, and that an idle one keeps nothing."""

import asyncio
import gc
import logging
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar

import pytest
from asgiref.sync import async_to_sync, sync_to_async

import bgtasks.drainer
import bgtasks.slots
from bgtasks.queue import Outcome
from bgtasks.shell import Shell
from bgtasks.slots import Owner, Slot, Slots, current_task
from tests.core import Core, ForcedDeque, exit_, interrupt, make_task
from tests.gate import BOUND, AsyncGate, Gate, wait_until

pytestmark = pytest.mark.usefixtures("no_collection")

T = TypeVar("T")


def assert_conn_max_is_exact(core: Core) -> None:
    """Assert that CONN_MAX tasks, no fewer and no more, run at once."""
    with Gate() as gate:
        for _ in range(core.queue.conn_max * 3):
            core.spawn("held", gate)
        gate.wait_entered(core.queue.conn_max)
    core.drain()

    assert gate.peak == core.queue.conn_max


# How many run at once.


@pytest.mark.parametrize("conn_max", [1, 3, 8])
def test_conn_max_tasks_run_at_once(conn_max: int) -> None:
    """However many wait, CONN_MAX plain functions run side by side, and not one more."""
    with Core(conn_max=conn_max) as core:
        assert_conn_max_is_exact(core)


def test_conn_max_holds_for_plain_and_asynchronous_tasks_together() -> None:
    """Plain functions and coroutines share the slots of their pool."""
    with Core(conn_max=4) as core, AsyncGate() as gate:
        call: Callable[..., None] = Gate.__call__
        plain = partial(call, gate)  # holds in the same gate, and so counts in the same peak

        for i in range(40):
            core.spawn("held", gate if i % 2 else plain)
        gate.wait_entered(4)
        running, queued = core.stats().running, core.stats().queued
        gate.open()
        core.drain()

        assert (running, queued) == (4, 36)
        assert gate.peak == 4
        assert gate.entered == core.stats().succeeded == 40


def test_calls_of_a_task_run_on_the_thread_of_its_slot() -> None:
    """All thread-sensitive calls of an asynchronous task run on one thread, the one of its slot."""
    threads: list[threading.Thread] = []

    async def call() -> None:
        threads.extend([await sync_to_async(threading.current_thread)() for _ in range(3)])

    with Core(conn_max=1) as core:
        core.spawn("calls", call)
        core.drain()

        assert threads == [core.slots.all[0].thread] * 3


def test_task_knows_itself_on_every_thread() -> None:
    """Code finds the task it is a part of: in a function, a coroutine, and a call on the slot's thread."""
    names: list[str] = []

    def name() -> None:
        names.append(current_task().name)

    async def name_async() -> None:
        name()
        await sync_to_async(name)()

    with Core() as core:
        core.spawn("plain", name)
        core.drain()
        core.spawn("asynchronous", name_async)
        core.drain()

        assert names == ["plain", "asynchronous", "asynchronous"]
        assert current_task() is None


def test_task_runs_in_the_context_of_its_spawner() -> None:
    """A context variable has in the task the value it had at the spawn."""
    variable: ContextVar[str] = ContextVar("variable")
    seen: list[str] = []

    async def see() -> None:
        seen.append(variable.get())

    with Core() as core:
        variable.set("at the spawn")
        core.spawn("plain", lambda: seen.append(variable.get()))
        core.spawn("asynchronous", see)
        variable.set("later")
        core.drain()

    assert seen == ["at the spawn"] * 2


# What a task returns.


def test_coroutine_of_a_plain_function_is_run_on_the_same_slot() -> None:
    """A plain function that returns a coroutine, such as a lambda, goes on as that, on its slot's thread."""
    threads: list[threading.Thread] = []

    async def call() -> None:
        threads.append(await sync_to_async(threading.current_thread)())

    def function() -> Any:
        threads.append(threading.current_thread())
        return call()

    with Core(conn_max=1) as core:
        core.spawn("returns a coroutine", function)
        core.spawn("next", lambda: threads.append(threading.current_thread()))
        core.drain()

        assert threads == [core.slots.all[0].thread] * 3
        assert core.stats().succeeded == 2


def test_failure_of_a_coroutine_of_a_plain_function_is_the_tasks() -> None:
    """What the returned coroutine raises fails the task."""
    with Core(conn_max=1) as core:
        core.spawn("returns a coroutine", lambda: raise_async(ValueError))
        core.drain()

        assert core.stats().failed == 1
        assert len(core.logs.of("'returns a coroutine' of pool 'core' failed: ValueError")) == 1


def yields(*args: Any) -> Iterator[None]:
    yield  # pragma: no cover  # nothing of it runs: that is the point


async def yields_async(*args: Any) -> AsyncIterator[None]:
    yield  # pragma: no cover  # as above


@pytest.mark.parametrize("generator", [yields, yields_async])
def test_function_that_returns_a_generator_fails(generator: Any) -> None:
    """A generator would be thrown away with nothing of it run: that is an error."""
    with Core() as core:
        core.spawn("generates", lambda: generator(1))
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert core.stats().failed == 1
        assert "TypeError: task 'generates' returned a generator, of which nothing has run" in line


# What a task raises.


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __repr__(self) -> str:
        raise SystemExit("no repr")  # pragma: no cover  # nobody asks for it


ERRORS = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
    GeneratorExit,
    StopIteration,
    UnprintableError,
]


def raise_(error: type[BaseException]) -> None:
    raise error


async def raise_async(error: type[BaseException]) -> None:
    raise error


async def raise_late(error: type[BaseException]) -> None:
    await asyncio.sleep(0)
    raise error


async def raise_on_slot(error: type[BaseException]) -> None:
    await sync_to_async(raise_)(error)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("task", [raise_, raise_async, raise_late])
def test_whatever_a_task_raises_is_logged_once_and_the_next_task_runs(task: Any, error: Any) -> None:
    """Any exception fails its task, is logged once with its traceback, and ends nothing else."""
    with Core(conn_max=1) as core:
        core.spawn("fails", task, error)
        core.spawn("next", print, end="")
        core.spawn("next", raise_async, ValueError)
        core.drain()

        [line] = core.logs.of("'fails'")
        stats = core.stats()
        assert (stats.failed, stats.succeeded, stats.running) == (2, 1, 0)
        assert "Traceback" in line
        assert f"in {task.__name__}" in line
        assert len(core.logs.above(logging.ERROR)) == 2


def test_error_of_a_call_on_the_slot_reaches_the_task() -> None:
    """What a thread-sensitive call raises is raised where the task awaits it."""
    with Core(conn_max=1) as core:
        core.spawn("fails", raise_on_slot, ValueError)
        core.spawn("next", print, end="")
        core.drain()

        assert (core.stats().failed, core.stats().succeeded) == (1, 1)
        assert len(core.logs.of("failed: ValueError")) == 1


# An idle slot keeps nothing.


class Thing:
    """Something a weak reference can be made to."""


variable: ContextVar[object] = ContextVar("variable")


class Watcher:
    """Tells when the things it was shown are gone."""

    def __init__(self) -> None:
        self._gone: list[threading.Event] = []
        self._references: list[weakref.ref[Any]] = []

    def watch(self, thing: T) -> T:
        gone = threading.Event()
        self._gone.append(gone)
        self._references.append(weakref.ref(thing, lambda _: gone.set()))
        return thing

    def kept(self) -> list[object]:
        """Wait until all are gone, and return those that are not."""
        return [
            reference
            for gone, reference in zip(self._gone, self._references, strict=True)
            if not gone.wait(BOUND)
        ]


class FailureError(Exception):
    pass


def work(watcher: Watcher, thing: Thing) -> None:
    assert variable.get() is not thing


def work_and_fail(watcher: Watcher, thing: Thing) -> None:
    raise watcher.watch(FailureError())


async def work_async(watcher: Watcher, thing: Thing) -> None:
    assert variable.get() is not thing


async def work_and_wait(watcher: Watcher, thing: Thing) -> None:
    await asyncio.sleep(0)


async def work_async_and_fail(watcher: Watcher, thing: Thing) -> None:
    await asyncio.sleep(0)
    raise watcher.watch(FailureError())


async def work_on_slot(watcher: Watcher, thing: Thing) -> None:
    await sync_to_async(work)(watcher, thing)


async def work_on_slot_and_fail(watcher: Watcher, thing: Thing) -> None:
    await sync_to_async(work)(watcher, thing)
    raise watcher.watch(FailureError())


def return_work(watcher: Watcher, thing: Thing) -> Any:
    return work_on_slot(watcher, thing)


async def overrun(watcher: Watcher, thing: Thing) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(
    "task",
    [
        work,
        work_and_fail,
        work_async,
        work_and_wait,
        work_async_and_fail,
        work_on_slot,
        work_on_slot_and_fail,
        return_work,
        overrun,
    ],
)
def test_idle_slot_keeps_nothing_of_its_last_task(task: Any) -> None:
    """Argument, context and exception of the last task are freed while the slot is idle, without a gc."""
    watcher = Watcher()

    def spawn() -> None:
        variable.set(watcher.watch(Thing()))
        core.spawn("last", task, watcher, watcher.watch(Thing()))

    with Core(conn_max=1, task_timeout=0.01 if task is overrun else 10 * BOUND) as core:
        core.spawn("first", print, end="")  # so that the pool has done its first steps
        core.drain()
        gc.collect()
        gc.disable()
        try:
            copy_context().run(spawn)

            assert watcher.kept() == []
            assert core.stats().queued == core.stats().running == 0
        finally:
            gc.enable()


def test_idle_slot_keeps_no_call() -> None:
    """The arguments, the result and the error of a call on the slot's thread are freed while it is idle."""
    watcher = Watcher()

    def fail(thing: object) -> None:
        raise watcher.watch(FailureError())

    with Core(conn_max=1) as core:
        slot = core.slots.all[0]
        gc.collect()
        gc.disable()
        try:
            assert slot.submit(lambda thing: watcher.watch(Thing()), watcher.watch(Thing())).result(BOUND)
            error = slot.submit(fail, watcher.watch(Thing())).exception(BOUND)
            assert isinstance(error, FailureError)
            del error

            assert watcher.kept() == []
        finally:
            gc.enable()


# The steps of other threads between ours, by force.


def test_task_appended_just_after_a_slot_looked_is_taken_by_it() -> None:
    """A task that comes between a slot's look at the queue and its rest is not left lying.

    1. slot: finds nothing to take
    2. spawner: appends a task, finds no slot idle, and leaves
    3. slot: goes idle, and has to look again
    """
    with Core(conn_max=1) as core:
        ran = threading.Event()
        first = threading.Event()
        core.slots.idle = ForcedDeque(core.slots.idle)
        core.slots.idle.force("before append", lambda: core.spawn("in between", ran.set))

        core.spawn("first", first.set)

        assert ran.wait(BOUND)
        core.drain()
        assert_conn_max_is_exact(core)


def test_slot_that_is_woken_as_it_looks_again_is_woken_once() -> None:
    """A slot that somebody takes out of the idle ones while it looks again is not run twice.

    1. slot: finds nothing to take, goes idle
    2. spawner: appends a task, takes the slot out, and sends it a message
    3. slot: sees the task, finds that it is owned by another, and waits for the message
    """
    with Core(conn_max=1) as core:
        ran = threading.Event()
        core.slots.idle = ForcedDeque(core.slots.idle)
        core.slots.idle.force("after append", lambda: core.spawn("in between", ran.set))

        core.spawn("first", print, end="")

        assert ran.wait(BOUND)
        core.drain()
        assert core.stats().succeeded == 2
        assert_conn_max_is_exact(core)


def test_slot_that_goes_idle_while_the_token_is_held_is_woken() -> None:
    """A slot and a task that both come while a spawner holds the wake token find each other.

    1. spawner A: sees an idle slot, appends a task, takes the wake token
    2. the slot is taken out by somebody else, so A finds none
    3. the slot goes idle again
    4. spawner B: appends a task, finds no token, and leaves it to A
    5. spawner A: gives the token back, and has to look again
    """
    with Core(conn_max=1) as core:
        group = core.slots
        group.idle = ForcedDeque(group.idle)
        group._wake_token = ForcedDeque(group._wake_token)
        taken: list[Any] = []
        b_accepted: list[bool] = []

        def go_idle_and_spawn() -> None:
            group.idle.extend(taken)
            b_accepted.append(core.spawn("B", print, end=""))
            assert core.stats().queued == 2

        group._wake_token.force("before append", go_idle_and_spawn)
        group.idle.force("before remove", lambda: taken.append(group.idle.pop()))

        assert core.spawn("A", print, end="") is True
        core.drain()

        assert b_accepted == [True]
        assert core.stats().succeeded == 2


def test_woken_slot_that_is_stopped_loses_no_task() -> None:
    """A task whose slot is stopped as it is woken waits, and runs with the next one that is spawned.

    1. spawner: takes the slot out of the idle ones
    2. somebody stops the drainer
    3. spawner: sends the slot's thread, which has ended, a message
    """
    done: list[str] = []

    with Core(conn_max=1) as core:
        core.slots.idle = ForcedDeque(core.slots.idle)
        core.slots.idle.force("after remove", core.drainer.stop)

        assert core.spawn("first", done.append, "first") is True
        assert core.stats().queued == 1
        core.spawn("second", done.append, "second")
        core.drain()

        assert done == ["first", "second"]


def test_burst_costs_its_spawner_one_wake() -> None:
    """While one slot is on its way a spawner wakes no other; the woken slot wakes the next one."""
    with Core(conn_max=3) as core:
        group = core.slots
        with Gate() as held:
            # A message that holds the slot's thread, so that the one woken is on its way until we say so.
            for slot in group.all:
                slot.submit(held)
            held.wait_entered(3)

            for _ in range(3):
                core.spawn("burst", print, end="")

            assert [slot.owner for slot in group.all].count(Owner.CALLED) == 1
        core.drain()
        assert_conn_max_is_exact(core)


# Exceptions set on a slot's thread from outside.

untraced = pytest.mark.skipif(
    sys.version_info < (3, 12) and sys.gettrace() is not None,
    reason="while an exception waits for a blocked thread, CPython 3.11 hangs in the next traced call",
)


@untraced
def test_slot_interrupted_while_idle_goes_on() -> None:
    """An exception set on the thread of an idle slot is logged, and neither the slot nor a task is lost."""
    with Core(conn_max=2) as core:
        assert_conn_max_is_exact(core)  # so that their threads serve
        wait_until(lambda: len(core.slots.idle) == 2)
        for slot in core.slots.all:
            interrupt(slot.thread)

        assert_conn_max_is_exact(core)

        stats = core.stats()
        assert stats.succeeded == stats.spawned
        assert len(core.logs.of("was interrupted; it goes on")) == 2
        assert all("SystemExit" in line for line in core.logs.of("was interrupted"))


@untraced
def test_task_interrupted_while_it_runs_has_failed() -> None:
    """An exception set on the thread of a running task is the task's."""
    with Core(conn_max=2) as core, Gate() as gate:
        core.spawn("interrupted", gate)
        gate.wait_entered()
        for slot in core.slots.all:
            if slot.owner is Owner.THREAD:
                interrupt(slot.thread, KeyboardInterrupt)
        gate.open()
        core.drain()

        assert core.stats().failed == 1
        assert len(core.logs.of("'interrupted' of pool 'core' failed: KeyboardInterrupt")) == 1
        assert_conn_max_is_exact(core)


class InterruptedShell(Shell):
    """Has its thread interrupted while it cleans, as a debugger could do it, the `at`-th time."""

    def __init__(self, at: int) -> None:
        super().__init__(object())
        self._left = at

    def clean(self) -> None:
        super().clean()
        self._left -= 1
        if self._left == 0:
            interrupt(threading.current_thread())


async def use_slot() -> None:
    await sync_to_async(print)(end="")


@pytest.mark.parametrize(
    ("task", "at", "outcome"),
    [
        pytest.param(print, 1, Outcome.FAILED, id="before a function"),
        pytest.param(print, 2, Outcome.FAILED, id="after a function"),
        pytest.param(use_slot, 1, Outcome.FAILED, id="before a call on the slot"),
        pytest.param(use_slot, 2, Outcome.SUCCEEDED, id="after a call on the slot"),
    ],
)
def test_task_interrupted_in_its_slot_is_accounted_for(task: Any, at: Any, outcome: Outcome) -> None:
    """A task whose slot is interrupted around it ends, the slot goes on, and it is logged once."""
    with Core(conn_max=1, hooks=InterruptedShell(at)) as core:
        core.spawn("interrupted", task)
        core.drain()
        core.spawn("next", print, end="")
        core.drain()

        stats = core.stats()
        assert (stats.running, stats.queued) == (0, 0)
        assert (stats.failed == 1) is (outcome is Outcome.FAILED)
        assert stats.failed + stats.succeeded == 2
        assert len(core.logs.above(logging.ERROR)) == 1
        assert_conn_max_is_exact(core)


class InterruptedWake(Slots):
    """Raises what was set from outside just as a slot wakes up, once."""

    error: BaseException | None = SystemExit()

    def awake(self, slot: Slot) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().awake(slot)


def test_slot_interrupted_as_it_wakes_gives_the_token_back() -> None:
    """A slot that is interrupted before it gave the wake token back wakes again, and others can be woken."""
    with Core(conn_max=2, slots=InterruptedWake) as core:
        core.spawn("first", print, end="")
        core.drain()

        assert core.logs.wait("was interrupted; it goes on")
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_interrupted_end_of_a_task_is_not_lost() -> None:
    """An exception that comes just as a task is counted leaves it with an outcome.

    1. slot: the task has returned, it calls queue.end
    2. another thread: sets an exception, which is raised as the call begins
    """
    with Core(conn_max=1) as core:
        end = core.queue.end

        def interrupted_end(task: Any, outcome: Outcome) -> None:
            core.queue.end = end
            raise SystemExit

        core.queue.end = interrupted_end

        core.spawn("interrupted", print, end="")
        core.drain()

        assert core.stats().running == 0
        assert_conn_max_is_exact(core)


class TwiceInterruptedShell(InterruptedShell):
    """Has its thread interrupted after a task, and again while the slot recovers from that."""

    def __init__(self) -> None:
        super().__init__(2)
        self._again = True

    def clean(self) -> None:
        super().clean()
        if self._left < 0 and self._again:
            self._again = False
            interrupt(threading.current_thread())


def test_interrupted_slot_leaves_the_tasks_of_the_others_alone() -> None:
    """What runs on the other slots when one is interrupted goes on, and is counted as what it becomes."""
    with Core(conn_max=2, hooks=InterruptedShell(3)) as core, Gate() as gate:
        core.spawn("other", gate)
        gate.wait_entered()
        core.spawn("interrupted", print, end="")
        core.logs.wait("was interrupted; it goes on")
        gate.open()
        core.drain()

        assert (core.stats().failed, core.stats().succeeded) == (1, 1)
        assert_conn_max_is_exact(core)


def test_slot_interrupted_while_it_recovers_goes_on() -> None:
    """An exception that comes while a slot recovers from another is recovered from as well."""
    with Core(conn_max=1, hooks=TwiceInterruptedShell()) as core:
        core.spawn("interrupted", print, end="")
        core.drain()

        core.logs.wait("was interrupted; it goes on", 2)
        assert core.stats().failed == 1
        assert_conn_max_is_exact(core)


class InterruptedLeave(Shell):
    """Has its thread interrupted once as a task leaves it."""

    error: type[BaseException] | None = SystemExit

    def leave(self) -> None:
        super().leave()
        error, self.error = self.error, None
        if error is not None:
            interrupt(threading.current_thread(), error)


def test_coroutine_whose_function_is_interrupted_is_closed() -> None:
    """A plain function that is interrupted as it returns a coroutine fails, and the coroutine is closed.

    1. slot: has called the function, which has returned a coroutine
    2. another thread: sets an exception on the slot's
    """
    coroutine = use_slot()
    with Core(conn_max=1, hooks=InterruptedLeave(object())) as core:
        core.spawn("interrupted", lambda: coroutine)
        core.drain()

        assert core.stats().failed == 1
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)
        assert_conn_max_is_exact(core)


def test_coroutine_that_was_not_yet_lent_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is if the exception comes just before the coroutine is lent to the loop."""
    coroutine = use_slot()
    lend = Slot._lend

    def interrupted_lend(slot: Slot, task: Any, *, touched: Any) -> None:
        monkeypatch.setattr(Slot, "_lend", lend)
        raise SystemExit

    monkeypatch.setattr(Slot, "_lend", interrupted_lend)
    with Core(conn_max=1) as core:
        core.spawn("interrupted", lambda: coroutine)
        core.drain()

        assert core.stats().failed == 1
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)
        assert_conn_max_is_exact(core)


def test_slot_interrupted_as_it_takes_a_task_accounts_for_it() -> None:
    """A task that the queue has given away when its slot is interrupted has failed, and its place is free."""
    with Core(conn_max=1, capacity=1) as core:
        core.queue.waiting = core.queue.inbox = ForcedDeque()
        core.queue.waiting.force("after popleft", exit_)
        core.spawn("lost", print, end="")
        core.logs.wait("was interrupted; it goes on")
        core.drain()

        assert core.spawn("next", print, end="") is True
        core.drain()
        stats = core.stats()
        assert (stats.spawned, stats.failed, stats.succeeded, stats.queued) == (2, 1, 1, 0)


def test_message_interrupted_before_the_slot_has_it_is_called_again() -> None:
    """A slot that is interrupted before it owns itself has the message still to deal with."""
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        errors = [SystemExit()]

        def proceed() -> Any:
            if errors:
                raise errors.pop()
            return slot.proceed()

        core.slots.idle.remove(slot)
        slot.call(proceed)

        assert core.logs.wait("was interrupted; it goes on")
        assert_conn_max_is_exact(core)


def test_message_interrupted_when_it_was_dealt_with_is_not_called_again() -> None:
    """A slot that is interrupted just after a message has its task fail, and says so once."""
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        slot._messages = ForcedDeque(slot._messages)
        slot._messages.force("after popleft", exit_)
        slot._bell.put(None)

        core.spawn("interrupted", print, end="")
        core.drain()

        assert core.stats().failed == 1
        assert_conn_max_is_exact(core)
        assert len(core.logs.above(logging.ERROR)) == 1


def test_call_interrupted_before_its_answer_is_answered() -> None:
    """A task that waits for a call on its slot's thread gets the exception that ended the call."""
    with Core(conn_max=1) as core, Gate() as gate:
        [slot] = core.slots.all
        slot.submit(gate)
        gate.wait_entered()
        call = slot.submit(print, end="")
        set_exception = call.set_exception
        call.set_result = lambda result: exit_()
        gate.open()

        assert isinstance(call.exception(BOUND), SystemExit)
        assert call.set_exception == set_exception
        assert core.logs.wait("was interrupted; it goes on")
        assert_conn_max_is_exact(core)


class InterruptedLaunch(bgtasks.drainer.Drainer):
    """Raises what was set from outside around the first launch."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self._when = when

    def launch(self, slot: Slot, task: Any) -> None:
        when, self._when = self._when, ""
        if when == "before":
            raise SystemExit
        super().launch(slot, task)
        if when == "after":
            raise SystemExit


@pytest.mark.parametrize("when", ["before", "after"])
def test_coroutine_whose_slot_is_interrupted_as_it_is_lent_runs_once(when: str) -> None:
    """A slot interrupted around the launch of a coroutine launches it if nobody has, and only then.

    "after" is while the loop is held, so that it has not yet taken the coroutine when the slot looks.
    """
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    def begin() -> Any:
        return run()  # which the slot's thread lends to the loop

    with Core(conn_max=1, drainer=InterruptedLaunch(when)) as core, Gate() as held:
        core.drainer.call_later(0, held)
        held.wait_entered()
        core.spawn("interrupted", begin)
        core.logs.wait("was interrupted; it goes on")
        held.open()
        core.drain()

        assert ran == [1]
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_slot_interrupted_as_it_leaves_its_rest_is_not_lost() -> None:
    """A slot that has taken itself out of the idle ones when it is interrupted goes on.

    1. slot: goes idle
    2. spawner: appends a task, and has yet to wake somebody
    3. slot: sees the task, takes itself out of the idle ones, and is interrupted
    """
    with Core(conn_max=1) as core:
        ran = threading.Event()
        idle = core.slots.idle = ForcedDeque(core.slots.idle)

        def put_and_interrupt() -> None:
            core.queue.put(make_task("in between", ran.set))
            idle.force("after remove", exit_)

        idle.force("after append", put_and_interrupt)

        core.spawn("first", print, end="")

        assert ran.wait(BOUND)
        core.drain()
        assert len(core.logs.of("was interrupted")) == 1
        assert_conn_max_is_exact(core)


def test_slot_interrupted_as_somebody_wakes_it_is_woken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that a spawner has taken out of the idle ones waits for its call.

    1. slot: goes idle
    2. spawner: takes it out of the idle ones
    3. slot: is interrupted, and finds itself neither idle nor called
    4. spawner: calls it
    """
    monkeypatch.setattr(bgtasks.slots, "CALL_PATIENCE", BOUND)
    with Core(conn_max=1) as core:
        idle = core.slots.idle = ForcedDeque(core.slots.idle)
        ran, resting, taken = threading.Event(), threading.Event(), threading.Event()

        def rest_and_interrupt() -> None:
            resting.set()
            taken.wait(BOUND)
            raise SystemExit

        def take() -> None:
            taken.set()
            core.logs.wait("was interrupted")

        idle.force("after append", rest_and_interrupt)
        core.spawn("first", print, end="")
        assert resting.wait(BOUND)
        idle.force("after remove", take)

        core.spawn("second", ran.set)

        assert ran.wait(BOUND)
        core.drain()
        assert core.stats().succeeded == 2
        assert_conn_max_is_exact(core)


def test_slot_interrupted_as_somebody_holds_it_rests_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that comes back to the idle ones by another's hand does not go there a second time.

    1. slot: goes idle
    2. fork: takes it out of the idle ones
    3. slot: is interrupted, and finds itself neither idle nor called
    4. fork: finds a task running in another slot, and puts this one back
    """
    monkeypatch.setattr(bgtasks.slots, "CALL_PATIENCE", BOUND)
    with Core(conn_max=1) as core:
        group = core.slots
        idle = group.idle = ForcedDeque(group.idle)
        resting, taken = threading.Event(), threading.Event()

        def rest_and_interrupt() -> None:
            resting.set()
            taken.wait(BOUND)
            raise SystemExit

        idle.force("after append", rest_and_interrupt)
        core.spawn("first", print, end="")
        assert resting.wait(BOUND)
        [slot] = group.all
        proceeded: list[int] = []
        monkeypatch.setattr(Slot, "proceed", lambda slot: proceeded.append(1))
        recovered = threading.Event()
        serve = slot._serve

        def serve_again() -> None:
            recovered.set()
            serve()

        slot._serve = serve_again
        idle.pop()
        taken.set()
        core.logs.wait("was interrupted; it goes on")
        group.release([slot])

        assert recovered.wait(BOUND)
        core.spawn("second", print, end="")
        core.drain()
        assert proceeded == []


def test_slot_interrupted_while_the_loop_owns_it_leaves_its_account_alone() -> None:
    """An exception on the thread of a slot in the middle of a step of the loop changes no figure.

    1. loop: ends the slot's task, and takes the next one out of the waiting ones
    2. slot: is interrupted
    3. loop: goes on
    """
    with Core(conn_max=1) as core, AsyncGate() as gate:
        core.spawn("lent", gate)
        gate.wait_entered()
        [slot] = core.slots.all
        waiting = core.queue.waiting = core.queue.inbox = ForcedDeque()

        def interrupt_slot() -> None:
            slot._send(exit_)
            core.logs.wait("was interrupted; it goes on")
            wait_until(lambda: not slot._messages)

        waiting.force("after popleft", interrupt_slot)
        core.spawn("next", print, end="")
        gate.open()
        core.drain()

        stats = core.stats()
        assert (stats.succeeded, stats.failed, stats.queued) == (2, 0, 0)


# Spawners that a signal handler ends in the middle of a wake.


def test_spawner_ended_with_the_token_gives_it_back() -> None:
    """A signal handler that raises when the wake token is taken leaves it to the next spawner."""
    with Core(conn_max=1) as core:
        core.slots._wake_token = ForcedDeque(core.slots._wake_token)
        core.slots._wake_token.force("after pop", exit_)
        with pytest.raises(SystemExit):
            core.spawn("interrupted", print, end="")

        core.spawn("next", print, end="")
        core.drain()

        assert core.stats().succeeded == 2


def test_spawner_ended_when_it_gave_the_token_back_has_given_it_back() -> None:
    """A signal handler that raises as a spawner gives up the token for want of a slot breaks nothing."""
    with Core(conn_max=1) as core:
        group = core.slots
        taken: list[Any] = []
        group.idle = ForcedDeque(group.idle)
        group._wake_token = ForcedDeque(group._wake_token)
        group._wake_token.force("after pop", lambda: taken.append(group.idle.pop()))
        group._wake_token.force("after append", exit_)
        with pytest.raises(SystemExit):
            core.spawn("interrupted", print, end="")
        group.idle.extend(taken)

        core.spawn("next", print, end="")
        core.drain()

        assert core.stats().succeeded == 2


def test_spawner_ended_with_a_slot_wakes_it() -> None:
    """A signal handler that raises when a slot was taken out of the idle ones does not lose the slot."""
    with Core(conn_max=1) as core:
        core.slots.idle = ForcedDeque(core.slots.idle)
        core.slots.idle.force("after remove", exit_)

        with pytest.raises(SystemExit):
            core.spawn("interrupted", print, end="")
        core.drain()

        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_spawner_ended_before_the_ring_rings() -> None:
    """A signal handler that raises between the message and the bell does not leave the slot asleep."""
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        slot._messages = ForcedDeque(slot._messages)
        slot._bell.put(None)
        slot._messages.force("after append", exit_)

        with pytest.raises(SystemExit):
            core.spawn("interrupted", print, end="")
        core.drain()

        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_spawner_ended_as_it_asks_the_loop_leaves_that_to_the_next() -> None:
    """A signal handler that raises as the loop is asked to take a coroutine loses neither it nor the next."""

    class InterruptedPoll(bgtasks.drainer.Drainer):
        def poll(self, group: Slots) -> bool:
            if not polls.pop():
                exit_()
            return super().poll(group)

    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    polls = [True, False]
    with Core(conn_max=1, drainer=InterruptedPoll()) as core:
        with pytest.raises(SystemExit):
            core.spawn("interrupted", run)
        core.drain()
        wait_until(lambda: core.slots.idle)
        core.spawn("next", run)
        core.drain()

        assert ran == [1, 1]
        assert polls == []
        assert_conn_max_is_exact(core)


# Slots as executors.


def test_cancelled_call_is_not_run() -> None:
    """A call that was cancelled while the slot was busy is passed over."""
    called: list[int] = []
    with Core(conn_max=1) as core, Gate() as gate:
        slot = core.slots.all[0]
        held = slot.submit(gate)
        gate.wait_entered()
        cancelled = slot.submit(called.append, 1)
        cancelled.cancel()
        last = slot.submit(called.append, 2)
        gate.open()

        last.result(BOUND)
        assert held.done()
        assert called == [2]


def test_stopped_slot_is_not_kept() -> None:
    """Nothing keeps a slot once its thread has ended, not even asgiref's table of executors."""
    with Core(conn_max=1) as core:
        slot = weakref.ref(core.slots.all[0])
        core.spawn("uses the slot", use_slot)
        core.drain()
    del core
    gc.collect()

    assert slot() is None


def test_stopped_slot_refuses_calls() -> None:
    """A slot whose thread has ended says so, where a future that never comes would hang the caller."""
    with Core(conn_max=1) as core:
        slot = core.slots.all[0]
        core.close(BOUND)

        with pytest.raises(RuntimeError, match="slot 'bgtasks-core-1' has stopped"):
            slot.submit(print)


def test_calls_left_by_a_slot_that_ends_are_answered() -> None:
    """A call that came too late for a slot's thread is answered by an error, and not never."""
    with Core(conn_max=1) as core, Gate() as gate:
        [slot] = core.slots.all
        slot.submit(gate)
        gate.wait_entered()
        slot.stop()
        late = slot.submit(print)
        gate.open()

        with pytest.raises(RuntimeError, match="the slot has stopped"):
            late.result(BOUND)
        core.slots.all.remove(slot)
        core.slots.idle.clear()


def test_functions_of_a_task_are_not_run_on_the_drainers_loop() -> None:
    """async_to_sync in a plain function has a loop of its own, though its thread has served the drainer's."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def loop() -> None:
        loops.append(asyncio.get_running_loop())

    with Core(conn_max=1) as core:
        core.spawn("asynchronous", use_slot)
        core.drain()
        core.spawn("plain", async_to_sync(loop))
        core.drain()

        assert core.stats().succeeded == 2
        assert not core.drainer.is_own_loop(loops[0])


# Opening, seizing, telling.


class FailingStart:
    """Lets only so many threads of the core be started: the machine has no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        start = threading.Thread.start

        def fail_or_start(thread: threading.Thread) -> None:
            if thread.name.startswith("bgtasks-core"):
                if self.left == 0:
                    raise RuntimeError("can't start new thread")
                self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fail_or_start)


def test_pool_opens_with_the_slots_it_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the machine has threads for some of the slots, the pool says so and works with those."""
    FailingStart(monkeypatch, 2)
    with Core(conn_max=4) as core, Gate() as gate:
        for _ in range(6):
            core.spawn("held", gate)
        gate.wait_entered(2)
        gate.open()
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert line.startswith("pool 'core' has only 2 slots\n  Traceback")
        assert "can't start new thread" in line
        assert gate.peak == 2
        assert core.stats().succeeded == 6


def test_task_that_waits_when_the_pool_opens_is_run() -> None:
    """Tasks that were spawned while there was no thread run as soon as the slots are there."""
    with Core(start=False) as core:
        ran = threading.Event()
        core.queue.put(make_task("waits", ran.set))

        core.drainer.start()

        assert ran.wait(BOUND)
        core.drain()


def test_repr_is_a_status_line() -> None:
    """Slots and each of them show what they are at."""
    with Core(conn_max=1, capacity=5) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", gate)

        assert repr(core.slots) == "<Slots 'core' 1/1 running, 1/5 queued>"
        assert repr(core.slots.all[0]) == "<Slot 'bgtasks-core-1' owned by thread>"
