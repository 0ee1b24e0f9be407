"""What is counted of the tasks of each name, and what is kept of the last failures and drops."""

import random
from bisect import bisect_left
from threading import Thread
from typing import Any

import pytest

from bgtasks.core import figures, queue
from bgtasks.core import task as task_module
from bgtasks.core.figures import (
    BOUNDS,
    EXPORTED,
    NAMES_MAX,
    OTHERS,
    Account,
    DropReason,
    Outcome,
    new_counts,
)
from bgtasks.core.places import SlotState
from bgtasks.core.queue import TaskQueue
from bgtasks.hooks import TEXT_MAX, place_of, traceback_text
from bgtasks.monitoring.figures import Times, read_stats_by_name, read_waiting, two_digits
from bgtasks.recent import LAST, Failure, Recent
from tests.gate import BOUND, Gate, wait_until
from tests.pool import Core, exit_, make_task


def by_name(tasks: TaskQueue) -> dict[str, Any]:
    return {of.name: of for of in read_stats_by_name(tasks)[1]}


def times(*seconds: float) -> Times:
    counts = [0] * (len(BOUNDS) + 1)
    for each in seconds:
        counts[bisect_left(BOUNDS, each)] += 1
    return Times(counts, sum(seconds), max(seconds, default=0.0))


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
    for module in (queue, task_module):
        monkeypatch.setattr(module, "monotonic", lambda: now)
    tasks, seat = TaskQueue("q", 10, 1), SlotState()
    for wait, run in [(0.0019, 0.0039), (0.0019, 20_000), (0.049, 0.0039)]:
        tasks.put(make_task("timed"))
        now += wait
        tasks.add_slots([seat])
        taken = tasks.take(seat)
        assert taken is not None
        now += run
        tasks.end(seat, taken, Outcome.SUCCEEDED)
        tasks.remove_slots()

    of = by_name(tasks)["timed"]

    runs = dict(zip((*BOUNDS, "more"), of.runs.counts, strict=True))
    assert {bound: count for bound, count in runs.items() if count} == {0.004: 2, "more": 1}
    waits = dict(zip((*BOUNDS, "more"), of.waits.counts, strict=True))
    assert {bound: count for bound, count in waits.items() if count} == {0.002: 2, 0.05: 1}
    assert (round(of.waits.seconds, 3), round(of.runs.seconds, 3)) == (0.053, 20_000.008)
    assert (round(of.waits.longest, 3), round(of.runs.longest, 3)) == (0.049, 20_000)


def test_task_that_never_ran_has_no_times() -> None:
    """A task that shutdown gave up is counted, but of its run nothing is said."""
    tasks = TaskQueue("q", 10, 1)
    tasks.put(make_task("given up"))
    tasks.close()
    tasks.cancel_waiting([])

    of = by_name(tasks)["given up"]

    assert of.ended[Outcome.CANCELLED] == 1
    assert sum(of.waits.counts) == sum(of.runs.counts) == 0


def test_number_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more names than NAMES_MAX, the later ones are counted as one, and stay so."""
    monkeypatch.setattr(figures, "NAMES_MAX", 2)
    tasks = TaskQueue("q", 3, 1)
    for name in ["a", "b", "c", "d", "c"]:
        tasks.put(make_task(name))
    before = by_name(tasks)
    seat = SlotState()
    tasks.add_slots([seat])
    task = tasks.take(seat)
    while task is not None:
        task = tasks.end(seat, task, Outcome.SUCCEEDED)
    after = by_name(tasks)

    assert (before["a"].queued, before["b"].queued, before[OTHERS].queued) == (1, 1, 1)
    assert before[OTHERS].dropped == {"full": 2}
    assert {name: of.spawned for name, of in after.items()} == {"a": 1, "b": 1, OTHERS: 3}


# Percentiles.


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_percentile_is_in_the_bucket_of_the_true_one(share: float, seed: int) -> None:
    """However the times are distributed, it is off by no more than a bucket, which is 12 % wide."""
    values = sorted(random.Random(seed).lognormvariate(-3, 2) for _ in range(500))
    true = values[int(share * len(values)) - 1]
    bucket = bisect_left(BOUNDS, true)

    found = times(*values).percentile(share)
    assert found is not None
    assert two_digits(BOUNDS[bucket - 1]) <= found <= two_digits(BOUNDS[bucket])


@pytest.mark.parametrize(
    ("seconds", "p50", "p95"),
    [
        ([0.05 + 0.015 * number / 400 for number in range(400)], 0.057, 0.064),
        ([16 * number / 400 for number in range(1, 401)], 8.0, 15.0),
        ([16.0] * 400, 15.0, 16.0),
        ([61.0], 61.0, 61.0),
        ([0.001] * 99 + [61.0], 0.00095, 0.001),
        ([20_000.0], 20_000.0, 20_000.0),
        ([0.0], 0.0, 0.0),
    ],
)
def test_percentiles_of_a_burst(seconds: list[float], p50: float, p95: float) -> None:
    """What is shown of tasks of 50 to 65 ms, of a burst that waited for up to 16 s, of one slow task."""
    seen = times(*seconds)

    assert (seen.percentile(0.5), seen.percentile(0.95)) == (p50, p95)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 1.0])
def test_percentile_is_never_more_than_the_longest(share: float) -> None:
    """No task has taken longer than the longest one has."""
    generator = random.Random(7)
    for _ in range(500):
        values = [generator.expovariate(generator.random()) for _ in range(generator.randint(1, 9))]
        found = times(*values).percentile(share)

        assert found is not None
        assert 0 <= found <= max(values)


def test_percentile_has_two_digits() -> None:
    """More digits than a bucket can tell are not shown."""
    assert times(*[0.0123456] * 3, 1.0).percentile(0.5) in {0.012, 0.013}
    assert times(*[123.456] * 3, 900.0).percentile(0.5) in {120.0, 130.0}


def test_percentile_of_nothing_is_none() -> None:
    """Without a task there is no percentile."""
    assert times().percentile(0.5) is None


def test_exported_buckets_are_sums_of_our_own() -> None:
    """A metrics system gets the same tasks in fewer buckets."""
    values = [random.Random(3).expovariate(3) for _ in range(500)] + [0.001, 0.0025, 300.0, 301.0]
    counts = [0] * (len(EXPORTED) + 1)
    for value in values:
        counts[bisect_left(EXPORTED, value)] += 1

    assert times(*values).exported() == tuple(counts)


# Failures and drops.


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
        [failure] = core.pool.hooks.recent.failures

    assert failure[1:4] == ("mail", "failed", "ValueError")
    assert "in fail\n" in failure.traceback
    assert "bgtasks/core" not in failure.traceback  # what calls a task is of no interest
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
        recent = core.pool.hooks.recent

        failures, drops = list(recent.failures), list(recent.drops)

    assert [failure.name for failure in failures] == [f"task {number}" for number in range(5, LAST + 5)]
    assert [drop[1:] for drop in drops] == [
        (f"dropped {number}", DropReason.SHUTDOWN.value) for number in range(5, LAST + 5)
    ]


def test_equal_failures_are_counted_together() -> None:
    """Those of one name and type, from one place, are one entry with the message of the last one."""

    def fail(number: int) -> None:
        raise ValueError(f"no such address: {number}")

    with Core(conn_max=1) as core:
        for number in range(333):
            core.spawn("mail", fail, number)
        core.spawn("other", fail, 1)
        core.spawn("mail", int, "x")
        core.drain()
        mail, other, builtin = core.pool.hooks.recent.failures

    assert (mail.times, mail.name, mail.message) == (333, "mail", "no such address: 332")
    assert mail.since <= mail.at
    assert mail.where.startswith(f"{__file__}:")
    assert (other.times, builtin.times) == (1, 1)


def test_message_that_cannot_be_shown_is_empty() -> None:
    """The failure is kept all the same."""

    class BrokenError(Exception):
        def __str__(self) -> str:
            raise SystemExit

    def fail() -> None:
        raise BrokenError

    with Core() as core:
        core.spawn("mail", fail)
        core.drain()
        [failure] = core.pool.hooks.recent.failures

    assert (failure.error, failure.message) == ("BrokenError", "")


def test_failure_that_was_raised_nowhere_has_no_place() -> None:
    """An exception that was never raised has no traceback."""
    assert place_of(ValueError()) == ""


def test_failures_are_counted_whole_after_a_signal_handler_has_raised() -> None:
    """The lock is let go of, so the next failure is counted."""
    recent = Recent()
    failure = Failure(1.0, "mail", "failed", "ValueError", "", "", "", 0.0, 0.0)

    def interrupted(**_changes: Any) -> None:
        recent._lock.acquire()  # as it is left by a handler that raises in the middle of `with`
        raise KeyboardInterrupt

    class Interrupted(Failure):
        _replace: Any = staticmethod(interrupted)

    with pytest.raises(KeyboardInterrupt):
        recent.add_failure(Interrupted(*failure))
    thread = Thread(target=recent.add_failure, args=[failure])
    thread.start()
    thread.join(BOUND)

    assert [each.times for each in recent.failures] == [1]


def test_waiting_tasks_are_told_by_name() -> None:
    """How long the oldest of each name has waited, and when what is delayed is due."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.pool.using(retries=1, retry_delay=40.0).spawn("bad", int, "x")
        wait_until(lambda: core.queue.delayed)
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("first", int)
        core.spawn("second", int)
        waiting = read_waiting(core.queue)

    assert set(waiting) == {"bad", "first", "second"}
    assert (waiting["first"].oldest or 0.0) >= (waiting["second"].oldest or 0.0) > 0.0
    assert (waiting["bad"].oldest, waiting["bad"].delayed) == (None, 1)
    assert 0.0 < (waiting["bad"].due or 0.0) <= 50.0


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


def test_names_beyond_the_limit_share_one_record() -> None:
    """It is made once, and no other one is."""
    account, asked = Account(), list[str]()
    account.new_counts = lambda name: (asked.append(name), new_counts(name))[1]
    for number in range(NAMES_MAX + 50):
        account.of(str(number))

    assert asked == [*map(str, range(NAMES_MAX)), OTHERS]
