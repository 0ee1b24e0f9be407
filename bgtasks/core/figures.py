"""What is counted of the tasks of one pool, by their names.

Times are counted in buckets with fixed bounds, twenty to each power of ten, so the memory is bounded and the
figures of several processes can be added. A bucket is some 12 % wide: two digits of a percentile are shown.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10
from typing import NamedTuple

# The upper bounds, in seconds, of the buckets that metrics systems are given.
EXPORTED = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Our own: the preferred numbers of ISO 3 (R20), and the exported ones, whose buckets are sums of ours.
# What took longer than the last bound is in one bucket more.
_R20 = (
    *(1.0, 1.12, 1.25, 1.4, 1.6, 1.8, 2.0, 2.24, 2.5, 2.8),
    *(3.15, 3.55, 4.0, 4.5, 5.0, 5.6, 6.3, 7.1, 8.0, 9.0),
)
BOUNDS = tuple(
    sorted({*EXPORTED, *(float(f"{step}e{power}") for power in range(-4, 4) for step in _R20), 10_000.0})
)

NAMES_MAX = 200  # names that a pool tells apart; the tasks of all further ones are counted under OTHERS
OTHERS = "(other names)"


class Outcome(enum.IntEnum):
    """How an accepted task ended: every one in exactly one way. The number is its place in ``ended``."""

    SUCCEEDED = 0
    FAILED = 1
    TIMED_OUT = 2
    CANCELLED = 3
    HANDED_OFF = 4

    @property
    def label(self) -> str:
        """The outcome in logs, signals and figures, such as ``"timed_out"``."""
        return self.name.lower()


class DropReason(enum.Enum):
    """Why a task was not accepted."""

    __hash__ = object.__hash__  # members are single objects, and Enum's own is a slow function in Python

    FULL = "full"
    SHUTDOWN = "shutdown"
    NO_THREAD = "no_thread"
    PROPAGATOR = "propagator"  # one could not capture its value


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool's figures at one moment.

    ``spawned == queued + running + succeeded + failed + timed_out + cancelled + dropped + handed_off``
    holds in every snapshot, not only at rest.

    Attributes:
        capacity: Tasks that may wait.
        conn_max: Tasks that may run at once.
        spawned: Calls of ``spawn`` so far in this process, dropped ones included.
        queued: Tasks that wait now.
        running: Tasks that run now.
        succeeded: Tasks that returned.
        failed: Tasks that raised.
        timed_out: Asynchronous tasks that were cancelled after ``TASK_TIMEOUT`` seconds.
        cancelled: Accepted tasks that shutdown gave up, waiting or running.
        dropped: Tasks that were not accepted.
        handed_off: Tasks that were given to the engine.
        stuck: Of the running ones, those past ``TASK_TIMEOUT``, which nothing can stop.
        handoff_failures: How often the engine could not be reached, or failed; the tasks ran here.
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
    handed_off: int
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
            **{outcome.label: sum(of.ended[outcome] for of in names) for outcome in Outcome},
            **of_the_pool,
        )


class NameFigures:
    """The tasks of one name in one pool. Written under the pool's lock."""

    __slots__ = (
        "dropped", "ended", "name", "queued", "run_max", "run_seconds", "running", "runs", "spawned",
        "wait_max", "wait_seconds", "waits",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.spawned = self.queued = self.running = 0
        self.ended = [0] * len(Outcome)
        self.dropped: dict[DropReason, int] = dict.fromkeys(DropReason, 0)
        self.waits = [0] * (len(BOUNDS) + 1)  # tasks that have run, by the bucket of the time they waited
        self.runs = [0] * (len(BOUNDS) + 1)  # the same tasks, by the bucket of the time they ran
        self.wait_seconds = self.run_seconds = 0.0
        self.wait_max = self.run_max = 0.0

    def copy(self) -> NameStats:
        """Return what is counted now."""
        # No call from here to the next one: a signal handler that spawns does not come in the middle of it.
        spawned, queued, running, ended = self.spawned, self.queued, self.running, (*self.ended,)
        dropped, waits, runs = {**self.dropped}, (*self.waits,), (*self.runs,)
        return NameStats(
            name=self.name,
            spawned=spawned,
            queued=queued,
            running=running,
            ended=ended,
            dropped={reason.value: count for reason, count in dropped.items() if count},
            waits=Times(waits, self.wait_seconds, self.wait_max),
            runs=Times(runs, self.run_seconds, self.run_max),
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


class Account:
    """The figures of one pool by the tasks' names. Written under the pool's lock."""

    def __init__(self) -> None:
        self.by_name: dict[str, NameFigures] = {}

    def of(self, name: str) -> NameFigures:
        """Return the figures in which tasks called `name` are counted: always the same ones."""
        figures = self.by_name.get(name)
        if figures is None:
            label = name if len(self.by_name) < NAMES_MAX else OTHERS
            figures = self.by_name.setdefault(label, NameFigures(label))
        return figures

    def drop(self, name: str, reason: DropReason) -> None:
        """Count a task that was not accepted."""
        figures = self.of(name)
        figures.spawned += 1
        figures.dropped[reason] += 1


def two_digits(value: float) -> float:
    """Return `value` rounded to as many digits as a bucket can tell."""
    return round(value, 1 - floor(log10(value))) if value > 0 else 0.0


class NameStats(NamedTuple):
    """The tasks of one name in one pool, at one moment."""

    name: str  # or OTHERS
    spawned: int  # calls of spawn, dropped ones included
    queued: int
    running: int
    ended: tuple[int, ...]  # by outcome, in the order of Outcome
    dropped: Mapping[str, int]  # by reason
    waits: Times  # how long those that have run had waited
    runs: Times  # how long they ran
