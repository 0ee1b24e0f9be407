"""The drainer: threads on demand, start and stop, threads that do not start, and what it does about forks.

The hooks of a fork are called here as os.fork calls them; tests/core/test_fork.py really forks.
"""

import _thread
import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

import bgtasks.core.drainer
from bgtasks.core.drainer import Drainer
from bgtasks.core.slots import Slots
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import (
    BackgroundThread,
    Core,
    FailingStart,
    after_call,
    assert_conn_max_is_exact,
    make_task,
    wait_idle,
)


async def nothing() -> None:
    pass


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have slots started with their pool's first task, on every version of Python."""
    monkeypatch.setattr(bgtasks.core.drainer, "START_SLOTS_AT_ONCE", False)


@pytest.fixture
def started_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the drainer started by a thread that coverage sees, where it takes a bare one."""

    def start_new_thread(function: Callable[..., Any], args: Any) -> None:
        threading.Thread(target=function, args=args).start()

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)


def names(core: Core) -> list[str]:
    return sorted(thread.name for thread in core.threads())


def put_in(slots: Slots, name: str, function: Callable[..., Any]) -> None:
    """Put a task into another pool than the kit's, as a spawn does."""
    assert slots.queue.put(make_task(name, function)) is None


# Threads on demand.


@pytest.mark.usefixtures("on_demand")
def test_start_starts_the_loop_only() -> None:
    """A process that spawns nothing has one thread of ours."""
    with Core(conn_max=3, start=False) as core:
        core.drainer.start()

        assert names(core) == ["bgtasks-drainer"]
        assert core.slots.all == []


@pytest.mark.usefixtures("on_demand")
def test_first_task_starts_the_slots_of_its_pool() -> None:
    """All of that pool, and none of another one that has no tasks."""
    with Core(conn_max=3, start=False) as core:
        other = core.another(conn_max=2)
        core.drainer.start()

        core.spawn("first", print, end="")
        core.drain()
        wait_until(lambda: len(core.slots.all) == 3)

        assert names(core) == ["bgtasks-core-1", "bgtasks-core-2", "bgtasks-core-3", "bgtasks-drainer"]
        assert other.all == []
        assert_conn_max_is_exact(core)


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("task", [print, nothing], ids=["plain", "asynchronous"])
def test_first_spawn_starts_the_drainer_as_well(task: Any) -> None:
    """A drainer that has no threads gets them by a spawn that does not wait for them."""
    with Core(start=False) as core:
        assert core.spawn("first", task) is True
        core.drain()

        assert core.stats().succeeded == 1
        assert names(core) == ["bgtasks-core-1", "bgtasks-core-2", "bgtasks-drainer"]


def test_slots_start_at_once_where_threads_do_not_start_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.12.0-3.12.2 the first tasks may come too late to start threads for them."""
    monkeypatch.setattr(bgtasks.core.drainer, "START_SLOTS_AT_ONCE", True)
    with Core(conn_max=2, start=False) as core:
        core.another()

        core.drainer.start()

        assert names(core) == [
            "bgtasks-core-1",
            "bgtasks-core-2",
            "bgtasks-core-other-1",
            "bgtasks-drainer",
        ]


@pytest.mark.usefixtures("on_demand")
def test_pool_that_is_added_later_starts_with_its_first_task() -> None:
    """A pool that is built while the drainer runs gets its slots by its first task; no others are touched."""
    ran = threading.Event()
    with Core(conn_max=1) as core:
        before = core.slots.threads()
        other = core.another(conn_max=2)
        put_in(other, "first", ran.set)

        assert core.drainer.ensure(other) is True

        assert ran.wait(BOUND)
        assert len(other.all) == 2
        assert core.slots.threads() == before


def test_tasks_that_waited_for_the_threads_run_as_soon_as_they_are_there() -> None:
    """However many wait when a pool's slots start, all of them run, CONN_MAX at once."""
    with Core(conn_max=2, start=False) as core, Gate() as gate, AsyncGate() as async_gate:
        for _ in range(4):
            assert core.queue.put(make_task("waits", gate)) is None
            assert core.queue.put(make_task("waits", async_gate, asynchronous=True)) is None
        core.start()

        wait_until(lambda: gate.inside + async_gate.inside == 2)
        gate.open()
        async_gate.open()
        core.drain()
        assert core.stats().succeeded == 8


# Start and stop.


def test_stop_ends_all_threads_and_start_brings_them_back(patient: None) -> None:
    """A drainer that was stopped has no thread; started again it works."""
    with Core(conn_max=2) as core:
        assert len(core.threads()) == 3

        core.drainer.stop()
        stopped = core.threads()
        core.start()

        assert stopped == []
        assert_conn_max_is_exact(core)


def test_stop_and_start_twice_are_once() -> None:
    """Neither does anything if there is nothing to do."""
    with Core(conn_max=1) as core:
        core.start()
        assert len(core.threads()) == 2
        core.drainer.stop()

        core.drainer.stop()

        assert len(core.logs.of("the drainer has started")) == 1
        assert len(core.logs.of("the drainer has stopped")) == 1


def test_task_that_waits_when_the_drainer_stops_runs_with_the_next_start() -> None:
    """A stop is no shutdown: what waits behind a running task is not lost, nor run by a slot that ends."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        [thread] = core.slots.threads()
        core.spawn("waits", nothing)
        core.spawn("waits", print, end="")

        core.drainer.stop()
        gate.open()
        thread.join(BOUND)

        assert (core.stats().succeeded, core.stats().queued) == (1, 2)
        core.start()
        core.drain()
        assert core.stats().succeeded == 3
        assert_conn_max_is_exact(core)


@pytest.mark.parametrize("first", [print, nothing], ids=["plain", "asynchronous"])
def test_pool_that_stopped_as_somebody_was_woken_waits_for_nobody(first: Any, patient: None) -> None:
    """A pool whose threads are started again does not rely on one that was woken before.

    1. a spawner: puts a task, and is about to wake a slot, or to have the loop look
    2. the drainer stops
    3. the spawner: wakes a thread that ends, or a loop that will not look any more
    """
    with Core(conn_max=1) as core:
        wait_idle(core.slots)
        [slot] = core.slots.all
        wake, ask_loop = slot.wake, core.queue.ask_loop

        def stop_and(go_on: Callable[[], object]) -> None:
            slot.wake, core.queue.ask_loop = wake, ask_loop
            core.drainer.stop()
            go_on()

        slot.wake, core.queue.ask_loop = partial(stop_and, wake), partial(stop_and, ask_loop)
        core.spawn("first", first)
        core.start()
        core.drain()
        wait_idle(core.slots)

        for task in (nothing, print):
            core.spawn("next", task)
            core.drain()

        assert core.stats().succeeded == 3
        assert_conn_max_is_exact(core)


def test_start_that_comes_after_the_shutdown_starts_nothing() -> None:
    """Who was asked to start the drainer, and gets to it when the pools are shut down, leaves it.

    1. a spawn or a fork: has a bare thread start the drainer
    2. shutdown: closes all pools
    3. the bare thread: gets its turn
    """
    with Core(start=False) as core:
        core.close(0)
        core.drainer._start_wanted()

        assert core.drainer.running is False
        assert core.threads() == []


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


def test_dropped_coroutine_object_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python does not warn of a coroutine object that was dropped for lack of a thread."""
    monkeypatch.setattr(_thread, "start_new_thread", fail_to_start)
    coroutine = nothing()
    with Core(start=False) as core:
        assert core.spawn("dropped", coroutine) is False

    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


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


def test_only_one_spawner_starts_the_drainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a start is under way no other is begun."""
    started: list[Any] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: started.append(args))
    with Core(start=False) as core:
        assert core.spawn("first", print, end="") is True
        assert core.spawn("second", print, end="") is True

        assert len(started) == 1
        [(start, args)] = started
        start(*args)  # as the thread does
        core.drain()
        assert core.spawn("third", print, end="") is True
        assert len(started) == 1


def test_two_starts_at_once_are_one(started_by_a_thread: None) -> None:
    """Two spawners that both find no thread have every thread started once."""
    with Core(start=False, conn_max=2) as core:
        barrier = threading.Barrier(2)
        starts = [
            threading.Thread(target=lambda: (barrier.wait(BOUND), core.drainer._start_wanted()))
            for _ in range(2)
        ]
        assert core.queue.put(make_task("waits")) is None
        core.drainer._wanted[core.slots] = None
        for start in starts:
            start.start()
        for start in starts:
            start.join(BOUND)

        assert names(core) == ["bgtasks-core-1", "bgtasks-core-2", "bgtasks-drainer"]
        core.drain()


@pytest.mark.parametrize("number", [0, 1], ids=["no thread", "a thread for one pool only"])
def test_pool_that_cannot_be_opened_is_opened_by_the_next_start(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """If not one slot of a pool can be started, start raises; what has started works, and the rest later."""
    with Core(start=False, conn_max=1) as core:
        other = core.another()
        with monkeypatch.context() as patch:
            FailingStart(patch, number)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                core.start()

        assert len(core.slots.all) == number
        assert other.all == []
        core.start()
        assert len(core.slots.all) == len(other.all) == 1
        core.spawn("works", nothing)
        core.drain()
        assert_conn_max_is_exact(core)


def test_pool_that_cannot_be_opened_leaves_the_others_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no thread for the slots of a pool that came late, the rest works on."""
    with Core(conn_max=1) as core:
        other = core.another()
        with monkeypatch.context() as patch:
            FailingStart(patch, 0)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                core.start()

        assert other.all == []
        assert_conn_max_is_exact(core)


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
                core.start()

        assert core.threads() == []
        assert core.drainer.loop.running is core.drainer.loop.thread is None
        assert core.drainer.running is False


def test_loop_that_cannot_be_made_is_an_error_of_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process out of file descriptors gets the error of that, and may try again."""

    def fail() -> None:
        raise OSError(24, "Too many open files")

    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "new_event_loop", fail)
            with pytest.raises(OSError, match="Too many open files"):
                core.drainer.start()

        assert core.drainer.running is False
        core.drainer.start()
        assert core.drainer.running


def test_start_that_fails_behind_a_spawn_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, started_by_a_thread: None
) -> None:
    """The task waits, an ERROR says why, and it runs once there are threads again, without another spawn."""
    monkeypatch.setattr(bgtasks.core.drainer, "RETRY_INTERVAL", 0.001)
    with Core(start=False) as core:
        with monkeypatch.context() as patch:
            FailingStart(patch, 0)
            assert core.spawn("first", print, end="") is True
            [line] = core.logs.wait("threads could not be started; it is tried again")
            assert core.stats().queued == 1

        core.drain()

        assert "can't start new thread" in line
        assert core.logs.of("could not be started") == [line]
        assert core.stats().succeeded == 1


# Forks.


def fork(core: Core) -> tuple[bool, list[threading.Thread]]:
    """Call the hooks of a fork in the parent; return whether the drainer ran in between, and its threads."""
    core.forks.before_fork()
    during = core.drainer.running, core.threads()
    core.forks.after_fork_in_parent()
    return during


class OtherFork:
    """A fork on a thread of its own, which is over when the test says so."""

    def __init__(self, core: Core) -> None:
        self._forks = core.forks
        self._begun, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._fork)

    def __enter__(self) -> "OtherFork":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.end()
        self._thread.join(BOUND)

    def end(self) -> None:
        self._end.set()

    def wait_begun(self) -> None:
        assert self._begun.wait(BOUND)

    def _fork(self) -> None:
        self._forks.before_fork()
        self._begun.set()
        assert self._end.wait(BOUND)
        self._forks.after_fork_in_parent()


def test_idle_drainer_steps_aside_before_a_fork(patient: None) -> None:
    """No thread of ours lives while an idle process forks, and the next spawn starts them again."""
    with Core(conn_max=2) as core:
        core.spawn("works", nothing)
        core.drain()
        core.drainer.background = [companion := BackgroundThread()]

        assert fork(core) == (False, [])

        assert core.drainer.running is False
        assert companion.heard == ["stop"]
        assert core.threads() == []
        core.spawn("next", nothing)
        core.drain()
        assert core.stats().succeeded == 2
        assert_conn_max_is_exact(core)


@pytest.mark.parametrize("gate", [Gate, AsyncGate])
def test_busy_drainer_is_left_alone_by_a_fork(gate: Any) -> None:
    """A fork in the middle of a task does not touch it, nor the threads."""
    with Core(conn_max=2) as core, gate() as held:
        core.drainer.background = [companion := BackgroundThread()]
        core.spawn("held", held)
        held.wait_entered()
        before = core.threads()

        assert fork(core) == (True, before)

        assert core.drainer.running
        assert companion.heard == ["notify"]
        held.open()
        core.drain()
        assert core.stats().succeeded == 1
        assert_conn_max_is_exact(core)


def test_busy_drainer_goes_on_behind_a_fork() -> None:
    """What waits while a busy process forks, or is spawned meanwhile, runs after it."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as async_gate:
        core.spawn("held", gate)
        core.spawn("held", async_gate)
        gate.wait_entered()
        async_gate.wait_entered()
        core.spawn("waits", print, end="")

        core.forks.before_fork()
        core.spawn("meanwhile", print, end="")
        core.spawn("meanwhile", nothing)
        core.forks.after_fork_in_parent()
        gate.open()
        async_gate.open()
        core.drain()

        assert core.stats().succeeded == 5


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

        running, _ = fork(core)

        assert running
        core.drainer.loop.call_later(0, released.set)


def test_pool_whose_neighbour_is_busy_keeps_its_slots() -> None:
    """If one pool is busy the drainer stays, and the slots of the others work on."""
    with Core(conn_max=2) as core, Gate() as gate:
        other = core.another()
        core.start()
        put_in(other, "held", gate)
        gate.wait_entered()

        running, _ = fork(core)

        assert running
        assert_conn_max_is_exact(core)


def test_fork_on_a_slots_own_thread_does_not_wait_for_it() -> None:
    """A task that forks, as by subprocess or multiprocessing, goes on."""
    with Core(conn_max=2) as core:
        core.spawn("forks", fork, core)
        core.drain()

        assert core.stats().succeeded == 1
        assert core.drainer.running
        assert_conn_max_is_exact(core)


def test_fork_on_the_drainers_own_thread_does_not_wait_for_it() -> None:
    """A callback that forks on the loop leaves the drainer as it is, though no task runs."""
    with Core(conn_max=2) as core:
        during: Future[Any] = Future()

        core.drainer.loop.call_soon(lambda: during.set_result(fork(core)))

        assert during.result(BOUND)[0]
        assert_conn_max_is_exact(core)


@pytest.mark.parametrize("task", [print, nothing], ids=["plain", "asynchronous"])
def test_task_spawned_during_a_fork_runs_after_it(task: Any, patient: None) -> None:
    """While a fork is under way nothing is started, and a task that comes then is not forgotten."""
    with Core(conn_max=1) as core:
        core.forks.before_fork()
        assert core.spawn("meanwhile", task) is True
        during = core.threads()
        core.forks.after_fork_in_parent()
        core.drain()

        assert during == []
        assert core.stats().succeeded == 1


def test_no_other_thread_is_in_the_middle_of_a_step_during_a_fork(patient: None) -> None:
    """The spawn of another thread waits for the fork to be over: its child would inherit half of it."""
    accepted: Future[bool] = Future()
    with Core(conn_max=1) as core:
        core.forks.before_fork()
        spawner = threading.Thread(target=lambda: accepted.set_result(core.spawn("meanwhile", nothing)))
        spawner.start()
        spawned = core.stats().spawned
        core.forks.after_fork_in_parent()

        assert accepted.result(BOUND) is True
        core.drain()
        spawner.join(BOUND)
        assert spawned == 0
        assert core.stats().succeeded == 1


def test_paused_pool_forks_with_what_waits(patient: None) -> None:
    """Tasks that wait for a pause to end do not make a process busy, and run once it is over."""
    with Core(conn_max=1) as core:
        core.queue.pause()
        core.spawn("waits", print, end="")
        core.spawn("waits", nothing)

        assert fork(core) == (False, [])

        assert core.stats().queued == 2
        core.queue.resume()
        core.drain()
        assert core.stats().succeeded == 2


def test_forks_at_once_end_with_the_last(patient: None) -> None:
    """Two threads fork at once: one waits for the other, and nothing is started in between."""
    with Core(conn_max=1) as core, OtherFork(core) as other:
        other.wait_begun()
        with OtherFork(core) as last:
            other.end()
            last.wait_begun()
            between = core.drainer.running, core.threads()
        core.spawn("next", nothing)
        core.drain()

        assert between == (False, [])
        assert core.stats().succeeded == 1


def test_fork_before_any_start_starts_nothing() -> None:
    """A drainer that never ran has nothing to bring back."""
    with Core(start=False) as core:
        fork(core)

        assert core.drainer.running is False
        assert core.threads() == []


def test_coroutine_that_waits_for_a_blocked_loop_survives_a_fork(patient: None) -> None:
    """A coroutine that the loop was asked to take makes the process a busy one, and runs, once."""
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    with Core(conn_max=1) as core, Gate() as held:
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        core.spawn("left", run)
        before = core.threads()

        assert fork(core) == (True, before)

        held.open()
        core.drain()
        assert ran == [1]
        assert core.stats().succeeded == 1


class Resting:
    """A pace at which one slot that has ended its task rests before it looks for the next one."""

    def __init__(self) -> None:
        self.resting, self.go_on = threading.Event(), threading.Event()

    def applies(self) -> bool:
        return not self.resting.is_set()

    def wait(self, waiting: Any) -> None:
        self.resting.set()
        assert self.go_on.wait(BOUND)


@pytest.fixture
def half_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Core, Resting]]:
    """A pool of two slots, one of which is idle, and the other one has ended its task and rests."""
    with Core(conn_max=2) as core, Gate() as first, Gate() as second:
        pace = Resting()
        monkeypatch.setattr(core.slots, "pace", pace)
        core.spawn("first", first)
        first.wait_entered()
        core.spawn("second", second)
        second.wait_entered()
        core.spawn("third", print, end="")
        first.open()
        assert pace.resting.wait(BOUND)
        second.open()
        wait_until(lambda: len(core.queue.idle) == 1)
        assert core.stats().succeeded == 3
        yield core, pace
        pace.go_on.set()


def test_fork_waits_for_a_slot_that_is_about_to_be_idle(
    half_idle: tuple[Core, Resting], patient: None
) -> None:
    """A slot that has ended its last task and is not idle yet needs a moment, which a fork gives it.

    1. slot: has counted its task as ended, is about to be idle
    2. fork: finds nothing that waits or runs, but a slot that is not idle; looks again
    3. slot: is idle
    """
    core, pace = half_idle

    with after_call(core.slots, "step_aside_if_idle", pace.go_on.set):
        assert fork(core) == (False, [])

    assert_conn_max_is_exact(core)


def test_fork_does_not_wait_for_ever(
    half_idle: tuple[Core, Resting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that is not idle in time is left alone, and the fork goes on."""
    core, pace = half_idle
    monkeypatch.setattr(bgtasks.core.drainer, "FORK_PATIENCE", 0)

    running, _ = fork(core)
    pace.go_on.set()

    assert running
    assert_conn_max_is_exact(core)


def test_child_has_no_pools_and_closes_what_waited(patient: None) -> None:
    """In a child the drainer starts from nothing; coroutine objects that waited in the parent are closed."""
    with Core(conn_max=1) as core:
        core.drainer.background = [companion := BackgroundThread()]
        core.forks.before_fork()
        coroutine = nothing()
        core.spawn("meanwhile", coroutine)

        core.forks.after_fork_in_child()

        assert core.drainer.running is False
        assert core.drainer.threads() == set()
        assert companion.heard == ["stop", "forget"]
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)
        core.close(0)
