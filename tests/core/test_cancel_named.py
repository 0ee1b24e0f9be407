"""What waits under a name is cancelled in one step, and nothing else changes its place."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bgtasks.core.figures import Outcome
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Task
from bgtasks.monitoring.figures import read_stats
from tests.gate import BOUND, Gate, wait_until
from tests.pool import Core, Drained, make_task


@given(st.lists(st.sampled_from("abc")))
def test_the_others_keep_their_order(names: Any) -> None:
    """Whatever waits, all of one name ends as cancelled, and the rest waits as before."""
    queue = TaskQueue("core", 100, 1)
    for name in names:
        assert queue.put(make_task(name)) is None
    cancelled: list[Task] = []
    queue.cancel(lambda task: task.name == "a", cancelled)

    assert [task.name for task in queue.waiting] == [name for name in names if name != "a"]
    assert [task.name for task in cancelled] == [name for name in names if name == "a"]
    assert queue.queued == len(queue.waiting) == read_stats(queue).queued
    if cancelled:
        assert queue.account["a"].ended[Outcome.CANCELLED] == len(cancelled)


def test_task_that_waits_to_be_tried_again_is_cancelled() -> None:
    """It waits as well. Its outcome is cancelled, and it is tried no more."""
    with Core(conn_max=1) as core:
        tried = core.pool.using(retries=3, retry_delay=BOUND)
        tried.spawn("bad", int, "x")
        tried.spawn("other", int, "x")
        wait_until(lambda: len(core.queue.delayed) == 2)
        cancelled: list[Task] = []
        core.queue.cancel(lambda task: task.name == "bad", cancelled)

        assert [task.name for task in cancelled] == ["bad"]
        assert [task.name for task in core.queue.delayed] == ["other"]
        assert (core.stats().cancelled, core.stats().queued) == (1, 1)


def test_what_is_checked_out_and_what_runs_is_left_alone() -> None:
    """An engine may have it already, or a slot."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("task", gate)
        gate.wait_entered()
        core.spawn("task", int)
        [out] = core.queue.check_out(1)
        cancelled: list[Task] = []
        core.queue.cancel(lambda task: task.name == "task", cancelled)
        core.queue.put_back([out])
        gate.open()
        core.drain()

        assert cancelled == []
        assert core.stats().succeeded == 2


def test_key_of_a_cancelled_task_is_free() -> None:
    """The next one with it is not coalesced with what will never run."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        keyed = core.pool.using(key="7")
        keyed.spawn("task", int)
        core.queue.cancel(lambda task: task.name == "task", [])
        keyed.spawn("task", int)
        gate.open()
        core.drain()

        assert (core.stats().coalesced, core.stats().succeeded) == (0, 2)


def test_drain_ends_with_what_it_waits_for() -> None:
    """Whoever waits for cancelled tasks hears of it at once."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("task", int)
        ended = Drained(core.queue)
        gate.open()
        core.queue.cancel(lambda task: task.name == "task", [])

        assert ended.result(BOUND)
