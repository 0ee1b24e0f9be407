"""Reading the figures of a pool, all at the same moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil, floor, log10
from typing import NamedTuple

from bgtasks.clock import monotonic
from bgtasks.core.figures import BOUNDS, EXPORTED, NameFigures, Outcome
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Task

LOOKED_AT = 10_000  # waiting tasks


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool's figures at one moment.

    ``spawned == queued + running + succeeded + failed + timed_out + cancelled + dropped + shed + coalesced +
    handed_off`` holds in every snapshot, also while tasks run.

    Attributes:
        capacity: Tasks that may wait.
        conn_max: Tasks that may run at once.
        spawned: Calls of ``spawn`` so far in this process, including dropped tasks.
        queued: Tasks that wait now.
        running: Tasks that run now.
        succeeded: Tasks that returned.
        failed: Tasks that raised.
        timed_out: Asynchronous tasks that were cancelled after ``TASK_TIMEOUT`` seconds.
        cancelled: Accepted tasks that a shutdown gave up, and waiting tasks that were cancelled in the admin.
        dropped: Tasks that were not accepted.
        shed: Accepted tasks that were given up while they waited: too old, or displaced by newer ones.
        coalesced: Submissions that were merged with an earlier one that waited under the same key.
        handed_off: Tasks that were given to the engine.
        retried: Failed tries after which the task waited for another try. This is not an outcome.
        stuck: Running plain functions that are past ``TASK_TIMEOUT`` and cannot be stopped.
        handoff_failures: How often the engine could not be reached, or failed; the tasks ran in this process.
    """

    capacity: int
    conn_max: int
    spawned: int
    queued: int
    running: int
    succeeded: int
    failed: int
    timed_out: int
    cancelled: int
    dropped: int
    shed: int
    coalesced: int
    handed_off: int
    retried: int
    stuck: int
    handoff_failures: int

    @classmethod
    def sum_of(cls, names: Sequence[NameStats], **of_the_pool: int) -> PoolStats:
        """Add up the figures of a pool's `names`, and put those that are `of_the_pool` beside them."""
        return cls(
            spawned=sum(of.spawned for of in names),
            queued=sum(of.queued for of in names),
            running=sum(of.running for of in names),
            dropped=sum(sum(of.dropped.values()) for of in names),
            retried=sum(of.retried for of in names),
            **{outcome.label: sum(of.ended[outcome] for of in names) for outcome in Outcome},
            **of_the_pool,
        )


class Times(NamedTuple):
    """How long tasks took.

    Attributes:
        counts: Tasks by bucket: see BOUNDS.
        seconds: Of all of them together.
        longest: The seconds of the longest one.
    """

    counts: Sequence[int]
    seconds: float
    longest: float

    def percentile(self, share: float) -> float | None:
        """Return the seconds within which a `share` of the tasks lies, to two digits; None without tasks."""
        total = sum(self.counts)
        if not total:
            return None
        rank, below, lower = ceil(share * total), 0, 0.0
        for bound, count in zip((*BOUNDS, self.longest), self.counts, strict=True):
            if count and below + count >= rank:
                upper = max(lower, min(bound, self.longest))
                return min(two_digits(lower + (upper - lower) * (rank - below) / count), self.longest)
            below += count
            lower = bound
        return self.longest

    def exported(self) -> tuple[int, ...]:
        """Return the tasks by the buckets of EXPORTED, and one for those that took longer."""
        edges = [0, *(BOUNDS.index(bound) + 1 for bound in EXPORTED), len(self.counts)]
        return tuple(sum(self.counts[low:high]) for low, high in pairwise(edges))


def two_digits(value: float) -> float:
    """Return `value` rounded to as many digits as a bucket, some 12 % wide, can tell."""
    return round(value, 1 - floor(log10(value))) if value > 0 else 0.0


class NameStats(NamedTuple):
    """The tasks of one name in one pool, at one moment."""

    name: str  # or OTHERS
    spawned: int  # calls of spawn, dropped ones included
    queued: int
    running: int
    ended: tuple[int, ...]  # by outcome, in the order of Outcome
    dropped: Mapping[str, int]  # by reason
    retried: int
    waits: Times  # how long those that have run had waited
    runs: Times  # how long they ran

    @classmethod
    def of(cls, figures: NameFigures) -> NameStats:
        """Return what is counted now. Part of a step."""
        # No call from here to the next one: a signal handler that spawns does not come in the middle of it.
        spawned, ended, retried = figures.spawned, (*figures.ended,), figures.retried
        unfinished, running = figures.counts
        dropped, waits, runs = {**figures.dropped}, (*figures.waits,), (*figures.runs,)
        return cls(
            name=figures.name,
            spawned=spawned,
            queued=unfinished - running,
            running=running,
            ended=ended,
            dropped={reason.value: count for reason, count in dropped.items() if count},
            retried=retried,
            waits=Times(waits, figures.wait_seconds, figures.wait_max),
            runs=Times(runs, figures.run_seconds, figures.run_max),
        )


def read_stats(queue: TaskQueue) -> PoolStats:
    """Return the figures of this moment."""
    return read_stats_by_name(queue)[0]


def read_stats_by_name(queue: TaskQueue) -> tuple[PoolStats, list[NameStats]]:
    """Return the figures of this moment, and what they are made of by the tasks' names."""
    names, of_the_pool = queue.read(_copy)
    return PoolStats.sum_of(names, **of_the_pool), sorted(names)


def _copy(queue: TaskQueue) -> tuple[list[NameStats], dict[str, int]]:
    return [NameStats.of(figures) for figures in list(queue.account.values())], {
        "capacity": queue.capacity,
        "conn_max": queue.conn_max,
        "stuck": sum(task.overran for task in queue.running()),
        "handoff_failures": queue.handoff_failures,
    }


class WaitingStats(NamedTuple):
    """How the tasks of one name wait, at one moment."""

    oldest: float | None  # seconds that the oldest one has waited, of those that are not delayed
    delayed: int  # of them, those that wait for a later time: to be tried again, or as run_after says
    due: float | None  # seconds until the first of these may run


def read_waiting(queue: TaskQueue) -> dict[str, WaitingStats]:
    """Return how tasks wait now, by name. Of a long queue only the first LOOKED_AT tasks are looked at."""
    waiting, delayed = queue.read(_copy_waiting)
    now = monotonic()
    oldest: dict[str, float] = {}
    for task in waiting:
        name = task.figures.name
        oldest[name] = max(oldest.get(name, 0.0), now - task.spawned_at)
    due: dict[str, float] = {}
    for task in delayed:  # in the order of that time
        due.setdefault(task.figures.name, max(0.0, task.policy.due_at - now))
    numbers = Counter(task.figures.name for task in delayed)
    return {name: WaitingStats(oldest.get(name), numbers[name], due.get(name)) for name in {**oldest, **due}}


def _copy_waiting(queue: TaskQueue) -> tuple[list[Task], list[Task]]:
    return [*queue.checked_out, *islice(queue.waiting, LOOKED_AT)], queue.delayed[:LOOKED_AT]


def oldest_wait(queue: TaskQueue) -> float | None:
    """Return for how many seconds the oldest waiting task has waited; None if none waits."""
    since = queue.read(_oldest)
    return None if since is None else max(0.0, monotonic() - since)  # or it may not run yet


def _oldest(queue: TaskQueue) -> float | None:
    oldest = (*queue.checked_out, *islice(queue.waiting, 1))
    return min((task.spawned_at for task in oldest), default=None)
