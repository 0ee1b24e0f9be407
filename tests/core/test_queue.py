"""The bounded queue: its bound and figures under 64 threads, in the middle of each step, and in a model."""

import itertools
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import bgtasks.core
from bgtasks import PoolStats
from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import NAMES_MAX, OTHERS, DropReason, Outcome
from bgtasks.core.places import Place, SlotState, State
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Life, Task
from bgtasks.monitoring.figures import NameStats, oldest_wait, read_stats, read_stats_by_name
from tests.gate import BOUND, Gate, wait_until
from tests.pool import Core, Drained, after_call, balance, held, make_task

THREADS = 64
SPAWNS = 200  # by each thread


@pytest.fixture
def switching() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(number: int, function: Callable[[int], object]) -> None:
    """Call `function` with 0, 1, ... on a thread each, all at once, and wait for them."""
    threads = [threading.Thread(target=function, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def is_balanced(of: NameStats) -> bool:
    """Tell whether the figures of one name keep that equation."""
    return of.spawned == of.queued + of.running + sum(of.ended) + sum(of.dropped.values())


def new_queue(capacity: int = 3, conn_max: int = 1) -> tuple[TaskQueue, list[SlotState]]:
    """Return a queue with idle slots that do nothing by themselves."""
    queue = TaskQueue("q", capacity, conn_max)
    slots = [SlotState() for _ in range(conn_max)]
    queue.add_slots(slots)
    return queue, slots


def put_and_take(queue: TaskQueue, *slots: SlotState) -> list[Task]:
    """Put a task for each of `slots`, and have it run there."""
    tasks = [make_task() for _ in slots]
    for slot, task in zip(slots, tasks, strict=True):
        queue.put(task)
        while not slot.signal.empty():
            slot.signal.get()
        assert queue.take(slot) is task
    return tasks


def lend(queue: TaskQueue, slot: SlotState, task: Task) -> bool:
    return queue.move(slot, task, Place.THREAD, Place.LENT)


def begin(queue: TaskQueue, slot: SlotState, task: Task) -> bool:
    return queue.move(slot, task, Place.LENT, Place.LOOP)


def return_to_thread(queue: TaskQueue, slot: SlotState, task: Task) -> bool:
    return queue.move(slot, task, Place.LOOP, Place.THREAD)


async def never_awaited() -> None:
    raise AssertionError("nobody runs it")


def assert_closed(coroutine: Any) -> None:
    """Assert that Python will not warn that `coroutine` was never awaited."""
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


# The bound.


def test_put_past_capacity_drops() -> None:
    """A task is dropped if as many wait as the capacity allows, and accepted again once one was taken."""
    queue = TaskQueue("q", 2, 1)
    assert [queue.put(make_task()) for _ in range(3)] == [None, None, DropReason.FULL]

    slot = SlotState()
    queue.add_slots([slot])
    queue.take(slot)

    assert queue.put(make_task()) is None
    assert queue.put(make_task()) is DropReason.FULL


def test_capacity_is_exact_for_threads_that_put_at_once(switching: None) -> None:
    """Of all the tasks that 64 threads put into a queue that nobody works on, just CAPACITY are accepted."""
    queue = TaskQueue("q", 1024, 1)
    accepted = [0] * THREADS
    start = threading.Barrier(THREADS)

    def put_many(i: int) -> None:
        start.wait(BOUND)
        for _ in range(100):
            accepted[i] += queue.put(make_task()) is None

    in_threads(THREADS, put_many)

    assert sum(accepted) == len(queue.waiting) == read_stats(queue).queued == 1024
    assert read_stats(queue).dropped == THREADS * 100 - 1024


def test_every_spawn_of_64_threads_is_accounted_for_at_every_moment(switching: None) -> None:
    """While 64 threads spawn, never more than CAPACITY tasks wait, and every snapshot keeps the equation.

    It does so in the sums and for every name. The figures are also compared with counts of the spawners' own:
    no snapshot has fewer spawns than have returned before it, nor more than have begun after it. In the end
    each True is a task that ran, each False a drop.
    """
    begun, accepted, dropped = [0] * THREADS, [0] * THREADS, [0] * THREADS
    ran = [[0] * SPAWNS for _ in range(THREADS)]
    errors: list[BaseException] = []
    wrong: list[object] = []
    samples = 0
    done = threading.Event()

    def run(i: int, j: int) -> None:
        ran[i][j] += 1

    async def arun(i: int, j: int) -> None:
        run(i, j)

    with Core(capacity=64, conn_max=8) as core:

        def spawn_many(i: int) -> None:
            try:
                for j in range(SPAWNS):
                    begun[i] += 1
                    if core.spawn(f"burst-{j % 8}", arun if j % 3 == 0 else run, i, j):
                        accepted[i] += 1
                    else:
                        dropped[i] += 1
            except BaseException as error:  # noqa: BLE001  # pragma: no cover  # the test fails because of it
                errors.append(error)

        def sample() -> None:
            nonlocal samples
            while not done.is_set():
                returned_before = sum(accepted) + sum(dropped)
                stats, names = read_stats_by_name(core.queue)
                begun_after = sum(begun)
                samples += 1
                if not (  # pragma: no branch
                    stats.queued <= 64
                    and stats.running <= 8
                    and stats.spawned == balance(stats) == sum(of.spawned for of in names)
                    and all(map(is_balanced, names))
                    and returned_before <= stats.spawned <= begun_after
                ):
                    wrong.append((returned_before, stats, names, begun_after))  # pragma: no cover

        reader = threading.Thread(target=sample)
        reader.start()
        try:
            in_threads(THREADS, spawn_many)
            core.drain()
        finally:
            done.set()
        reader.join()
        stats, names = read_stats_by_name(core.queue)

    assert errors == []
    assert samples > 0
    assert wrong == []
    assert stats.spawned == THREADS * SPAWNS
    assert stats.succeeded == sum(accepted) == sum(map(sum, ran))
    assert max(map(max, ran)) == 1
    assert stats.dropped == sum(dropped)
    assert {of.name for of in names} == {f"burst-{i}" for i in range(8)}


def test_names_without_number_fill_no_memory() -> None:
    """Past the names that a pool tells apart, all further ones are counted under one, and nothing is lost."""
    queue = TaskQueue("q", 1, 1)
    for i in range(NAMES_MAX + 50):
        queue.put(make_task(f"name-{i}"))

    stats, names = read_stats_by_name(queue)

    assert len(names) == NAMES_MAX + 1
    assert next(of.spawned for of in names if of.name == OTHERS) == 50
    assert stats.spawned == NAMES_MAX + 50


# Drops.


@pytest.mark.parametrize("reason", [DropReason.FULL, DropReason.SHUTDOWN])
def test_dropped_coroutine_object_is_closed(reason: Any) -> None:
    """A coroutine object that is dropped does not make Python warn that it was never awaited."""
    queue = TaskQueue("q", 1, 1)
    coroutine = never_awaited()
    queue.put(make_task())
    if reason is DropReason.SHUTDOWN:
        queue.close()

    assert queue.put(make_task("task", coroutine, asynchronous=True)) is reason

    assert_closed(coroutine)
    assert read_stats(queue).dropped == 1


def test_coroutine_object_for_which_there_is_no_thread_is_closed() -> None:
    """So it is if no thread can be started."""
    coroutine = never_awaited()
    with Core(start=False, drainer=Drainer(may_start=lambda: False)) as core:
        assert core.spawn("task", coroutine) is False

        assert (core.stats().dropped, core.stats().queued) == (1, 0)
    assert_closed(coroutine)


def test_refused_task_is_a_drop() -> None:
    """A task that is not even made, since the queue is full or closed, is counted as spawned and dropped."""
    queue = TaskQueue("q", 1, 1)
    queue.put(make_task())
    assert queue.refuse("refused") is DropReason.FULL
    queue.close()
    assert queue.refuse("refused") is DropReason.SHUTDOWN

    stats, names = read_stats_by_name(queue)
    assert (stats.spawned, stats.dropped, stats.queued) == (3, 2, 1)
    assert names[0].dropped == {"full": 1, "shutdown": 1}


# The end of a queue's life.


def test_closed_queue_accepts_nothing() -> None:
    """Once a queue is closed, every task is dropped, with room or without, and what waits still runs."""
    queue, [slot] = new_queue()
    task = make_task()
    queue.put(task)
    queue.close()

    assert queue.put(make_task()) is DropReason.SHUTDOWN

    assert read_stats(queue).dropped == 1
    assert queue.take(slot) is task


def test_closed_queue_stays_closed() -> None:
    """None of its steps opens a queue again."""
    queue, _ = new_queue()
    queue.close()
    assert queue.state is State.CLOSING
    queue.cancel_waiting([])

    queue.close()
    assert queue.pause() is False
    queue.resume()

    assert queue.state is State.CLOSED
    assert queue.put(make_task()) is DropReason.SHUTDOWN


def test_close_ends_a_pause() -> None:
    """What was accepted before a shutdown runs, even if the pool was paused."""
    queue, [slot] = new_queue()
    assert queue.pause() is True
    task = make_task()
    queue.put(task)
    assert queue.take(slot) is None

    queue.close()

    assert not slot.signal.empty()
    assert queue.take(slot) is task


def test_cancel_waiting_leaves_what_runs() -> None:
    """The waiting tasks are cancelled in their order; running ones go on."""
    queue, [slot] = new_queue()
    [running] = put_and_take(queue, slot)
    first, second = make_task(), make_task()
    queue.put(first)
    queue.put(second)
    cancelled: list[Task] = []

    queue.cancel_waiting(cancelled)

    assert cancelled == [first, second]
    assert first.outcome is second.outcome is Outcome.CANCELLED
    assert queue.running() == [running]
    assert (read_stats(queue).cancelled, read_stats(queue).queued) == (2, 0)


# Taking and ending.


def test_tasks_are_taken_in_the_order_of_their_spawning() -> None:
    """The task that has waited longest is taken first, and runs from then on."""
    queue, [slot, other] = new_queue(conn_max=2)
    first, second = make_task(), make_task()
    queue.put(first)
    queue.put(second)

    assert [queue.take(slot), queue.take(other)] == [first, second]

    assert set(queue.running()) == {first, second}
    assert first.started_at >= first.spawned_at


def test_slot_that_ends_a_task_goes_on_with_the_next() -> None:
    """A slot that ends a task is given the oldest waiting one with it, and is idle if none waits."""
    queue, [slot] = new_queue()
    [first] = put_and_take(queue, slot)
    second = make_task()
    queue.put(second)

    assert queue.end(slot, first, Outcome.SUCCEEDED) is second
    assert queue.end(slot, second, Outcome.SUCCEEDED) is None

    assert slot.place is Place.IDLE
    assert slot.task is None
    assert read_stats(queue).succeeded == 2


def test_one_thread_is_woken_at_a_time() -> None:
    """A burst rings one bell. Whoever takes a task has the next slot woken, if more tasks wait."""
    queue, slots = new_queue(conn_max=3)
    for _ in range(3):
        queue.put(make_task())
    assert sum(slot.signal.qsize() for slot in slots) == 1

    for woken in range(1, 4):
        [slot] = [slot for slot in slots if not slot.signal.empty()]
        slot.signal.get()
        assert queue.take(slot) is not None
        assert len(queue.running()) == woken

    assert all(slot.signal.empty() for slot in slots)


def test_slots_that_are_opened_while_one_is_woken_are_woken() -> None:
    """A slot that was on its way to a task when it was stopped does not keep others from being woken."""
    queue, [slot] = new_queue()
    task = make_task()
    queue.put(task)
    assert not slot.signal.empty()

    queue.remove_slots()
    [new] = slots = [SlotState()]
    queue.add_slots(slots)

    assert not new.signal.empty()
    assert queue.take(slot) is None
    assert queue.take(new) is task


def test_slot_that_is_stopped_while_it_runs_a_task_gets_no_other() -> None:
    """A slot that is no longer one of the queue's ends what it runs, and what waits is left to the others.

    1. drainer: takes the slots out
    2. slot: ends its task, and has not heard yet that it has to stop
    """
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    queue.remove_slots()

    assert queue.end(slot, task, Outcome.SUCCEEDED) is None
    waiting = make_task()
    queue.put(waiting)
    [new] = slots = [SlotState()]
    queue.add_slots(slots)

    assert not new.signal.empty()
    assert queue.take(slot) is None
    assert queue.take(new) is waiting


@pytest.mark.parametrize("asynchronous", [False, True])
def test_slots_leave_only_if_none_is_busy(asynchronous: Any) -> None:
    """For a fork all slots are taken out at once, if none runs a task; then nothing starts."""
    queue, [slot, _] = new_queue(conn_max=2)
    task = make_task(asynchronous=asynchronous)
    queue.put(task)
    queue.take(slot)
    assert queue.remove_slots(if_idle=True) is False

    queue.end(slot, task, Outcome.SUCCEEDED)

    assert queue.remove_slots(if_idle=True) is True
    queue.put(make_task())
    assert queue.take(slot) is None
    assert read_stats(queue).queued == 1


def test_paused_queue_gives_nothing() -> None:
    """While it is paused, tasks wait up to the capacity, and slots are woken when it goes on."""
    queue, [slot] = new_queue(capacity=2)
    [first] = put_and_take(queue, slot)
    assert queue.pause() is True
    assert [queue.put(make_task()) for _ in range(3)] == [None, None, DropReason.FULL]
    assert queue.end(slot, first, Outcome.SUCCEEDED) is None
    assert queue.take(slot) is None
    assert slot.signal.empty()

    queue.resume()

    assert not slot.signal.empty()
    assert queue.take(slot) is not None


def test_slot_that_ends_a_task_without_taking_one_takes_it_later() -> None:
    """A slot that waits between two tasks is not idle meanwhile: nothing else is given to it."""
    queue, [slot] = new_queue()
    [first] = put_and_take(queue, slot)
    second = make_task()
    queue.put(second)

    assert queue.end(slot, first, Outcome.SUCCEEDED, take=False) is None
    assert queue.remove_slots(if_idle=True) is False
    assert read_stats(queue).running == 0

    assert queue.take(slot) is second
    queue.end(slot, second, Outcome.SUCCEEDED, take=False)
    assert queue.take(slot) is None
    assert slot.place is Place.IDLE


def test_task_given_up_is_counted_once() -> None:
    """A task that shutdown has given up is cancelled, and not counted when it ends after all."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    cancelled: list[Task] = []
    queue.give_up([task], cancelled)
    assert queue.running() == []

    queue.end(slot, task, Outcome.SUCCEEDED)

    assert cancelled == [task]
    assert (read_stats(queue).cancelled, read_stats(queue).succeeded) == (1, 0)
    assert task.outcome is Outcome.CANCELLED


def test_ended_task_cannot_be_given_up() -> None:
    """A shutdown that comes too late for a task leaves it its outcome."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    queue.end(slot, task, Outcome.SUCCEEDED)
    cancelled: list[Task] = []

    queue.give_up([task], cancelled)

    assert cancelled == []
    assert (read_stats(queue).cancelled, read_stats(queue).succeeded) == (0, 1)
    assert task.outcome is Outcome.SUCCEEDED


def test_one_side_tells_of_an_end() -> None:
    """Of a slot and a shutdown that both see the end of a task, only the first tells the listeners."""
    queue, [slot, other] = new_queue(conn_max=2)
    told_by_slot, told_by_shutdown = put_and_take(queue, slot, other)
    cancelled: list[Task] = []

    assert queue.decide(told_by_slot, Outcome.FAILED) is True
    queue.give_up([told_by_slot, told_by_shutdown], cancelled)
    assert queue.decide(told_by_shutdown, Outcome.SUCCEEDED) is False

    assert cancelled == [told_by_shutdown]
    assert (told_by_slot.outcome, told_by_shutdown.outcome) == (Outcome.FAILED, Outcome.CANCELLED)
    assert (read_stats(queue).failed, read_stats(queue).cancelled) == (1, 1)


def test_function_that_was_given_up_does_not_go_on_as_a_coroutine() -> None:
    """The coroutine that a plain function returns after it was given up is not lent to the loop."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    queue.give_up([task], [])

    assert lend(queue, slot, task) is False

    assert begin(queue, slot, task) is False


def test_lent_task_that_was_given_up_does_not_begin() -> None:
    """A coroutine that the loop has not begun when a shutdown gives it up never runs."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    lend(queue, slot, task)

    queue.give_up([task], [])

    assert begin(queue, slot, task) is False
    assert read_stats(queue).cancelled == 1


def test_lent_task_begins_once() -> None:
    """However often the loop is asked to, it begins a coroutine once."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    assert lend(queue, slot, task) is True

    assert [begin(queue, slot, task), begin(queue, slot, task)] == [True, False]

    assert read_stats(queue).running == 1


def test_lent_task_that_an_exception_has_hit_does_not_begin() -> None:
    """Once a slot that was interrupted has its task back to end it as failed, the loop does not begin it.

    1. slot: has lent the task, is interrupted, and looks what was hit
    2. loop: looks whether it has to begin it
    3. slot: ends it
    """
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    lend(queue, slot, task)

    assert queue.interrupted(slot) is task
    assert begin(queue, slot, task) is False
    queue.end(slot, task, Outcome.FAILED)

    assert read_stats(queue).failed == 1
    assert slot.place is Place.IDLE


def test_interrupted_slot_leaves_the_loop_its_task() -> None:
    """A task that the loop has begun is not hit by what interrupts the slot's thread."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    lend(queue, slot, task)
    begin(queue, slot, task)

    assert queue.interrupted(slot) is None

    assert slot.place is Place.LOOP
    assert queue.running() == [task]


def test_thread_is_woken_for_a_coroutine_that_the_loop_does_not_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the thread comes the watch, which finds out why."""
    monkeypatch.setattr("bgtasks.core.places.CLAIM_PATIENCE", 0)
    queue, [slot] = new_queue()
    queue.put(make_task(asynchronous=True))
    assert slot.signal.empty()

    queue.put(make_task(asynchronous=True))

    assert slot.signal.get_nowait() is None


def test_another_thread_is_woken_if_the_loop_claims_the_slot_of_the_first() -> None:
    """Its thread makes the calls of the coroutine, and may take long to look for tasks."""
    queue, [claimed, other] = new_queue(conn_max=2)
    queue.put(make_task(asynchronous=True))
    queue.put(make_task())
    assert (queue.waking, other.signal.empty()) == (claimed, True)

    assert queue.claim() is claimed
    assert (queue.waking, other.signal.get_nowait()) == (other, None)


def test_nothing_is_taken_back_from_the_loop_once_what_waits_was_cancelled() -> None:
    """It would wait for ever."""
    queue, [slot] = new_queue()
    task = make_task(asynchronous=True)
    queue.put(task)
    assert queue.take(slot) is task
    assert lend(queue, slot, task)
    queue.cancel_waiting([])

    queue.set_loop_blocked(True)

    assert (queue.queued, queue.running()) == (0, [task])


def test_loop_claims_an_idle_slot_for_a_coroutine_only() -> None:
    """The loop begins what waits at the head of the queue, if that is asynchronous, and wakes no thread."""
    queue, [slot] = new_queue()
    asked: list[int] = []
    queue.ask_loop = lambda: not asked.append(1)
    first, second = make_task(asynchronous=True), make_task()
    queue.put(first)
    assert slot.signal.empty()

    assert queue.claim() is slot
    queue.put(second)

    assert asked == [1]
    assert (slot.task, first.life) == (first, Life.RUNNING)
    assert queue.claim() is None
    assert queue.end(slot, first, Outcome.SUCCEEDED) is second
    assert slot.place is Place.THREAD


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.HANDED_OFF])
def test_each_outcome_has_its_figure(outcome: Outcome) -> None:
    """Each outcome is counted under its own name."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    queue.end(slot, task, outcome)

    stats = read_stats(queue)

    assert getattr(stats, outcome.label) == 1
    assert stats.spawned == balance(stats) == 1


def test_task_past_its_timeout_is_stuck_while_it_runs() -> None:
    """A running task that is past TASK_TIMEOUT counts as stuck until it ends."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    assert read_stats(queue).stuck == 0
    task.overran = True

    assert read_stats(queue).stuck == 1
    queue.end(slot, task, Outcome.SUCCEEDED)

    assert read_stats(queue).stuck == 0


def test_queue_holds_what_waits_or_runs() -> None:
    """A queue knows the tasks that wait, those that are checked out first, and those that run."""
    queue, [slot] = new_queue()
    [running] = put_and_take(queue, slot)
    first, second = make_task(), make_task()
    queue.put(first)
    queue.put(second)
    queue.check_out(1)

    assert held(queue) == [second, first]
    assert queue.running() == [running]
    assert queue.tasks() == {first, second, running}


def test_oldest_wait_is_that_of_the_oldest_task() -> None:
    """It is looked for among the waiting tasks and those that are checked out, and None if there are none."""
    queue = TaskQueue("q", 2, 1)
    assert oldest_wait(queue) is None
    old, new = make_task(), make_task()
    old.spawned_at -= 100
    queue.put(old)
    queue.put(new)
    assert 100 <= (oldest_wait(queue) or 0) < 100 + BOUND

    queue.check_out(2)

    assert 100 <= (oldest_wait(queue) or 0) < 100 + BOUND


# Checking out.


def test_checked_out_tasks_keep_their_places() -> None:
    """The newest tasks are checked out. They count as queued, and no slot takes them."""
    queue = TaskQueue("q", 3, 1)
    old, middle, new = tasks = [make_task() for _ in range(3)]
    for task in tasks:
        queue.put(task)

    assert queue.check_out(2) == [new, middle]

    assert read_stats(queue).queued == 3
    assert queue.put(make_task()) is DropReason.FULL
    slot = SlotState()
    queue.add_slots([slot])
    assert queue.take(slot) is old
    assert queue.end(slot, old, Outcome.SUCCEEDED) is None


def test_tasks_that_are_put_back_run() -> None:
    """Tasks that were put back are run by the slots, in the order in which they were put back, and once."""
    queue, [slot] = new_queue()
    [running] = put_and_take(queue, slot)
    first, second = make_task(), make_task()
    queue.put(first)
    queue.put(second)
    tasks = queue.check_out(9)
    assert queue.end(slot, running, Outcome.SUCCEEDED) is None

    queue.put_back(reversed(tasks))
    queue.put_back(tasks)

    assert not slot.signal.empty()
    assert queue.take(slot) is first
    assert queue.end(slot, first, Outcome.SUCCEEDED) is second
    assert queue.end(slot, second, Outcome.SUCCEEDED) is None
    assert (read_stats(queue).queued, read_stats(queue).succeeded) == (0, 3)


def test_task_that_is_handed_off_is_counted_once() -> None:
    """A checked-out task that the engine has counts as handed off, and its place is free."""
    queue = TaskQueue("q", 1, 1)
    task = make_task()
    queue.put(task)
    queue.check_out(1)

    assert queue.count_handed_off(task) is True

    assert queue.count_handed_off(task) is False
    assert task.outcome is Outcome.HANDED_OFF
    assert (read_stats(queue).handed_off, read_stats(queue).queued) == (1, 0)
    assert queue.put(make_task()) is None


def test_what_is_put_is_checked_out_at_once_if_so_wanted() -> None:
    """A consumer that takes all tasks gets them before any slot, up to the capacity."""
    queue, [slot] = new_queue(capacity=1)
    queue.set_check_out_new(True)
    task = make_task()
    assert [queue.put(task), queue.put(make_task())] == [None, DropReason.FULL]

    assert list(queue.checked_out) == [task]
    assert queue.take(slot) is None
    assert queue.count_handed_off(task) is True


def test_shutdown_leaves_what_is_checked_out_to_the_consumer() -> None:
    """It is not cancelled before the consumer had its time, and then it is, and is nobody's any more."""
    queue, [slot] = new_queue()
    queue.put(make_task())
    [task] = queue.check_out(1)
    cancelled: list[Task] = []
    queue.close()
    queue.cancel_waiting(cancelled)
    assert cancelled == []
    assert read_stats(queue).queued == 1

    queue.cancel_waiting(cancelled, checked_out=True)

    assert cancelled == [task]
    assert queue.count_handed_off(task) is False
    queue.put_back([task])
    assert queue.take(slot) is None
    assert (read_stats(queue).cancelled, read_stats(queue).handed_off, read_stats(queue).queued) == (1, 0, 0)


# Drains.


def test_drain_of_an_empty_queue_is_over() -> None:
    """Nobody waits for the end of nothing."""
    assert Drained(TaskQueue("q", 1, 1)).result(0) is True


def test_drain_waits_for_the_tasks_spawned_before_it() -> None:
    """It is over when what waited, what was checked out and what ran has ended."""
    queue, [slot] = new_queue()
    [running] = put_and_take(queue, slot)
    waiting, checked_out = make_task(), make_task()
    queue.put(waiting)
    queue.put(checked_out)
    queue.check_out(1)
    drained = Drained(queue)

    queue.end(slot, running, Outcome.SUCCEEDED)
    queue.end(slot, waiting, Outcome.FAILED)
    assert not drained.done()
    queue.count_handed_off(checked_out)

    assert drained.result(0) is True


def test_drain_does_not_wait_for_later_tasks() -> None:
    """A task spawned after it holds it up neither by running on nor by ending early."""
    queue, slots = new_queue(conn_max=2)
    [before] = put_and_take(queue, slots[0])
    drained = Drained(queue)
    [after] = put_and_take(queue, slots[1])

    queue.end(slots[1], after, Outcome.SUCCEEDED)
    assert not drained.done()
    put_and_take(queue, slots[1])
    queue.end(slots[0], before, Outcome.SUCCEEDED)

    assert drained.done()
    assert queue.tasks()


def test_each_drain_waits_for_its_own_tasks() -> None:
    """Two who wait from different moments are told at different moments."""
    queue, slots = new_queue(conn_max=2)
    [before] = put_and_take(queue, slots[0])
    first = Drained(queue)
    [after] = put_and_take(queue, slots[1])
    second, third = Drained(queue), Drained(queue)

    queue.end(slots[0], before, Outcome.SUCCEEDED)
    assert (first.done(), second.done(), third.done()) == (True, False, False)
    queue.end(slots[1], after, Outcome.SUCCEEDED)

    assert second.done()
    assert third.done()


def test_drain_leaves_out_who_is_excepted() -> None:
    """A task that waits for the others does not wait for itself."""
    queue, slots = new_queue(conn_max=2)
    own, other = put_and_take(queue, *slots)
    drained = Drained(queue, except_for=[own])

    queue.end(slots[1], other, Outcome.SUCCEEDED)

    assert drained.done()


@pytest.mark.parametrize("how", ["cancelled", "given up"])
def test_drain_is_over_when_its_task_will_not_run(how: Any) -> None:
    """Whoever waits for a task is told when it was cancelled or given up."""
    queue, [slot] = new_queue()
    if how == "given up":
        [task] = put_and_take(queue, slot)
    else:
        task = make_task()
        queue.put(task)
    drained = Drained(queue)
    assert not drained.done()

    if how == "cancelled":
        queue.cancel_waiting([])
    else:
        queue.give_up([task], [])

    assert drained.result(0) is True


def test_drain_is_announced_outside_the_lock() -> None:
    """A waiter's callback may do what it likes: no other thread's step waits for it."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    put: list[DropReason | None] = []
    drained = Drained(queue)
    drained.hook = lambda: in_threads(1, lambda _: put.append(queue.put(make_task())))

    queue.end(slot, task, Outcome.SUCCEEDED)

    assert put == [None]


def test_drain_that_was_given_up_is_passed_over() -> None:
    """A waiter that has given up does not disturb the task that ends, nor the other waiters."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    cancelled, other = Drained(queue), Drained(queue)
    cancelled.cancel()

    queue.end(slot, task, Outcome.SUCCEEDED)

    assert other.done()
    assert read_stats(queue).succeeded == 1


def test_drains_that_were_given_up_are_not_kept() -> None:
    """Whoever asks again and again, and gives up each time, fills no memory while a task goes on."""
    queue, [slot] = new_queue()
    put_and_take(queue, slot)
    waiters = [Drained(queue) for _ in range(100)]
    while waiters:
        waiters.pop().cancel()

    assert not queue.drains


def test_drain_is_announced_to_all_though_that_is_interrupted() -> None:
    """If an exception comes when one of two waiters knows of the end, the other is told after it."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    first, second = Drained(queue), Drained(queue)
    errors: list[BaseException] = [SystemExit()]
    told: list[Drained] = []

    def interrupt_once() -> None:
        if errors:
            raise errors.pop()

    first.hook = interrupt_once
    second.hook = lambda: told.append(second)
    with pytest.raises(SystemExit):
        queue.end(slot, task, Outcome.SUCCEEDED)

    queue.repair()

    assert told == [second]
    assert read_stats(queue).succeeded == 1


def test_drain_under_load_ends() -> None:
    """Whoever waits for what was spawned so far is done while others go on spawning."""
    with Core(conn_max=2) as core, Gate() as gate:
        core.spawn("before", gate)
        gate.wait_entered()
        drained = Drained(core.queue)
        with Gate() as later:
            core.spawn("after", later)
            later.wait_entered()

            gate.open()

            assert drained.result(BOUND) is True
            assert core.stats().running == 1


def test_every_drain_of_many_threads_ends(switching: None) -> None:
    """Eight threads spawn, and each waits for its own task again and again: each wait ends after its task."""
    late: list[int] = []

    with Core(capacity=1024, conn_max=4) as core:

        def spawn_and_drain(i: int) -> None:
            for _ in range(50):
                ended: list[int] = []
                core.spawn("task", ended.append, 1)
                core.drain()
                late.append(len(ended))

        in_threads(8, spawn_and_drain)

    assert late == [1] * 400


# Signal handlers and finalizers that spawn, or ask, in the middle of a step.

PACKAGE = str(Path(bgtasks.core.__file__).parent)


class Interruption(BaseException):
    """What a signal handler raises."""


class AtPoint:
    """A profile function that calls `hook` at the n-th point of the core at which a signal may arrive.

    The interpreter looks for signals as a Python function begins, and after the call of one written in C.
    """

    def __init__(self, n: int, hook: Callable[[], object]) -> None:
        self.left = n
        self._hook = hook

    def __call__(self, frame: Any, event: str, arg: Any) -> None:  # pragma: no cover  # no tracer sees it
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(PACKAGE):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                self._hook()

    def do(self, action: Callable[[], object]) -> bool:
        """Do `action` with the hook in the middle of it; False if it has no such point any more."""
        sys.setprofile(self)
        try:
            action()
        except Interruption:
            pass
        finally:
            sys.setprofile(None)
        return self.left <= 0


def interrupt() -> None:  # pragma: no cover  # no tracer sees it
    raise Interruption


class Scene:
    """A queue with room for one more, two slots that run a task, an idle one, and tasks of every kind."""

    def __init__(self) -> None:
        self.queue, self.slots = new_queue(capacity=4, conn_max=3)
        self.busy = self.slots[0]
        self.running, self.other = put_and_take(self.queue, *self.slots[:2])
        self.queue.pause()
        self.first, self.second, self.checked_out = (make_task(name) for name in ("first", "second", "out"))
        for task in (self.first, self.second, self.checked_out):
            assert self.queue.put(task) is None
        assert self.queue.check_out(1) == [self.checked_out]
        self.queue.paused = False
        self.tasks = [self.running, self.other, self.first, self.second, self.checked_out]
        self.drained = Drained(self.queue)
        self.cancelled: list[Task] = []
        self.runs: list[Task] = [self.running, self.other]

    def new(self) -> Task:
        """Return a task with a name of its own."""
        self.tasks.append(make_task(f"new-{len(self.tasks)}"))
        return self.tasks[-1]

    def work(self) -> None:
        """Have the slots do all that they can, woken by their bells, until none has anything to do."""
        idle = False
        while not idle:
            idle = True
            for slot in self.slots:
                if slot.task is None and slot.signal.empty():
                    continue
                while not slot.signal.empty():
                    slot.signal.get()
                idle = False
                task: Task | None = slot.task or self.queue.take(slot)
                while task is not None:
                    if task not in self.runs:
                        self.runs.append(task)
                    elif slot is not self.busy or task not in {self.running, self.other}:  # pragma: no branch
                        assert task in {self.running, self.other}, "it runs twice"
                    task = self.queue.end(slot, task, Outcome.SUCCEEDED)

    def assert_whole(self, n: int) -> None:
        """Assert that every task is in one place and in one figure."""
        queue = self.queue
        stats, names = read_stats_by_name(queue)
        assert stats.spawned == balance(stats), n
        assert all(map(is_balanced, names)), (n, names)
        assert stats.queued == len(held(queue)) == len(set(held(queue))) <= queue.capacity, n
        assert stats.running == len(queue.running()), n
        assert not set(held(queue)) & set(queue.running()), n
        assert all(task.life is Life.WAITING for task in held(queue)), n
        assert len(set(self.cancelled)) == len(self.cancelled) == stats.cancelled, n
        could_run = bool(queue.idle and queue.waiting) and not queue.paused
        assert not could_run or any(not slot.signal.empty() for slot in queue.idle), n


STEPS: dict[str, Callable[[Scene], object]] = {
    "put": lambda scene: scene.queue.put(scene.new()),
    "take": lambda scene: scene.queue.take(scene.slots[2]),
    "end": lambda scene: scene.queue.end(scene.busy, scene.running, Outcome.SUCCEEDED),
    "check_out": lambda scene: scene.queue.check_out(2),
    "put_back": lambda scene: scene.queue.put_back([scene.checked_out]),
    "count_handed_off": lambda scene: scene.queue.count_handed_off(scene.checked_out),
    "pause": lambda scene: scene.queue.pause(),
    "close": lambda scene: scene.queue.close(),
    "cancel_waiting": lambda scene: scene.queue.cancel_waiting(scene.cancelled, checked_out=True),
    "give_up": lambda scene: scene.queue.give_up([scene.running, scene.other], scene.cancelled),
    "count_inline": lambda scene: count_inline(scene),  # noqa: PLW0108  # defined below
    "drain_waiter": lambda scene: Drained(scene.queue),
    "stats_by_name": lambda scene: read_stats_by_name(scene.queue),
    "unseat_if_idle": lambda scene: scene.queue.remove_slots(if_idle=True),
    "repair": lambda scene: scene.queue.repair(),
}


def count_inline(scene: Scene) -> None:
    """Count a task that runs in the code that spawns it."""
    task = scene.new()
    task.started_at = monotonic()
    scene.queue.count_inline(task, Outcome.SUCCEEDED)


@pytest.mark.parametrize("step", STEPS)
def test_spawn_in_the_middle_of_a_step_finds_it_whole(step: Any) -> None:
    """Wherever a signal handler spawns in a step, its task is accepted or dropped, and all are counted."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        reasons: list[DropReason | None] = []
        point = AtPoint(n, lambda: reasons.append(scene.queue.put(scene.new())))
        if not point.do(lambda: STEPS[step](scene)):
            break

        scene.assert_whole(n)
        scene.queue.resume()
        scene.work()
        scene.assert_whole(n)
        stats = read_stats(scene.queue)
        assert (stats.queued, stats.running) == (len(scene.queue.checked_out), 0), n
        assert reasons in [[None], [DropReason.FULL], [DropReason.SHUTDOWN]], n
        assert stats.spawned == len(scene.tasks), n
    assert n > 3


@pytest.mark.parametrize("step", STEPS)
def test_snapshot_in_the_middle_of_a_step_keeps_the_equation(step: Any) -> None:
    """Wherever a signal handler asks for the figures, they add up, in the sums and for every name."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        snapshots: list[tuple[PoolStats, list[NameStats]]] = []
        point = AtPoint(n, lambda: snapshots.append(read_stats_by_name(scene.queue)))
        if not point.do(lambda: STEPS[step](scene)):
            break

        [(stats, names)] = snapshots
        assert stats.spawned == balance(stats), n
        assert all(map(is_balanced, names)), n
    assert n > 3


@pytest.mark.parametrize("step", STEPS)
def test_drain_that_begins_in_the_middle_of_a_step_ends(step: Any) -> None:
    """Wherever a signal handler begins to wait in a step, it waits for what does not end in that step."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        drains: list[Drained] = []
        point = AtPoint(n, lambda: drains.append(Drained(scene.queue)))
        if not point.do(lambda: STEPS[step](scene)):
            break

        scene.queue.resume()
        scene.work()
        scene.queue.cancel_waiting(scene.cancelled, checked_out=True)
        assert drains[0].done(), n
    assert n > 3


@pytest.mark.parametrize("drop", [False, True])
def test_spawn_in_the_middle_of_a_snapshot_leaves_that_whole(drop: bool) -> None:
    """Wherever a signal handler spawns while the figures are read, those that were read add up."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        if drop:
            scene.queue.put(scene.new())  # the last place
        snapshots: list[tuple[PoolStats, list[NameStats]]] = []
        names_of_tasks = iter([scene.first.name, "unknown"])
        point = AtPoint(n, lambda: [scene.queue.put(make_task(name)) for name in names_of_tasks])
        if not point.do(lambda: snapshots.append(read_stats_by_name(scene.queue))):
            break

        [(stats, names)] = snapshots
        assert stats.spawned == balance(stats), n
        assert all(map(is_balanced, names)), (n, names)
    assert n > 10


def test_shutdown_in_the_middle_of_a_put_is_whole() -> None:
    """Wherever a signal handler shuts the queue down in a put, the task is dropped or cancelled, once.

    1. spawner: appends its task
    2. signal handler: closes the queue and cancels what waits
    3. spawner: looks again, and finds nothing to take back
    """
    ends = set()
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        task = scene.new()
        reasons: list[DropReason | None] = []
        point = AtPoint(n, lambda: (scene.queue.close(), STEPS["cancel_waiting"](scene)))
        if not point.do(lambda: reasons.append(scene.queue.put(task))):
            break

        assert reasons in [[None], [DropReason.SHUTDOWN]], n
        assert (task in scene.cancelled) is (reasons == [None]), n
        scene.assert_whole(n)
        scene.work()
        assert scene.runs == [scene.running, scene.other], n
        assert scene.drained.done(), n
        ends.add(reasons[0])
    assert ends == {None, DropReason.SHUTDOWN}


def test_put_inside_put_has_one_place() -> None:
    """Of two spawns for the last place, one in the middle of the other, exactly one is accepted."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        reasons: list[DropReason | None] = []
        point = AtPoint(n, lambda: reasons.append(scene.queue.put(scene.new())))
        if not point.do(lambda: reasons.append(scene.queue.put(scene.new()))):
            break

        assert sorted(reasons, key=str) == [DropReason.FULL, None], n
        assert len(held(scene.queue)) == scene.queue.capacity, n


# Exceptions from outside in the middle of a step.


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("step", ["put", "count_inline"])
def test_interrupted_spawn_has_happened_or_not(step: Any, full: bool) -> None:
    """Wherever a signal handler raises in a spawn, it has happened or not, and no wake-up is lost."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        if full:
            scene.queue.put(scene.new())
        if not AtPoint(n, interrupt).do(lambda: STEPS[step](scene)):
            break

        scene.assert_whole(n)
        scene.work()
        scene.queue.count_handed_off(scene.checked_out)
        stats = read_stats(scene.queue)
        assert stats.spawned in {len(scene.tasks) - 1, len(scene.tasks)}, n
        assert stats.succeeded + stats.handed_off + stats.dropped == stats.spawned, n
        assert stats.dropped <= full, n
        assert scene.drained.done(), n


@pytest.mark.parametrize(
    "step",
    ["put_back", "count_handed_off", "close", "cancel_waiting", "give_up", "pause", "repair"],
)
def test_interrupted_step_is_finished_by_the_next_call(step: Any) -> None:
    """Wherever a signal handler raises in these, slots go on, and the next call loses and doubles nothing."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        if not AtPoint(n, interrupt).do(lambda: STEPS[step](scene)):
            break

        scene.assert_whole(n)
        if step != "give_up":  # it comes before the tasks end
            scene.work()
            scene.assert_whole(n)
        assert scene.queue.put(scene.new()) in {None, DropReason.SHUTDOWN}, n
        STEPS[step](scene)
        scene.queue.resume()
        scene.work()
        scene.queue.count_handed_off(scene.checked_out)
        scene.assert_whole(n)

        stats = read_stats(scene.queue)
        assert (stats.queued, stats.running, stats.spawned) == (0, 0, len(scene.tasks)), n
        assert scene.drained.done(), n
        assert not {*scene.cancelled} & {*scene.runs[2:]}, n
        assert all(task.life is Life.ENDED for task in scene.tasks[:-1]), n


def test_interrupted_end_is_counted_once() -> None:
    """Wherever an exception comes as a slot ends a task, that is counted once, and the next is not lost."""
    n = 0
    for n in itertools.count(1):
        scene = Scene()
        queue, busy = scene.queue, scene.busy
        if not AtPoint(n, interrupt).do(lambda: STEPS["end"](scene)):
            break

        queue.repair()
        hit = queue.interrupted(busy)
        if hit is not None:
            queue.end(busy, hit, Outcome.FAILED)
        scene.assert_whole(n)
        scene.work()
        queue.count_handed_off(scene.checked_out)

        stats = read_stats(queue)
        assert (stats.succeeded + stats.failed, stats.handed_off) == (4, 1), n
        assert stats.failed == (hit is not None), n
        assert scene.drained.done(), n


# Parts.


def test_coroutine_object_is_called_once_by_being_awaited() -> None:
    """A task that is a coroutine object is that object; a function is called with its arguments."""
    coroutine = never_awaited()
    task = make_task("object", coroutine, asynchronous=True)

    assert task.call() is coroutine
    assert make_task("function", max, 1, 2).call() == 2

    task.discard()


def test_ended_task_is_not_kept() -> None:
    """A queue keeps the figures of the tasks that have ended and nothing else of them."""
    queue, [slot] = new_queue()
    [task] = put_and_take(queue, slot)
    drained = Drained(queue)
    queue.decide(task, Outcome.SUCCEEDED)
    queue.end(slot, task, Outcome.SUCCEEDED)

    ended = weakref.ref(task)
    del task

    assert drained.done()
    assert ended() is None


@pytest.mark.skipif(
    sysconfig.get_config_var("Py_GIL_DISABLED") == 1, reason="frees an object when its thread next runs"
)
def test_argument_that_spawns_as_it_is_freed_is_not_in_the_way() -> None:
    """A __del__ that spawns from wherever it is called gets its task in, and holds nothing up."""
    ran: list[str] = []

    class Spawns:
        def __del__(self) -> None:
            core.spawn("last", ran.append, "last")

    with Core(conn_max=1) as core:
        core.spawn("first", lambda _: ran.append("first"), Spawns())
        wait_until(lambda: "last" in ran)  # the slot frees it after the task has ended
        with after_call(core.queue, "put", Spawns):
            core.spawn("second", ran.append, "second")
        core.drain()

    assert sorted(ran) == ["first", "last", "last", "second"]


# A model of it all.


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a model of it: lists, a counter for each outcome, and a set for each drain.

    The rules do what spawners, the slots' threads, the loop, a consumer and a shutdown do. Which slot wakes
    is left to the queue. But tasks are taken in their order, and when all bells that were rung were heard and
    the loop has claimed what it was asked to, nothing waits that could run.
    """

    CAPACITY = 3
    CONN_MAX = 2

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.slots = new_queue(self.CAPACITY, self.CONN_MAX)
        self.queue.ask_loop = self.ask_loop
        self.asked = 0  # calls of `claim` that the loop has to do
        self.waiting: list[Task] = []
        self.checked_out: list[Task] = []
        self.running: dict[SlotState, Task] = {}
        self.between: list[SlotState] = []  # slots that have ended a task and not asked for the next
        self.given_up: set[Task] = set()  # of the running ones
        self.ended = dict.fromkeys(Outcome, 0)
        self.dropped = 0
        self.spawned = 0
        self.state = State.OPEN
        self.paused = False
        self.blocked = False
        self.past: list[Task] = []
        self.drains: list[tuple[Drained, set[Task]]] = []

    def ask_loop(self) -> None:
        self.asked += 1

    # Spawners.

    @rule(asynchronous=st.booleans())
    def put(self, asynchronous: bool) -> None:
        task = make_task(asynchronous=asynchronous)
        self.spawned += 1
        if self.state is not State.OPEN:
            expected = DropReason.SHUTDOWN
        elif len(self.waiting) + len(self.checked_out) == self.CAPACITY:
            expected = DropReason.FULL
        else:
            expected = None
            self.waiting.append(task)
        self.dropped += expected is not None

        assert self.queue.put(task) is expected

    @rule()
    def run_inline(self) -> None:
        task = make_task()
        task.started_at = monotonic()
        self.spawned += 1
        self.ended[Outcome.FAILED] += 1

        self.queue.count_inline(task, Outcome.FAILED)

    # Slots and the loop.

    def _expect_given(self, slot: SlotState) -> Task | None:
        """Return the task that `slot` gets if it asks for one."""
        ready = self._ready()
        if not ready:
            return None
        self.running[slot] = task = ready[0]
        self.waiting.remove(task)
        return task

    def _ready(self) -> list[Task]:
        """Return the tasks that may be given, oldest first."""
        return [task for task in self.waiting if not (self.paused or (self.blocked and task.asynchronous))]

    @rule(blocked=st.booleans())
    def block_loop(self, blocked: bool) -> None:
        """The loop does not answer: what it has not begun waits again, if there is room. Or it answers."""
        lent = [slot for slot in self._lent() if self.running[slot] not in self.given_up and blocked]
        for slot in sorted(lent, key=lambda slot: self.running[slot].started_at, reverse=True):
            if len(self.held()) < self.CAPACITY:
                self.waiting.insert(0, self.running.pop(slot))
        self.blocked = blocked

        self.queue.set_loop_blocked(blocked)

    @rule(data=st.data())
    def take(self, data: Any) -> None:
        """A slot's thread looks what to do, rung or not."""
        slot = data.draw(st.sampled_from(self.slots))
        self._hear(slot)

    def _hear(self, slot: SlotState) -> None:
        while not slot.signal.empty():
            slot.signal.get()
        if slot in self.running:
            task = self.running[slot]
            expected = task if slot.place is Place.THREAD else None
        else:
            if slot in self.between:
                self.between.remove(slot)
            expected = self._expect_given(slot)

        assert self.queue.take(slot) is expected

    @precondition(lambda self: self.asked)
    @rule()
    def claim(self) -> None:
        self.asked -= 1
        free = [slot for slot in self.slots if slot not in self.running and slot not in self.between]
        expected = bool(free) and any(task.asynchronous for task in self._ready()[:1])

        slot = self.queue.claim()

        assert (slot is not None) is expected
        if slot is not None:
            assert slot in free
            assert slot.task is self.waiting[0]
            self.running[slot] = self.waiting.pop(0)

    def _lent(self) -> list[SlotState]:
        return [slot for slot in self.running if slot.place is Place.LENT]

    @precondition(lambda self: self._lent())
    @rule(data=st.data())
    def begin_lent(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(self._lent()))
        task = self.running[slot]

        assert begin(self.queue, slot, task) is (task not in self.given_up)
        assert begin(self.queue, slot, task) is False

    @precondition(lambda self: any(slot.place is Place.THREAD for slot in self.running))
    @rule(data=st.data())
    def lend(self, data: Any) -> None:
        slot = data.draw(st.sampled_from([slot for slot in self.running if slot.place is Place.THREAD]))
        task = self.running[slot]

        assert lend(self.queue, slot, task) is (task not in self.given_up)

    def begun(self) -> list[SlotState]:
        """Return the slots whose tasks the loop has begun."""
        return [
            slot
            for slot, task in self.running.items()
            if slot.place is Place.LOOP and task not in self.given_up
        ]

    @precondition(lambda self: self.begun())
    @rule(data=st.data())
    def return_to_thread(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(self.begun()))

        assert return_to_thread(self.queue, slot, self.running[slot]) is True

        assert self.queue.take(slot) is self.running[slot]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def interrupted(self, data: Any) -> None:
        """An exception from outside hits a slot that has a task: the task fails, or goes on on the loop."""
        slot = data.draw(st.sampled_from(list(self.running)))
        task = self.running[slot]
        goes_on = slot.place is Place.LOOP

        assert self.queue.interrupted(slot) is (None if goes_on else task)

        if not goes_on:
            assert begin(self.queue, slot, task) is False
            self._end(slot, Outcome.FAILED, takes=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), takes=st.booleans())
    def end(self, data: Any, outcome: Outcome, takes: bool) -> None:
        self._end(data.draw(st.sampled_from(list(self.running))), outcome, takes=takes)

    def _end(self, slot: SlotState, outcome: Outcome, *, takes: bool) -> None:
        task = self.running.pop(slot)
        if task in self.given_up:
            self.given_up.remove(task)
        else:
            self.ended[outcome] += 1
            self._over(task)
        if takes:
            expected = self._expect_given(slot)
        else:
            expected = None
            slot.place = Place.THREAD  # only a thread waits between two tasks
            self.between.append(slot)

        assert self.queue.end(slot, task, outcome, take=takes) is expected

    @precondition(lambda self: self.between)
    @rule(data=st.data())
    def next(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(self.between))
        self.between.remove(slot)

        assert self.queue.take(slot) is self._expect_given(slot)

    @rule()
    def repair(self) -> None:
        """An exception from outside changes nothing: at most it wakes who need not be woken."""
        self.queue.repair()

    @precondition(lambda self: not self.running and not self.between)
    @rule()
    def fork(self) -> None:
        """All slots leave, and new ones come: what was rung, and what the loop was asked, is forgotten."""
        assert self.queue.remove_slots(if_idle=True) is True
        assert [self.queue.take(slot) for slot in self.slots] == [None] * self.CONN_MAX
        self.asked = 0
        self.slots = [SlotState() for _ in range(self.CONN_MAX)]
        self.queue.add_slots(self.slots)

    @precondition(lambda self: self.running)
    @rule()
    def fork_while_busy(self) -> None:
        assert self.queue.remove_slots(if_idle=True) is False

    @rule()
    def rest(self) -> None:
        """Every bell is heard, and the loop claims. Then nothing waits that could run."""
        while self.asked or any(not slot.signal.empty() for slot in self.slots):
            for slot in self.slots:
                if not slot.signal.empty():
                    self._hear(slot)
            if self.asked:
                self.claim()

        free = [slot for slot in self.slots if slot not in self.running and slot not in self.between]
        could_run = any(not (self.blocked and task.asynchronous) for task in self.waiting)
        assert not could_run or not free or self.paused

    # A consumer that may hand tasks off.

    @rule(number=st.integers(1, 3))
    def check_out(self, number: int) -> None:
        expected = self.waiting[::-1][:number]
        del self.waiting[len(self.waiting) - len(expected) :]
        self.checked_out += expected

        assert self.queue.check_out(number) == expected

    @precondition(lambda self: self.checked_out and self.state is not State.CLOSED)
    @rule(data=st.data())
    def put_back(self, data: Any) -> None:
        tasks = data.draw(st.lists(st.sampled_from(self.checked_out), unique=True, min_size=1))
        self.checked_out = [task for task in self.checked_out if task not in tasks]
        self.waiting += tasks

        self.queue.put_back([*tasks, *self.past[-1:], *self.running.values()])

    @precondition(lambda self: self.checked_out)
    @rule(data=st.data())
    def hand_off(self, data: Any) -> None:
        task = data.draw(st.sampled_from(self.checked_out))
        self.checked_out.remove(task)
        self.ended[Outcome.HANDED_OFF] += 1
        self._over(task)

        assert self.queue.count_handed_off(task) is True

    @precondition(lambda self: self.past or self.waiting)
    @rule(data=st.data())
    def hand_off_what_is_not_checked_out(self, data: Any) -> None:
        assert self.queue.count_handed_off(data.draw(st.sampled_from([*self.past, *self.waiting]))) is False

    # Whoever pauses, ends or waits.

    @rule()
    def pause(self) -> None:
        self.paused = self.state is State.OPEN

        assert self.queue.pause() is self.paused

    @rule()
    def resume(self) -> None:
        self.paused = False

        self.queue.resume()

    @rule()
    def close(self) -> None:
        if self.state is State.OPEN:
            self.state = State.CLOSING
        self.paused = False

        self.queue.close()

    @precondition(lambda self: self.state is not State.OPEN)
    @rule(checked_out=st.booleans())
    def cancel_waiting(self, checked_out: bool) -> None:
        self.state = State.CLOSED
        expected, self.waiting = self.waiting, []
        if checked_out:
            expected += self.checked_out
            self.checked_out = []
        self.ended[Outcome.CANCELLED] += len(expected)
        for task in expected:
            self._over(task)
        cancelled: list[Task] = []

        self.queue.cancel_waiting(cancelled, checked_out=checked_out)

        assert cancelled == expected

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_up(self, data: Any) -> None:
        tasks = data.draw(st.lists(st.sampled_from(list(self.running.values())), unique=True))
        expected = [task for task in tasks if task not in self.given_up]
        self.given_up.update(tasks)
        self.ended[Outcome.CANCELLED] += len(expected)
        for task in expected:
            self._over(task)
        cancelled: list[Task] = []

        self.queue.give_up([*tasks, *self.past], cancelled)

        assert cancelled == expected

    @rule(data=st.data())
    def wait(self, data: Any) -> None:
        running = [task for task in self.running.values() if task not in self.given_up]
        excepted = data.draw(st.sets(st.sampled_from(running))) if running else set()
        pending = {*self.held(), *running} - excepted

        self.drains.append((Drained(self.queue, except_for=excepted), pending))

    def _over(self, task: Task) -> None:
        self.past.append(task)
        for _, pending in self.drains:
            pending.discard(task)

    # What holds after each.

    def held(self) -> list[Task]:
        return [*self.waiting, *self.checked_out]

    @invariant()
    def figures_are_those_of_the_model(self) -> None:
        queue, (stats, [*names]) = self.queue, read_stats_by_name(self.queue)
        running = [task for task in self.running.values() if task not in self.given_up]

        assert stats.spawned == balance(stats) == self.spawned
        assert stats.queued == len(self.held()) <= self.CAPACITY
        assert stats.running == len(running)
        assert stats.dropped == self.dropped
        assert {outcome: getattr(stats, outcome.label) for outcome in Outcome} == self.ended
        assert queue.state is self.state
        assert list(queue.waiting) == self.waiting
        assert set(queue.checked_out) == set(self.checked_out)
        assert set(queue.running()) == set(running)
        assert queue.tasks() == {*self.held(), *running}
        assert all(map(is_balanced, names))
        assert sum(of.spawned for of in names) == self.spawned

    @invariant()
    def drains_are_over_when_their_tasks_have_ended(self) -> None:
        for reached, pending in self.drains:
            assert reached.done() is not bool(pending)


QueueMachine.TestCase.__doc__ = "Whatever order the steps come in, the queue does as the model does."
TestQueueAgainstModel = QueueMachine.TestCase
