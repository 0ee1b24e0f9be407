"""What is counted of the tasks of one pool, by their names, and written under the pool's lock.

Times are counted in buckets with fixed bounds, twenty to each power of ten, so the memory is bounded and the
figures of several processes can be added.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Callable
from typing import TypeAlias

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

# The tasks of one name that wait or run, and those of them that run. In a list, or in memory that outlives
# the process: a killed one has not lost them.
Counts: TypeAlias = "list[int] | memoryview[int]"
UNFINISHED, RUNNING = 0, 1  # the places in it


def new_counts(_name: str) -> Counts:
    """Return the counts of a name in a list."""
    return [0, 0]


class Outcome(enum.IntEnum):
    """How an accepted task ended: each in exactly one way. The number is its place in ``ended``."""

    SUCCEEDED = 0
    FAILED = 1
    TIMED_OUT = 2
    CANCELLED = 3
    HANDED_OFF = 4
    SHED = 5
    COALESCED = 6  # of a submission: an earlier one that waits has become it

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
    NO_LOOP = "no_loop"
    PROPAGATOR = "propagator"  # one could not capture its value


class ShedReason(enum.Enum):
    """Why a task that waited was given up."""

    EXPIRED = "expired"
    DISPLACED = "displaced"


class NameFigures:
    """The tasks of one name in one pool."""

    __slots__ = (
        "counts", "dropped", "ended", "name", "retried", "run_max", "run_seconds", "runs", "spawned",
        "wait_max", "wait_seconds", "waits",
    )  # fmt: skip

    def __init__(self, name: str, counts: Counts) -> None:
        self.name = name
        self.counts = counts
        self.spawned = 0
        self.retried = 0  # tries that have failed, after which the tasks have waited again
        self.ended = [0] * len(Outcome)
        self.dropped: dict[DropReason, int] = dict.fromkeys(DropReason, 0)
        self.waits = [0] * (len(BOUNDS) + 1)  # tasks that have run, by the bucket of the time they waited
        self.runs = [0] * (len(BOUNDS) + 1)  # the same tasks, by the bucket of the time they ran
        self.wait_seconds = self.run_seconds = 0.0
        self.wait_max = self.run_max = 0.0

    def count_try(self, waited: float, ran: float) -> None:
        """Count for how many seconds a task that is tried again has waited and run."""
        self.waits[bisect_left(BOUNDS, waited)] += 1
        self.runs[bisect_left(BOUNDS, ran)] += 1
        self.wait_seconds += waited
        self.run_seconds += ran
        self.wait_max = max(self.wait_max, waited)
        self.run_max = max(self.run_max, ran)


class Account(dict[str, NameFigures]):
    """The figures of one pool by the tasks' names."""

    def __init__(self) -> None:
        super().__init__()
        self.new_counts: Callable[[str], Counts] = new_counts  # called under the pool's lock

    def of(self, name: str) -> NameFigures:
        """Return the figures in which tasks called `name` are counted: always the same ones."""
        figures = self.get(name)
        if figures is None:
            label = name if len(self) < NAMES_MAX else OTHERS
            figures = self.get(label) or self.setdefault(label, NameFigures(label, self.new_counts(label)))
        return figures
