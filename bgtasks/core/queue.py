"""The queue of one pool: the steps by which its slots take and end tasks.

What a step is, and all state, is in ``bgtasks.core.places``. The steps of what waits are in
``bgtasks.core.waiting``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from bgtasks.clock import monotonic
from bgtasks.core.figures import RUNNING, UNFINISHED, Outcome, ShedReason
from bgtasks.core.lock import acquire
from bgtasks.core.places import Place, SlotState, State, step
from bgtasks.core.task import Life, Task
from bgtasks.core.waiting import Waiting


class TaskQueue(Waiting):
    """The steps of all tasks."""

    # For slots. `slot` is the one that asks.

    @step
    def add_slots(self, slots: Sequence[SlotState]) -> None:
        """Have `slots`, all of them idle, as well."""
        for slot in slots:
            slot.place = Place.IDLE
            if self.delayed:
                slot.wake()  # so that its thread sleeps no longer than it may
        self.slots = [*self.slots, *slots]
        self.idle = [*reversed(slots), *self.idle]

    @step
    def remove_slots(self, *, if_idle: bool = False) -> bool:
        """Have no slots, so that nothing starts. False if one is not idle, and all have to be."""
        if if_idle and len(self.idle) < len(self.slots):
            return False
        for slot in self.idle:
            slot.place = Place.OUT
        self.slots, self.idle = [], []
        self.waking, self.asked_at = None, 0.0
        return True

    @step
    def claim(self) -> SlotState | None:
        """Give the oldest waiting task to an idle slot, and return that, if the task is asynchronous."""
        self.asked_at = 0.0
        now = monotonic()
        index = self._ready(now)
        if not self.idle or index is None or not self.waiting[index].asynchronous:
            return None
        slot = self.idle.pop()
        if slot is self.waking:
            self.waking = None  # its thread may be busy with calls for long; have another one woken
        slot.place = Place.LOOP
        self._give(slot, now, index)
        return slot

    def _ready(self, now: float) -> int | None:
        """Release what is due, shed what is too old, and return where the next task is, if there is one."""
        self._release_due(now)
        while (index := self.first()) is not None and self.waiting[index].policy.expires_at < now:
            self._shed(ShedReason.EXPIRED, index)
        return index

    def _give(self, slot: SlotState, now: float, index: int) -> Task:
        """Move a waiting task to `slot`, which the loop keeps only if the task is asynchronous."""
        task = self.waiting[index]  # atomic from here on
        counts, policy = task.figures.counts, task.policy
        task.started_at = now
        task.verdict = task.runner = task.stop_reason = None
        task.watched = task.overran = False
        self.queued -= 1
        counts[RUNNING] += 1
        task.life = Life.RUNNING
        slot.task = task
        if slot.place is not Place.LOOP or not task.asynchronous:
            slot.place = Place.THREAD
        del self.waiting[index]
        if policy.key:
            self._forget_key(task)
        return task

    @step
    def take(self, slot: SlotState) -> Task | None:
        """Return the task that the slot's thread has to go on with; None if it may sleep."""
        if self.waking is slot:
            self.waking = None
        now = monotonic()
        self._release_due(now)  # this thread may have slept until now for that, and its slot be the loop's
        if slot.place is Place.IDLE and (index := self._ready(now)) is not None:
            self.idle.remove(slot)  # first: if an exception comes in between, nobody else gives it a task
            return self._give(slot, now, index)
        if slot.place is Place.THREAD and slot.task is None:
            return self._next(slot, now)
        return slot.task if slot.place is Place.THREAD else None

    def end(self, slot: SlotState, task: Task, outcome: Outcome, *, take: bool = True) -> Task | None:
        """Count `task` as ended, unless a shutdown has given it up, and counted it, before.

        Returns:
            The task that the slot goes on with. None if there is none, and the slot is idle, or not `take`.
        """
        lock, now, following = self.lock, monotonic(), None
        if not lock.acquire(False):
            acquire(lock)
        try:  # no step: nobody has to be woken, and an exception from outside is for the slot to mend
            if slot.task is task:  # or it waits to be tried again
                task.end(outcome, now)
            slot.task = None
            if take:
                following = self._next(slot, now)
            if self.drains and task.life is Life.ENDED:
                self.mark_ended(task)
        finally:
            lock.release()
        if self.drains:
            self.tell_drains()
        return following

    def _next(self, slot: SlotState, now: float) -> Task | None:
        if (index := self._ready(now)) is not None:
            return self._give(slot, now, index)
        slot.place = Place.IDLE if slot in self.slots else Place.OUT
        if slot.place is Place.IDLE:
            self.idle.append(slot)
            if self.delayed:
                slot.wake()  # as in `add_slots`
        return None

    @step
    def retry(self, slot: SlotState, task: Task, delay: float) -> str | None:
        """Have a `task` that has failed wait again, for `delay` seconds; or return why it cannot."""
        now, policy = monotonic(), task.policy
        if task.life is not Life.RUNNING or self.state is not State.OPEN:
            return "the pool is being shut down"
        if policy.key in self.keyed:
            return "a newer one with its key waits"
        half = max(1, self.capacity // 2)
        full = len(self.delayed) >= half and sum(each.policy.tries > 0 for each in self.delayed) >= half
        if full or self.queued >= self.capacity:
            return "the pool is full"
        policy.due_at = now + delay
        place, index = self._where(policy)
        waited, ran, figures = task.started_at - task.spawned_at, now - task.started_at, task.figures
        task.life, slot.task = Life.WAITING, None  # atomic from here on
        task.function, task.asynchronous = policy.function, policy.asynchronous
        task.spawned_at = policy.due_at
        policy.tries += 1
        figures.counts[RUNNING] -= 1
        figures.retried += 1
        self.queued += 1
        if policy.key:
            self.keyed[policy.key] = task
        place.insert(index, task)
        figures.count_try(waited, ran)
        return None

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
        for task in sorted({*self.running()}.intersection(lent), key=attrgetter("started_at"), reverse=True):
            slot, counts = lent[task], task.figures.counts
            if blocked and self.state is not State.CLOSED and self.queued < self.capacity:
                self.queued += 1  # atomic from here on
                counts[RUNNING] -= 1
                task.life = Life.WAITING
                slot.task, slot.place = None, Place.IDLE
                self.idle += (slot,)
                self.waiting.appendleft(task)
                self.keep_key(task)
                slot.wake()  # as in `add_slots`

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
        slot.place = Place.THREAD  # the loop must not begin it any more
        return slot.task

    # For a task that runs in the code that spawns it.

    @step
    def count_inline(self, task: Task, outcome: Outcome) -> None:
        """Count `task`, which never waited, as spawned and ended in one."""
        figures = task.figures = self.account.of(task.name)
        task.end(outcome, monotonic())
        figures.spawned += 1  # atomic from here on
        figures.counts[RUNNING] += 1
        figures.counts[UNFINISHED] += 1

    # For whoever ends the pool.

    @step
    def give_up(self, tasks: Iterable[Task], cancelled: list[Task]) -> None:
        """Count those of `tasks` that still run as ended, and move them to `cancelled`."""
        now = monotonic()
        for task in tasks:
            if task.life is Life.ENDED:
                continue
            verdict = task.verdict  # if there is one, it has just ended, and the listeners have not returned
            outcome = Outcome.CANCELLED if verdict is None else verdict
            if task.end(outcome, now) and verdict is None:
                cancelled.append(task)
            self.mark_ended(task)
