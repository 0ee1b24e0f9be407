"""How plain functions that compute leave the GIL to the rest of the process.

A thread that computes in Python gives the GIL up every 5 ms, if others wait for it (`sys.setswitchinterval`).
One that answers a request gives it up many times, at each question to the database, and each time waits for
it again. So one slot that goes from one such task to the next is enough to starve a site, and fewer slots
would not help. What helps is that slots do nothing for a moment between two tasks.

Without the GIL, threads wait for a processor instead. The kernel divides the processors equally among the
threads that compute, so eight slots leave too little to the one thread that answers requests.

While slots go from task to task, the drainer looks every PERIOD how long others have to wait, and which
threads have used the processor. With the GIL, they wait as long as its own loop is late; without, as long as
the kernel says. If that is too long, and the slots have used more than SHARE of a processor, they start their
tasks at such intervals that they use SHARE. If nobody takes what they leave, as in a process that only works
off its queue, they go on as fast as they can. So they do if nobody has to wait, as beside tasks that compute
without the GIL while there are processors for all.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from time import process_time, thread_time

from bgtasks.clock import monotonic
from bgtasks.core.drainer import Drainer
from bgtasks.core.lock import has_gil
from bgtasks.core.log import log
from bgtasks.core.pace import GRAIN, Pace
from bgtasks.core.places import State
from bgtasks.core.queue import TaskQueue

CAN_MEASURE = sys.platform == "linux"  # the clock of another thread; elsewhere nobody is slowed down
PERIOD = 0.02  # seconds between two looks
LOOK_FOR = 1.0  # seconds, at least
COMPUTING = 0.02  # processor seconds in the last moments; with less, slots are looked at no longer than that

LATE = 0.001  # seconds that others wait, on average; with more, they are kept waiting
LATE_OVER = 0.1  # seconds of that average, with the GIL ...
DELAYED_OVER = 0.03  # ... and without: what all threads have waited varies less than one loop's lateness
SMALL = 0.0005  # processor seconds; 1024 tasks smaller than that finish in half a second
SHARE = 1 / 3  # of a processor, which slots get at least if they need it
WANTED = 0.02  # of a processor; if others use less of it, they do not need what the slots leave
FASTER, SLOWER = 0.1, 2.5  # a second, as parts of what they use: while nobody waits, and while others do
TRIAL = 0.15  # seconds that slots leave something, before that is decided
RETRY = 1.0  # seconds before they do so again
INTERVAL_MAX = 1.0  # seconds

QUIET = 60.0  # seconds between two records that say so:
SLOWED_DOWN = "tasks compute while other threads have to wait: a plain function is started every %.1f ms"


def processor_time(thread: int | None) -> float:
    """Return the processor seconds of a thread by its native id, such as ``threading.Thread.native_id``.

    Returns:
        0.0 for None, and for a thread that has ended.
    """
    if thread is None:
        return 0.0
    try:
        # How Linux makes a clock of an id: man 2 clock_getres. Python's pthread_getcpuclockid takes the other
        # kind of id, and crashes if there is no such thread.
        return time.clock_gettime(~thread << 3 | 6)
    except OSError:
        return 0.0


def processor_time_of(threads: Iterable[threading.Thread]) -> float:
    """Return the processor seconds of several threads together."""
    return sum(processor_time(thread.native_id) for thread in threads)


class RunQueue:
    """How long threads of this process wait for a processor. Linux says so (proc(5), schedstat).

    With the GIL, each file that is read would have to wait for it several times.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}  # by thread: nanoseconds waited, times run

    def delay(self, except_for: Container[int | None]) -> float:
        """Return the mean seconds, since the last call, that a thread waited each time it needed a processor.

        0.0 if none ran, and for the first call. The threads with the native ids `except_for` are left out.
        """
        before, self._before = self._before, dict(_run_queue(except_for))
        waited = times = 0
        for thread, (waited_by_now, times_by_now) in self._before.items():
            if thread in before:
                waited += waited_by_now - before[thread][0]
                times += times_by_now - before[thread][1]
        return waited / 1e9 / times if times else 0.0


class MeasuredPace(Pace):
    """The pace of the slots of a `drainer`, which keeps them from starving the rest of the process."""

    def __init__(self, drainer: Drainer) -> None:
        super().__init__()
        self._drainer = drainer
        self._run_queue = RunQueue()
        self._looking = False  # the loop was asked to look; set by slots, cleared on the loop
        self._quiet_until = 0.0  # monotonic seconds, from when on it is said again that slots are slowed down
        self.free()

    def applies(self) -> bool:
        """Tell whether a slot has to ``wait``, and have the loop check whether it has to from now on."""
        if not self._looking and CAN_MEASURE:
            self._looking = True
            self._drainer.loop.call_soon(self._look_again, monotonic())
        return self.interval > 0

    def free(self) -> None:
        """Let slots go as fast as they can, and be asked to look again."""
        self.speed_up()
        self._looking = False

    def speed_up(self) -> None:
        """Let slots go as fast as they can, and forget what was seen."""
        self.interval = 0.0
        self.held = False  # slots are slowed down, and others take what they leave
        self._share = 0.0  # of a processor, which slots may use; 0.0 for all that they can get
        self._since = self._retry = 0.0  # monotonic seconds: of the trial, and of the next one
        self._began = 0.0  # monotonic seconds: of the first look
        self._before: tuple[float, float, float, int] | None = None  # the arguments of the last look
        # Over the last moments:
        self._late = self._others = 0.0  # seconds, and the part of a processor; means
        self._used = self._ended = 0.0  # processor seconds, and the tasks that took them; sums

    def look(self, now: float, *, late: float, over: float, slots: float, others: float, ended: int) -> bool:
        """Set the interval, and tell whether to look again while slots have tasks.

        Args:
            now: Monotonic seconds.
            late: Seconds that others waited, each time they had to, since the last look.
            over: Seconds over which the average of `late` is taken.
            slots: Processor seconds that the threads of all pools have used so far.
            others: Those that all other threads have used, but the drainer's and those beside it.
            ended: Tasks that have ended so far.
        """
        before, self._before = self._before, (now, slots, others, ended)
        if before is None:
            self._began = now
            return True
        elapsed = max(GRAIN, now - before[0])
        used = max(0.0, slots - before[1])  # what a slot that has ended had used counts no more
        others = max(0.0, others - before[2])
        fade = max(0.0, 1 - elapsed / 0.5)
        self._late += (late - self._late) * min(1.0, elapsed / over)
        self._others = self._others * fade + others / elapsed * (1 - fade)
        self._used = self._used * fade + used
        self._ended = self._ended * fade + max(0, ended - before[3])
        each = self._used / max(1.0, self._ended)
        self._share = self._next_share(now, elapsed, used / elapsed, each)
        self.held = self._share > 0 and now - self._since > TRIAL
        self.interval = min(each / self._share, INTERVAL_MAX) if self._share else 0.0
        return self.interval > 0 or self._used >= COMPUTING or now - self._began < LOOK_FOR

    def _next_share(self, now: float, elapsed: float, used: float, each: float) -> float:
        if not self._share:
            if self._late > LATE and used > SHARE and each > SMALL and now >= self._retry:
                self._since, self._others = now, WANTED
                return SHARE
            return 0.0
        if self._others < WANTED and now - self._since > TRIAL:
            self._retry = now + RETRY
            return 0.0
        change = -SLOWER if self._late > LATE else FASTER
        share = self._share * (1 + change * elapsed)
        return max(SHARE, share) if share <= 1 else 0.0

    # On the drainer's loop.

    def _look_again(self, due: float) -> None:
        """Check whether slots delay others, while they have tasks. It was `due` at that monotonic second."""
        again = False
        try:
            if self._look(due):
                next_due = monotonic() + PERIOD
                self._drainer.loop.call_later(PERIOD, self._look_again, next_due)
                again = True
        finally:
            if not again:
                self.free()  # the next slot that goes from one task to another asks again

    def _look(self, due: float) -> bool:
        now, pools = monotonic(), list(self._drainer.pools)
        # Not whether tasks run: a slot that waits until it may start the next one runs none.
        if all(len(pool.queue.idle) == len(pool.queue.slots) for pool in pools):
            return False
        if any(pool.queue.state is not State.OPEN for pool in pools):
            self.speed_up()  # a shutdown waits for them
            return True
        slots = [thread for pool in pools for thread in pool.threads()]
        beside = [each for thread in self._drainer.background for each in thread.threads()]
        used = processor_time_of(slots)
        others = process_time() - thread_time() - used - processor_time_of(beside)
        late, over = now - due, LATE_OVER
        if not has_gil():
            own = {threading.get_native_id(), *(thread.native_id for thread in (*slots, *beside))}
            late, over = self._run_queue.delay(own), DELAYED_OVER
        ended = sum(pool.queue.read(_ended) for pool in pools)
        again = self.look(now, late=late, over=over, slots=used, others=others, ended=ended)
        if self.held and now >= self._quiet_until:
            self._quiet_until = now + QUIET
            log(logging.INFO, SLOWED_DOWN, self.interval * 1000)
        return again


def _run_queue(except_for: Container[int | None]) -> Iterator[tuple[int, tuple[int, int]]]:
    for path in Path("/proc/self/task").iterdir():
        thread = int(path.name)
        if thread not in except_for:
            with contextlib.suppress(OSError, ValueError):  # it has ended; or the kernel does not count this
                _used, waited, times = (path / "schedstat").read_bytes().split()
                yield thread, (int(waited), int(times))


def _ended(queue: TaskQueue) -> int:
    return sum(sum(figures.ended) for figures in list(queue.account.values()))
