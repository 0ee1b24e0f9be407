"""The places of one pool's tasks: all that its one lock guards, and what a step under it is.

At every moment a task is in exactly one place: waiting, checked out, in a slot, or counted as ended. Each
change of place is one step under the lock, together with the figures that it changes. So figures are of one
moment, a drain waits for exact tasks, and nothing depends on the GIL.

Nothing of the user's is called under the lock: functions, logging, signals, callbacks, the ends of arguments.
A signal handler or a ``__del__`` may spawn in the middle of a step, so the lock is re-entrant. Signals, and
exceptions from outside (raised by a signal handler, or set on a thread), arrive as a function begins and
after a call. So what belongs together is changed without a call between, which is "atomic" in the comments,
and ``repair`` mends the rest.
"""

from __future__ import annotations

import enum
import queue
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

from bgtasks.clock import monotonic
from bgtasks.core.figures import Account, ShedReason
from bgtasks.core.lock import acquire, free, new_lock
from bgtasks.core.task import Life, Task

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q", bound="Places")

CLAIM_PATIENCE = 1.0  # seconds for the loop to claim; then a thread does, and has the loop looked after


class State(enum.Enum):
    """The life of a queue, in one direction only."""

    OPEN = "open"
    CLOSING = "closing"  # accepts nothing more, what it holds still runs
    CLOSED = "closed"  # what waited was cancelled: holds nothing that will ever run


class Place(enum.Enum):
    """Who goes on with a slot."""

    OUT = "out"  # nobody: it is not open yet, or no more
    IDLE = "idle"  # nobody, until its thread is woken or the loop claims it
    THREAD = "thread"
    LENT = "lent"  # the loop, as soon as it gets to it: the thread has a coroutine for it
    LOOP = "loop"  # while its thread serves the calls of the slot's asynchronous task


class SlotState:
    """What the queue knows of a slot."""

    def __init__(self) -> None:
        self.task: Task | None = None  # that it runs; under the pool's lock
        self.place = Place.OUT  # under the pool's lock
        self.context: Context | None = None  # of the task, once it has begun; written by who goes on with it
        self.signal: queue.SimpleQueue[None] = queue.SimpleQueue()  # its thread sleeps on it
        self.wake: Callable[[], None] = partial(self.signal.put, None)

    def go_on(self) -> None:
        """Have whoever goes on with the slot look at it. Called without the lock; twice is harmless."""
        self.wake()


class DrainWaiter:
    """The tasks that somebody waits for, and how to tell that they have ended."""

    def __init__(self, pending: set[Task], tell: Callable[[], object]) -> None:
        self.pending = pending  # under the pool's lock
        self.tell = tell  # called once all have ended, perhaps twice; it must not raise


def step(method: Callable[Concatenate[Q, P], T]) -> Callable[Concatenate[Q, P], T]:
    """Have `method` run under the pool's lock, as one step, and then do what follows from it.

    A slot is woken if tasks wait, and drains hear of what has ended. A step calls no other one.
    """

    @wraps(method)
    def run(self: Q, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            if not self.lock.acquire(False):
                acquire(self.lock)
            try:
                result = method(self, *args, **kwargs)
                wake = self.to_wake()
            finally:
                self.lock.release()
            if wake is not None:
                wake()
            if self.drains:
                self.tell_drains()
        except BaseException:
            self.repair()
            raise
        return result

    return run


class Places:
    """At most `capacity` waiting tasks, `conn_max` slots, and the figures of all tasks."""

    def __init__(self, pool: str, capacity: int, conn_max: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.conn_max = conn_max
        self.lock = new_lock()
        # Written as the pool is built:
        self.displaces = False  # a full queue sheds the oldest task for a new one
        self.makes_room = False  # it does, or some tasks expire; may become True once
        self.on_shed: Callable[[Task, ShedReason], object] = lambda _task, _reason: None  # must not raise
        self.ask_loop: Callable[[], object] = lambda: None  # has the loop call `claim`
        # All that follows is written under the lock.
        self.state = State.OPEN
        self.paused = False  # no task is taken
        self.waiting: deque[Task] = deque()
        self.delayed: list[Task] = []  # until they may run, or are tried again, in the order of that time
        self.keyed: dict[str, Task] = {}  # what waits and has a key, but for what is checked out
        # With a consumer that may hand them off, oldest first; True once the engine has the task.
        self.checked_out: dict[Task, bool] = {}
        self.check_out_new = False  # what is put is checked out at once
        self.queued: int = 0  # how many wait
        self.account = Account()
        self.handoff_failures = 0
        self.shed: deque[tuple[Task, ShedReason]] = deque()  # what nobody was told of yet
        self.drains: dict[DrainWaiter, None] = {}  # a dictionary for its order, and its atomic operations
        self.slots: Sequence[SlotState] = []  # those that have threads
        self.idle: list[SlotState] = []  # the last one to go idle gets the first task: its thread is warm
        self.waking: SlotState | None = None  # the idle slot whose thread was woken; see to_wake
        self.asked_at = 0.0  # monotonic seconds; the loop is going to claim, if it is not deaf; 0.0 if not
        self.loop_blocked = False  # coroutines are left waiting

    # What follows from a step.

    def to_wake(self) -> Callable[[], object] | None:
        """Return what wakes an idle slot, to be called after the step; None if no task waits for one.

        One thread is woken at a time: as it takes its task, it has the next one woken, if more tasks wait. So
        a burst costs its spawner one wake-up, and small tasks cost few changes of threads. Coroutines are
        left to the loop, which claims an idle slot for each.
        """
        waiting = self.waiting
        if self.shed and self.idle:
            return self.idle[-1].wake  # to tell of it
        if not self.idle or self.first() is None:
            return None
        if not self.loop_blocked and waiting[0].asynchronous and waiting[-1].asynchronous:
            now = monotonic()
            if not self.asked_at:
                self.asked_at = now
                return self.ask_loop
            if now - self.asked_at < CLAIM_PATIENCE:
                return None
        if self.waking is not None:
            return None
        self.waking = self.idle[-1]
        return self.waking.wake

    def first(self) -> int | None:
        """Return where the first task is that may be given: while the loop is blocked, a function."""
        if not self.waiting or self.paused:
            return None
        if not self.loop_blocked:
            return 0
        return next((i for i, task in enumerate(self.waiting) if not task.asynchronous), None)

    def repair(self) -> None:
        """Go on after an exception from outside in a step of this thread: no slot may miss its task."""
        free(self.lock)
        with self.lock:
            self.waking, self.asked_at = None, 0.0
            waits = [*self.waiting, *self.delayed]
            self.keyed = {task.policy.key: task for task in waits if task.policy.key}
            self.idle = [slot for slot in self.slots if slot.place is Place.IDLE]
            for waiter in list(self.drains):
                waiter.pending = {task for task in waiter.pending if task.life is not Life.ENDED}
            slots = [*self.slots]
        for slot in slots:
            slot.go_on()
        self.tell_drains()

    # For whoever waits for tasks to end.

    @step
    def drain_waiter(
        self, tell: Callable[[], object], *, except_for: Iterable[Task | None] = ()
    ) -> DrainWaiter:
        """Have `tell` called once every task that now waits or runs has ended."""
        waiter = DrainWaiter(self.tasks().difference(except_for), tell)
        self.drains[waiter] = None
        return waiter

    @step
    def forget(self, waiter: DrainWaiter) -> None:
        """Tell `waiter` nothing any more."""
        self.drains.pop(waiter, None)

    def mark_ended(self, task: Task) -> None:
        """Have nobody wait for `task` any more. Part of a step."""
        for waiter in list(self.drains):
            waiter.pending.discard(task)

    def tell_drains(self) -> None:
        """Tell those who wait for nothing any more."""
        for waiter in list(self.drains):
            if not waiter.pending:
                waiter.tell()
                self.drains.pop(waiter, None)

    # For whoever looks.

    @step
    def read(self: Q, look: Callable[[Q], T]) -> T:
        """Return what `look` sees at one moment. It must call nothing of the user's."""
        return look(self)

    def held(self) -> list[Task]:
        """Return all tasks that wait, wherever they do. Part of a step."""
        return [*self.checked_out, *self.waiting, *self.delayed]

    def running(self) -> list[Task]:
        """Return the tasks that run. They are consistent only as a part of a step."""
        tasks = [slot.task for slot in self.slots]
        return [task for task in tasks if task is not None and task.life is not Life.ENDED]

    def tasks(self) -> set[Task]:
        """Return the tasks that wait or run. Part of a step."""
        return {*self.held(), *self.running()}
