"""What is counted of the tasks of one name: how they ended, how long they waited and how long they ran.

A slot counts where a task ends, in figures of its own that nobody else writes, so a spawn pays nothing. Times
are counted in buckets of fixed bounds: enough for a percentile or a histogram, of a size that never grows.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# Upper bounds of the buckets, in seconds. What took longer than the last is in one bucket more.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

NAMES_MAX = 200  # names that a pool tells apart; the tasks of all further ones are counted under OTHERS
OTHERS = "(other names)"

LAST = 20  # failures and drops that are kept to be looked at
OWN_MODULES = frozenset({"bgtasks.slots", "bgtasks.drainer", "bgtasks.queue"})  # what a task is called by
FRAMES = 30  # the innermost frames of a traceback that are kept of each exception in it
TEXT_MAX = 4000  # characters of a traceback that are kept: the end of it, which says what happened


class Failure(NamedTuple):
    """One of the last tasks that raised. It holds text only, nothing of the task itself."""

    at: float  # seconds since the epoch
    name: str
    outcome: str
    error: str  # the type
    traceback: str  # without the values of variables
    wait_s: float
    run_s: float


class Drop(NamedTuple):
    """One of the last tasks that were not accepted."""

    at: float  # seconds since the epoch
    name: str
    reason: str


def traceback_text(error: BaseException) -> str:
    """Return the traceback of `error`, bounded, with no value of any variable. Never raises."""
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") in OWN_MODULES:
            trace = trace.tb_next
        lines = traceback.TracebackException(
            type(error), error, trace or error.__traceback__, limit=-FRAMES, compact=True
        ).format()
        text = "".join(lines).rstrip()
    except BaseException as other:
        text = f"{type(error).__name__} (its traceback raised {type(other).__name__})"
    return text if len(text) <= TEXT_MAX else "[...]\n" + text[-TEXT_MAX:]


class NameFigures:
    """The ended tasks of one name, as one slot has counted them. Only its owner writes it."""

    __slots__ = ("ended", "run_seconds", "runs", "wait_seconds", "waits")

    def __init__(self, outcomes: int) -> None:
        self.ended = [0] * outcomes  # by outcome
        self.waits = [0] * (len(BOUNDS) + 1)  # tasks by the time they waited, of those that ran
        self.runs = [0] * (len(BOUNDS) + 1)  # tasks by the time they ran
        self.wait_seconds = 0.0
        self.run_seconds = 0.0


class NameStats(NamedTuple):
    """The tasks of one name in one pool, at one moment.

    Attributes:
        name: Of the tasks, or OTHERS.
        queued: Tasks that wait now.
        running: Tasks that run now.
        ended: How many have ended, by outcome, in the order of ``Outcome``.
        dropped: How many were not accepted, by reason.
        waits: Tasks that have run, by the bucket of the time they waited.
        runs: The same tasks, by the bucket of the time they ran.
        wait_seconds: Of all of them together.
        run_seconds: Of all of them together.
    """

    name: str
    queued: int
    running: int
    ended: tuple[int, ...]
    dropped: Mapping[str, int]
    waits: tuple[int, ...]
    runs: tuple[int, ...]
    wait_seconds: float
    run_seconds: float

    @property
    def spawned(self) -> int:
        """Calls of ``spawn``, dropped ones included."""
        return self.queued + self.running + sum(self.ended) + sum(self.dropped.values())


def add_up(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return the sums of the columns of `rows`."""
    return tuple(map(sum, zip(*rows, strict=True)))


def percentile(buckets: Sequence[int], share: float) -> float | None:
    """Return the time (seconds) within which a `share` of the tasks in `buckets` lies; None without tasks.

    Interpolated inside its bucket, as Prometheus' ``histogram_quantile`` does. Of what lies past the last
    bound, that bound is all that can be said.
    """
    total = sum(buckets)
    if not total:
        return None
    rank = share * total
    below = 0
    lower = 0.0
    for bound, count in zip(BOUNDS, buckets, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
        lower = bound
    return lower
