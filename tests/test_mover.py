"""The mover: what is moved when, and that no interleaving runs a task twice or loses it."""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Self, cast

import pytest

from bgtasks import mover as module
from bgtasks.mover import Fate, HandoffSlots, Life
from bgtasks.queue import DropReason, Outcome, State, TaskQueue
from bgtasks.slots import Hooks
from tests.core import Core, ForcedDeque, ForcedSet, exit_, interrupt, make_task
from tests.engines import Ends, FakeEngine
from tests.gate import BOUND, Gate, wait_until


class HandoffCore(Core):
    """A pool that hands off to an engine which the test controls, and a record of how its tasks end."""

    def __init__(self, *, always: bool = False, capacity: int = 8, conn_max: int = 2, **kwargs: Any) -> None:
        self.engine = FakeEngine()
        self.ends = Ends()
        self.ran: list[str] = []
        slots = partial(HandoffSlots, engine=self.engine, always=always)
        super().__init__(capacity=capacity, conn_max=conn_max, slots=slots, **kwargs)
        assert isinstance(self.slots, HandoffSlots)
        self.mover = self.slots.mover

    def __enter__(self) -> Self:
        self.ends.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            super().__exit__(*exc_info)
        finally:
            self.ends.__exit__()

    def put(self, *names: Any) -> None:
        """Spawn a task of each name, which notes that it ran here."""
        for name in names:
            assert self.spawn(name, self.ran.append, name)

    @contextmanager
    def mover_held(self) -> Iterator[None]:
        """Keep the mover from looking at the queue."""
        self.wait_rest(keep=True)
        yield
        self.mover.release()

    def wait_rest(self, *, keep: bool = False) -> None:
        """Wait until the mover has nothing to do."""
        wait_until(self.mover.seize)
        if not keep:
            self.mover._token.append(None)

    def assert_each_once(self, *names: Any) -> None:
        """Every task was run here or is the engine's: one of the two, and once."""
        assert Counter(self.ran + self.engine.taken) == Counter(names)


def numbers(first: Any, last: Any) -> list[Any]:
    return [str(number) for number in range(first, last + 1)]


# Overflow.


def test_overflow_moves_the_newest_tasks() -> None:
    """At three quarters of CAPACITY the newest waiting tasks go to the engine, until half of it is left."""
    with HandoffCore() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 5))
        assert core.engine.taken == []

        core.put("6")

        assert core.ends.wait(Outcome.HANDED_OFF, 2) == ["5", "6"]
        gate.open()
        core.drain()
        assert core.engine.taken == ["6", "5"]
        assert core.ran == numbers(1, 4)
        assert core.stats().handed_off == 2


def test_a_queue_below_the_mark_is_left_alone() -> None:
    """What can wait, waits: no task is moved, and the mover is not even woken."""
    with HandoffCore() as core:
        for _ in range(10):
            core.put("quick")
            core.drain()

        assert core.engine.batches == []


def test_the_first_look_leaves_a_queue_below_the_mark_alone() -> None:
    """The mover looks as soon as it has its thread, at five tasks that may all wait, and moves none."""
    with HandoffCore(start=False) as core:
        core.drainer._start_token.clear()  # somebody is about to start it, so spawns do not
        core.slots.pause()
        core.put(*numbers(1, 5))
        core.drainer.start()
        core.wait_rest()

        assert core.engine.batches == []
        core.slots.resume()
        core.drain()
        assert core.ran == numbers(1, 5)


def test_the_mover_acts_while_every_slot_is_busy() -> None:
    """One of the CONN_MAX slots is kept for moving, so long tasks in all others hold nothing up."""
    with HandoffCore(conn_max=4) as core, Gate() as gate:
        for _ in range(4):
            core.spawn("held", gate)
        gate.wait_entered(3)
        core.put(*numbers(1, 5))

        assert core.ends.wait(Outcome.HANDED_OFF, 2)
        assert gate.peak == 3


def test_a_burst_far_beyond_the_capacity_is_not_dropped_if_the_engine_keeps_up() -> None:
    """Ten times CAPACITY, spawned at the engine's pace: every task is run here or taken, once."""
    names = numbers(1, 80)
    with HandoffCore() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        for number, name in enumerate(names, 1):
            core.put(name)
            if number > 5:
                core.ends.wait(Outcome.HANDED_OFF, 2 * ((number - 4) // 2))
        gate.open()
        core.drain()

        core.assert_each_once(*names)
        assert core.stats().dropped == 0


def test_a_slow_engine_lets_the_queue_fill_and_drop() -> None:
    """Tasks on their way keep their places, so the bound of waiting tasks holds whatever the engine does."""
    with HandoffCore() as core, Gate() as gate, Gate() as engine:
        core.engine.before = engine
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        engine.wait_entered()
        core.put("7", "8")

        assert core.spawn("one too many", print) is False
        assert core.stats().queued == 8
        engine.open()
        gate.open()
        core.drain()
        core.assert_each_once(*numbers(1, 8))


def test_tasks_that_cannot_travel_stay_in_their_order() -> None:
    """The mover passes over them, and slots run them as they came."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.stays = lambda name: int(name) % 2 == 0
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        core.ends.wait(Outcome.HANDED_OFF, 2)
        gate.open()
        core.drain()

        assert core.engine.taken == ["5", "3"]
        assert core.ran == ["1", "2", "4", "6"]


def test_a_queue_of_tasks_that_cannot_travel_is_not_searched_at_each_spawn() -> None:
    """After a look in vain the mover rests a moment, or it would take the interpreter from everybody."""
    looks = []
    with HandoffCore(capacity=100) as core, Gate() as gate:

        def stays(name: str) -> bool:
            looks.append(name)
            return True

        core.engine.stays = stays
        core.spawn("held", gate)
        gate.wait_entered()
        with core.mover_held():
            core.put(*numbers(1, 75))
        core.wait_rest()
        seen = len(looks)
        core.mover._rest_until = monotonic() + BOUND
        core.put(*numbers(76, 99))

        assert seen >= 75
        assert len(looks) == seen


def test_each_move_is_counted_at_any_moment() -> None:
    """G5 holds in every snapshot while tasks are spawned, run and moved."""
    with HandoffCore(capacity=64, conn_max=3) as core:
        stop = threading.Event()
        bad = []

        def watch() -> None:
            while not stop.is_set():
                stats = core.stats()
                bad.extend([stats] * (stats.queued > 64 or stats.running > 2))

        watcher = threading.Thread(target=watch)
        watcher.start()
        accepted = sum(core.spawn("task", core.ran.append, "task") for _ in range(5000))
        core.drain()
        stop.set()
        watcher.join(BOUND)

        stats = core.stats()
        assert not bad
        assert stats.spawned == 5000 == accepted + stats.dropped
        assert stats.handed_off == len(core.engine.taken)
        assert stats.succeeded == len(core.ran)
        assert accepted == stats.handed_off + stats.succeeded


# Always.


def test_always_hands_every_task_off() -> None:
    """The pool is the outbox of the engine: no slot runs what can travel, and the engine gets it in order."""
    with HandoffCore(always=True, capacity=1000) as core:
        core.put(*numbers(1, 300))
        core.drain()

        assert core.engine.taken == numbers(1, 300)
        assert core.ran == []
        assert max(core.engine.batches) <= module.BATCH


def test_always_runs_here_what_cannot_travel() -> None:
    """A lambda among the others is run by a slot."""
    with HandoffCore(always=True) as core:
        core.engine.stays = lambda name: name == "stays"
        core.put("1", "stays", "2")
        core.drain()

        assert core.engine.taken == ["1", "2"]
        assert core.ran == ["stays"]


def test_always_with_an_engine_that_is_down_runs_here_and_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The failed batch, what waits behind it and what follows is run here, until the engine has rested."""
    monkeypatch.setattr(module, "REST", BOUND)
    with HandoffCore(always=True) as core:
        core.engine.before = fail
        core.put("1", "2")
        core.ends.wait(Outcome.SUCCEEDED, 2)
        core.put("3")
        core.ends.wait(Outcome.SUCCEEDED, 3)
        core.wait_rest()

        core.engine.before = lambda parcels: None
        core.mover._rest_until = 0.0
        core.put("4")  # rings, and the mover opens the outbox again
        core.drain()
        core.wait_rest()
        core.put("5")
        core.drain()

        assert core.engine.taken == ["5"]
        core.assert_each_once(*numbers(1, 5))


def fail(parcels: Any) -> None:
    raise ConnectionError("the engine is down")


def test_always_with_an_engine_slower_than_the_spawners_runs_some_here() -> None:
    """Above the mark new tasks are given to the slots: better run here than dropped."""
    with HandoffCore(always=True) as core, Gate() as engine:
        core.engine.before = engine
        core.put("1")
        engine.wait_entered()
        core.put(*numbers(2, 6))
        for number in range(7, 21):
            core.put(str(number))
            core.ends.wait(Outcome.SUCCEEDED, number - 6)

        engine.open()
        core.drain()
        core.assert_each_once(*numbers(1, 20))
        core.wait_rest()
        core.put("21")
        core.drain()
        assert core.engine.taken[-1] == "21"


def test_always_with_an_engine_that_hangs_runs_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """After STALL seconds without an answer, what waits behind the batch is run here."""
    monkeypatch.setattr(module, "STALL", 0.01)
    with HandoffCore(always=True) as core, Gate() as engine:
        core.engine.before = engine
        core.put("1")
        engine.wait_entered()
        core.put("2", "3")

        assert core.ends.wait(Outcome.SUCCEEDED, 2) == ["2", "3"]
        engine.open()
        core.drain()
        core.assert_each_once("1", "2", "3")


def test_a_batch_that_takes_its_time_is_not_a_hanging_one() -> None:
    """The look that was due when a batch began finds it young, and comes again."""
    with HandoffCore(always=True, start=False) as core:
        core.mover._sent_at = monotonic()
        later = []
        core.mover._later = lambda delay, callback: later.append(callback)
        core.queue.outbox.append(make_task())

        core.mover._watch()
        later.pop()()
        assert core.queue.outbox
        assert later

        core.mover._sent_at = 0.0
        later.pop()()
        assert not later
        core.queue.outbox.clear()


# An engine that fails.


def test_an_engine_that_is_down_costs_no_task() -> None:
    """Tasks stay and run here, and a warning says why."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.before = fail
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        [line] = core.logs.wait("could not be handed off")
        gate.open()
        core.drain()

        assert "'core' could not be handed off to the engine 'engine', 1 times" in line
        assert "ConnectionError: the engine is down" in line
        assert sorted(core.ran) == numbers(1, 6)
        assert core.engine.taken == []
        assert core.stats().handoff_failures >= 1


def test_an_engine_that_stays_down_costs_one_warning_a_minute() -> None:
    """The next warning says how often it failed since the last one."""
    with HandoffCore(start=False) as core:
        for _ in range(3):
            core.mover._fail(ConnectionError("down"))
        assert len(core.logs.of("could not be handed off")) == 1

        core.mover._quiet_until = 0.0
        core.mover._fail(ConnectionError("down"))

        assert "3 times since the last warning" in core.logs.of("could not be handed off")[1]
        assert core.stats().handoff_failures == 4


def test_a_failing_engine_rests_before_it_is_tried_again() -> None:
    """A spawn does not ring while the engine rests."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.before = fail
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        core.wait_rest()
        core.engine.before = lambda parcels: None
        core.mover._rest_until = monotonic() + BOUND
        core.put("7", "8")
        gate.open()
        core.drain()

        assert core.engine.taken == []
        assert core.ran == numbers(1, 8)


def test_a_batch_that_fails_in_the_middle_keeps_what_was_taken() -> None:
    """A broker has some and not the others: those are run here, and no task is run twice."""

    def half(parcels: Any) -> None:
        for parcel in parcels[:1]:
            parcel.fate = Fate.TAKEN
            core.engine.taken.append(parcel.content)
        raise ConnectionError("lost")

    with HandoffCore() as core, Gate() as gate:
        core.engine.before = half
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        core.ends.wait(Outcome.HANDED_OFF)
        gate.open()
        core.drain()

        assert core.engine.taken == ["6"]
        core.assert_each_once(*numbers(1, 6))


@pytest.mark.parametrize("answer", [Fate.TAKEN, Fate.HERE])
def test_a_commit_that_raised_is_decided_by_the_engine(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the engine says what it has, the task is run by nobody; then by exactly one."""
    monkeypatch.setattr(module, "REST", 0.01)
    asked = threading.Event()

    def lose_the_answer(parcels: Any) -> None:
        for parcel in parcels:
            parcel.fate = Fate.UNSURE
        core.engine.before = lambda parcels: None
        raise ConnectionError("lost")

    def answers(parcel: Any) -> Any:
        asked.set()
        core.engine.answers = lambda parcel: answer
        return Fate.UNSURE

    with HandoffCore() as core, Gate() as gate:
        core.engine.before = lose_the_answer
        core.engine.answers = answers
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        assert asked.wait(BOUND)
        gate.open()
        core.drain()

        core.assert_each_once(*numbers(1, 6))
        assert (core.engine.taken == ["6", "5"]) is (answer is Fate.TAKEN)


def test_an_engine_that_cannot_be_asked_keeps_its_tasks_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold their places and are neither run nor counted, and a shutdown says what they are."""
    monkeypatch.setattr(module, "REST", 0.01)

    def lose_the_answer(parcels: Any) -> None:
        for parcel in parcels:
            parcel.fate = Fate.UNSURE
        raise ConnectionError("lost")

    asked = threading.Event()

    def cannot(parcels: Any) -> None:
        asked.set()
        raise ConnectionError("still lost")

    with HandoffCore() as core, Gate() as gate:
        core.engine.before = lose_the_answer
        core.engine.confirm = cannot
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        assert asked.wait(BOUND)
        gate.open()
        wait_until(lambda: core.stats().succeeded == 5)

        assert core.stats().queued == 2
        assert core.ran == numbers(1, 4)
        assert core.close(0.05) == 2
        assert core.logs.of(
            "the engine 'engine' has not answered for 2 tasks of pool 'core': it may have them"
        )
        assert sorted(core.ends.of(Outcome.CANCELLED)) == ["5", "6"]


# Shutdown.


def test_a_shutdown_moves_everything_that_waits() -> None:
    """The running task gets its time, those behind it go to the engine, and nothing is cancelled."""
    with HandoffCore(capacity=1000) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 300))
        closing = threading.Thread(target=core.close, args=(BOUND,))
        closing.start()
        core.ends.wait(Outcome.HANDED_OFF, 300)
        gate.open()
        closing.join(BOUND)

        assert sorted(core.engine.taken, key=int) == numbers(1, 300)
        assert core.ran == []
        assert core.ends.of(Outcome.CANCELLED) == []


def test_a_shutdown_tries_a_failing_engine_again() -> None:
    """As long as there is time, what could not be moved is tried again."""
    failures: list[Any] = []

    def fail_twice(parcels: Any) -> None:
        failures.append(None)
        if len(failures) == 2:
            core.engine.before = lambda parcels: None
        raise ConnectionError("down")

    with HandoffCore() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.put("1", "2")
        core.engine.before = fail_twice
        closing = threading.Thread(target=core.close, args=(BOUND,))
        closing.start()
        core.ends.wait(Outcome.HANDED_OFF, 2)
        gate.open()
        closing.join(BOUND)

        assert len(failures) == 2
        core.assert_each_once("1", "2")


def test_what_cannot_travel_is_run_or_reported_at_shutdown() -> None:
    """A shutdown with an engine still runs here what cannot go there, as far as time allows."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.stays = lambda name: name != "travels"
        core.spawn("held", gate)
        gate.wait_entered()
        core.put("stays", "travels")
        closing = threading.Thread(target=core.close, args=(BOUND,))
        closing.start()
        core.ends.wait(Outcome.HANDED_OFF)
        gate.open()
        closing.join(BOUND)

        assert core.ran == ["stays"]
        assert core.engine.taken == ["travels"]


def test_a_batch_that_outlives_the_shutdown_is_reported_once() -> None:
    """The interleaving is forced.

    1. A batch is on its way, and the engine hangs.
    2. The shutdown's time is over: it gives the batch up, and says that the engine may have it.
    3. The engine answers. The tasks are counted already, and stay counted as they were.
    """
    with HandoffCore() as core, Gate() as gate, Gate() as engine:
        core.engine.before = engine
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        engine.wait_entered()
        gate.open()

        assert (core.close(0.0) or 0) >= 2
        stats = core.stats()
        engine.open()
        core.mover.thread.join(BOUND)

        assert core.logs.of("it may have them, or not")
        assert core.stats() == stats
        assert stats.handed_off == 0
        assert stats.spawned == 7 == stats.succeeded + stats.cancelled


def test_a_batch_that_fails_after_the_shutdown_is_not_run_either() -> None:
    """It was reported as cancelled, so nobody runs it any more: it does not go back to the waiting ones."""
    with HandoffCore() as core, Gate() as gate, Gate() as engine:

        def hang_and_fail(parcels: Any) -> None:
            engine()
            fail(parcels)

        core.engine.before = hang_and_fail
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        engine.wait_entered()
        gate.open()
        wait_until(lambda: core.stats().succeeded == 5)
        core.close(0.0)
        engine.open()
        core.mover.thread.join(BOUND)

        assert not core.queue.held()
        assert core.engine.taken == []
        assert core.ran == numbers(1, 4)
        assert sorted(core.ends.of(Outcome.CANCELLED)) == ["5", "6"]


def test_a_shutdown_begins_no_batch_that_would_end_too_late() -> None:
    """The mover knows how long the engine takes for a task, and stops in time."""
    with HandoffCore(start=False) as core:
        core.mover.life = Life.WINDING_UP
        core.mover._each = 0.1
        core.queue.waiting.append(make_task())

        core.mover.deadline = monotonic() + 1000
        assert core.mover._wanted(0) == 1
        assert core.mover._batch_size() == 2
        core.mover.deadline = monotonic() + 0.05
        assert core.mover._wanted(0) == 0
        core.mover.deadline = monotonic() - 1
        assert core.mover._batch_size() == 1
        core.queue.waiting.clear()
        core.mover.life = Life.CLOSED
        assert core.mover._wanted(0) == 0


# Interleavings.


def test_a_slot_that_takes_the_task_which_the_mover_reaches_for_has_it() -> None:
    """The interleaving is forced.

    1. The mover sees the newest task, which is the only one.
    2. A slot takes it.
    3. The mover finds nothing to take.
    """
    queue = TaskQueue("core", 8, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    assert queue.put(make_task()) is None
    taken = []
    queue.waiting.force("before pop", lambda: taken.append(queue.take(queue.accounts[0])))

    assert queue.lift(queue.accounts[1], queue.waiting, oldest=False) is None

    assert taken[0] is not None
    assert queue.moving() == []
    assert queue.stats().running == 1


def test_a_spawner_that_comes_before_the_mover_has_its_own_task_moved() -> None:
    """The interleaving is forced.

    1. The mover sees the newest task.
    2. A spawner puts a newer one.
    3. The mover takes that, and leaves the one it has seen.
    """
    queue = TaskQueue("core", 8, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    first, second = make_task("first"), make_task("second")
    queue.put(first)
    queue.waiting.force("before pop", lambda: queue.put(second))

    assert queue.lift(queue.accounts[1], queue.waiting, oldest=False) is second
    assert queue.moving() == [second]
    assert list(queue.waiting) == [first]


def test_the_mover_takes_nothing_out_of_a_swept_queue() -> None:
    """The interleaving is forced.

    1. The mover is about to take a task.
    2. A shutdown sweeps the queue; a late spawner puts a task, and will take it back.
    3. The mover leaves it to that spawner.
    """
    queue = TaskQueue("core", 8, 2)
    queue.close()
    queue.sweep()
    queue.waiting.append(make_task())

    assert queue.lift(queue.accounts[1], queue.waiting, oldest=False) is None


def test_a_task_that_comes_back_after_the_sweep_is_abandoned() -> None:
    """The interleaving is forced.

    1. A task is on its way.
    2. A shutdown sweeps the queue.
    3. The engine fails, and the task would wait for slots that are about to end: it stays on its way.
    4. The shutdown gives it up, and counts it.
    """
    queue = TaskQueue("core", 8, 2)
    task = make_task()
    queue.put(task)
    queue.lift(queue.accounts[1], queue.waiting, oldest=False)
    queue.close()
    assert queue.sweep() == []

    queue.lower(queue.accounts[1], task)
    assert list(queue.waiting) == []
    assert queue.sweep(moving=True) == [task]
    assert queue.sweep(moving=True) == [task]
    queue.lower(queue.accounts[1], task)
    assert not queue.hand_off(queue.accounts[1], task)

    assert task.outcome is Outcome.CANCELLED
    assert queue.stats().cancelled == 1
    assert queue.is_empty()


def test_an_engine_that_has_the_task_before_it_is_given_up_wins() -> None:
    """The interleaving is forced.

    1. A shutdown is about to give up what is on its way.
    2. The engine has it, and the mover counts it.
    3. The shutdown finds nothing, and counts nothing.
    """
    queue = TaskQueue("core", 8, 2)
    queue.waiting = queue.inbox = ForcedDeque()
    task = make_task()
    queue.put(task)
    queue.lift(queue.accounts[1], queue.waiting, oldest=False)

    class Moving(set[Any]):
        def pop(self) -> Any:
            queue._moving = set(self)
            assert queue.hand_off(queue.accounts[1], task)
            self.clear()
            return super().pop()

    queue._moving = Moving(queue._moving)

    assert queue.sweep(moving=True) == []

    assert task.outcome is Outcome.HANDED_OFF
    assert queue.stats().handed_off == 1
    assert queue.is_empty()


def test_a_task_on_its_way_is_waited_for() -> None:
    """drain() does not take a task that has left the waiting ones for one that has ended."""
    queue = TaskQueue("core", 8, 2)
    task = make_task()
    queue.put(task)
    queue.lift(queue.accounts[1], queue.waiting, oldest=False)
    reached = queue.all_ended()
    assert not reached.done()
    assert queue.stats().queued == 1

    queue.hand_off(queue.accounts[1], task)

    assert reached.done()


def test_a_spawner_whose_task_the_mover_has_leaves_it_there() -> None:
    """The interleaving is forced.

    1. A spawner has put its task, and finds no thread to run it.
    2. The mover has it by then.
    3. The spawner cannot take it back: it is accepted, and accounted for.
    """
    queue = TaskQueue("core", 8, 2)
    task = make_task()
    queue.put(task)
    queue.lift(queue.accounts[1], queue.waiting, oldest=False)

    assert not queue.withdraw(task, DropReason.NO_THREAD)


def test_a_task_is_taken_back_out_of_the_outbox() -> None:
    """A spawner that finds the queue swept takes its task back wherever it has put it."""
    queue = TaskQueue("core", 8, 2)
    queue.inbox = queue.outbox = ForcedDeque()
    task = make_task()
    queue.outbox.force("before append", lambda: (queue.close(), queue.sweep()))

    assert queue.put(task) is DropReason.SHUTDOWN
    assert queue.stats().dropped == 1


def test_a_sweep_finds_what_is_in_the_outbox() -> None:
    """What waits for the engine when the time is over is cancelled as the rest is."""
    queue = TaskQueue("core", 8, 2)
    queue.inbox = queue.outbox
    task = make_task()
    queue.put(task)

    assert queue.sweep() == [task]
    assert queue.state is State.CLOSED


def test_a_spawn_just_after_the_movers_look_is_seen() -> None:
    """The interleaving is forced.

    1. The mover finds nothing more to move.
    2. A spawner puts a task, and finds no token to ring with.
    3. The mover gives the token back, looks again, and moves it.
    """
    with HandoffCore(always=True) as core:
        core.wait_rest()
        put = threading.Event()
        token = core.mover._token = ForcedDeque([None])
        token.force("before append", lambda: (core.put("late"), put.set()))
        core.put("first")
        assert put.wait(BOUND)
        core.drain()

        assert core.engine.taken == ["first", "late"]


def test_tasks_spawned_before_the_threads_are_there_are_moved() -> None:
    """The first look comes with the thread, so that no ring is needed for it."""
    with HandoffCore(always=True, start=False) as core:
        core.put("early")
        core.drainer.start()
        core.drain()

        assert core.engine.taken == ["early"]


# Exceptions from outside.


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_mover_goes_on(always: bool, when: str) -> None:
    """An exception set on its thread from outside, before or after the send, loses nothing."""
    with HandoffCore(always=always) as core, Gate() as gate:

        def be_interrupted(parcels: Any) -> None:
            setattr(core.engine, when, lambda parcels: None)
            interrupt(threading.current_thread())
            while True:
                str(parcels)  # until it is delivered

        setattr(core.engine, when, be_interrupted)
        core.spawn("held", gate)
        if not always:
            gate.wait_entered()
        core.put(*numbers(1, 6))
        core.logs.wait("was interrupted; it goes on")
        gate.open()
        core.drain()

        taken = [name for name in core.engine.taken if name != "held"]
        assert Counter(core.ran + taken) == Counter(numbers(1, 6))


@pytest.mark.parametrize(
    ("of", "step"),
    [
        ("waiting", "before pop"),
        ("waiting", "after pop"),
        ("waiting", "before append"),
        ("waiting", "after append"),
        ("_moving", "after add"),
        ("_moving", "before remove"),
        ("_moving", "after remove"),
        ("_permits", "after append"),
    ],
)
def test_an_exception_at_any_step_of_a_move_loses_nothing_and_runs_nothing_twice(of: Any, step: Any) -> None:
    """The steps are those after which the interpreter may deliver an exception from outside."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.stays = lambda name: name == "6"
        core.spawn("held", gate)
        gate.wait_entered()
        core.wait_rest()
        with core.mover_held():
            core.put(*numbers(1, 6))
            make = ForcedSet if of == "_moving" else ForcedDeque
            forced: Any = make(getattr(core.queue, of))
            setattr(core.queue, of, forced)
            if of == "waiting":
                core.queue.inbox = forced
        forced.force(step, on_thread(core.mover.thread, exit_))
        core.logs.wait("was interrupted; it goes on")
        core.ends.wait(Outcome.HANDED_OFF)
        gate.open()
        core.drain()

        core.assert_each_once(*numbers(1, 6))
        stats = core.stats()
        assert (stats.queued, stats.running, stats.spawned) == (0, 0, 7)
        assert stats.handed_off == len(core.engine.taken)


def on_thread(thread: Any, step: Any) -> Any:
    """Return a hook that does `step` on `thread`, and nothing on others."""
    return lambda: step() if threading.current_thread() is thread else None


def test_a_bypass_that_was_interrupted_is_completed_by_the_next_one() -> None:
    """The task that was between the two deques is found, whichever of them it had reached."""
    for step in ("before append", "after append"):
        queue = TaskQueue("core", 8, 2)
        queue.inbox = queue.outbox
        queue.waiting = ForcedDeque()
        tasks = [make_task(name) for name in "ab"]
        for task in tasks:
            queue.put(task)
        queue.waiting.force(step, exit_)
        with pytest.raises(SystemExit):
            queue.bypass()

        queue.bypass()

        assert list(queue.waiting) == tasks
        assert not queue.outbox


def test_an_exception_as_the_mover_ends_is_reported() -> None:
    """Its thread ends all the same."""
    with HandoffCore() as core:
        core.mover.hooks = cast(Hooks, BrokenClose())
        core.drain()

    assert core.logs.of("was interrupted as it ended")


class BrokenClose:
    def clean(self) -> None:
        pass

    def close(self) -> None:
        raise SystemExit


def test_an_error_of_ours_while_packing_keeps_the_task_here() -> None:
    """Whatever pack raises is logged, and the task is run by a slot."""

    def broken(task: Any) -> None:
        raise RuntimeError("ours")

    with HandoffCore(always=True) as core:
        core.engine.pack = broken
        core.put("1")
        core.drain()

        assert core.ran == ["1"]
        assert core.logs.of("task '1' of pool 'core' could not be packed, and runs here")


# Threads and forks.


def test_without_a_thread_for_the_mover_everything_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no thread left hands nothing off, and says so."""

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    with HandoffCore(always=True, start=False) as core:
        monkeypatch.setattr(core.mover, "open", refuse)
        core.put("early")
        core.drainer.start()
        core.put("late")
        core.drain()

        assert core.ran == ["early", "late"]
        assert core.logs.of("pool 'core' hands nothing off")


def test_a_thread_that_does_not_start_leaves_the_mover_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and the next start tries again."""
    with HandoffCore(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: exit_())
            with pytest.raises(SystemExit):
                core.mover.open()

        assert core.mover.life is Life.CLOSED
        assert core.mover.seize()


def test_the_mover_steps_aside_for_a_fork_and_comes_back(patient: None) -> None:
    """An idle process has no thread of the mover's while it forks; after it, tasks are moved again."""
    with HandoffCore(always=True) as core:
        core.put("1")
        core.drain()
        core.drainer.before_fork()
        assert not core.threads()
        core.drainer.after_fork_in_parent()
        core.put("2")
        core.drain()

        assert core.engine.taken == ["1", "2"]


def test_a_fork_in_the_middle_of_a_move_takes_nothing_away() -> None:
    """A busy mover does not step aside: the parent goes on with it."""
    with HandoffCore(always=True) as core, Gate() as engine:
        core.engine.before = engine
        core.put("1")
        engine.wait_entered()
        core.drainer.before_fork()
        core.drainer.after_fork_in_parent()
        engine.open()
        core.drain()

        assert core.engine.taken == ["1"]


def test_a_fork_while_a_task_runs_leaves_the_mover_its_token() -> None:
    """The slots cannot be had, so the mover is put back."""
    with HandoffCore() as core, Gate() as gate:
        core.wait_rest()
        core.spawn("held", gate)
        gate.wait_entered()
        core.drainer.before_fork()
        core.drainer.after_fork_in_parent()

        core.put(*numbers(1, 6))
        assert core.ends.wait(Outcome.HANDED_OFF, 2)


def test_the_repr_is_a_status_line() -> None:
    """It says whose mover it is, and what it is there for."""
    with HandoffCore() as core:
        assert repr(core.mover) == "<Mover of 'core' to 'engine' open>"


def test_a_debug_line_names_each_task(caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, each move is logged with the fields that every record of a task has."""
    with HandoffCore(always=True) as core, caplog.at_level(logging.DEBUG, "bgtasks"):
        core.put("1")
        core.drain()
        core.wait_rest()

    record: Any
    [record] = [record for record in caplog.records if "handed off to" in record.getMessage()]
    assert record.getMessage() == "task '1' of pool 'core' handed off to the engine 'engine'"
    assert (record.task, record.pool, record.outcome) == ("1", "core", "handed_off")
