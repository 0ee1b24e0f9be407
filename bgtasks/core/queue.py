"""The bounded queue of one pool, and every step of its tasks, each under the pool's one lock.

At every moment a task is in exactly one place: waiting, checked out, in a slot, or counted as ended. Each
change of place is one step under the lock, together with the figures that it changes. So figures are of one
moment, a drain waits for exact tasks, and nothing depends on the GIL.

Nothing of the user's is called under the lock: functions, logging, signals, callbacks, the ends of arguments.
A signal handler or a ``__del__`` may spawn in the middle of a step, so the lock is re-entrant. Signals, and
exceptions from outside (raised by a signal handler, or set on a thread), arrive as a function begins and
after a call. So what belongs together is changed without a call between, and ``repair`` mends the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from time import monotonic
from typing import TypeVar

from bgtasks.core.drain import Steps, step
from bgtasks.core.figures import Account, DropReason, Outcome
from bgtasks.core.lock import acquire, free
from bgtasks.core.places import Place, SlotState, State
from bgtasks.core.task import Life, Task

T = TypeVar("T")

CLAIM_PATIENCE = 1.0  # seconds for the loop to claim; then a thread does, and has the loop looked after

_started_at = attrgetter("started_at")


class TaskQueue(Steps):
    """At most `capacity` waiting tasks, the places of the slots, and the figures of all tasks."""

    def __init__(self, pool: str, capacity: int, conn_max: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.conn_max = conn_max
        super().__init__()
        self.ask_loop: Callable[[], object] = lambda: None  # has the loop call `claim`
        # All that follows is written under the lock.
        self.state = State.OPEN
        self.paused = False  # no task is taken
        self.waiting: deque[Task] = deque()
        self.checked_out: dict[Task, None] = {}  # with a consumer that may hand them off, oldest first
        self.check_out_new = False  # what is put is checked out at once
        self.queued = 0  # how many wait or are checked out
        self.slots: Sequence[SlotState] = []  # those that have threads
        self.idle: list[SlotState] = []  # the last one to go idle gets the first task: its thread is warm
        self.waking: SlotState | None = None  # the idle slot whose thread was woken; see to_wake
        self.asked_at = 0.0  # monotonic seconds; the loop is going to claim, if it is not deaf; 0.0 if not
        self.loop_blocked = False  # coroutines are left waiting
        self.account = Account()
        self.handoff_failures = 0

    # For spawners.

    def put(self, task: Task) -> DropReason | None:
        """Accept `task` and return None, or count a drop and return its reason."""
        lock, wake, reason = self.lock, None, None
        try:  # as in `step`, whose wrapper would cost each spawn 0.2 µs
            if not lock.acquire(False):
                acquire(lock)
            task.figures = figures = self.account.get(task.name) or self.account.of(task.name)
            # No call from here to the next one: all of it is done or nothing, and nobody spawns in between.
            figures.spawned += 1
            if self.queued >= self.capacity or self.state is not State.OPEN:
                reason = DropReason.FULL if self.state is State.OPEN else DropReason.SHUTDOWN
                figures.dropped[reason] += 1
            else:
                figures.queued += 1
                self.queued += 1
                if self.check_out_new:
                    self.checked_out[task] = None
                else:
                    self.waiting.append(task)
                if self.idle:
                    wake = self.to_wake()
            lock.release()
            if wake is not None:
                wake()
        except BaseException:
            self.repair()
            raise
        if reason is not None:
            task.discard()
        return reason

    @step
    def refuse(self, name: str, reason: DropReason | None = None) -> DropReason:
        """Count the drop of a task called `name` that was not even made, and return the reason."""
        if reason is None:
            reason = DropReason.FULL if self.state is State.OPEN else DropReason.SHUTDOWN
        figures = self.account.of(name)
        figures.spawned += 1
        figures.dropped[reason] += 1
        return reason

    # For slots. `slot` is the one that asks.

    @step
    def add_slots(self, slots: Sequence[SlotState]) -> None:
        """Have `slots`, all of them idle, as well."""
        for slot in slots:
            slot.place = Place.IDLE
        self.slots = [*self.slots, *slots]
        self.idle = [*reversed(slots), *self.idle]

    @step
    def remove_slots(self, *, if_idle: bool = False) -> bool:
        """Have no slots, so that nothing starts. False if one is not idle, and all shall be."""
        if if_idle and len(self.idle) < len(self.slots):
            return False
        for slot in self.idle:
            slot.place = Place.OUT
        self.slots, self.idle = [], []
        self.waking, self.asked_at = None, 0.0
        return True

    def to_wake(self) -> Callable[[], object] | None:
        """Return what wakes an idle slot, to be called after the step; None if no task waits for one.

        One thread is woken at a time: as it takes its task, it has the next one woken, if more tasks wait. So
        a burst costs its spawner one wake-up, and small tasks cost few changes of threads. Coroutines are
        left to the loop, which claims an idle slot for each.
        """
        waiting = self.waiting
        if not self.idle or self._ready() is None:
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

    @step
    def claim(self) -> SlotState | None:
        """Give the oldest waiting task to an idle slot, and return that, if the task is asynchronous."""
        self.asked_at = 0.0
        if not self.idle or not self.waiting or self.paused or not self.waiting[0].asynchronous:
            return None
        slot = self.idle.pop()
        slot.place = Place.LOOP
        self._give(slot, monotonic())
        return slot

    def _ready(self) -> int | None:
        """Return where the next task to give is, if there is one: while the loop is blocked, a function."""
        if not self.waiting or self.paused:
            return None
        if not self.loop_blocked:
            return 0
        return next((i for i, task in enumerate(self.waiting) if not task.asynchronous), None)

    def _give(self, slot: SlotState, now: float, index: int = 0) -> Task:
        """Move a waiting task to `slot`, which the loop keeps only if the task is asynchronous."""
        task = self.waiting[index]
        figures = task.figures
        task.begin(now)
        # No call from here to the last one, so all of it is done or nothing.
        self.queued -= 1
        figures.queued -= 1
        figures.running += 1
        task.life = Life.RUNNING
        slot.task = task
        if slot.place is not Place.LOOP or not task.asynchronous:
            slot.place = Place.THREAD
        del self.waiting[index]
        return task

    @step
    def take(self, slot: SlotState) -> Task | None:
        """Return the task that the slot's thread shall go on with; None if it may sleep."""
        if self.waking is slot:
            self.waking = None
        if slot.place is Place.IDLE and (index := self._ready()) is not None:
            self.idle.remove(slot)  # first: if an exception comes in between, nobody else gives it a task
            return self._give(slot, monotonic(), index)
        if slot.place is Place.THREAD and slot.task is None:
            return self._next(slot, monotonic())
        return slot.task if slot.place is Place.THREAD else None

    def end(self, slot: SlotState, task: Task, outcome: Outcome, *, take: bool = True) -> Task | None:
        """Count `task` as ended, unless a shutdown has given it up, and counted it, before.

        Returns:
            The task that the slot goes on with. None if there is none, and the slot is idle, or not `take`.
        """
        lock, now, following = self.lock, monotonic(), None
        times = task.times(now)
        if not lock.acquire(False):
            acquire(lock)
        try:  # no step: nobody has to be woken, and an exception from outside is for the slot to mend
            task.end(outcome, times)
            slot.task = None
            if take:
                following = self._next(slot, now)
            if self.drains:
                self.mark_ended(task)
        finally:
            lock.release()
        if self.drains:
            self.tell_drains()
        return following

    def _next(self, slot: SlotState, now: float) -> Task | None:
        index = self._ready()
        if index is not None:
            return self._give(slot, now, index)
        self._go_idle(slot)
        return None

    def _go_idle(self, slot: SlotState) -> None:
        slot.place = Place.IDLE if slot in self.slots else Place.OUT
        if slot.place is Place.IDLE:
            self.idle.append(slot)

    @step
    def move(self, slot: SlotState, task: Task, place: Place, to: Place) -> bool:
        """Let the next one go on with the slot, if it is at `place` with a `task` that was not given up."""
        moved = slot.task is task and slot.place is place and task.life is Life.RUNNING
        if moved:
            slot.place = to
        return moved

    @step
    def set_loop_blocked(self, blocked: bool) -> None:
        """Leave coroutines waiting, also those that the loop has not begun, until it answers; or no more."""
        self.loop_blocked = blocked
        lent = {slot.task: slot for slot in self.slots if slot.place is Place.LENT and slot.context is None}
        for task in sorted(set(self.running()).intersection(lent), key=_started_at, reverse=True):
            if blocked and self.queued < self.capacity:
                self._take_back(lent[task], task)

    def _take_back(self, slot: SlotState, task: Task) -> None:
        figures = task.figures
        # No call from here to the last one, so all of it is done or nothing.
        self.queued += 1
        figures.queued += 1
        figures.running -= 1
        task.life = Life.WAITING
        slot.task, slot.place = None, Place.IDLE
        self.idle += (slot,)
        self.waiting.appendleft(task)

    @step
    def decide(self, task: Task, outcome: Outcome) -> bool:
        """Note how `task` ended, for the caller to tell the listeners; False if a shutdown has told them."""
        task.verdict = outcome
        return task.life is not Life.ENDED

    @step
    def interrupted(self, slot: SlotState) -> Task | None:
        """Return the task that an exception has hit on the slot's thread; None if none was, or it goes on."""
        if slot.task is None or slot.place is Place.LOOP:
            return None
        slot.place = Place.THREAD  # the loop shall not begin it any more
        return slot.task

    def repair(self) -> None:
        """Go on after an exception from outside in a step of this thread: no slot may miss its task."""
        free(self.lock)
        with self.lock:
            self.waking, self.asked_at = None, 0.0
            self.idle = [slot for slot in self.slots if slot.place is Place.IDLE]
            for waiter in list(self.drains):
                waiter.pending = {task for task in waiter.pending if task.life is not Life.ENDED}
            slots = [*self.slots]
        for slot in slots:
            slot.go_on()
        self.tell_drains()

    # For a task that runs in the code that spawns it.

    @step
    def count_inline(self, task: Task, outcome: Outcome) -> None:
        """Count `task`, which never waited, as spawned and ended in one."""
        figures = task.figures = self.account.of(task.name)
        task.end(outcome, task.times(monotonic()))
        # No call since it was counted as ended, so all of it is done or nothing.
        figures.spawned += 1
        figures.running += 1

    # For a consumer that may hand tasks off.

    @step
    def set_check_out_new(self, on: bool) -> None:
        """Check out at once what is put from now on, or no more."""
        self.check_out_new = on

    @step
    def check_out(self, number: int) -> list[Task]:
        """Check out up to `number` of the newest waiting tasks. They keep their places in CAPACITY."""
        tasks: list[Task] = []
        while len(tasks) < number and self.waiting:
            task = self.waiting[-1]
            self.checked_out[task] = None
            self.waiting.pop()
            tasks.append(task)
        return tasks

    @step
    def put_back(self, tasks: Iterable[Task]) -> None:
        """Let slots run `tasks`, unless they were cancelled, or are about to be: the queue is closed."""
        for task in tasks:
            if task in self.checked_out and self.state is not State.CLOSED:
                # No call from here to the last one, so all of it is done or nothing.
                del self.checked_out[task]
                self.waiting.append(task)

    @step
    def count_handed_off(self, task: Task) -> bool:
        """Count a checked-out `task` as the engine's; False if a shutdown has cancelled it before."""
        if task not in self.checked_out:
            return False
        self._end_waiting(task, Outcome.HANDED_OFF, [])
        return True

    def _end_waiting(self, task: Task, outcome: Outcome, ended: list[Task]) -> None:
        """Move the oldest waiting task, or one that is checked out, to `ended`."""
        # No call from here to the last one, so all of it is done or nothing.
        task.life, task.outcome = Life.ENDED, outcome
        task.figures.queued -= 1
        task.figures.ended[outcome] += 1
        self.queued -= 1
        ended += (task,)
        if task in self.checked_out:
            del self.checked_out[task]
        else:
            del self.waiting[0]
        self.mark_ended(task)

    # For whoever pauses or ends the pool.

    @step
    def pause(self) -> bool:
        """Take no task until ``resume``; what is spawned waits. False if the pool is shut down."""
        self.paused = self.state is State.OPEN
        return self.paused

    @step
    def resume(self) -> None:
        """Take tasks again."""
        self.paused = False

    @step
    def close(self) -> None:
        """Accept nothing more. What was accepted shall run, so it ends a pause."""
        self.paused = False
        if self.state is State.OPEN:
            self.state = State.CLOSING

    @step
    def cancel_waiting(self, cancelled: list[Task], *, checked_out: bool = False) -> None:
        """Close for good, and move what waits to `cancelled`; and if `checked_out`, what is checked out."""
        self.state = State.CLOSED
        self.check_out_new = False
        for task in [*self.waiting, *(self.checked_out if checked_out else ())]:
            self._end_waiting(task, Outcome.CANCELLED, cancelled)

    @step
    def give_up(self, tasks: Iterable[Task], cancelled: list[Task]) -> None:
        """Count those of `tasks` that still run as ended, and move them to `cancelled`."""
        now = monotonic()
        for task in tasks:
            if task.life is Life.ENDED:
                continue
            verdict = task.verdict  # if there is one, it has just ended, and the listeners have not returned
            outcome = Outcome.CANCELLED if verdict is None else verdict
            if task.end(outcome, task.times(now)) and verdict is None:
                cancelled.append(task)
            self.mark_ended(task)

    # For whoever looks.

    @step
    def read(self, look: Callable[[TaskQueue], T]) -> T:
        """Return what `look` sees at one moment. It must call nothing of the user's."""
        return look(self)

    def running(self) -> list[Task]:
        """Return the tasks that run; all of one moment only as a part of a step."""
        tasks = [slot.task for slot in self.slots]
        return [task for task in tasks if task is not None and task.life is not Life.ENDED]

    def tasks(self) -> set[Task]:
        """Return the tasks that wait or run. Part of a step."""
        return {*self.checked_out, *self.waiting, *self.running()}
