"""What waits in a pool: the half of its queue that spawners, a mover and a shutdown work on.

A waiting task is in the queue, or delayed until its time, or checked out by a consumer that may hand it off.
Each of them has one of the CAPACITY places.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, MutableSequence
from math import inf
from operator import attrgetter
from typing import TypeVar

from bgtasks.clock import monotonic
from bgtasks.core.figures import UNFINISHED, DropReason, NameFigures, Outcome, ShedReason
from bgtasks.core.lock import acquire
from bgtasks.core.places import Places, State, step
from bgtasks.core.policy import NO_POLICY, Policy
from bgtasks.core.task import Life, Task

T = TypeVar("T")

_due_at: Callable[[Task], float] = attrgetter("policy.due_at")


class Waiting(Places):
    """The steps of tasks that wait."""

    # For spawners.

    def put(self, task: Task) -> DropReason | None:
        """Accept `task` and return None, or count a drop and return its reason.

        If it is coalesced with one that waits, its outcome says so.
        """
        lock, wake, reason = self.lock, None, None
        try:  # as in `step`, whose wrapper would cost each spawn 0.2 µs
            if not lock.acquire(False):
                acquire(lock)
            task.figures = figures = self.account.get(task.name) or self.account.of(task.name)
            plain = task.policy is NO_POLICY and self.state is State.OPEN and self.queued < self.capacity
            if not plain:
                reason = self._put_specially(task)
            else:
                figures.spawned += 1  # atomic from here on
                figures.counts[UNFINISHED] += 1
                self.queued += 1
                if self.check_out_new:
                    self.checked_out[task] = False
                else:
                    self.waiting.append(task)
            if self.idle:
                wake = self.to_wake()
            lock.release()
            if wake is not None:
                wake()
            while not plain and self.shed:
                self.tell_shed()
            if not plain and self.drains:
                self.tell_drains()
        except BaseException:
            self.repair()
            raise
        if not plain and (reason is not None or task.outcome is Outcome.COALESCED):
            task.discard()
        return reason

    @step
    def refuse(self, name: str, reason: DropReason | None = None) -> DropReason:
        """Count the drop of a task called `name` that was not even made, and return the reason."""
        if reason is None:
            reason = DropReason.FULL if self.state is State.OPEN else DropReason.SHUTDOWN
        return _count_drop(self.account.of(name), reason)

    def _put_specially(self, task: Task) -> DropReason | None:
        """Put `task` in the place of another one, or where there is room for it, if there is."""
        twin = self.keyed.get(task.policy.key)
        if self.state is not State.OPEN:
            return _count_drop(task.figures, DropReason.SHUTDOWN)
        if twin is not None and twin.life is Life.WAITING:
            _coalesce(twin, task)
            self.makes_room = self.makes_room or task.policy.expires_at < inf
            return None
        if self.queued >= self.capacity:
            self._make_room()
        if self.queued >= self.capacity:
            return _count_drop(task.figures, DropReason.FULL)
        self._accept(task)
        return None

    def _make_room(self) -> None:
        """Shed what is too old at the head of the queue, and else the oldest task, if it may be given up."""
        now = monotonic()
        while self.waiting and self.waiting[0].policy.expires_at < now:
            self._shed(ShedReason.EXPIRED)
        if self.displaces and self.waiting and self.queued >= self.capacity:
            self._shed(ShedReason.DISPLACED)

    def _accept(self, task: Task) -> None:
        figures, policy = task.figures, task.policy
        place, index = self._where(policy)
        figures.spawned += 1  # atomic from here on
        figures.counts[UNFINISHED] += 1
        self.queued += 1
        if self.check_out_new:
            self.checked_out[task] = False
        else:
            if policy.key:
                self.keyed[policy.key] = task
            place.insert(index, task)
        if policy.expires_at < inf:
            self.makes_room = True

    def _where(self, policy: Policy) -> tuple[MutableSequence[Task], int]:
        """Return where a task is to wait. Until the first one is due, the threads of idle slots sleep."""
        if policy.due_at <= monotonic():
            return self.waiting, len(self.waiting)
        index = bisect_right(self.delayed, policy.due_at, key=_due_at)
        for slot in self.idle if index == 0 else ():
            slot.wake()  # its thread looks when that is, after this step
        return self.delayed, index

    def _release_due(self, now: float) -> None:
        """Have the delayed tasks that are due wait no longer than the others."""
        # One by one: a spawn in the middle of another one may leave two in the wrong order.
        while self.delayed and self.delayed[0].policy.due_at <= now:
            self.waiting += (self.delayed[0],)  # atomic from here on
            del self.delayed[0]

    def until_due(self) -> float | None:
        """Return in how many seconds the first delayed task is due; None if there is none."""
        first = self.delayed[:1]
        return max(0.0, _due_at(first[0]) - monotonic()) if first else None

    # What ends without having run.

    def _shed(self, reason: ShedReason, index: int = 0) -> None:
        task = self.waiting[index]
        # After a try it has failed, whether or not there is a next one.
        outcome = Outcome.FAILED if task.policy.tries else Outcome.SHED
        self._end_waiting(task, outcome, self.shed, (task, reason), index)

    def _end_waiting(
        self, task: Task, outcome: Outcome, ended: MutableSequence[T], entry: T, index: int = 0
    ) -> None:
        """Count a task that is checked out, or waits at `index`, and add an `entry` to what has `ended`."""
        if task.life is not Life.WAITING:  # atomic from here on
            return  # a spawn by a signal handler has just shed it
        task.life, task.outcome = Life.ENDED, outcome
        task.figures.counts[UNFINISHED] -= 1
        task.figures.ended[outcome] += 1
        self.queued -= 1
        ended += (entry,)
        if task in self.checked_out:
            del self.checked_out[task]
        else:
            del self.waiting[index]
        self._forget_key(task)
        self.mark_ended(task)

    def keep_key(self, task: Task) -> None:
        """Have newer tasks with its key coalesced with `task`, unless another one waits. Part of a step."""
        if task.policy.key:
            self.keyed.setdefault(task.policy.key, task)

    def _forget_key(self, task: Task) -> None:
        if self.keyed.get(task.policy.key) is task:
            del self.keyed[task.policy.key]

    def tell_shed(self) -> None:
        """Tell of one task that was shed, if there is one. Called without the lock."""
        try:
            task, reason = self.shed.popleft()
        except IndexError:  # another thread has told the last one
            return
        task.discard()
        self.on_shed(task, reason)

    # For a consumer that may hand tasks off.

    @step
    def set_check_out_new(self, on: bool) -> None:
        """Check out at once what is put from now on, or no more."""
        self.check_out_new = on

    @step
    def check_out(self, number: int) -> list[Task]:
        """Check out up to `number` of the newest waiting tasks. They keep their places in CAPACITY.

        Delayed ones are checked out, after the others, only once the queue is closed.
        """
        tasks: list[Task] = []
        while len(tasks) < number and (self.waiting or (self.delayed and self.state is not State.OPEN)):
            source = self.waiting or self.delayed
            task = source[-1]
            self.checked_out[task] = False
            del source[-1]
            self._forget_key(task)
            tasks.append(task)
        return tasks

    @step
    def put_back(self, tasks: Iterable[Task]) -> None:
        """Let slots run `tasks`, unless they were cancelled, or are about to be: the queue is closed."""
        for task in tasks:
            if task in self.checked_out and self.state is not State.CLOSED:
                place, index = self._where(task.policy)
                del self.checked_out[task]  # atomic from here on
                place.insert(index, task)
                self.keep_key(task)

    @step
    def note_taken(self, task: Task) -> bool:
        """Note that the engine has a checked-out `task`, for the caller to tell the listeners.

        False if it was noted before, or a shutdown has cancelled the task.
        """
        if self.checked_out.get(task, True):
            return False
        self.checked_out[task] = True
        return True

    @step
    def count_handed_off(self, task: Task) -> bool:
        """Count a checked-out `task` as the engine's; False if a shutdown has cancelled it before."""
        if task not in self.checked_out:
            return False
        self._end_waiting(task, Outcome.HANDED_OFF, [], task)
        return True

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
        """Accept nothing more. What was accepted has to run, so it ends a pause, and the delay of retries."""
        now, self.paused = monotonic(), False
        if self.state is State.OPEN:
            self.state = State.CLOSING
        for task in [*self.delayed]:
            if task.policy.tries and task in self.delayed:
                task.policy.due_at = 0.0
                task.spawned_at = min(task.spawned_at, now)  # from when it waits
                self.waiting += (task,)  # atomic from here on
                self.delayed.remove(task)

    @step
    def cancel_waiting(self, cancelled: list[Task], *, checked_out: bool = False) -> None:
        """Close for good, and move what waits to `cancelled`; and if `checked_out`, what is checked out."""
        self.state = State.CLOSED
        self.check_out_new = False
        self._release_due(inf)
        untaken = [task for task, is_taken in self.checked_out.items() if checked_out and not is_taken]
        for task in [*self.waiting, *untaken]:
            self._end_waiting(task, Outcome.CANCELLED, cancelled, task)

    @step
    def cancel(self, which: Callable[[Task], bool], cancelled: list[Task]) -> None:
        """Cancel what waits in the queue if `which` says so, which must call nothing of the user's."""
        chosen = {task for task in [*self.waiting, *self.delayed] if which(task)}
        for index in reversed(range(len(self.delayed))):
            if self.delayed[index] in chosen:
                self.waiting += (self.delayed[index],)  # atomic from here on
                del self.delayed[index]
        for _ in range(len(self.waiting)):
            if self.waiting[0] in chosen:
                self._end_waiting(self.waiting[0], Outcome.CANCELLED, cancelled, self.waiting[0])
            else:
                self.waiting.rotate(-1)  # once around, so that the order stays


def _count_drop(figures: NameFigures, reason: DropReason) -> DropReason:
    figures.spawned += 1  # atomic from here on
    figures.dropped[reason] += 1
    return reason


def _coalesce(twin: Task, task: Task) -> None:
    """Have `twin`, which waits, be what the newer `task` is. That one ends with what `twin` was."""
    old, new = twin.policy, task.policy
    twin.function, task.function = task.function, twin.function  # atomic from here on
    twin.args, task.args = task.args, twin.args
    twin.kwargs, task.kwargs = task.kwargs, twin.kwargs
    twin.context, task.context = task.context, twin.context
    twin.captured, task.captured = task.captured, twin.captured
    twin.asynchronous = old.asynchronous = new.asynchronous
    old.function, new.function = new.function, old.function
    old.options, old.expires_at = new.options, new.expires_at  # it keeps its tries, and when it is due
    task.life, task.outcome = Life.ENDED, Outcome.COALESCED
    task.figures.spawned += 1
    task.figures.ended[Outcome.COALESCED] += 1
