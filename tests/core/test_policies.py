"""Options of a submission: tasks that expire, give way to newer ones, are coalesced, or are tried again."""

import asyncio
import contextvars
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from bgtasks import signals
from bgtasks.core import policy as policies
from bgtasks.core.figures import DropReason, Outcome, ShedReason
from bgtasks.core.places import SlotState, State
from bgtasks.core.policy import NO_POLICY, Options, Policy
from bgtasks.core.task import Task
from bgtasks.monitoring.figures import read_stats, read_stats_by_name
from bgtasks.repeats import repeats
from tests.core.test_queue import QueueMachine, in_threads, is_balanced, lend, new_queue
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, assert_whole, balance, make_task, receiving

EVER = 1e9  # seconds


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "JITTER", 0)


@contextmanager
def shedding() -> Iterator[list[tuple[str, str]]]:
    """Collect what ``task_shed`` sends, as (name, reason)."""
    received: list[tuple[str, str]] = []

    def receive(sender: Any, name: str, reason: str, **named: Any) -> None:
        received.append((name, reason))

    signals.task_shed.connect(receive)
    try:
        yield received
    finally:
        signals.task_shed.disconnect(receive)


class Tries:
    """A plain function that fails for so many times, and notes when it is called."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.at: list[float] = []
        self._failures = failures
        self._error = ValueError("failed") if error is None else error

    def __call__(self, *args: Any) -> None:
        self.at.append(monotonic())
        if len(self.at) <= self._failures:
            raise self._error

    async def coroutine(self) -> None:
        await asyncio.sleep(0)
        self()


def with_policy(task: Task, **options: Any) -> Task:
    task.policy = Policy(Options(**options), task.name, task.function, task.asynchronous, task.spawned_at)
    return task


# Tasks that are too old.


@pytest.mark.parametrize("asynchronous", [False, True])
def test_task_that_has_waited_for_too_long_is_shed(asynchronous: bool) -> None:
    """It does not run, and says so by a signal, a warning and a figure; the next one runs."""
    ran: list[str] = []

    def run() -> None:
        ran.append("plain")  # pragma: no cover  # that is the point

    async def arun() -> None:
        ran.append("asynchronous")  # pragma: no cover  # that is the point

    with Core(conn_max=1) as core, Gate() as gate, shedding() as shed:
        core.spawn("first", gate)
        gate.wait_entered()
        core.pool.using(expires=0.001).spawn("old", arun if asynchronous else run)
        core.pool.using(expires=EVER).spawn("young", ran.append, "young")
        wait_until(lambda: monotonic() > core.queue.waiting[0].spawned_at + 0.001)
        gate.open()
        core.drain()

        assert ran == ["young"]
        assert shed == [("old", "expired")]
        assert core.logs.of("shed") == ["task 'old' shed: it expired while it waited in pool 'core'"]
        assert (core.stats().shed, core.stats().succeeded) == (1, 2)
        assert_whole(core)


def test_expired_task_is_told_of_if_nothing_comes_after_it() -> None:
    """The slot that finds it is told, though it gets no task."""
    with Core(conn_max=1) as core, AsyncGate() as gate, shedding() as shed:
        core.spawn("first", gate)
        gate.wait_entered()
        core.pool.using(expires=0.001).spawn("old", asyncio.sleep, 0)
        wait_until(lambda: monotonic() > core.queue.waiting[0].spawned_at + 0.001)
        gate.open()
        core.drain()
        wait_until(lambda: len(shed) == 1)


def test_loop_claims_no_expired_coroutine() -> None:
    """It is shed, and the loop gets the next one."""
    queue, [slot] = new_queue()
    old, new = (with_policy(make_task(asynchronous=True), expires=1.0) for _ in range(2))
    queue.put(old)
    queue.put(new)
    old.policy.expires_at = 0.0

    assert queue.claim() is slot
    assert slot.task is new
    assert old.outcome is Outcome.SHED


def test_full_queue_sheds_what_is_too_old_before_it_drops() -> None:
    """What waits at its head and will not run any more makes room for what is new."""
    with Core(conn_max=1, capacity=2) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        for _ in range(2):
            core.pool.using(expires=0.001).spawn("old", int)
        wait_until(lambda: monotonic() > core.queue.waiting[-1].spawned_at + 0.001)

        assert core.spawn("new", int) is True
        assert core.spawn("new", int) is True
        assert core.spawn("new", int) is False

        gate.open()
        core.drain()
        assert (core.stats().shed, core.stats().dropped, core.stats().succeeded) == (2, 1, 3)


def test_age_counts_from_the_commit() -> None:
    """A task that waits for its transaction is not old yet."""
    with Core(conn_max=1) as core:
        task = make_task(name="waits")
        using = core.pool.using(expires=EVER)
        task.spawned_at = 0.0
        using.submit(task)

        assert task.policy.expires_at == EVER
        core.drain()


# A full queue that gives up its oldest tasks.


def test_full_queue_sheds_its_oldest_task_for_a_new_one() -> None:
    """With ON_FULL "drop_oldest" nothing is dropped, and what runs is new."""
    ran: list[int] = []
    with Core(conn_max=1, capacity=2) as core, Gate() as gate, shedding() as shed:
        core.queue.displaces = core.queue.makes_room = True
        core.spawn("runs", gate)
        gate.wait_entered()

        assert all(core.spawn("n", ran.append, n) for n in range(5))

        gate.open()
        core.drain()
        assert ran == [3, 4]
        assert shed == [("n", "displaced")] * 3
        assert (core.stats().shed, core.stats().dropped) == (3, 0)
        core.queue.displaces = core.queue.makes_room = False
        assert_whole(core)


def test_what_is_checked_out_is_not_shed() -> None:
    """A mover may have it on its way: the new task is dropped."""
    with Core(conn_max=1, capacity=1) as core, Gate() as gate:
        core.queue.displaces = True
        core.spawn("runs", gate)
        gate.wait_entered()
        core.spawn("moves", int)
        [task] = core.queue.check_out(1)

        assert core.spawn("new", int) is False

        core.queue.put_back([task])
        gate.open()
        core.drain()


def test_shed_coroutine_object_is_closed() -> None:
    """Python does not warn of a coroutine that was never awaited."""
    with Core(conn_max=1, capacity=1) as core, Gate() as gate:
        core.queue.displaces = True
        core.spawn("runs", gate)
        gate.wait_entered()
        coroutine = asyncio.sleep(0)
        core.spawn("coroutine", coroutine)
        core.spawn("new", int)

        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            coroutine.send(None)
        gate.open()
        core.drain()


# One of many equal tasks.


def test_task_with_the_key_of_a_waiting_one_takes_its_place() -> None:
    """It has the newest arguments and context, and the place of the first."""
    ran: list[Any] = []
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    def run(n: int) -> None:
        ran.append((n, variable.get()))

    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        keyed = core.pool.using(key="a")
        for n in range(3):
            variable.set(n)
            assert keyed.spawn("index", run, n) is True
            core.spawn("other", ran.append, f"other {n}")
        gate.open()
        core.drain()

        assert ran == [(2, 2), "other 0", "other 1", "other 2"]
        assert (core.stats().coalesced, core.stats().succeeded) == (2, 5)
        assert_whole(core)


def test_keys_are_told_apart_by_the_names_of_the_tasks() -> None:
    """Two kinds of tasks may use one key."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        core.pool.using(key="a").spawn("one", int)
        core.pool.using(key="a").spawn("other", int)
        core.pool.using(key="b").spawn("one", int)
        gate.open()
        core.drain()

        assert core.stats().coalesced == 0


def test_task_that_runs_is_not_touched_by_one_with_its_key() -> None:
    """The new one waits."""
    with Core(conn_max=2) as core, Gate() as gate:
        keyed = core.pool.using(key="a")
        keyed.spawn("runs", gate)
        gate.wait_entered()
        keyed.spawn("runs", gate)
        gate.wait_entered(2)
        gate.open()
        core.drain()

        assert (core.stats().coalesced, core.stats().succeeded) == (0, 2)


def test_spawn_in_the_middle_of_a_step_leaves_the_task_that_is_taken_alone() -> None:
    """A signal handler that spawns just then is not coalesced with what runs by now."""
    queue, [slot] = new_queue()
    first, second = with_policy(make_task(), key="a"), with_policy(make_task(), key="a")
    queue.put(first)
    forget = queue._forget_key

    def spawn_and_forget(task: Task) -> None:
        if task is first:
            queue.put(second)
        forget(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "_forget_key", spawn_and_forget)
        assert queue.take(slot) is first

    assert list(queue.waiting) == [second]
    assert queue.keyed == {second.policy.key: second}


def test_coalesced_coroutine_object_is_closed() -> None:
    """It is the older one that does not run."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        older = asyncio.sleep(0)
        core.pool.using(key="a").spawn("k", older)
        core.pool.using(key="a").spawn("k", asyncio.sleep(0))

        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            older.send(None)
        gate.open()
        core.drain()
        assert core.stats().succeeded == 2


def test_coalescing_is_exact_under_concurrent_spawns() -> None:
    """Of the tasks that many threads spawn at once under one key, one waits."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        keyed = core.pool.using(key="a")

        def spawn() -> None:
            for _ in range(50):
                keyed.spawn("k", int)

        threads = [threading.Thread(target=spawn) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (core.stats().coalesced, core.stats().queued) == (399, 1)
        gate.open()
        core.drain()


def test_waiting_task_takes_over_the_options_of_the_newer_one() -> None:
    """The newer one's retries and expiry are those of its function."""
    queue, [slot] = new_queue()
    old = with_policy(make_task(), key="a", retries=2)
    queue.put(old)
    assert (queue.take(slot), queue.retry(slot, old, 0)) == (old, None)

    queue.put(with_policy(make_task(), key="a", retries=1, expires=EVER))

    assert queue.makes_room
    assert queue.take(slot) is old
    assert old.policy.expires_at < inf
    assert old.policy.delay_after(Outcome.FAILED, ValueError(), 0) is None  # it had its one retry


def test_tasks_are_coalesced_with_one_that_was_put_back() -> None:
    """A consumer has found that it cannot travel, or the loop is blocked that it was lent to."""
    queue, [slot] = new_queue()
    back = with_policy(make_task(asynchronous=True), key="a")
    queue.put(back)
    queue.put_back(queue.check_out(1))
    queue.put(with_policy(make_task(asynchronous=True), key="a"))
    assert (queue.queued, read_stats(queue).coalesced) == (1, 1)

    assert queue.take(slot) is back
    assert lend(queue, slot, back)
    queue.set_loop_blocked(True)
    queue.put(with_policy(make_task(asynchronous=True), key="a"))
    assert (queue.queued, read_stats(queue).coalesced) == (1, 2)


def test_drain_is_told_of_what_a_full_queue_sheds() -> None:
    """Also while no slot is idle."""
    queue, [slot] = new_queue(capacity=1)
    queue.displaces = True
    running, shed = make_task(), make_task()
    queue.put(running)
    assert queue.take(slot) is running
    queue.put(shed)
    told: list[int] = []
    queue.drain_waiter(lambda: told.append(1), except_for=[running])

    queue.put(make_task())

    assert (shed.outcome, told) == (Outcome.SHED, [1])


def test_full_queue_coalesces() -> None:
    """That takes no place."""
    with Core(conn_max=1, capacity=1) as core, Gate() as gate:
        core.spawn("runs", gate)
        gate.wait_entered()
        keyed = core.pool.using(key="a")
        assert [keyed.spawn("k", int), keyed.spawn("k", int), core.spawn("k", int)] == [True, True, False]
        gate.open()
        core.drain()


# Another try.


@pytest.mark.parametrize("asynchronous", [False, True])
def test_task_that_fails_is_tried_again(asynchronous: bool) -> None:
    """After a delay that doubles, in which it has no slot; it has one outcome, and warnings of its tries."""
    tries = Tries(2)
    with (
        Core(conn_max=1) as core,
        receiving(signals.task_started) as started,
        receiving(signals.task_finished) as finished,
    ):
        using = core.pool.using(retries=5, retry_delay=0.02)
        using.spawn("fails", tries.coroutine if asynchronous else tries)
        wait_until(lambda: core.stats().retried == 1)
        core.spawn("meanwhile", int)
        core.drain()

        first, second, third = tries.at
        assert second - first >= 0.02
        assert third - second >= 0.04
        assert (core.stats().retried, core.stats().succeeded, core.stats().failed) == (2, 2, 0)
        assert started.count(("fails", None)) == 3
        assert [outcome for name, outcome in finished if name == "fails"] == ["succeeded"]
        assert len(core.logs.of("retrying in")) == 1
        repeats.flush()
        assert core.logs.of("a try of task 'fails' of pool 'core' failed again (1 more): ValueError")
        assert core.logs.above(logging.ERROR) == []
        assert_whole(core)


def test_task_that_fails_at_every_try_has_failed() -> None:
    """Its last error is logged, and it counts once."""
    tries = Tries(9)
    with Core(conn_max=1) as core:
        core.pool.using(retries=2, retry_delay=0).spawn("fails", tries)
        core.drain()

        assert len(tries.at) == 3
        assert (core.stats().failed, core.stats().retried) == (1, 2)
        [line] = core.logs.above(logging.ERROR)
        assert "ValueError: failed" in line


def test_only_what_is_named_is_tried_again() -> None:
    """Other exceptions, and those that are none of Exception's, fail at once."""
    with Core(conn_max=1) as core:
        using = core.pool.using(retries=3, retry_delay=0, retry_on=ConnectionError)
        using.spawn("other", Tries(1))
        using.spawn("this", Tries(1, ConnectionError()))
        core.pool.using(retries=3, retry_delay=0).spawn("exits", exit)
        core.drain()

        assert (core.stats().failed, core.stats().succeeded, core.stats().retried) == (2, 1, 1)


def test_timeout_counts_as_a_timeout_error() -> None:
    """It is tried again if TimeoutError is."""
    waits: list[int] = []

    async def wait_once() -> None:
        waits.append(1)
        await asyncio.sleep(BOUND if len(waits) == 1 else 0)

    with Core(conn_max=1, task_timeout=0.02) as core:
        core.pool.using(retries=1, retry_delay=0, retry_on=TimeoutError).spawn("waits", wait_once)
        core.drain()

        assert (core.stats().succeeded, core.stats().retried, core.stats().timed_out) == (1, 1, 0)


def test_each_try_has_a_fresh_context_and_the_original_function() -> None:
    """What a try sets is gone, and a plain function that returns a coroutine is called anew."""
    variable: contextvars.ContextVar[list[int]] = contextvars.ContextVar("variable")
    seen: list[Any] = []

    async def fail(number: int) -> None:
        seen.append((number, variable.get(None)))
        variable.set([number])
        await asyncio.sleep(0)
        if number < 2:
            raise ValueError

    def make() -> Any:
        return fail(len(seen))

    with Core(conn_max=1) as core:
        core.pool.using(retries=3, retry_delay=0).spawn("makes", make)
        core.drain()

        assert seen == [(0, None), (1, None), (2, None)]
        assert core.stats().succeeded == 1


def test_coroutine_object_cannot_be_tried_again() -> None:
    """It says so where it is spawned; under a pool's default it runs once."""
    with Core(conn_max=1) as core:
        with pytest.raises(TypeError, match="cannot be tried again"):
            core.pool.using(retries=1).spawn("once", asyncio.sleep(0))
        with pytest.raises(TypeError, match="cannot be tried again"):
            core.pool.using(retries=1).spawn_on_commit("once", asyncio.sleep(0))
        core.pool._options = Options(retries=1, retry_delay=0)
        core.spawn("fails", Tries(1).coroutine())
        core.drain()

        assert (core.stats().failed, core.stats().retried) == (1, 0)
    gc.collect()


def test_no_try_is_planned_past_the_expiry() -> None:
    """A task that would be too old by then has failed."""
    with Core(conn_max=1) as core:
        core.pool.using(retries=3, retry_delay=60, expires=30).spawn("fails", Tries(1))
        core.drain()

        assert (core.stats().failed, core.stats().retried, core.stats().shed) == (1, 0, 0)


def test_task_that_expires_before_its_next_try_has_failed() -> None:
    """It is not shed: it was run. Its end is told like any other."""
    tries = Tries(9)
    with Core(conn_max=1) as core, receiving(signals.task_finished) as finished:
        core.pool.using(retries=3, retry_delay=EVER, expires=2 * EVER).spawn("fails", tries)
        wait_until(lambda: core.stats().retried == 1)
        [task] = core.queue.held()
        task.policy.expires_at = task.policy.due_at = 0.0
        core.slots.all[0].wake()
        core.drain()

        wait_until(lambda: finished == [("fails", "failed")])
        assert len(tries.at) == 1
        assert (core.stats().failed, core.stats().shed) == (1, 0)
        [line] = core.logs.above(logging.ERROR)
        assert "was to be tried again, and was shed instead: expired" in line


def test_figures_are_of_one_moment_with_policies() -> None:
    """In every snapshot, each task is in one place: also one that expired, gave way, or was tried again."""
    wrong: list[object] = []
    done = threading.Event()

    def fail() -> None:
        raise ValueError

    def sample() -> None:
        while not done.is_set():
            stats, names = read_stats_by_name(core.queue)
            if not (  # pragma: no branch
                stats.spawned == balance(stats) == sum(of.spawned for of in names)
                and all(map(is_balanced, names))
                and stats.queued <= 16
                and stats.running <= 4
            ):
                wrong.append((stats, names))  # pragma: no cover

    with Core(capacity=16, conn_max=4) as core:
        core.queue.displaces = core.queue.makes_room = True
        expiring, keyed = core.pool.using(expires=0.001), core.pool.using(key="a")
        tried, tried_at_once = (core.pool.using(retries=2, retry_delay=delay) for delay in (0.002, 0))
        kinds: list[Callable[[], object]] = [
            lambda: expiring.spawn("expires", int),
            lambda: keyed.spawn("keyed", int),
            lambda: tried.spawn("fails", fail),
            lambda: tried_at_once.spawn("fails at once", fail),
            lambda: core.spawn("coroutine", asyncio.sleep, 0),
            lambda: core.spawn("sleeps", time.sleep, 0.001),
        ]
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            in_threads(4, lambda i: [kinds[(i + j) % len(kinds)]() for j in range(600)])
            core.drain()
        finally:
            done.set()
            sampler.join()
        stats = core.stats()

    assert wrong == []
    assert stats.spawned == 2400 == balance(stats)
    assert min(stats.succeeded, stats.failed, stats.retried, stats.shed, stats.coalesced) > 0


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda core, using: [core.spawn("waits", int) for _ in range(4)], "the pool is full"),
        (lambda core, using: using.spawn("fails", int), "a newer one with its key waits"),
        (lambda core, using: core.queue.close(), "the pool is being shut down"),
    ],
)
def test_task_is_not_tried_again_without_a_place(prepare: Callable[..., object], why: str) -> None:
    """It displaces nobody, and a newer one with its key runs in its stead."""
    with Core(conn_max=1, capacity=4) as core, Gate() as gate:

        def fail() -> None:
            gate()
            raise ValueError

        using = core.pool.using(retries=3, key="a", retry_delay=EVER)
        using.spawn("fails", fail)
        gate.wait_entered()
        prepare(core, using)
        gate.open()
        core.drain()

        assert (core.stats().failed, core.stats().retried) == (1, 0)
        assert f"is not retried: {why}" in core.logs.of("is not retried")[0]


def test_retries_that_are_refused_are_limited_in_the_log() -> None:
    """Many tasks for whose next try no place is free cost one warning, and one with their number."""
    with Core() as core:
        for _ in range(3):
            core.hooks.retried(make_task("fails"), 1, ValueError(), 1.0, "the pool is full")
        repeats.flush()

        assert core.logs.lines[-2:] == [
            "task 'fails' of pool 'core' failed (ValueError), and is not retried: the pool is full",
            "task 'fails' of pool 'core' failed again (2 more), and is not retried: ValueError",
        ]


def test_retries_hold_half_of_the_capacity_at_most() -> None:
    """The other half is for what is new."""
    with Core(conn_max=1, capacity=4) as core:
        for _ in range(3):
            core.pool.using(retries=1, retry_delay=EVER).spawn("fails", Tries(1))
        wait_until(lambda: core.stats().failed == 1)

        assert (core.stats().queued, core.stats().failed) == (2, 1)
        core.close(0)


def test_delay_is_cut_short_by_a_shutdown() -> None:
    """What waits for another try gets a last one."""
    tries = Tries(1)
    with Core(conn_max=1) as core:
        core.pool.using(retries=3, retry_delay=EVER).spawn("fails", tries)
        wait_until(lambda: core.stats().retried == 1)

        assert core.close(BOUND) == 0
        assert core.stats().succeeded == 1
        assert core.queue.account.of("fails").wait_seconds >= 0


def test_delayed_task_runs_while_other_slots_are_busy() -> None:
    """Whichever slot is idle wakes for it, and if none is, the first that has ended its task takes it."""
    with Core(conn_max=2) as core, AsyncGate() as agate, Gate() as gate:
        tries = Tries(1)
        core.spawn("loop", agate)
        agate.wait_entered()
        core.pool.using(retries=1, retry_delay=0.05).spawn("fails", tries)
        wait_until(lambda: core.stats().retried == 1)
        core.spawn("thread", gate)
        gate.wait_entered()
        agate.open()
        wait_until(lambda: core.stats().succeeded == 2)

        assert len(tries.at) == 2
        gate.open()
        core.drain()


def test_coroutine_is_tried_again_though_nothing_else_happens() -> None:
    """The loop leaves its slot idle, whose thread has slept all the while."""
    tries = Tries(1)
    with Core(conn_max=1) as core:
        core.pool.using(retries=1, retry_delay=0.05).spawn("fails", tries.coroutine)
        core.drain()

        assert len(tries.at) == 2


def test_slot_wakes_for_a_delayed_task_in_place_of_those_that_get_others() -> None:
    """Of the slots that are idle at any time, one sleeps no longer than until the next try."""
    tries = Tries(1)
    with Core(conn_max=3) as core, Gate() as gate:
        core.pool.using(retries=1, retry_delay=0.2).spawn("fails", tries)
        wait_until(lambda: core.stats().retried == 1)
        wait_until(lambda: len(core.queue.idle) == 3)
        for number in (1, 2):
            core.spawn("others", gate)
            gate.wait_entered(number)
        wait_until(lambda: core.stats().succeeded == 1)

        assert core.stats().running == 2
        gate.open()
        core.drain()


def test_fork_keeps_what_waits_for_another_try() -> None:
    """The threads stop for it, and start again though nothing is spawned."""
    tries = Tries(1)
    with Core(conn_max=1) as core:
        core.pool.using(retries=1, retry_delay=0.05).spawn("fails", tries)
        wait_until(lambda: core.stats().retried == 1)
        wait_until(lambda: len(core.queue.idle) == 1)
        core.forks.before_fork()
        core.forks.after_fork_in_parent()
        core.drain()

        assert core.stats().succeeded == 1


# A task that may not run yet.


def later(seconds: float) -> Task:
    task = with_policy(make_task())
    task.policy.due_at = monotonic() + seconds
    return task


def test_delayed_task_waits_and_runs_when_it_is_due() -> None:
    """It is counted as waiting, runs though nothing else happens, and not early."""
    with Core(conn_max=1) as core:
        at: list[float] = []
        task = later(0.05)
        task.function = lambda: at.append(monotonic())
        core.pool.submit(task)
        assert core.stats().queued == 1
        core.drain()

        assert at[0] >= task.policy.due_at


def test_delayed_tasks_run_in_the_order_of_their_times() -> None:
    """Whatever the order is in which they are put."""
    queue, [slot] = new_queue()
    late, early, now = later(2 * EVER), later(EVER), later(0)
    for task in (late, early, now):
        queue.put(task)

    assert queue.take(slot) is now
    assert queue.delayed == [early, late]


def woken(slots: list[SlotState]) -> list[SlotState]:
    """Return those of `slots` that were woken, and forget it."""
    found = [slot for slot in slots if not slot.signal.empty()]
    for slot in found:
        while not slot.signal.empty():
            slot.signal.get()
    return found


def test_threads_of_idle_slots_sleep_until_the_first_task_is_due() -> None:
    """All of them look when that is if it changes, and none if it does not."""
    queue, slots = new_queue(conn_max=2)
    queue.put(later(EVER))
    assert woken(slots) == slots
    queue.put(later(2 * EVER))
    assert woken(slots) == []
    queue.put(later(EVER / 2))
    assert woken(slots) == slots


def test_slot_that_becomes_idle_sleeps_until_the_first_task_is_due() -> None:
    """It was not among the idle ones as the task came: it had to step aside, or has lent its own task."""
    queue, slots = new_queue()
    queue.remove_slots(if_idle=True)
    queue.put(later(EVER))
    queue.add_slots(slots)
    assert woken(slots) == slots

    coroutine = make_task(asynchronous=True)
    queue.put(coroutine)
    assert queue.take(slots[0]) is coroutine
    assert lend(queue, slots[0], coroutine)
    woken(slots)
    queue.set_loop_blocked(True)
    assert woken(slots) == slots


def test_delayed_tasks_in_the_wrong_order_are_late_and_never_early() -> None:
    """One that a nested put leaves behind a later one waits for that."""
    queue, [slot] = new_queue()
    late, early = later(EVER), later(0)
    for task in (late, early):
        queue.put(task)
    queue.delayed, _ = [late, early], queue.waiting.clear()

    assert queue.take(slot) is None
    assert queue.delayed == [late, early]


def test_delayed_task_can_be_checked_out_once_the_queue_is_closed() -> None:
    """What is put back waits for its time again, but for a retry, of which the delay was cut."""
    queue, [slot] = new_queue()
    delayed, failed = later(EVER), with_policy(make_task())
    queue.put(failed)
    assert queue.take(slot) is failed
    queue.retry(slot, failed, EVER)
    queue.put(delayed)

    assert queue.check_out(2) == []
    queue.close()
    assert queue.check_out(2) == [failed, delayed]
    queue.put_back([failed, delayed])
    assert (list(queue.waiting), queue.delayed) == ([failed], [delayed])


def test_delayed_tasks_leave_room_for_retries() -> None:
    """Only retries count towards their half of the capacity."""
    with Core(conn_max=1, capacity=4) as core:
        for _ in range(3):
            core.queue.put(later(EVER))
        core.pool.using(retries=1, retry_delay=0).spawn("fails", Tries(1))
        wait_until(lambda: core.stats().succeeded == 1)

        assert core.close(0) == 3


def test_shutdown_waits_for_what_is_due_before_its_deadline() -> None:
    """What is due later is cancelled and reported at once: it does not hold the shutdown up."""
    with Core(conn_max=1) as core, Gate() as gate:
        soon, late = later(0.05), later(EVER)
        soon.function = gate
        for task in (late, soon):
            core.pool.submit(task)
        closing = threading.Thread(target=core.close, args=(BOUND,))
        closing.start()
        gate.wait_entered()

        assert late.outcome is Outcome.CANCELLED
        gate.open()
        closing.join()
        assert (core.stats().succeeded, core.stats().cancelled) == (1, 1)
        assert len(core.logs.of("was shut down with 1 tasks cancelled")) == 1


# A model of all.


class PolicyMachine(QueueMachine):
    """The queue that gives up its oldest tasks, with keys and retries. Time passes only if a rule says so."""

    def __init__(self) -> None:
        super().__init__()
        self.queue.displaces = self.queue.makes_room = True
        self.delayed: list[Task] = []
        self.keyed: dict[str, Task] = {}
        self.retried = 0
        self.told: list[tuple[Task, ShedReason]] = []
        self.queue.on_shed = lambda task, reason: self.told.append((task, reason))

    def _delay(self, task: Task) -> None:
        """Have a task wait where its time says."""
        (self.delayed if task.policy.due_at > monotonic() else self.waiting).append(task)
        self.delayed.sort(key=lambda task: task.policy.due_at)

    def _forget_key(self, task: Task) -> None:
        if self.keyed.get(task.policy.key) is task:
            del self.keyed[task.policy.key]

    def _make_room(self) -> None:
        if self._is_full():
            self._shed_expired()
        if self._is_full() and self.waiting:
            self._shed(self.waiting[0])

    def _is_full(self) -> bool:
        return len(self.waiting) + len(self.checked_out) + len(self.delayed) == self.CAPACITY

    def _shed_expired(self) -> None:
        while self.waiting and self.waiting[0].policy.expires_at < monotonic():
            self._shed(self.waiting[0])

    def _shed(self, task: Task) -> None:
        self.waiting.remove(task)
        tried = task.policy.tries
        self.ended[Outcome.FAILED if tried else Outcome.SHED] += 1
        self._forget_key(task)
        self._over(task)

    @rule(asynchronous=st.booleans())
    def put(self, asynchronous: bool) -> None:
        self._put(make_task(asynchronous=asynchronous))

    @rule(key=st.sampled_from("ab"), retries=st.sampled_from([0, 2]))
    def put_with_key(self, key: str, retries: int) -> None:
        self._put(with_policy(make_task(), key=key, retries=retries))

    @rule(seconds=st.sampled_from([EVER, 2 * EVER]))
    def put_delayed(self, seconds: float) -> None:
        task = with_policy(make_task())
        task.policy.due_at = monotonic() + seconds
        self._put(task)

    @precondition(lambda self: any(task.policy is not NO_POLICY for task in self.held()))
    @rule(data=st.data())
    def expire(self, data: Any) -> None:
        """A task that waits becomes too old."""
        task = data.draw(st.sampled_from([task for task in self.held() if task.policy is not NO_POLICY]))
        task.policy.expires_at = 0.0

    def _put(self, task: Task) -> None:
        self.spawned += 1
        key = task.policy.key
        twin, function = self.keyed.get(key), task.function
        expected = None
        if self.state is not State.OPEN:
            expected = DropReason.SHUTDOWN
        elif twin is not None:
            self.ended[Outcome.COALESCED] += 1
        else:
            self._make_room()
            if self._is_full():
                expected = DropReason.FULL
            elif task.policy is NO_POLICY:
                self.waiting.append(task)
            else:
                self._delay(task)
                if key:
                    self.keyed[key] = task
        self.dropped += expected is not None

        assert self.queue.put(task) is expected
        if twin is not None and expected is None:
            assert twin.function is function

    def _hear(self, slot: SlotState) -> None:
        super()._hear(slot)
        while self.queue.shed:
            self.queue.tell_shed()

    @precondition(lambda self: self.asked)
    @rule()
    def claim(self) -> None:
        while (ready := self._ready()) and ready[0].policy.expires_at < monotonic():
            self._shed(ready[0])
        super().claim()

    def _expect_given(self, slot: SlotState) -> Task | None:
        while (task := super()._expect_given(slot)) is not None and task.policy.expires_at < monotonic():
            del self.running[slot]
            self.waiting.insert(0, task)
            self._shed(task)
        if task is not None:
            self._forget_key(task)
        return task

    @precondition(lambda self: any(task.policy is not NO_POLICY for task in self.running.values()))
    @rule(data=st.data())
    def retry(self, data: Any) -> None:
        """A task fails that is to be tried again; the slot asks for the next one."""
        slot = data.draw(
            st.sampled_from([slot for slot, task in self.running.items() if task.policy is not NO_POLICY])
        )
        task = self.running[slot]
        policy = task.policy
        held = len(self.waiting) + len(self.checked_out) + len(self.delayed)
        can = self.state is State.OPEN and task not in self.given_up and policy.key not in self.keyed
        can = can and held < self.CAPACITY and not any(each.policy.tries for each in self.delayed)

        assert (self.queue.retry(slot, task, EVER) is None) is can

        if can:
            self.retried += 1
            self._delay(task)
            if policy.key:
                self.keyed[policy.key] = task
            del self.running[slot]
            expected = self._expect_given(slot)
            assert self.queue.end(slot, task, Outcome.FAILED) is expected

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def time_passes(self, data: Any) -> None:
        for task in self.delayed:
            task.policy.due_at = 0.0
        self.waiting += self.delayed
        self.delayed = []
        self._hear(data.draw(st.sampled_from(self.slots)))

    @rule()
    def repair(self) -> None:
        waits = [*self.waiting, *self.delayed]
        self.keyed = {task.policy.key: task for task in waits if task.policy.key}

        self.queue.repair()

    @rule(number=st.integers(1, 3))
    def check_out(self, number: int) -> None:
        late = self.delayed[::-1] if self.state is not State.OPEN else []
        expected = [*self.waiting[::-1], *late][:number]
        for task in expected:
            self._forget_key(task)
            (self.waiting if task in self.waiting else self.delayed).remove(task)
        self.checked_out += expected

        assert self.queue.check_out(number) == expected

    @precondition(lambda self: self.checked_out and self.state is not State.CLOSED)
    @rule(data=st.data())
    def put_back(self, data: Any) -> None:
        tasks = data.draw(st.lists(st.sampled_from(self.checked_out), unique=True, min_size=1))
        for task in tasks:
            self.checked_out.remove(task)
            if task.policy is NO_POLICY:
                self.waiting.append(task)
            else:
                self._delay(task)

        self.queue.put_back([*tasks, *self.past[-1:], *self.running.values()])

    @rule()
    def close(self) -> None:
        self.waiting += [task for task in self.delayed if task.policy.tries]
        self.delayed = [task for task in self.delayed if not task.policy.tries]
        super().close()

    @precondition(lambda self: self.state is not State.OPEN)
    @rule()
    def cancel_delayed(self) -> None:
        """A shutdown gives up what is due after its deadline."""
        deadline = monotonic() + 1.5 * EVER
        expected = [task for task in self.delayed[::-1] if task.policy.due_at > deadline]
        for task in expected:
            self.delayed.remove(task)
            self._over(task)
        self.ended[Outcome.CANCELLED] += len(expected)
        cancelled: list[Task] = []

        self.queue.cancel(lambda task: task.policy.due_at > deadline, cancelled)

        assert cancelled == expected

    @precondition(lambda self: self.state is not State.OPEN)
    @rule(checked_out=st.booleans())
    def cancel_waiting(self, checked_out: bool) -> None:
        self.keyed = {}
        self.waiting += self.delayed
        self.delayed = []
        super().cancel_waiting(checked_out)

    # What holds after each.

    def held(self) -> list[Task]:
        return [*super().held(), *self.delayed]

    @invariant()
    def delays_and_keys_are_those_of_the_model(self) -> None:
        assert self.queue.delayed == self.delayed
        assert self.queue.keyed == self.keyed
        assert read_stats(self.queue).retried == self.retried


PolicyMachine.TestCase.__doc__ = "So it does with the options of a submission."
TestPoliciesAgainstModel = PolicyMachine.TestCase
