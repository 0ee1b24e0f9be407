"""The bounded queue and its account: exact under 64 threads, under every order of steps, and in a model."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import bgtasks.queue
from bgtasks import PoolStats
from bgtasks.queue import DropReason, Landmark, Outcome, State, Tally, Task, TaskQueue
from tests.core import Core, ForcedDeque, ForcedSet, exit_, make_task
from tests.gate import BOUND, Gate, wait_until

THREADS = 64
SPAWNS = 2_500  # a thread; with 10,000 it takes more than a minute under coverage


@pytest.fixture
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the interpreter switch threads as often as it can, or every so many seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(getattr(request, "param", 1e-6))
    yield
    sys.setswitchinterval(before)


def in_threads(number: int, function: Callable[[int], object]) -> None:
    """Call `function` with 0, 1, ... on a thread each, all at once, and wait for them."""
    threads = [threading.Thread(target=function, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def balance(stats: PoolStats) -> int:
    """Return the right side of the equation that every snapshot keeps."""
    return (
        stats.queued
        + stats.running
        + stats.succeeded
        + stats.failed
        + stats.timed_out
        + stats.cancelled
        + stats.dropped
        + stats.handed_off
    )


def take(queue: TaskQueue, slot: int = 0) -> Any:
    """Take a task as the slot of that number does."""
    return queue.take(queue.accounts[slot])


class ForcedList(list[Any]):
    """A list that calls a function after something was added to it, once."""

    def __init__(self, hook: Callable[[], object]) -> None:
        super().__init__()
        self._hooks = [hook]

    def extend(self, items: Any) -> None:
        super().extend(items)
        if self._hooks:
            self._hooks.pop()()


async def never_awaited() -> None:
    raise AssertionError("nobody runs it")


# The bound.


def test_put_past_capacity_drops() -> None:
    """A task is dropped if as many wait as the capacity allows, and accepted again once one was taken."""
    queue = TaskQueue("q", 2, 1)
    assert [queue.put(make_task()) for _ in range(3)] == [None, None, DropReason.FULL]

    take(queue)

    assert queue.put(make_task()) is None
    assert queue.put(make_task()) is DropReason.FULL


def test_capacity_is_exact_for_threads_that_put_at_once(switching: None) -> None:
    """Of all the tasks that 64 threads put into a queue nobody drains, just CAPACITY are accepted."""
    queue = TaskQueue("q", 1024, 1)
    accepted = [0] * THREADS
    start = threading.Barrier(THREADS)

    def put_many(i: int) -> None:
        start.wait(BOUND)
        for _ in range(200):
            accepted[i] += queue.put(make_task()) is None

    in_threads(THREADS, put_many)

    assert sum(accepted) == len(queue.waiting) == queue.stats().queued == 1024
    assert queue.stats().dropped == THREADS * 200 - 1024


# More often, and 73 threads that look whether it is their turn leave no time for anything else.
@pytest.mark.parametrize("switching", [1e-3], indirect=True)
def test_every_spawn_of_64_threads_is_accounted_for_at_every_moment(switching: None) -> None:
    """While 64 threads spawn, never more than CAPACITY tasks wait, and every snapshot keeps the equation.

    The figures are compared with counts of the spawners' own: no snapshot has fewer spawns than have
    returned before it, nor more than have begun after it; and in the end each True is a task that ran, each
    False a drop.
    """
    begun, accepted, dropped = [0] * THREADS, [0] * THREADS, [0] * THREADS
    errors: list[BaseException] = []
    wrong: list[object] = []
    samples = 0
    ran = Tally()
    done = threading.Event()

    with Core(capacity=1024, conn_max=8) as core:

        def spawn_many(i: int) -> None:
            try:
                for _ in range(SPAWNS):
                    begun[i] += 1
                    if core.spawn("burst", ran.add):
                        accepted[i] += 1
                    else:
                        dropped[i] += 1
            except BaseException as error:  # noqa: BLE001  # pragma: no cover  # the test fails of it
                errors.append(error)

        def sample() -> None:
            nonlocal samples
            while not done.is_set():
                returned_before = sum(accepted) + sum(dropped)
                waiting = len(core.queue.waiting)
                stats = core.stats()
                begun_after = sum(begun)
                samples += 1
                if not (  # pragma: no branch
                    waiting <= 1024
                    and stats.queued <= 1024
                    and stats.running <= 8
                    and stats.spawned == balance(stats)
                    and returned_before <= stats.spawned <= begun_after
                ):
                    wrong.append((waiting, returned_before, stats, begun_after))  # pragma: no cover

        reader = threading.Thread(target=sample)
        reader.start()
        try:
            in_threads(THREADS, spawn_many)
            core.drain()
        finally:
            done.set()
        reader.join()
        stats = core.stats()

    assert errors == []
    assert samples > 0
    assert wrong == []
    assert stats.spawned == THREADS * SPAWNS
    assert stats.succeeded == sum(accepted) == ran.value
    assert stats.dropped == sum(dropped)


def test_put_inside_put_does_not_deadlock() -> None:
    """A spawner that is interrupted in the middle of a put by another put goes on (a signal handler)."""
    queue = TaskQueue("q", 3, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    inner, outer = make_task("inner"), make_task("outer")
    queue.waiting.force("before append", lambda: queue.put(inner))

    assert queue.put(outer) is None

    assert list(queue.waiting) == [inner, outer]
    assert queue.stats().queued == 2


def test_put_does_not_wait_for_the_lock() -> None:
    """A spawner gets on while another thread holds the queue's lock."""
    queue = TaskQueue("q", 1, 1)
    put: list[DropReason | None] = []

    with queue._lock:
        in_threads(2, lambda _: put.append(queue.put(make_task())))

    assert sorted(put, key=str) == [DropReason.FULL, None]


# Drops.


@pytest.mark.parametrize("reason", list(DropReason))
def test_dropped_coroutine_object_is_closed(reason: Any) -> None:
    """A coroutine object that is dropped does not make Python warn that it was never awaited."""
    queue = TaskQueue("q", 1, 1)
    coroutine = never_awaited()
    task = make_task("task", coroutine, asynchronous=True)
    if reason is DropReason.FULL:
        queue.put(make_task())
    elif reason is DropReason.SHUTDOWN:
        queue.close()

    dropped = queue.put(task)
    if reason is DropReason.NO_THREAD:
        assert queue.withdraw(task, reason)
    else:
        assert dropped is reason

    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)
    assert queue.stats().dropped == 1


def test_withdrawn_task_gives_its_place_back() -> None:
    """A task that was taken back counts as dropped, and its place is free again."""
    queue = TaskQueue("q", 1, 1)
    task = make_task()
    queue.put(task)

    assert queue.withdraw(task, DropReason.NO_THREAD) is True

    assert queue.put(make_task()) is None
    assert (queue.stats().spawned, queue.stats().dropped, queue.stats().queued) == (2, 1, 1)


def test_taken_task_cannot_be_withdrawn() -> None:
    """A task that was taken runs, so it is not taken back and not counted as dropped."""
    queue = TaskQueue("q", 1, 1)
    task = make_task()
    queue.put(task)
    take(queue)

    assert queue.withdraw(task, DropReason.NO_THREAD) is False

    assert (queue.stats().running, queue.stats().dropped) == (1, 0)


# The end of a queue's life, and who comes in the middle of it.


def test_closed_queue_accepts_nothing() -> None:
    """Once a queue is closed, every task is dropped, with room or without."""
    queue = TaskQueue("q", 1, 1)
    assert queue.close() is True

    assert queue.put(make_task()) is DropReason.SHUTDOWN

    assert queue.stats().dropped == 1


def test_closed_queue_stays_closed() -> None:
    """Only the first close of a queue closes it, and none opens a swept one again."""
    queue = TaskQueue("q", 1, 1)
    queue.close()
    queue.sweep()

    assert queue.close() is False

    assert queue.state is State.CLOSED


def test_queue_swept_before_the_append_takes_the_task_back() -> None:
    """A spawner that appends to a queue which was swept since it looked takes its task back itself.

    1. spawner: finds the queue open, takes a permit
    2. shutdown: closes and sweeps the queue, finds nothing
    3. spawner: appends, where nobody will ever look again
    """
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    swept: list[Task] = []
    queue.waiting.force("before append", lambda: (queue.close(), swept.extend(queue.sweep())))

    assert queue.put(make_task()) is DropReason.SHUTDOWN

    assert swept == []
    assert list(queue.waiting) == []
    assert queue.is_empty()
    assert (queue.stats().spawned, queue.stats().dropped) == (1, 1)


def test_queue_swept_after_the_append_has_cancelled_the_task() -> None:
    """A spawner whose task was swept before it could look again has spawned it: it counts once.

    1. spawner: appends
    2. shutdown: closes and sweeps the queue, cancels the task
    3. spawner: finds the queue closed, and nothing to take back
    """
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    swept: list[Task] = []
    queue.waiting.force("after append", lambda: (queue.close(), swept.extend(queue.sweep())))
    task = make_task()

    assert queue.put(task) is None

    assert swept == [task]
    assert (queue.stats().spawned, queue.stats().dropped, queue.stats().cancelled) == (1, 0, 1)


def test_queue_closed_during_a_put_drops_the_task() -> None:
    """A spawner that finds the queue closing after its append takes the task back while it waits."""
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.waiting.force("before append", queue.close)

    assert queue.put(make_task()) is DropReason.SHUTDOWN

    assert queue.sweep() == []
    assert (queue.stats().dropped, queue.stats().cancelled) == (1, 0)


def test_sweep_cancels_what_waits_and_leaves_what_runs() -> None:
    """A sweep returns the waiting tasks in their order, as cancelled; running ones go on."""
    queue = TaskQueue("q", 3, 1)
    running, first, second = make_task(), make_task(), make_task()
    for task in (running, first, second):
        queue.put(task)
    take(queue)

    assert queue.sweep() == [first, second]

    assert first.outcome is second.outcome is Outcome.CANCELLED
    assert queue.running() == [running]
    assert (queue.stats().cancelled, queue.stats().queued) == (2, 0)


# Taking and ending.


def test_tasks_are_taken_in_the_order_of_their_spawning() -> None:
    """The task that has waited longest is taken first, and runs from then on."""
    queue = TaskQueue("q", 2, 1)
    first, second = make_task(), make_task()
    queue.put(first)
    queue.put(second)

    assert [take(queue), take(queue), take(queue)] == [first, second, None]

    assert set(queue.running()) == {first, second}
    assert first.started_at >= first.spawned_at


def test_last_task_taken_by_another_slot_is_taken_once() -> None:
    """A slot that finds a task waiting, and gone when it takes it, gets none.

    1. slot A: sees one task waiting
    2. slot B: takes it
    3. slot A: pops an empty queue
    """
    queue = TaskQueue("q", 1, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    task = make_task()
    queue.put(task)
    taken: list[Task | None] = []
    queue.waiting.force("after len", lambda: taken.append(take(queue, slot=1)))

    assert take(queue) is None

    assert taken == [task]
    assert queue.running() == [task]
    assert queue.put(make_task()) is None
    assert queue.put(make_task()) is DropReason.FULL


def test_task_given_up_is_counted_once() -> None:
    """A task that shutdown has given up is cancelled, and not counted when it ends after all."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    task = take(queue)
    assert queue.give_up(task) is True

    queue.end(task, Outcome.SUCCEEDED)

    assert (queue.stats().cancelled, queue.stats().succeeded) == (1, 0)
    assert task.outcome is Outcome.CANCELLED


def test_ended_task_cannot_be_given_up() -> None:
    """A shutdown that comes too late for a task leaves it its outcome."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    task = take(queue)
    queue.end(task, Outcome.SUCCEEDED)

    assert queue.give_up(task) is False

    assert (queue.stats().cancelled, queue.stats().succeeded) == (0, 1)
    assert task.outcome is Outcome.SUCCEEDED


def test_task_that_is_being_counted_has_its_outcome_once_it_cannot_be_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shutdown that gives it up just then can report it as cancelled, as it is counted.

    1. slot: removes the task from the running ones
    2. shutdown: cannot give it up
    3. slot: counts it
    """
    monkeypatch.setattr(bgtasks.queue, "READ_PATIENCE", BOUND)
    queue = TaskQueue("q", 1, 1)
    queue._running = running = ForcedSet()
    queue.put(make_task())
    task = take(queue)
    outcomes: list[Any] = []

    def give_up() -> None:
        outcomes.append(queue.give_up(task))
        outcomes.append(task.outcome)

    with Gate() as gate:
        running.force("after remove", gate)
        slot = threading.Thread(target=queue.end, args=(task, Outcome.CANCELLED))
        slot.start()
        gate.wait_entered()
        shutdown = threading.Thread(target=give_up)
        shutdown.start()
        wait_until(lambda: queue._hush or outcomes)
    shutdown.join(BOUND)
    slot.join(BOUND)

    assert outcomes == [False, Outcome.CANCELLED]
    assert queue.stats().cancelled == 1


def test_one_teller_tells_of_an_end() -> None:
    """Of a slot and a shutdown that both see the end of a task, only the first tells the listeners."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    task = take(queue)

    assert queue.may_tell(task, "slot") is True
    assert queue.may_tell(task, "shutdown") is False

    assert queue.may_tell(task, "slot") is True


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_has_its_figure(outcome: Outcome) -> None:
    """Each outcome is counted under its own name."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    queue.end(take(queue), outcome)

    stats = queue.stats()

    assert getattr(stats, outcome.label) == 1
    assert stats.spawned == balance(stats) == 1


def test_task_past_its_timeout_is_stuck_while_it_runs() -> None:
    """A running task that is past TASK_TIMEOUT counts as stuck until it ends."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    task = take(queue)
    assert queue.stats().stuck == 0
    task.overran = True

    assert queue.stats().stuck == 1
    queue.end(task, Outcome.SUCCEEDED)

    assert queue.stats().stuck == 0


@pytest.mark.parametrize("waiting", [True, False])
def test_queue_is_empty_when_nothing_waits_or_runs(waiting: Any) -> None:
    """A queue is empty if no task waits in it and none of it runs, and a place taken is a task waiting."""
    queue = TaskQueue("q", 1, 1)
    assert queue.is_empty()
    task = make_task()
    queue.put(task)
    if not waiting:
        take(queue)

    assert not queue.is_empty()

    assert queue.is_empty(except_for=[task]) is not waiting


def test_queue_is_not_empty_in_the_middle_of_a_put() -> None:
    """A place that a spawner has taken counts, though its task is not there yet."""
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    empty: list[bool] = []
    queue.waiting.force("before append", lambda: empty.append(queue.is_empty()))

    queue.put(make_task())

    assert empty == [False]


# Snapshots in the middle of a step.


def test_snapshot_waits_for_a_step_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes while a slot has taken a task out of the queue, and put it nowhere, looks again.

    1. slot: takes the task out of the waiting ones
    2. reader: sees that a step is under way
    3. slot: puts the task among the running ones
    """
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task())
    seen = []
    looked, done = threading.Event(), threading.Event()

    def wait_for_the_slot(seconds: float) -> None:
        looked.set()
        done.wait(BOUND)

    monkeypatch.setattr(bgtasks.queue, "sleep", wait_for_the_slot)
    reader = threading.Thread(target=lambda: seen.append(queue.stats()))

    def read() -> None:
        reader.start()
        assert looked.wait(BOUND)

    queue.waiting.force("after popleft", read)

    take(queue)
    done.set()
    reader.join(BOUND)

    assert [(stats.queued, stats.running, stats.spawned) for stats in seen] == [(0, 1, 1)]


def test_snapshot_that_a_step_went_through_is_taken_anew() -> None:
    """A task that moves while the figures are added up is counted once.

    1. reader: counts the free places, and so the task as queued
    2. slot: takes the task
    3. reader: counts the running tasks, and so the same task again
    """
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    queue._permits = ForcedDeque(queue._permits)
    queue._permits.force("after len", lambda: take(queue))

    stats = queue.stats()

    assert (stats.queued, stats.running, stats.spawned) == (0, 1, 1)


def test_snapshot_is_taken_before_a_busy_slot_takes_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that finds a slot between two states again and again has it pause before the next task."""
    monkeypatch.setattr(bgtasks.queue, "READ_HUSH", BOUND)
    monkeypatch.setattr(bgtasks.queue, "READ_PATIENCE", BOUND)
    queue = TaskQueue("q", 2, 1)
    queue.waiting = queue.inbox = waiting = ForcedDeque()
    queue.put(make_task())
    queue.put(make_task())
    snapshots: list[PoolStats] = []
    asked: list[float] = []  # until when the slot was asked to pause, as it took the second task

    def take_two(gate: Gate) -> None:
        waiting.force("after popleft", gate)
        take(queue)
        waiting.force("after popleft", lambda: asked.append(queue._hush))
        take(queue)

    with Gate() as gate:
        slot = threading.Thread(target=take_two, args=(gate,))
        slot.start()
        gate.wait_entered()
        reader = threading.Thread(target=lambda: snapshots.append(queue.stats()))
        reader.start()
        wait_until(lambda: queue._hush)
    reader.join(BOUND)
    assert not queue._hush  # long before the slot would go on by itself
    slot.join(BOUND)

    assert asked == [0]
    assert (snapshots[0].queued, snapshots[0].running) == (1, 1)


def test_slot_does_not_pause_for_ever_for_a_reader_that_does_not_come_back() -> None:
    """After READ_HUSH it takes the next task, and the one after that without a look at the clock."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    queue._hush = until = monotonic() + 0.02

    assert take(queue) is not None
    assert monotonic() >= until
    assert not queue._hush


@contextmanager
def reader_of_a_step(queue: TaskQueue) -> Iterator[threading.Thread]:
    """Hold a slot in the middle of taking a task, beside a reader who has asked the slots to pause."""
    queue.waiting = queue.inbox = waiting = ForcedDeque(queue.waiting)
    with Gate() as gate:
        waiting.force("after popleft", gate)
        slot = threading.Thread(target=take, args=(queue,))
        slot.start()
        gate.wait_entered()
        reader = threading.Thread(target=queue.stats)
        reader.start()
        wait_until(lambda: queue._hush)
        yield reader
    reader.join(BOUND)
    slot.join(BOUND)


def test_slots_do_not_pause_for_a_reader_that_waits_for_a_step_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that waits in vain keeps the other slots for READ_HUSH, not for as long as it waits."""
    monkeypatch.setattr(bgtasks.queue, "READ_PATIENCE", BOUND)
    queue = TaskQueue("q", 2, 2)
    queue.put(make_task())
    queue.put(make_task())
    with reader_of_a_step(queue) as reader:
        assert take(queue, 1) is not None
        assert reader.is_alive()


def test_reader_that_was_stopped_with_its_process_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes while nobody runs is not counted: the slot has had no chance to end its step."""
    attempts: list[float] = []

    def count(seconds: float) -> None:
        attempts.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(bgtasks.queue, "READ_PATIENCE", BOUND)
    monkeypatch.setattr(bgtasks.queue, "sleep", count)
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    with reader_of_a_step(queue) as reader:
        monkeypatch.setattr(bgtasks.queue, "monotonic", lambda: monotonic() + 10 * BOUND)
        before = len(attempts)
        wait_until(lambda: len(attempts) > before + 10 or not reader.is_alive())

        assert reader.is_alive()


def test_count_without_a_slot_that_is_interrupted_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises in there leaves no step for readers to wait for."""
    queue = TaskQueue("q", 1, 1)
    task = make_task()
    queue.begin_beside(task)
    with monkeypatch.context() as patch:
        patch.setattr(bgtasks.queue, "bisect_left", lambda *_: exit_())
        with pytest.raises(SystemExit):
            queue.count_beside(task, Outcome.SUCCEEDED)

    assert not any(account.epoch % 2 for account in queue._all_accounts())
    assert queue.stats().spawned == 0
    queue.count_beside(task, Outcome.SUCCEEDED)
    assert queue.stats().succeeded == 1


def test_snapshot_inside_a_step_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that asks for the figures in the middle of a step gets some, and does not hang."""
    monkeypatch.setattr(bgtasks.queue, "READ_PATIENCE", 0.01)
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task())
    seen = []
    queue.waiting.force("after popleft", lambda: seen.append(queue.stats()))

    take(queue)

    assert len(seen) == 1
    assert (queue.stats().queued, queue.stats().running) == (0, 1)


# Exceptions from outside in the middle of a step.


def test_put_interrupted_before_the_append_gives_its_place_back() -> None:
    """A spawner that a signal handler ends between the permit and the append has spawned nothing."""
    queue = TaskQueue("q", 1, 1)
    queue._permits = ForcedDeque(queue._permits)
    queue._permits.force("after pop", exit_)
    coroutine = never_awaited()

    with pytest.raises(SystemExit):
        queue.put(make_task("interrupted", coroutine, asynchronous=True))

    assert queue.is_empty()
    assert queue.stats().spawned == 0
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


@pytest.mark.parametrize("meanwhile", ["waits", "runs", "has ended"])
def test_put_interrupted_after_the_append_has_spawned(meanwhile: Any) -> None:
    """A spawner that is ended just after the append has spawned its task, whatever became of it by then."""
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()

    def go_on_and_exit() -> None:
        if meanwhile != "waits":
            task = take(queue)
            if meanwhile == "has ended":
                queue.end(task, Outcome.SUCCEEDED)
        raise SystemExit

    queue.waiting.force("after append", go_on_and_exit)

    with pytest.raises(SystemExit):
        queue.put(make_task())

    stats = queue.stats()
    assert stats.spawned == 1
    assert (stats.queued, stats.running, stats.succeeded) == (
        int(meanwhile == "waits"),
        int(meanwhile == "runs"),
        int(meanwhile == "has ended"),
    )


def test_take_interrupted_before_the_task_runs_counts_it_as_failed() -> None:
    """A slot that is interrupted when the queue has given the task away, and nobody has it, counts it."""
    queue = TaskQueue("q", 1, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task())
    queue.waiting.force("after popleft", exit_)
    with pytest.raises(SystemExit):
        take(queue)

    queue.settle(queue.accounts[0])

    stats = queue.stats()
    assert (stats.spawned, stats.failed, stats.queued, stats.running) == (1, 1, 0, 0)
    assert queue.is_empty()


def test_take_interrupted_when_the_task_runs_gives_its_place_back() -> None:
    """A slot that is interrupted before the permit is back has its task, and the place is free."""
    queue = TaskQueue("q", 1, 1)
    queue._running = ForcedSet()
    queue.put(make_task())
    queue._running.force("after add", exit_)
    with pytest.raises(SystemExit):
        take(queue)

    queue.settle(queue.accounts[0])

    stats = queue.stats()
    assert (stats.spawned, stats.running, stats.queued) == (1, 1, 0)
    assert queue.put(make_task()) is None


@pytest.mark.parametrize("step", ["before remove", "after remove"])
def test_end_that_is_interrupted_counts_the_task_once(step: Any) -> None:
    """A task whose end is interrupted is counted by settle, or still runs and can be ended."""
    queue = TaskQueue("q", 1, 1)
    queue._running = ForcedSet()
    queue.put(make_task())
    landmark = queue.all_ended()
    task = take(queue)
    queue._running.force(step, exit_)
    with pytest.raises(SystemExit):
        queue.end(task, Outcome.SUCCEEDED)

    queue.settle(queue.accounts[0])
    queue.end(task, Outcome.FAILED)

    stats = queue.stats()
    assert (stats.spawned, stats.running) == (1, 0)
    assert (stats.succeeded, stats.failed) == ((0, 1) if step == "before remove" else (1, 0))
    assert landmark.done()


def test_end_interrupted_while_it_is_announced_is_announced_to_all() -> None:
    """A slot that is interrupted when one of two waiters knows of the end of its task tells the other."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    first, second = queue.all_ended(), queue.all_ended()
    first.add_done_callback(lambda _: exit_())
    with pytest.raises(SystemExit):
        queue.end(take(queue), Outcome.SUCCEEDED)
    assert not second.done()

    queue.settle(queue.accounts[0])

    assert second.done()
    assert (queue.stats().succeeded, queue.stats().failed) == (1, 0)


def test_task_that_another_slot_has_ended_is_not_taken_for_lost() -> None:
    """A slot that looks for the task it has lost passes over one that is counted, and is being announced."""
    queue = TaskQueue("q", 2, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task("other"))
    queue.put(make_task("lost"))
    landmark = queue.all_ended()
    other = take(queue, slot=1)
    queue.waiting.force("after popleft", exit_)
    with pytest.raises(SystemExit):
        take(queue)
    strike = queue._strike

    def settle_meanwhile(task: Task) -> None:
        queue._strike = strike
        queue.settle(queue.accounts[0])
        assert not landmark.done()
        strike(task)

    queue._strike = settle_meanwhile

    queue.end(other, Outcome.SUCCEEDED)

    assert landmark.done()
    assert (queue.stats().failed, queue.stats().succeeded) == (1, 1)


def test_settle_leaves_an_account_at_rest_alone() -> None:
    """Where nothing was interrupted there is nothing to put in order."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    take(queue)
    before = queue.stats()

    queue.settle(queue.accounts[0])

    assert queue.stats() == before


@pytest.mark.parametrize("step", ["as it counts", "as it tells"])
def test_interrupted_sweep_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    """A shutdown that is ended in the middle of a sweep keeps no reader waiting, and the next one goes on.

    Whoever waits for the tasks is told of their end then, those that the first one had swept among them.
    """
    monkeypatch.setattr(bgtasks.queue, "sleep", lambda _: pytest.fail("a step is under way for ever"))
    queue = TaskQueue("q", 2, 1)
    queue.waiting = queue.inbox = ForcedDeque()
    first, second = make_task("first"), make_task("second")
    queue.put(first)
    queue.put(second)
    landmark = queue.all_ended()
    queue._permits = ForcedDeque(queue._permits)
    if step == "as it counts":
        queue._permits.force("after append", exit_)
    else:
        monkeypatch.setattr(queue, "_strike", lambda task: exit_())
    with pytest.raises(SystemExit):
        queue.sweep()
    monkeypatch.undo()

    queue.stats()
    assert queue.sweep() == [first, second]

    assert (queue.stats().queued, queue.stats().cancelled) == (0, 2)
    assert len(queue._permits) == 2
    assert landmark.done()


@pytest.mark.parametrize("step", ["before remove", "after remove"])
def test_interrupted_give_up_is_finished_by_the_next(step: Any) -> None:
    """A shutdown that is ended as it gives a task up counts it once, and tells those who wait for it."""
    queue = TaskQueue("q", 2, 2)
    queue._running = ForcedSet()
    queue.put(make_task("given up"))
    queue.put(make_task("other"))
    landmark = queue.all_ended()
    task, other = take(queue), take(queue, slot=1)
    if step == "before remove":
        queue._running.force(step, exit_)
    else:
        queue._removed = ForcedList(exit_)
    with pytest.raises(SystemExit):
        queue.give_up(task)

    assert [queue.give_up(other), queue.give_up(task)] == [True, step == "before remove"]

    stats = queue.stats()
    assert (stats.spawned, stats.cancelled, stats.running) == (2, 2, 0)
    assert task.outcome is Outcome.CANCELLED
    assert landmark.done()


# Landmarks.


def test_landmark_of_an_empty_queue_is_reached() -> None:
    """Nobody waits for the end of nothing."""
    assert TaskQueue("q", 1, 1).all_ended().result(0) is True


def test_landmark_waits_for_the_tasks_spawned_before_it() -> None:
    """It is reached when what waited and what ran has ended."""
    queue = TaskQueue("q", 2, 1)
    queue.put(make_task())
    queue.put(make_task())
    running = take(queue)
    landmark = queue.all_ended()

    queue.end(running, Outcome.SUCCEEDED)
    assert not landmark.done()
    queue.end(take(queue), Outcome.FAILED)

    assert landmark.result(0) is True


def test_landmark_does_not_wait_for_later_tasks() -> None:
    """A task spawned after it holds it up neither by running on nor by ending early."""
    queue = TaskQueue("q", 2, 2)
    before, after = make_task(), make_task()
    queue.put(before)
    landmark = queue.all_ended()
    queue.put(after)
    take(queue)
    take(queue)

    queue.end(after, Outcome.SUCCEEDED)
    assert not landmark.done()
    queue.end(before, Outcome.SUCCEEDED)

    assert landmark.done()


def test_later_task_that_runs_on_does_not_hold_a_landmark_up() -> None:
    """A landmark is reached while a task that was spawned after it still runs."""
    queue = TaskQueue("q", 2, 2)
    queue.put(make_task())
    landmark = queue.all_ended()
    queue.put(make_task())
    before = take(queue)
    take(queue)

    queue.end(before, Outcome.SUCCEEDED)

    assert landmark.done()
    assert not queue.is_empty()


def test_each_waiter_has_a_landmark_of_its_own() -> None:
    """Two who wait from different moments are told at different moments."""
    queue = TaskQueue("q", 2, 2)
    queue.put(make_task())
    first = queue.all_ended()
    queue.put(make_task())
    second, third = queue.all_ended(), queue.all_ended()
    tasks = [take(queue), take(queue)]

    queue.end(tasks[0], Outcome.SUCCEEDED)
    assert (first.done(), second.done(), third.done()) == (True, False, False)
    queue.end(tasks[1], Outcome.SUCCEEDED)

    assert second.done()
    assert third.done()


def test_landmark_leaves_out_who_is_excepted() -> None:
    """A task that waits for the others does not wait for itself."""
    queue = TaskQueue("q", 2, 2)
    own, other = make_task(), make_task()
    queue.put(own)
    queue.put(other)
    take(queue)
    take(queue)
    landmark = queue.all_ended(except_for=[own])

    queue.end(other, Outcome.SUCCEEDED)

    assert landmark.done()


def test_sweep_reaches_landmarks() -> None:
    """Whoever waits for a queued task is told when it is cancelled."""
    queue = TaskQueue("q", 2, 1)
    queue.put(make_task())
    queue.put(make_task())
    landmark = queue.all_ended()

    queue.sweep()

    assert landmark.result(0) is True


def test_landmark_is_announced_outside_the_lock() -> None:
    """A waiter's callback may ask the queue, from whatever thread it likes, and is not in its way."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    seen: list[int] = []

    def look(_: Future[bool]) -> None:
        in_threads(1, lambda _: seen.append(queue.stats().succeeded))

    queue.all_ended().add_done_callback(look)

    queue.end(take(queue), Outcome.SUCCEEDED)

    assert seen == [1]


def test_cancelled_landmark_is_passed_over() -> None:
    """A waiter that has given up does not disturb the task that ends, nor the other waiters."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    cancelled, other = queue.all_ended(), queue.all_ended()
    cancelled.cancel()

    queue.end(take(queue), Outcome.SUCCEEDED)

    assert other.done()
    assert queue.stats().succeeded == 1


def test_withdrawn_task_does_not_hold_a_landmark_up() -> None:
    """A task that was dropped after all has ended, for those who wait for it as well."""
    queue = TaskQueue("q", 1, 1)
    task = make_task()
    queue.put(task)
    landmark = queue.all_ended()

    queue.withdraw(task, DropReason.NO_THREAD)

    assert landmark.done()


def test_task_that_ends_before_a_landmark_is_set_up_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that was seen running and has ended before the landmark knows of it is struck off.

    1. waiter: sees the task running
    2. slot: ends the task, strikes it off a landmark that does not wait for anything yet
    3. waiter: has the landmark wait for what it has seen
    """
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    task = take(queue)

    class Late(Landmark):
        def seal(self, tasks: Any) -> None:
            queue.end(task, Outcome.SUCCEEDED)
            super().seal(tasks)

    monkeypatch.setattr(bgtasks.queue, "Landmark", Late)

    assert queue.all_ended().done()


def test_task_that_ends_just_as_a_landmark_is_set_up_is_not_waited_for() -> None:
    """A task struck off at the very moment at which the landmark begins to wait for it is struck off.

    1. slot: finds the landmark not set up
    2. waiter: sets it up, and finds no task that has ended
    3. slot: notes the task for the waiter, which will not look again
    """
    task = make_task()
    landmark = Landmark()
    landmark._early = ForcedSet()
    landmark._early.force("before add", lambda: landmark.seal({task}))

    landmark.strike(task)

    assert landmark.reached.done()


def test_two_who_strike_the_last_tasks_off_announce_once() -> None:
    """Of two slots that end the last two tasks at once, the second to announce it is not in the way.

    1. slot A: strikes its task off, and finds nothing pending
    2. slot B: does the same, and announces it
    3. slot A: announces it
    """
    task, other = make_task(), make_task()
    landmark = Landmark()
    landmark.seal({task})
    set_result = landmark.reached.set_result

    def announce_second(result: bool) -> None:
        landmark.reached.set_result = set_result
        landmark.strike(other)
        set_result(result)

    landmark.reached.set_result = announce_second

    landmark.strike(task)

    assert landmark.reached.result(0) is True


def test_task_lost_by_an_interrupted_take_does_not_hold_a_landmark_up() -> None:
    """Whoever waits for a task that nobody has received from the queue is told that it has ended."""
    queue = TaskQueue("q", 2, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task("lost"))
    queue.put(make_task("other"))
    landmark = queue.all_ended()
    queue.waiting.force("after popleft", exit_)
    with pytest.raises(SystemExit):
        take(queue)
    other = take(queue, slot=1)

    queue.settle(queue.accounts[0])
    assert not landmark.done()
    queue.end(other, Outcome.SUCCEEDED)

    assert landmark.done()
    assert (queue.stats().failed, queue.stats().succeeded) == (1, 1)


def test_task_lost_while_somebody_begins_to_wait_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that an interrupted take loses is struck off by the waiter if its slot came too early for that.

    1. waiter: looks at the tasks
    2. slot: takes one and is interrupted, looks for landmarks, and finds one with no tasks
    3. waiter: seals the landmark with that task
    """
    queue = TaskQueue("q", 1, 1)
    waiting = queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task("lost"))
    seal = Landmark.seal

    def lose_and_seal(landmark: Landmark, tasks: set[Task]) -> None:
        waiting.force("after popleft", exit_)
        with pytest.raises(SystemExit):
            take(queue)
        queue.settle(queue.accounts[0])
        seal(landmark, tasks)

    monkeypatch.setattr(Landmark, "seal", lose_and_seal)
    landmark = queue.all_ended()

    assert landmark.done()
    assert queue.stats().failed == 1


def test_task_put_while_lost_ones_are_looked_for_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a lost task does not take for it what was spawned, and waited for, just then.

    1. slot: has lost a task, and looks at what is left
    2. spawner: puts a task
    3. waiter: begins to wait for it
    4. slot: looks at what is waited for
    """
    queue = TaskQueue("q", 2, 1)
    waiting = queue.waiting = queue.inbox = ForcedDeque()
    queue.put(make_task("lost"))
    waiting.force("after popleft", exit_)
    with pytest.raises(SystemExit):
        take(queue)
    steady = queue._steady
    late: list[Future[bool]] = []

    def put_and_wait_after(read: Callable[[], Any]) -> Any:
        result = steady(read)
        monkeypatch.undo()
        queue.put(make_task("alive"))
        late.append(queue.all_ended())
        return result

    monkeypatch.setattr(queue, "_steady", put_and_wait_after)
    queue.settle(queue.accounts[0])

    assert not late[0].done()
    task = take(queue)
    assert (task.name, task.outcome) == ("alive", None)
    queue.end(task, Outcome.SUCCEEDED)
    assert late[0].done()
    assert (queue.stats().failed, queue.stats().succeeded) == (1, 1)


def test_abandoned_landmarks_are_not_kept() -> None:
    """Whoever asks again and again, and gives up each time, fills no memory while a task goes on."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    for _ in range(100):
        queue.all_ended().cancel()

    assert len(queue._landmarks) <= 1


def test_drain_under_load_ends() -> None:
    """Whoever waits for what was spawned so far is done while others go on spawning."""
    with Core(conn_max=2) as core, Gate() as gate:
        core.spawn("before", gate)
        gate.wait_entered()
        landmark = core.queue.all_ended()
        with Gate() as later:
            core.spawn("after", later)
            later.wait_entered()

            gate.open()

            assert landmark.result(BOUND) is True
            assert core.stats().running == 1


# Parts.


def test_tally_counts_what_many_threads_add(switching: None) -> None:
    """No addition of any thread is lost, and reading adds nothing."""
    tally = Tally()

    def add(_: int) -> None:
        for _ in range(1000):
            tally.add()
            assert tally.value > 0

    in_threads(8, add)

    assert tally.value == 8000


def test_coroutine_object_is_called_once_by_being_awaited() -> None:
    """A task that is a coroutine object is that object; a function is called with its arguments."""
    coroutine = never_awaited()
    task = make_task("object", coroutine, asynchronous=True)

    assert task.call() is coroutine
    assert make_task("function", max, 1, 2).call() == 2

    task.discard()


def test_ended_task_is_not_kept() -> None:
    """A queue keeps the count of the tasks that have ended and nothing else of them."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    landmark = queue.all_ended()
    task = take(queue)
    queue.may_tell(task, "slot")
    queue.end(task, Outcome.SUCCEEDED)

    ended = weakref.ref(task)
    del task

    assert landmark.done()
    assert ended() is None


# A model of it all.


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a model that is two lists, a counter and a set for each landmark."""

    CAPACITY = 3

    def __init__(self) -> None:
        super().__init__()
        self.queue = TaskQueue("q", self.CAPACITY, 2)
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.told: dict[Task, object] = {}
        self.ended = dict.fromkeys(Outcome, 0)
        self.dropped = 0
        self.spawned = 0
        self.state = State.OPEN
        self.past: list[Task] = []
        self.given_up: list[Task] = []
        self.landmarks: list[tuple[Future[bool], set[Task]]] = []

    @rule()
    def put(self) -> None:
        task = make_task()
        self.spawned += 1
        if self.state is not State.OPEN:
            expected = DropReason.SHUTDOWN
        elif len(self.waiting) == self.CAPACITY:
            expected = DropReason.FULL
        else:
            expected = None
            self.waiting.append(task)
        self.dropped += expected is not None

        assert self.queue.put(task) is expected

    @rule()
    def take(self) -> None:
        expected = self.waiting.pop(0) if self.waiting else None
        if expected is not None:
            self.running.append(expected)

        assert take(self.queue) is expected

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: Any, outcome: Outcome) -> None:
        task = data.draw(st.sampled_from(self.running))
        self.running.remove(task)
        self.told.pop(task, None)
        self.ended[outcome] += 1
        self._over(task)

        self.queue.end(task, outcome)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_up(self, data: Any) -> None:
        task = data.draw(st.sampled_from(self.running))
        self.running.remove(task)
        self.given_up.append(task)
        self.ended[Outcome.CANCELLED] += 1
        self._over(task)

        assert self.queue.give_up(task) is True

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def give_up_too_late(self, data: Any) -> None:
        assert self.queue.give_up(data.draw(st.sampled_from(self.past))) is False

    @precondition(lambda self: self.running)
    @rule(data=st.data(), teller=st.sampled_from(["slot", "shutdown"]))
    def tell(self, data: Any, teller: Any) -> None:
        task = data.draw(st.sampled_from(self.running))
        first = self.told.setdefault(task, teller) == teller

        assert self.queue.may_tell(task, teller) is first

    @precondition(lambda self: self.given_up)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end_after_all(self, data: Any, outcome: Outcome) -> None:
        self.queue.end(data.draw(st.sampled_from(self.given_up)), outcome)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: Any) -> None:
        task = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(task)
        self.dropped += 1
        self._over(task)

        assert self.queue.withdraw(task, DropReason.NO_THREAD) is True

    @precondition(lambda self: self.running or self.past)
    @rule(data=st.data())
    def withdraw_too_late(self, data: Any) -> None:
        task = data.draw(st.sampled_from(self.running + self.past))

        assert self.queue.withdraw(task, DropReason.NO_THREAD) is False

    @rule(data=st.data())
    def wait(self, data: Any) -> None:
        excepted = data.draw(st.sets(st.sampled_from(self.running))) if self.running else set()
        pending = {*self.waiting, *self.running} - excepted

        self.landmarks.append((self.queue.all_ended(except_for=excepted), pending))

    @rule()
    def close(self) -> None:
        was_open = self.state is State.OPEN
        if was_open:
            self.state = State.CLOSING

        assert self.queue.close() is was_open

    @precondition(lambda self: self.state is State.CLOSING)
    @rule()
    def sweep(self) -> None:
        self.state = State.CLOSED
        swept, self.waiting = self.waiting, []
        self.ended[Outcome.CANCELLED] += len(swept)
        for task in swept:
            self._over(task)

        assert self.queue.sweep() == swept

    def _over(self, task: Task) -> None:
        self.past.append(task)
        for _, pending in self.landmarks:
            pending.discard(task)

    @invariant()
    def bound_is_kept(self) -> None:
        assert len(self.queue.waiting) <= self.CAPACITY

    @invariant()
    def figures_are_those_of_the_model(self) -> None:
        stats = self.queue.stats()

        assert stats.spawned == balance(stats) == self.spawned
        assert (stats.queued, stats.running) == (len(self.waiting), len(self.running))
        assert stats.dropped == self.dropped
        assert {outcome: getattr(stats, outcome.label) for outcome in Outcome} == self.ended
        assert self.queue.state is self.state
        assert list(self.queue.waiting) == self.waiting
        assert set(self.queue.running()) == set(self.running)
        assert self.queue.is_empty(except_for=self.running) is not self.waiting or self.waiting == []

    @invariant()
    def names_add_up_to_the_figures(self) -> None:
        stats, names = self.queue.stats_by_name()

        assert sum(of.spawned for of in names) == stats.spawned
        assert sum(of.queued for of in names) == stats.queued
        assert sum(of.running for of in names) == stats.running
        assert sum(sum(of.dropped.values()) for of in names) == stats.dropped
        for outcome in Outcome:
            assert sum(of.ended[outcome] for of in names) == self.ended[outcome]

    @invariant()
    def landmarks_are_reached_when_their_tasks_have_ended(self) -> None:
        for reached, pending in self.landmarks:
            assert reached.done() is not bool(pending)


QueueMachine.TestCase.__doc__ = "Whatever order the steps come in, the queue does as the model does."
TestQueueAgainstModel = QueueMachine.TestCase
