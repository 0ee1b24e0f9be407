"""Lets other threads have the GIL more often while one plain function computes for long.

A thread that computes in Python gives the GIL up every 5 ms, if others wait for it (`sys.setswitchinterval`).
A request waits for it dozens of times. So beside one task that computes for three seconds, requests take as
long as that; with an interval of 0.5 ms most of them take 50 ms at most, for no more processor time.

With several such tasks at once it is left as it is: they switch among themselves as well, which costs 6 %
with four of them, and a request that waits for each in turn is hardly faster. Short tasks are the concern of
``bgtasks.monitoring.pace``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from time import process_time, thread_time
from typing import NamedTuple

from bgtasks.clock import monotonic
from bgtasks.core.lock import has_gil
from bgtasks.core.slots import Slots
from bgtasks.monitoring.pace import CAN_MEASURE, LATE, WANTED, processor_time, processor_time_of
from bgtasks.monitoring.thread import MonitorThread
from bgtasks.monitoring.watchdog import functions

LOOK_INTERVAL = 0.1  # seconds between two looks; what computes for longer than that is a long task
STAYS = 2.0  # seconds without a function until the thread ends, so that each of many tasks does not start one
DEFAULT = 0.005  # seconds, Python's switch interval. Another one is somebody's choice, and left alone
SHORTER = 0.0005  # seconds

COMPUTES = 0.1  # of a processor, which a function uses at least that computes; eight of them may share one


class Used(NamedTuple):
    """The processor seconds that were used so far."""

    functions: dict[tuple[int, float], float]  # by a slot's thread and the start of the function that it runs
    others: float  # by all threads but those of the slots and the one that looks


class SwitchWatch(MonitorThread):
    """A thread that looks at plain functions while any runs, and sets the switch interval."""

    role = "switch-watch"

    def __init__(self, built: Callable[[], Iterable[Slots]]) -> None:
        self._built = built  # what runs the tasks of each pool
        self._is_shorter = False  # we have set it; written by the thread
        super().__init__()

    def forget(self) -> None:
        """Know of no thread: this is a forked child. It has inherited the interval."""
        super().forget()
        self._set(shorter=False)

    def _is_wanted(self) -> bool:
        return CAN_MEASURE and has_gil()

    def _is_needed(self) -> bool:
        return any(self._functions())

    def _run(self, stop: threading.Event) -> None:
        before, quiet_since = self._read(), monotonic()
        due = quiet_since + LOOK_INTERVAL
        try:
            while monotonic() - quiet_since < STAYS and not stop.wait(due - monotonic()):
                late = monotonic() - due
                after = self._read()
                self._set(shorter=self._is_worth_it(before, after, LOOK_INTERVAL + late, late))
                before, due = after, monotonic() + LOOK_INTERVAL
                if after.functions:
                    quiet_since = monotonic()
        finally:
            self._set(shorter=False)

    def _functions(self) -> Iterator[tuple[int, float]]:
        """Yield the native id of the slot's thread, and the start, of each plain function that runs."""
        for _, slot, task in functions(self._built()):
            yield slot.thread.native_id or 0, task.started_at

    def _read(self) -> Used:
        used = {function: processor_time(function[0]) for function in self._functions()}
        slots = processor_time_of(thread for pool in self._built() for thread in pool.threads())
        return Used(used, process_time() - thread_time() - slots)

    def _is_worth_it(self, before: Used, after: Used, elapsed: float, late: float) -> bool:
        """Tell whether one function computes, and whether others wait for it, from two readings."""
        computing = sum(
            used - before.functions[function] >= COMPUTES * elapsed
            for function, used in after.functions.items()
            if function in before.functions
        )
        are_others = after.others - before.others >= WANTED * elapsed
        return computing == 1 and are_others and (late > LATE or self._is_shorter)

    def _set(self, *, shorter: bool) -> None:
        """Set the interval, unless somebody else has."""
        old, new = (DEFAULT, SHORTER) if shorter else (SHORTER, DEFAULT)
        if shorter is not self._is_shorter:
            is_ours = round(sys.getswitchinterval(), 6) == old
            if is_ours:
                sys.setswitchinterval(new)
            self._is_shorter = shorter and is_ours
