"""The slots of a pool that hands off: its shutdown, its threads, and forks."""

import logging
import threading
from time import monotonic
from typing import Any

import pytest

from bgtasks.core.figures import Outcome
from bgtasks.core.places import State
from bgtasks.handoff import mover as module
from bgtasks.handoff.engine import Fate
from tests.gate import BOUND, Gate, wait_until
from tests.handoff.kit import HandoffCore, fail, numbers
from tests.pool import after_call, exit_, held, make_task

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
        thread = core.mover.thread
        gate.open()

        assert (core.close(0.0) or 0) >= 2
        stats = core.stats()
        engine.open()
        thread.join(BOUND)

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
        thread = core.mover.thread
        core.close(0.0)
        engine.open()
        thread.join(BOUND)

        assert not held(core.queue)
        assert core.engine.taken == []
        assert core.ran == numbers(1, 4)
        assert sorted(core.ends.of(Outcome.CANCELLED)) == ["5", "6"]


def test_a_shutdown_begins_no_batch_that_would_end_too_late() -> None:
    """The mover knows how long the engine takes for a task, and stops in time."""
    with HandoffCore(start=False) as core:
        core.mover._each = 0.1

        core.mover.wind_up(monotonic() + 1000)
        assert core.mover._batch_size() == 2
        core.mover.wind_up(monotonic() + 0.15)
        assert core.mover._batch_size() == 1
        core.mover.wind_up(monotonic() + 0.05)
        assert core.mover._batch_size() == 0
        core.mover.wind_up(monotonic() - 1)
        assert core.mover._batch_size() == 0


def test_a_shutdown_out_of_time_begins_no_batch() -> None:
    """The interleaving is forced.

    1. The mover has taken tasks out of the queue, to send them.
    2. The shutdown's time is over: it cancels what waits, and counts what the engine may have.
    3. The mover does not send them any more. They are cancelled, and the engine has none.
    """
    with HandoffCore() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        cancelled: list[Any] = []

        def run_out_of_time() -> None:
            core.queue.close()
            core.queue.cancel_waiting(cancelled)

        with after_call(core.mover, "_collect", run_out_of_time):
            core.put(*numbers(1, 6))
            wait_until(lambda: core.queue.state is State.CLOSED)
            core.wait_rest()
        core.slots.abandon(cancelled)

        assert core.engine.batches == []
        assert not core.logs.of("has not answered")
        assert sorted(task.name for task in cancelled) == numbers(1, 6)
        assert core.stats().cancelled == 6


# Threads and forks.


def test_without_a_thread_for_the_mover_everything_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no thread left hands nothing off, and says so."""

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    with HandoffCore(always=True, start=False) as core:
        monkeypatch.setattr(core.mover, "open", refuse)
        core.put("early")
        core.start()
        core.put("late")
        core.drain()

        assert core.ran == ["early", "late"]
        assert core.logs.of("pool 'core' hands nothing off")


def test_a_thread_that_does_not_start_leaves_the_mover_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and the next start tries again."""
    with HandoffCore(start=False) as core:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: exit_())
            with pytest.raises(SystemExit):
                core.mover.open()

        assert core.mover.stop() == []
        core.start()
        assert core.mover.thread in core.slots.threads()


def test_the_mover_steps_aside_for_a_fork_and_comes_back(patient: None) -> None:
    """An idle process has no thread of the mover's while it forks; after it, tasks are moved again."""
    with HandoffCore(always=True) as core:
        core.put("1")
        core.drain()
        core.forks.before_fork()
        assert not core.threads()
        core.forks.after_fork_in_parent()
        core.put("2")
        core.drain()

        assert core.engine.taken == ["1", "2"]


def test_a_fork_in_the_middle_of_a_move_takes_nothing_away(patient: None) -> None:
    """A busy mover does not step aside, and the fork does not wait for it: the parent goes on with it."""
    with HandoffCore(always=True) as core, Gate() as engine:
        core.engine.before = engine
        core.put("1")
        engine.wait_entered()
        core.forks.before_fork()
        core.forks.after_fork_in_parent()
        engine.open()
        core.drain()

        assert core.engine.taken == ["1"]


def test_a_fork_while_a_task_runs_leaves_the_mover_at_work() -> None:
    """The threads stay, and what overflows is moved."""
    with HandoffCore() as core, Gate() as gate:
        core.wait_rest()
        core.spawn("held", gate)
        gate.wait_entered()
        core.forks.before_fork()
        core.forks.after_fork_in_parent()

        core.put(*numbers(1, 6))
        assert core.ends.wait(Outcome.HANDED_OFF, 2)


def test_a_fork_that_begins_as_the_mover_does_waits_for_it_or_leaves_it() -> None:
    """The interleaving is forced.

    1. The fork finds every slot idle, and takes them.
    2. The mover is in a pass: it has just begun, and has taken nothing yet.
    3. They are given back, and the fork looks again once the pass is over.
    """
    with HandoffCore() as core, Gate() as gate:
        core.wait_rest()
        core.mover._pass = lambda bell: gate()
        core.mover.ring()
        gate.wait_entered()
        assert not core.slots.step_aside_if_idle()
        assert len(core.queue.slots) == len(core.slots.all) == len(core.queue.idle)

        gate.open()
        core.wait_rest()
        assert core.slots.step_aside_if_idle()
        core.queue.add_slots(core.slots.all)


def test_the_mover_begins_no_pass_while_a_fork_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interleaving is forced.

    1. The fork finds everything idle, and takes the slots.
    2. A spawner puts a task, and rings: the mover leaves it alone.
    3. Another pool turns out to be busy, so the threads stay: the mover looks without another ring.
    """
    monkeypatch.setattr(module, "PAUSE", 0.001)
    looks: list[None] = []

    class NoSlots(list[Any]):
        def __len__(self) -> int:
            looks.append(None)
            return 0

    with HandoffCore(always=True) as core:
        core.wait_rest()
        assert core.slots.step_aside_if_idle()
        core.queue.slots = NoSlots()
        core.put("1")
        wait_until(lambda: len(looks) >= 2)
        assert core.engine.packed == []

        core.queue.add_slots(core.slots.all)
        core.drain()

        assert core.engine.taken == ["1"]


def test_a_fork_leaves_the_threads_while_the_engine_may_have_tasks() -> None:
    """The mover has nothing to do, but it is the one who knows which tasks these are."""

    def lose_the_answer(parcels: Any) -> None:
        for parcel in parcels:
            parcel.fate = Fate.UNSURE
        core.engine.answers = lambda parcel: Fate.TAKEN
        raise ConnectionError("lost")

    with HandoffCore(always=True) as core:
        core.engine.before = lose_the_answer
        core.put("1")
        core.logs.wait("could not be handed off")
        core.wait_rest()
        assert not core.slots.step_aside_if_idle()

        core.mover.ring()
        core.drain()
        core.wait_rest()
        assert core.slots.step_aside_if_idle()
        core.queue.add_slots(core.slots.all)


def test_a_fork_does_not_wait_for_a_pool_that_has_no_threads_yet() -> None:
    """Its tasks wait for the mover, which a fork does not meet: it is started afterwards."""
    with HandoffCore(always=True, start=False) as core:
        assert core.queue.put(make_task("early")) is None
        assert core.queue.checked_out

        assert core.slots.step_aside_if_idle()


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
