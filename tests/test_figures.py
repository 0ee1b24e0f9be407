"""What is counted of the tasks of each name, and what is kept of the last failures and drops."""

import random
from typing import Any

import pytest

from bgtasks import figures, queue
from bgtasks.figures import BOUNDS, LAST, OTHERS, TEXT_MAX, percentile, traceback_text
from bgtasks.queue import DropReason, Outcome, TaskQueue
from tests.core import Core, exit_, make_task
from tests.gate import Gate


def by_name(tasks: TaskQueue) -> dict[str, Any]:
    return {of.name: of for of in tasks.stats_by_name()[1]}


def test_tasks_are_counted_by_name_and_outcome() -> None:
    """Whatever becomes of a task, it is counted under its name."""
    with Core(conn_max=1, capacity=2) as core, Gate() as gate:
        core.spawn("good", print, end="")
        core.spawn("bad", int, "x")
        core.drain()
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        core.spawn("waits", print, end="")
        core.spawn("late", print, end="")

        seen = by_name(core.queue)

    assert {name: of.spawned for name, of in seen.items()} == {
        "good": 1,
        "bad": 1,
        "held": 1,
        "waits": 2,
        "late": 1,
    }
    assert seen["good"].ended[Outcome.SUCCEEDED] == 1
    assert seen["bad"].ended[Outcome.FAILED] == 1
    assert (seen["held"].running, seen["waits"].queued) == (1, 2)
    assert seen["late"].dropped == {"full": 1}


def test_times_are_counted_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task that ran adds one to a bucket of its wait and one to a bucket of its run."""
    now = 100.0
    monkeypatch.setattr(queue, "monotonic", lambda: now)
    tasks = TaskQueue("q", 10, 1)
    for wait, run in [(0.002, 0.004), (0.002, 1000), (0.05, 0.004)]:
        tasks.put(make_task("timed"))
        now += wait
        task = tasks.take(tasks.accounts[0])
        assert task is not None
        now += run
        tasks.end(task, Outcome.SUCCEEDED)

    of = by_name(tasks)["timed"]

    assert dict(zip((*BOUNDS, "more"), of.runs, strict=True)) == {
        **dict.fromkeys((*BOUNDS, "more"), 0),
        0.005: 2,
        "more": 1,
    }
    assert sum(of.waits) == 3
    assert of.waits[1] == 2
    assert (round(of.wait_seconds, 3), round(of.run_seconds, 3)) == (0.054, 1000.008)


def test_task_that_never_ran_has_no_times() -> None:
    """A task that shutdown gave up is counted, but of its run nothing is said."""
    tasks = TaskQueue("q", 10, 1)
    tasks.put(make_task("swept"))
    tasks.close()
    tasks.sweep()

    of = by_name(tasks)["swept"]

    assert of.ended[Outcome.CANCELLED] == 1
    assert sum(of.waits) == sum(of.runs) == 0


def test_number_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more names than NAMES_MAX, the later ones are counted as one, and stay so."""
    monkeypatch.setattr(queue, "NAMES_MAX", 2)
    tasks = TaskQueue("q", 3, 1)
    before = by_name(tasks)
    for name in ["a", "b", "c", "d", "c"]:
        tasks.put(make_task(name))
        before = by_name(tasks)
    while (task := tasks.take(tasks.accounts[0])) is not None:
        tasks.end(task, Outcome.SUCCEEDED)
    after = by_name(tasks)

    assert (before["a"].queued, before["b"].queued, before[OTHERS].queued) == (1, 1, 1)
    assert before[OTHERS].dropped == {"full": 2}
    assert {name: of.spawned for name, of in after.items()} == {"a": 1, "b": 1, OTHERS: 3}


def test_task_that_is_lost_is_counted_under_no_name() -> None:
    """A task that a slot has lost has failed, whatever it was called, and the names still add up."""
    tasks = TaskQueue("q", 3, 1)
    account = tasks.accounts[0]
    tasks.put(make_task("lost"))
    account.epoch += 1
    account.taking = True
    tasks.waiting.popleft()

    tasks.settle(account)

    assert by_name(tasks)[OTHERS].ended[Outcome.FAILED] == 1


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_percentile_is_in_the_bucket_of_the_true_one(share: float) -> None:
    """A percentile from the buckets is off by no more than the bucket that the true one is in."""
    values = sorted(random.Random(1).expovariate(3) for _ in range(500))
    buckets = [0] * (len(BOUNDS) + 1)
    for value in values:
        buckets[sum(value > bound for bound in BOUNDS)] += 1
    true = values[int(share * len(values)) - 1]
    upper = next(bound for bound in BOUNDS if bound >= true)
    lower = max((bound for bound in BOUNDS if bound < true), default=0)

    found = percentile(buckets, share)
    assert found is not None
    assert lower <= found <= upper


def test_percentile_of_nothing_is_none() -> None:
    """Without a task there is no percentile."""
    assert percentile([0] * (len(BOUNDS) + 1), 0.5) is None


def test_percentile_past_the_last_bound_is_that_bound() -> None:
    """Of what took longer than the last bound, no more is known."""
    assert percentile([0] * len(BOUNDS) + [1], 0.5) == BOUNDS[-1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failure_is_kept_as_text_without_arguments(asynchronous: bool) -> None:
    """The traceback of a failed task is there to be looked at, and no argument's value is in it."""

    def fail(address: str) -> None:
        raise ValueError("no such address")

    async def fail_on_the_loop(address: str) -> None:
        fail(address)

    with Core() as core:
        core.spawn("mail", fail_on_the_loop if asynchronous else fail, "ada@example.com")
        core.drain()
        [failure] = core.queue.failures

    assert failure[1:4] == ("mail", "failed", "ValueError")
    assert "in fail\n" in failure.traceback
    assert "bgtasks/slots.py" not in failure.traceback  # what calls a task is of no interest
    assert failure.traceback.endswith("ValueError: no such address")
    assert "ada@example.com" not in str(failure)


def test_number_of_failures_and_drops_is_bounded() -> None:
    """Only the last ones are kept."""
    with Core(conn_max=1) as core:
        for number in range(LAST + 5):
            core.spawn(f"task {number}", int, "x")
        core.drain()
        core.queue.close()
        for number in range(LAST + 5):
            core.spawn(f"dropped {number}", int, "x")

        failures, drops = list(core.queue.failures), list(core.queue.drops)

    assert [failure.name for failure in failures] == [f"task {number}" for number in range(5, LAST + 5)]
    assert [drop[1:] for drop in drops] == [
        (f"dropped {number}", DropReason.SHUTDOWN.value) for number in range(5, LAST + 5)
    ]


def test_traceback_is_bounded() -> None:
    """However deep the stack and long the message, the text has an end, and it is the end that is kept."""

    def deep(n: int) -> None:
        if not n:
            raise ValueError("x" * 10_000 + "the end")
        deep(n - 1)

    with pytest.raises(ValueError, match="x") as caught:
        deep(200)
    text = traceback_text(caught.value)

    assert len(text) <= TEXT_MAX + 10
    assert text.endswith("the end")


def test_traceback_of_an_exception_that_cannot_be_shown() -> None:
    """An exception whose parts raise is shown as far as it goes."""

    class BrokenError(Exception):
        __notes__: Any = property(lambda self: exit_())

    assert traceback_text(BrokenError()) == "BrokenError (its traceback raised SystemExit)"


def test_figures_have_a_sum_for_each_outcome() -> None:
    """Rows are added up column by column."""
    assert figures.add_up([(1, 2), (10, 20), (100, 200)]) == (111, 222)
