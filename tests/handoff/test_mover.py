"""The mover: what is moved when, and that no interleaving runs a task twice or loses it."""

import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any, cast

import pytest

from bgtasks.core.figures import Outcome
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Hooks
from bgtasks.handoff import mover as module
from bgtasks.handoff.engine import Fate
from bgtasks.monitoring.figures import read_stats
from bgtasks.repeats import repeats
from bgtasks.signals import task_finished
from tests.gate import BOUND, Gate, wait_until
from tests.handoff.kit import HandoffCore, fail, numbers
from tests.pool import Drained, after_call, exit_, held, interrupt, make_task

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
        core.queue.pause()
        core.put(*numbers(1, 5))
        wait_until(lambda: core.mover.thread)
        core.wait_rest()

        assert core.engine.batches == []
        core.queue.resume()
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


def test_a_queue_of_tasks_that_cannot_travel_is_not_searched_at_each_spawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a look in vain the mover rests a moment, or it would take the interpreter from everybody."""
    monkeypatch.setattr(module, "PAUSE", BOUND)
    with HandoffCore(capacity=100) as core, Gate() as gate:
        core.engine.stays = lambda name: True
        core.spawn("held", gate)
        gate.wait_entered()
        with core.mover_held():
            core.put(*numbers(1, 75))
        core.wait_rest()
        core.put(*numbers(76, 99))
        core.wait_rest()

        assert sorted(core.engine.packed, key=int) == numbers(1, 75)


def test_a_task_that_cannot_travel_is_packed_once() -> None:
    """Packing costs more than a look at what is known, and a pass looks at every waiting task."""
    with HandoffCore() as core, Gate() as gate:
        core.engine.stays = lambda name: name != "travels"
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        core.wait_rest()
        core.mover._rest_until = 0.0
        core.put("travels")
        core.ends.wait(Outcome.HANDED_OFF)
        core.wait_rest()

        assert sorted(core.engine.packed) == [*numbers(1, 6), "travels"]


def test_a_task_that_the_engine_refuses_is_not_sent_again() -> None:
    """It runs here, as one that cannot travel, and the others of its batch go their way."""

    def refuse(parcels: Any) -> None:
        for parcel in parcels:
            if parcel.content == "6":
                parcel.fate = Fate.REFUSED
                core.engine.taken.remove("6")

    with HandoffCore() as core, Gate() as gate:
        core.engine.after = refuse
        core.spawn("held", gate)
        gate.wait_entered()
        core.put(*numbers(1, 6))
        core.ends.wait(Outcome.HANDED_OFF, 2)
        gate.open()
        core.drain()

        assert core.engine.packed.count("6") == 1
        assert core.engine.taken == ["5", "4"]
        assert core.ran == ["1", "2", "3", "6"]


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
        core.mover.ring()  # while the engine rests, that changes nothing
        core.wait_rest()
        core.put("3")
        core.ends.wait(Outcome.SUCCEEDED, 3)
        assert core.stats().handoff_failures == 1
        core.wait_rest()

        core.engine.before = lambda parcels: None
        core.mover._rest_until = 0.0
        core.put("4")  # rings, and the mover has new tasks checked out again
        core.drain()
        core.wait_rest()
        core.put("5")
        core.drain()

        assert core.engine.taken == ["5"]
        core.assert_each_once(*numbers(1, 5))


def test_always_with_an_engine_slower_than_the_spawners_runs_some_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Above the mark new tasks are given to the slots: better run here than dropped."""
    monkeypatch.setattr(module, "STALL", 10 * BOUND)
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


def test_a_batch_that_takes_its_time_is_not_a_hanging_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look that was due when a batch began finds it young, and comes again."""
    later: list[Callable[[], object]] = []
    with HandoffCore(always=True) as core, Gate() as engine:
        monkeypatch.setattr(core.drainer.loop, "call_later", lambda delay, callback: later.append(callback))
        core.engine.before = engine
        core.put("1")
        engine.wait_entered()
        core.put("2")

        later.pop()()
        assert list(core.queue.checked_out) == held(core.queue)
        [again] = later
        engine.open()
        core.drain()
        core.wait_rest()
        later.clear()
        core.mover._watching = False
        again()

        assert not later
        assert core.engine.taken == ["1", "2"]


def test_a_look_at_a_batch_that_has_just_ended_takes_nothing_from_the_next_one() -> None:
    """The interleaving is forced.

    1. The look on the loop finds a batch that takes too long.
    2. That batch ends, and the mover packs the task behind it.
    3. The look does not put that one back.
    """
    with HandoffCore(always=True) as core, Gate() as first, Gate() as second:
        core.engine.before = first
        core.put("1")
        first.wait_entered()
        core.put("2")
        sent_at = core.mover._sent_at
        core.engine.stays = lambda name: bool(second())
        first.open()
        second.wait_entered()

        core.queue.put_back(core.mover._behind_batch(sent_at))
        second.open()
        core.drain()

        assert core.engine.taken == ["1", "2"]
        assert core.ran == []


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

        assert "'core' could not be handed off to the engine 'engine'; they run here" in line
        assert "ConnectionError: the engine is down" in line
        assert sorted(core.ran) == numbers(1, 6)
        assert core.engine.taken == []
        assert core.stats().handoff_failures >= 1


def test_an_engine_that_stays_down_costs_one_warning_a_minute() -> None:
    """The next warning says how often more it failed, and why."""
    with HandoffCore(start=False) as core:
        for _ in range(3):
            core.mover._fail(ConnectionError("down"))
        assert len(core.logs.of("could not be handed off")) == 1

        repeats.flush()

        assert core.logs.lines[-1] == (
            "pool 'core' again could not hand off to the engine 'engine' (2 more): ConnectionError"
        )
        assert core.stats().handoff_failures == 3


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


def test_an_engine_that_does_not_know_is_not_asked_at_each_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests between two questions, as after a failure."""
    monkeypatch.setattr(module, "REST", BOUND)
    asked: list[Any] = []

    def lose_the_answer(parcels: Any) -> None:
        for parcel in parcels:
            parcel.fate = Fate.UNSURE
        raise ConnectionError("lost")

    def answer(parcel: Any) -> Fate:
        asked.append(parcel)
        return Fate.UNSURE

    with HandoffCore(always=True) as core:
        core.engine.before, core.engine.answers = lose_the_answer, answer
        core.put("1")
        core.logs.wait("could not be handed off")
        core.wait_rest()
        core.mover._rest_until = 0.0
        core.put("2")
        wait_until(lambda: asked)
        core.wait_rest()
        core.put("3")
        core.wait_rest()
        assert len(asked) == 1

        core.engine.answers = lambda parcel: Fate.TAKEN
        core.mover.ring()
        core.drain()

        assert core.engine.taken == ["1"]
        assert core.ran == ["2", "3"]


# Interleavings.


def checked_out(*names: str) -> tuple[TaskQueue, list[Any]]:
    """Return a queue, and its tasks, which a consumer has."""
    queue = TaskQueue("core", 8, 2)
    for name in names:
        assert queue.put(make_task(name)) is None
    return queue, queue.check_out(len(names))


def test_a_task_that_comes_back_when_waiting_tasks_were_cancelled_is_not_run() -> None:
    """The interleaving is forced.

    1. A task is with the engine.
    2. A shutdown's time is over: it cancels what waits.
    3. The engine fails. The task would wait for slots that are about to end: it stays checked out.
    4. The shutdown gives it up, and counts it.
    """
    queue, [task] = checked_out("task")
    cancelled: list[Any] = []
    queue.close()
    queue.cancel_waiting(cancelled)
    assert cancelled == []

    queue.put_back([task])
    assert not queue.waiting
    queue.cancel_waiting(cancelled, checked_out=True)
    queue.put_back([task])
    assert not queue.count_handed_off(task)

    assert cancelled == [task]
    assert task.outcome is Outcome.CANCELLED
    assert read_stats(queue).cancelled == 1
    assert not held(queue)


def test_an_engine_that_has_the_task_before_it_is_given_up_wins() -> None:
    """It is counted as the engine's, and the shutdown finds nothing to cancel."""
    queue, [task] = checked_out("task")
    queue.close()
    assert queue.count_handed_off(task)
    cancelled: list[Any] = []

    queue.cancel_waiting(cancelled, checked_out=True)

    assert cancelled == []
    assert task.outcome is Outcome.HANDED_OFF
    assert read_stats(queue).handed_off == 1


def test_an_engine_that_has_the_task_while_the_listeners_hear_of_it_wins() -> None:
    """A shutdown that is over meanwhile does not cancel it, so nobody is told of two ends."""
    queue, [task] = checked_out("task")
    queue.close()
    assert queue.note_taken(task)
    assert not queue.note_taken(task)
    cancelled: list[Any] = []

    queue.cancel_waiting(cancelled, checked_out=True)
    assert cancelled == []
    assert queue.count_handed_off(task)

    assert task.outcome is Outcome.HANDED_OFF
    assert (read_stats(queue).handed_off, read_stats(queue).cancelled) == (1, 0)


def test_a_drain_waits_until_the_listeners_know_that_a_task_was_handed_off() -> None:
    """As with a task that runs here: what they write, such as its result, is there after the drain."""
    drained: list[bool] = []

    def look(**kwargs: Any) -> None:
        drained.append(reached.done())

    with HandoffCore(always=True) as core:
        with core.mover_held():
            core.put("task")
            reached = Drained(core.queue)
        task_finished.connect(look)
        try:
            core.drain()
        finally:
            task_finished.disconnect(look)

    assert drained == [False]


def test_a_task_that_is_being_moved_is_waited_for() -> None:
    """drain() does not take a task that has left the waiting ones for one that has ended."""
    queue, [task] = checked_out("task")
    reached = Drained(queue)
    assert not reached.done()
    assert read_stats(queue).queued == 1

    queue.count_handed_off(task)

    assert reached.done()


def test_a_spawn_just_after_the_movers_look_is_seen() -> None:
    """The interleaving is forced.

    1. The mover finds nothing more to move.
    2. A spawner puts a task, and rings.
    3. The mover ends its pass, begins another one, and moves it.
    """
    with HandoffCore(always=True) as core:
        core.wait_rest()
        put = threading.Event()
        with after_call(core.mover, "_pass", lambda: (core.put("late"), put.set())):
            core.put("first")
            assert put.wait(BOUND)
        core.drain()

        assert core.engine.taken == ["first", "late"]


def test_tasks_spawned_before_the_threads_are_there_are_moved() -> None:
    """The first look comes with the thread, so that no ring is needed for it."""
    with HandoffCore(always=True, start=False) as core:
        core.put("early")
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


STEPS = [
    ("queue", "put_back"),
    ("queue", "note_taken"),
    ("queue", "count_handed_off"),
    ("engine", "pack"),
    ("engine", "send"),
    ("mover", "_collect"),
    ("mover", "_watch"),
    ("mover", "_settle"),
    ("mover", "_end"),
]


@pytest.mark.parametrize(
    ("of", "step", "always"),
    [("queue", "check_out", False), *((*step, always) for step in STEPS for always in (False, True))],
)
def test_an_exception_after_any_step_of_a_move_loses_nothing_and_runs_nothing_twice(
    of: Any, step: Any, always: bool
) -> None:
    """The steps are those after which the interpreter may deliver an exception from outside."""
    with HandoffCore(always=always) as core, Gate() as gate:
        core.engine.stays = lambda name: name in {"6", "held"}
        core.spawn("held", gate)
        gate.wait_entered()
        core.wait_rest()
        core.hold_mover()
        core.put(*numbers(1, 6))
        with after_call(getattr(core, of), step, exit_):
            core.release_mover()
            core.logs.wait("was interrupted; it goes on")
            core.wait_rest()
        gate.open()
        core.drain()

        core.assert_each_once(*numbers(1, 6))
        stats = core.stats()
        assert (stats.queued, stats.running, stats.spawned) == (0, 0, 7)
        assert stats.handed_off == len(core.engine.taken)


@pytest.mark.parametrize("always", [False, True])
def test_an_exception_that_takes_a_ring_away_does_not_make_the_mover_deaf(always: bool) -> None:
    """The mover was woken, and had not looked. What is put afterwards is moved."""
    with HandoffCore(always=always) as core, Gate() as gate:
        core.engine.stays = lambda name: name == "held"
        core.spawn("held", gate)
        gate.wait_entered()
        core.wait_rest()
        thread, seats = core.mover.thread, core.queue.slots

        class Seats(list[Any]):
            def __len__(self) -> int:
                if threading.current_thread() is thread:
                    core.queue.slots = seats
                    exit_()
                return len(seats)

        core.queue.slots = Seats(seats)
        recovered = threading.Event()
        with after_call(core.mover, "_recover", recovered.set):
            core.mover.ring()
            assert recovered.wait(BOUND)
        core.put(*numbers(1, 6))

        core.ends.wait(Outcome.HANDED_OFF, 2)


def test_a_lock_that_an_exception_has_left_held_is_freed() -> None:
    """An exception that comes as a `with` statement is left may leave the lock held."""
    with HandoffCore(always=True) as core:
        core.wait_rest()
        with after_call(core.mover, "_left_behind", lambda: (core.queue.lock.acquire(), exit_())):
            core.put("1")
            core.logs.wait("was interrupted; it goes on")
        core.put("2")
        core.drain()

        core.assert_each_once("1", "2")


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
