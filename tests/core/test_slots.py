"""Slots: how many run at once, what a task can do to them, and that an idle one keeps nothing."""

import asyncio
import gc
import itertools
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from time import monotonic, sleep
from typing import Any, TypeVar

import pytest
from asgiref.sync import async_to_sync, sync_to_async

import bgtasks.core.drainer
from bgtasks.core.figures import Outcome
from bgtasks.core.task import Task, current_task
from bgtasks.hooks import DjangoHooks
from bgtasks.monitoring.figures import read_stats_by_name
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import (
    SENDER,
    Core,
    FailingStart,
    after_call,
    assert_conn_max_is_exact,
    assert_whole,
    exit_,
    interrupt,
    make_task,
    untraced,
    wait_idle,
)

pytestmark = pytest.mark.usefixtures("no_collection")

T = TypeVar("T")


@pytest.fixture
def switching() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def before_call(owner: Any, name: str, hook: Callable[[], object]) -> Iterator[None]:
    """Call `hook` once, before the next call of what `owner` has as `name`."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, function)
        hook()
        return function(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


AROUND = pytest.mark.parametrize("around", [before_call, after_call])


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
        task = current_task()
        assert task is not None
        names.append(task.name)

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
        assert "TypeError: task 'generates' returned a generator; its body would never run" in line


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
        """Wait until all are gone, and return those that are not.

        It does not sleep: a free-threaded Python frees an object when the thread next runs that made it.
        """
        deadline = monotonic() + BOUND
        while not all(gone.is_set() for gone in self._gone) and monotonic() < deadline:
            sleep(0.001)
        return [
            reference
            for gone, reference in zip(self._gone, self._references, strict=True)
            if not gone.is_set()
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
            assert slot.calls.submit(lambda thing: watcher.watch(Thing()), watcher.watch(Thing())).result(
                BOUND
            )
            error = slot.calls.submit(fail, watcher.watch(Thing())).exception(BOUND)
            assert isinstance(error, FailureError)
            del error

            assert watcher.kept() == []
        finally:
            gc.enable()


# Spawners and slots that look at the same time.


def test_task_spawned_just_after_a_slot_looked_is_taken_by_it() -> None:
    """A task that comes between a slot's look at the queue and its rest is not left lying.

    1. slot: finds nothing to take
    2. spawner: puts a task, and wakes the slot
    3. slot: goes to sleep, and has been woken
    """
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        ran = threading.Event()
        wait_idle(core.slots)
        with after_call(core.queue, "take", lambda: core.spawn("in between", ran.set)):
            slot.signal.put(None)

            assert ran.wait(BOUND)
        core.drain()
        assert_conn_max_is_exact(core)


def test_slot_that_is_woken_too_often_runs_each_task_once() -> None:
    """A wake-up too many is harmless: a task is taken once, and an idle slot goes to rest again."""
    ran: list[int] = []
    with Core(conn_max=2) as core:
        for i in range(20):
            for slot in core.slots.all:
                slot.go_on()
            core.spawn("task", ran.append, i)
        core.drain()
        wait_idle(core.slots)

        assert sorted(ran) == list(range(20))
        assert_conn_max_is_exact(core)


def test_woken_slot_that_is_stopped_loses_no_task() -> None:
    """A task whose slot is stopped while it is woken runs in the slots that are started next.

    1. spawner: puts a task and wakes the slot
    2. somebody stops the pool's slots
    3. slot: finds that it has to end
    """
    done: list[str] = []
    with Core(conn_max=1) as core, Gate() as held:
        [slot] = core.slots.all
        slot.calls.submit(held)
        held.wait_entered()
        wait_until(slot.signal.empty)
        with after_call(core.queue, "put", core.slots.stop):
            assert core.spawn("first", done.append, "first") is True
        held.open()
        slot.thread.join(BOUND)
        core.spawn("second", done.append, "second")
        core.drain()

        assert done == ["first", "second"]
        assert_conn_max_is_exact(core)


def test_burst_costs_its_spawner_one_wake_up() -> None:
    """While one slot is on its way a spawner wakes no other; the woken slot has the next one woken."""
    with Core(conn_max=3) as core:
        slots = core.slots.all
        with Gate() as held:
            # A call that holds the slot's thread, so that the one woken is on its way until we say so.
            for slot in slots:
                slot.calls.submit(held)
            held.wait_entered(3)
            assert all(slot.signal.empty() for slot in slots)

            for _ in range(3):
                core.spawn("burst", print, end="")

            assert sum(slot.signal.qsize() for slot in slots) == 1
        core.drain()
        assert_conn_max_is_exact(core)


def test_coroutine_in_an_idle_slot_needs_no_thread() -> None:
    """The loop takes an idle slot for an asynchronous task by itself: the thread may be slow to wake."""
    ran = threading.Event()

    async def run() -> None:
        ran.set()

    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        with Gate() as held:
            slot.calls.submit(held)
            held.wait_entered()

            core.spawn("asynchronous", run)

            assert ran.wait(BOUND)
            core.drain()
        assert core.stats().succeeded == 1


def test_coroutine_whose_loop_is_gone_is_cancelled() -> None:
    """A coroutine for which there is no loop ends as cancelled and is closed, and its slot goes on."""
    coroutine = use_slot()
    with Core(conn_max=1) as core, Gate() as gate:

        def return_coroutine() -> Any:
            gate()
            return coroutine

        core.spawn("returns a coroutine", return_coroutine)
        gate.wait_entered()
        core.spawn("next", print, end="")
        [thread] = core.drainer.loop.stop()
        thread.join(BOUND)
        gate.open()
        core.drain()

        assert (core.stats().cancelled, core.stats().succeeded) == (1, 1)
        assert_closed(coroutine)


def test_coroutine_of_a_function_that_was_given_up_is_closed() -> None:
    """The coroutine that a plain function returns after it was given up does not run, and is closed."""
    coroutine = use_slot()
    with Core(conn_max=1) as core, Gate() as gate:
        [slot] = core.slots.all

        def return_coroutine() -> Any:
            gate()
            return coroutine

        core.spawn("returns a coroutine", return_coroutine)
        gate.wait_entered()
        assert core.close(0) == 1
        gate.open()
        slot.thread.join(BOUND)

        assert core.stats().cancelled == 1
        assert_closed(coroutine)


def test_small_queue_drops_nothing_that_fits() -> None:
    """However small the CAPACITY, once all slots are busy exactly that many tasks wait."""
    with Core(conn_max=4, capacity=1) as core, Gate() as gate:
        for running in range(1, 5):
            assert core.spawn("held", gate) is True
            gate.wait_entered(running)

        assert [core.spawn("waits", gate) for _ in range(3)] == [True, False, False]
        gate.open()
        core.drain()

        assert (core.stats().succeeded, core.stats().dropped) == (5, 2)


# Exceptions set on a slot's thread from outside.


def assert_closed(coroutine: Any) -> None:
    """Assert that Python will not warn that `coroutine` was never awaited."""
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


@untraced
def test_slot_interrupted_while_idle_goes_on() -> None:
    """An exception set on the thread of an idle slot is logged, and neither the slot nor a task is lost."""
    with Core(conn_max=2) as core:
        assert_conn_max_is_exact(core)  # so that their threads serve
        wait_idle(core.slots)
        for slot in core.slots.all:
            interrupt(slot.thread)
            slot.go_on()
        core.logs.wait("was interrupted; it goes on", 2)

        assert_conn_max_is_exact(core)

        stats = core.stats()
        assert stats.succeeded == stats.spawned
        assert all("SystemExit" in line for line in core.logs.of("was interrupted"))


@untraced
def test_task_interrupted_while_it_runs_has_failed() -> None:
    """An exception set on the thread of a running task is the task's."""
    with Core(conn_max=2) as core, Gate() as gate:
        core.spawn("interrupted", gate)
        gate.wait_entered()
        for slot in core.slots.all:
            if slot.task is not None:
                interrupt(slot.thread, KeyboardInterrupt)
        gate.open()
        core.drain()

        assert core.stats().failed == 1
        assert len(core.logs.of("'interrupted' of pool 'core' failed: KeyboardInterrupt")) == 1
        assert_conn_max_is_exact(core)


class InterruptedHooks(DjangoHooks):
    """Has its thread interrupted while it cleans, as a debugger could do it, the `at`-th times."""

    def __init__(self, *at: int) -> None:
        super().__init__(SENDER)
        self._at = at
        self._cleaned = 0

    def clean(self) -> None:
        super().clean()
        self._cleaned += 1
        if self._cleaned in self._at:
            interrupt(threading.current_thread())


async def use_slot() -> None:
    await sync_to_async(print)(end="")


@pytest.mark.parametrize(
    ("task", "at", "outcome"),
    [
        pytest.param(print, 1, Outcome.FAILED, id="before a function"),
        pytest.param(print, 2, Outcome.SUCCEEDED, id="after a function"),
        pytest.param(use_slot, 1, Outcome.FAILED, id="before a call on the slot"),
        pytest.param(use_slot, 2, Outcome.SUCCEEDED, id="after a call on the slot"),
    ],
)
def test_task_interrupted_in_its_slot_is_accounted_for(task: Any, at: Any, outcome: Outcome) -> None:
    """A task whose slot is interrupted around it ends, the slot goes on, and it is logged once."""
    with Core(conn_max=1, hooks=InterruptedHooks(at)) as core:
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


def test_interrupted_slot_leaves_the_tasks_of_the_others_alone() -> None:
    """What runs on the other slots when one is interrupted goes on, and is counted as what it becomes."""
    with Core(conn_max=2, hooks=InterruptedHooks(3)) as core, Gate() as gate:
        core.spawn("other", gate)
        gate.wait_entered()
        core.spawn("interrupted", print, end="")
        core.logs.wait("was interrupted; it goes on")
        gate.open()
        core.drain()

        assert (core.stats().failed, core.stats().succeeded) == (0, 2)
        assert_conn_max_is_exact(core)


def test_slot_interrupted_while_it_recovers_goes_on() -> None:
    """An exception that comes while a slot recovers from another is recovered from as well."""
    with Core(conn_max=1, hooks=InterruptedHooks(2, 3)) as core:
        core.spawn("interrupted", print, end="")
        core.drain()

        core.logs.wait("was interrupted; it goes on", 2)
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


@AROUND
@pytest.mark.parametrize("step", ["take", "end", "move", "interrupted", "repair"])
@pytest.mark.parametrize("kind", ["plain", "coroutine of a function", "call on the slot"])
def test_slot_interrupted_around_a_step_loses_nothing(around: Any, step: str, kind: str) -> None:
    """Wherever an exception comes around a slot's steps, each task ends once and runs at most once.

    The slot has tasks waiting when it is interrupted, and goes on with them.
    """
    runs: Counter[int] = Counter()

    async def arun(i: int) -> None:
        runs[i] += 1

    def return_arun(i: int) -> Any:
        return arun(i)

    async def arun_on_slot(i: int) -> None:
        await sync_to_async(lambda: runs.update([i]))()

    tasks: dict[str, Any] = {
        "plain": lambda i: runs.update([i]),
        "coroutine of a function": return_arun,
        "call on the slot": arun_on_slot,
    }
    with Core(conn_max=1, capacity=4, hooks=InterruptedHooks(4)) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        for i in range(4):
            assert core.spawn("task", tasks[kind], i)
        with around(core.queue, step, exit_):
            gate.open()
            core.drain()

        stats = core.stats()
        assert (stats.spawned, stats.queued, stats.running) == (5, 0, 0)
        assert stats.succeeded + stats.failed == 5
        assert stats.failed <= 2
        assert max(runs.values()) == 1
        assert runs.total() >= 4 - stats.failed
        assert_whole(core)


class InterruptedDetach(DjangoHooks):
    """Has its thread interrupted once as the context of a coroutine leaves it."""

    error: type[BaseException] | None = SystemExit

    def detach(self) -> None:
        super().detach()
        error, self.error = self.error, None
        if error is not None:
            interrupt(threading.current_thread(), error)


def test_coroutine_whose_function_is_interrupted_is_closed() -> None:
    """A plain function that is interrupted as it returns a coroutine fails, and the coroutine is closed.

    1. slot: has called the function, which has returned a coroutine
    2. another thread: sets an exception on the slot's
    """
    coroutine = use_slot()
    with Core(conn_max=1, hooks=InterruptedDetach(SENDER)) as core:
        core.spawn("interrupted", lambda: coroutine)
        core.drain()

        assert core.stats().failed == 1
        assert_closed(coroutine)
        assert_conn_max_is_exact(core)


def test_coroutine_that_was_not_yet_lent_is_closed() -> None:
    """So it is if the exception comes just before the coroutine is lent to the loop."""
    coroutine = use_slot()
    with Core(conn_max=1) as core:
        with before_call(core.queue, "move", exit_):
            core.spawn("interrupted", lambda: coroutine)
            core.drain()

        assert core.stats().failed == 1
        assert_closed(coroutine)
        assert_conn_max_is_exact(core)


def test_coroutine_whose_slot_is_interrupted_as_it_is_lent_ends_once() -> None:
    """A slot is interrupted when it has lent a coroutine to a busy loop: it ends it, or the loop runs it."""
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    def begin() -> Any:
        return run()

    with Core(conn_max=1) as core, Gate() as held:
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        with after_call(core.queue, "move", exit_):
            core.spawn("interrupted", begin)
            core.logs.wait("was interrupted; it goes on")
            held.open()
            core.drain()

        assert core.stats().succeeded + core.stats().failed == 1
        assert core.stats().succeeded == len(ran)
        assert_conn_max_is_exact(core)


def test_call_interrupted_before_its_answer_is_answered() -> None:
    """A task that waits for a call on its slot's thread gets the exception that ended the call."""
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        with before_call(slot.calls, "_answer", exit_):
            call = slot.calls.submit(print, end="")

            assert isinstance(call.exception(BOUND), SystemExit)
        assert_conn_max_is_exact(core)


def test_future_of_a_call_is_set_on_the_loop() -> None:
    """A slot's thread leaves a future's lock alone: interrupted with it, it would hold up the loop."""
    threads: list[threading.Thread] = []
    with Core(conn_max=1) as core, Gate() as gate:
        [slot] = core.slots.all
        call = slot.calls.submit(gate)
        gate.wait_entered()
        call.add_done_callback(lambda _: threads.append(threading.current_thread()))
        gate.open()
        call.result(BOUND)
        wait_until(lambda: threads)

        assert threads == [core.drainer.loop.thread]


@untraced
def test_slot_interrupted_while_the_loop_has_its_task_leaves_that_alone() -> None:
    """An exception on the thread of a slot whose task waits on the loop changes no figure."""
    with Core(conn_max=1) as core, AsyncGate() as gate:
        core.spawn("asynchronous", gate)
        gate.wait_entered()
        [slot] = core.slots.all
        interrupt(slot.thread)
        slot.calls.submit(print, end="").exception(BOUND)
        core.logs.wait("was interrupted; it goes on")
        core.spawn("next", print, end="")
        gate.open()
        core.drain()

        stats = core.stats()
        assert (stats.succeeded, stats.failed, stats.queued) == (2, 0, 0)
        assert_conn_max_is_exact(core)


class NotingHooks(DjangoHooks):
    """Notes of which tasks it was told, with both signals in use."""

    def __init__(self) -> None:
        super().__init__(SENDER)
        self.told: Counter[Task] = Counter()

    def watched(self) -> bool:
        return True

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        super().finished(task, outcome, error)
        self.told[task] += 1


@untraced
# An exception may come when a function has made a coroutine, and nobody has it yet.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("watched", [False, True])
def test_runs_are_counted_while_slots_are_interrupted(  # noqa: C901  # seven kinds of tasks
    switching: None, watched: bool
) -> None:
    """Exceptions set on all slots' threads while these work: no task runs twice, and each ends once.

    Afterwards as many tasks run as there are slots, and as many wait as there are places.
    """
    rounds, size = 15, 60
    runs = [0] * (rounds * size)
    hooks = NotingHooks() if watched else None

    def run(i: int) -> None:
        runs[i] += 1

    async def arun(i: int) -> None:
        runs[i] += 1

    async def arun_late(i: int) -> None:
        await asyncio.sleep(0)
        runs[i] += 1

    async def arun_on_slot(i: int) -> None:
        await sync_to_async(run)(i)
        await sync_to_async(int)()

    def return_arun(i: int) -> Any:
        return arun_on_slot(i)

    kinds: list[Callable[[int], Any]] = [run, arun, arun_late, arun_on_slot, return_arun, run]
    numbers = itertools.count()
    with Core(conn_max=8, capacity=size, hooks=hooks) as core:
        for slot in core.slots.all:  # so that their threads serve
            slot.calls.submit(int).result(BOUND)
        for _ in range(rounds):
            slots = iter(core.slots.all)
            for turn in range(size):
                i = next(numbers)
                assert core.spawn(f"task-{i % 6}", kinds[i % 6], i)
                if turn % 7 == 6:
                    interrupt(next(slots).thread)
            core.drain()
            for slot in core.slots.all:  # so that none is interrupted again while it recovers
                slot.calls.submit(int).exception(BOUND)
        wait_idle(core.slots)

        stats, names = read_stats_by_name(core.queue)
        assert stats.spawned == rounds * size == stats.succeeded + stats.failed
        assert all(of.spawned == sum(of.ended) == rounds * size / 6 for of in names)
        assert max(runs) == 1
        assert rounds * size - stats.failed <= sum(runs) <= rounds * size
        if hooks is not None:
            assert max(hooks.told.values()) == 1
        assert_whole(core)


# Spawners that a signal handler ends.


@AROUND
@pytest.mark.parametrize("asynchronous", [False, True])
def test_spawner_that_is_ended_around_its_put_leaves_the_pool_whole(around: Any, asynchronous: Any) -> None:
    """A signal handler that raises around the put does not lose the task that was put, nor a slot."""
    ran: list[int] = []

    async def arun() -> None:
        ran.append(1)

    with Core(conn_max=1) as core:
        with around(core.queue, "put", exit_), pytest.raises(SystemExit):
            core.spawn("interrupted", arun if asynchronous else partial(ran.append, 1))
        core.drain()

        assert len(ran) == core.stats().spawned == (around is after_call)
        assert_whole(core)


def test_spawner_that_is_ended_before_it_wakes_a_slot_has_woken_it() -> None:
    """A signal handler that raises between the put and the wake-up does not leave the slot asleep."""
    with Core(conn_max=1) as core:
        [slot] = core.slots.all
        wait_idle(core.slots)
        with before_call(slot, "wake", exit_), pytest.raises(SystemExit):
            core.spawn("interrupted", print, end="")
        core.drain()

        assert core.stats().succeeded == 1
        assert_whole(core)


def test_spawner_that_is_ended_as_it_asks_the_loop_loses_no_coroutine() -> None:
    """A signal handler that raises as the loop is asked to claim a coroutine loses no task."""
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    with Core(conn_max=1) as core:
        with before_call(core.queue, "ask_loop", exit_), pytest.raises(SystemExit):
            core.spawn("interrupted", run)
        core.drain()
        wait_idle(core.slots)
        core.spawn("next", run)
        core.drain()

        assert ran == [1, 1]
        assert_whole(core)


# Slots as executors.


def test_cancelled_call_is_not_run() -> None:
    """A call that was cancelled while the slot was busy is passed over."""
    called: list[int] = []
    with Core(conn_max=1) as core, Gate() as gate:
        slot = core.slots.all[0]
        held = slot.calls.submit(gate)
        gate.wait_entered()
        cancelled = slot.calls.submit(called.append, 1)
        cancelled.cancel()
        last = slot.calls.submit(called.append, 2)
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
            slot.calls.submit(print)


def test_calls_left_by_a_slot_that_ends_are_answered() -> None:
    """A call that came too late for a slot's thread is answered by an error, and not never."""
    with Core(conn_max=1) as core, Gate() as gate:
        [slot] = core.slots.all
        core.spawn("held", gate)
        gate.wait_entered()
        slot.stop()
        late = slot.calls.submit(print)
        gate.open()

        with pytest.raises(RuntimeError, match="slot 'bgtasks-core-1' has stopped"):
            late.result(BOUND)


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
        assert loops[0] is not core.drainer.loop.running


# Opening, and looking.


def test_pool_opens_with_the_slots_it_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads for some of its slots, a pool says so, works with those, and gets the rest later."""
    monkeypatch.setattr(bgtasks.core.drainer, "RETRY_INTERVAL", 0.001)
    with Core(conn_max=4, start=False) as core, Gate() as gate:
        with monkeypatch.context() as patch:
            FailingStart(patch, 2)
            for _ in range(6):
                core.spawn("held", gate)
            gate.wait_entered(2)
            [line] = core.logs.wait("threads could not be started; it is tried again")
            assert gate.peak == 2

        gate.wait_entered(4)
        gate.open()
        core.drain()

        assert "can't start new thread" in line
        assert core.logs.above(logging.ERROR) == [line]
        assert core.stats().succeeded == 6
        assert_conn_max_is_exact(core)


def test_task_that_waits_when_the_pool_opens_is_run() -> None:
    """Tasks that were spawned while there was no thread run as soon as the slots are there."""
    with Core(start=False) as core:
        ran = threading.Event()
        core.queue.put(make_task("waits", ran.set))

        core.start()

        assert ran.wait(BOUND)
        core.drain()


def test_repr_is_a_status_line() -> None:
    """Slots and each of them show what they are at."""
    with Core(conn_max=1, capacity=5) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", gate)

        assert repr(core.slots) == "<Slots 'core' 1/1 running>"
        assert repr(core.slots.all[0]) == "<Slot 'bgtasks-core-1' thread>"
