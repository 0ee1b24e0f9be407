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
from time import monotonic

from bgtasks.core.drain import Steps, step
from bgtasks.core.figures import Account, DropReason, NameStats, Outcome, PoolStats
from bgtasks.core.lock import acquire, free
from bgtasks.core.places import Place, Seat, State
from bgtasks.core.task import Life, Task


class TaskQueue(Steps):
    """At most `capacity` waiting tasks, the places of the slots, and the figures of all tasks."""

    def __init__(self, pool: str, capacity: int, conn_max: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.conn_max = conn_max
        super().__init__()
        self.ask_loop: Callable[[], bool] = lambda: False  # has the loop call `claim`; False if there is none
        # All that follows is written under the lock.
        self.state = State.OPEN
        self.paused = False  # no task is taken
        self.waiting: deque[Task] = deque()
        self.checked_out: dict[Task, None] = {}  # with a consumer that may hand them off, oldest first
        self.check_out_new = False  # what is put is checked out at once
        self.queued = 0  # how many wait or are checked out
        self.seats: list[Seat] = []  # of the slots that have threads
        self.idle: list[Seat] = []  # the last one to go idle is the first to get a task: its thread is warm
        self.waking: Seat | None = None  # the idle slot whose thread is being woken; see to_wake
        self.asked = False  # the loop is going to claim
        self.account = Account()
        self.handoff_failures = 0

    # For spawners.

    def is_full(self) -> bool:
        """Tell whether a task would be dropped now."""
        return self.queued >= self.capacity or self.state is not State.OPEN

    def put(self, task: Task) -> DropReason | None:
        """Accept `task` and return None, or count a drop and return its reason."""
        lock, waiting, reason, seat, ask = self.lock, self.waiting, None, None, False
        try:
            if not lock.acquire(False):
                acquire(lock)
            task.figures = figures = self.account.by_name.get(task.name) or self.account.of(task.name)
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
                    waiting.append(task)
                if self.idle:
                    if task.asynchronous and waiting and waiting[0].asynchronous:
                        ask, self.asked = not self.asked, True
                    else:
                        seat = self.to_wake()
            lock.release()
            if seat is not None:
                seat.bell.put(None)
            elif ask and not self.ask_loop():
                self.unask()
        except BaseException:
            self.repair()
            raise
        if reason is not None:
            task.discard()
        return reason

    @step
    def withdraw(self, task: Task, reason: DropReason) -> bool:
        """Drop a `task` that was just put; False if it does not wait any more, and so is accounted for."""
        if task.life is not Life.WAITING:
            return False
        # No call from here to the last one, so all of it is done or nothing.
        task.life = Life.ENDED
        task.figures.queued -= 1
        task.figures.dropped[reason] += 1
        self.queued -= 1
        if task in self.checked_out:
            del self.checked_out[task]
        else:
            self.waiting.remove(task)
        self.strike(task)
        return True

    @step
    def refuse(self, name: str, reason: DropReason = DropReason.FULL) -> DropReason:
        """Count the drop of a task called `name`, and return why: for this `reason`, or the shutdown."""
        reason = reason if self.state is State.OPEN else DropReason.SHUTDOWN
        self.account.drop(name, reason)
        return reason

    # For slots. `seat` is the slot that asks.

    @step
    def seat(self, seats: Sequence[Seat]) -> None:
        """Have `seats`, all of them idle, and no others."""
        for seat in self.idle:
            seat.place = Place.OUT
        for seat in seats:
            seat.place = Place.IDLE
        self.seats, self.idle = [*seats], [*reversed(seats)]
        self.waking, self.asked = None, False

    @step
    def unseat_if_idle(self) -> bool:
        """Have no seats, so that nothing starts; False if a slot is not idle."""
        if len(self.idle) < len(self.seats):
            return False
        for seat in self.idle:
            seat.place = Place.OUT
        self.seats, self.idle = [], []
        self.waking, self.asked = None, False
        return True

    def to_wake(self) -> Seat | None:
        """Return the idle slot whose bell shall be rung, after the step, if tasks wait.

        One thread is woken at a time: as it takes its task, it has the next one woken, if more tasks wait. So
        a burst costs its spawner one wake-up, and small tasks cost few changes of threads.
        """
        if not self.idle or not self.waiting or self.paused or self.waking is not None:
            return None
        self.waking = self.idle[-1]
        return self.waking

    @step
    def unask(self) -> None:
        """Leave to the threads what the loop was asked to claim: it is not there."""
        self.asked = False

    @step
    def claim(self) -> Seat | None:
        """Give the oldest waiting task, if it is asynchronous, to an idle slot, and return that slot."""
        self.asked = False
        if not self.idle or not self.waiting or self.paused or not self.waiting[0].asynchronous:
            return None
        seat = self.idle.pop()
        seat.place = Place.LOOP
        self._give(seat, monotonic())
        return seat

    def _give(self, seat: Seat, now: float) -> Task:
        """Move the oldest waiting task to `seat`."""
        task = self.waiting[0]
        figures = task.figures
        # No call from here to the last one, so all of it is done or nothing.
        self.queued -= 1
        figures.queued -= 1
        figures.running += 1
        task.started_at = now
        task.verdict = task.runner = task.stop_reason = None
        task.continued = task.overran = False
        seat.task = task
        if task.asynchronous:
            task.life = Life.RUNNING if seat.place is Place.LOOP else Life.LENT
            seat.place = Place.LOOP
        else:
            task.life, seat.place = Life.RUNNING, Place.THREAD
        self.waiting.popleft()
        return task

    @step
    def take(self, seat: Seat) -> Task | None:
        """Return the task that the slot's thread shall go on with; None if it may sleep."""
        if self.waking is seat:
            self.waking = None
        if seat.place is Place.IDLE and self.waiting and not self.paused:
            self.idle.remove(seat)  # first: if an exception comes in between, nobody else gives it a task
            return self._give(seat, monotonic())
        return seat.task if seat.place is Place.THREAD else None

    def end(self, seat: Seat, task: Task, outcome: Outcome, *, take: bool = True) -> Task | None:
        """Count `task` as ended, unless a shutdown has given it up, and counted it, before.

        Returns:
            The task that the slot goes on with. None if there is none, and the slot is idle, or not `take`.
        """
        lock, now, following = self.lock, monotonic(), None
        times = task.times(now)
        if not lock.acquire(False):
            acquire(lock)
        try:
            task.end(outcome, times)
            seat.task = None
            if take:
                following = self._next(seat, now)
            if self.drains:
                self.strike(task)
        finally:
            lock.release()
        if self.drains:
            self.announce()
        return following

    def _next(self, seat: Seat, now: float) -> Task | None:
        if self.waiting and not self.paused:
            return self._give(seat, now)
        self._go_idle(seat)
        return None

    def _go_idle(self, seat: Seat) -> None:
        seat.place = Place.IDLE if seat in self.seats else Place.OUT
        if seat.place is Place.IDLE:
            self.idle.append(seat)

    @step
    def next(self, seat: Seat) -> Task | None:
        """Return the next task of a slot that has ended one without taking another; None if it is idle."""
        return self._next(seat, monotonic())

    @step
    def begin(self, task: Task) -> bool:
        """Begin a task that was lent to the loop; False if it began, or was counted, before. On the loop."""
        lent = task.life is Life.LENT
        if lent:
            task.life = Life.RUNNING
        return lent

    @step
    def lend(self, seat: Seat, task: Task) -> bool:
        """Pass the slot to the loop: its plain function goes on as a coroutine. False if it was given up."""
        running = task.life is Life.RUNNING
        if running:
            task.life, seat.place = Life.LENT, Place.LOOP
        return running

    @step
    def return_to_thread(self, seat: Seat) -> None:
        """Have the slot's thread end the task, once it is started. On the loop."""
        seat.place = Place.THREAD

    @step
    def decide(self, task: Task, outcome: Outcome) -> bool:
        """Note how `task` ended, for the caller to tell the listeners; False if a shutdown has told them."""
        task.verdict = outcome
        return task.life is not Life.ENDED

    @step
    def interrupted(self, seat: Seat) -> Task | None:
        """Return the task that an exception has hit on the slot's thread; None if none was, or it goes on."""
        task = seat.task
        if task is None and seat.place is Place.THREAD:
            self._go_idle(seat)
        if task is None or (seat.place is Place.LOOP and task.life is not Life.LENT):
            return None
        if task.life is Life.LENT:
            task.life = Life.RUNNING  # the loop shall not begin it any more
        seat.place = Place.THREAD
        return task

    def repair(self) -> None:
        """Go on after an exception from outside in a step of this thread: nobody may miss a wake-up."""
        free(self.lock)
        with self.lock:
            self.waking, self.asked = None, False
            self.idle = [seat for seat in self.seats if seat.place is Place.IDLE]
            for waiter in list(self.drains):
                waiter.pending = {task for task in waiter.pending if task.life is not Life.ENDED}
            seats = [*self.seats]
        for seat in seats:
            seat.start()
        self.announce()

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
        """Count a checked-out `task` as the engine's; False if it was cancelled or withdrawn before."""
        return task in self.checked_out and self._end_waiting(task, Outcome.HANDED_OFF, [])

    def _end_waiting(self, task: Task, outcome: Outcome, ended: list[Task]) -> bool:
        """Move the oldest waiting task, or one that is checked out, to `ended`; False if it was before."""
        if task.life is not Life.WAITING:
            return False
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
        self.strike(task)
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
        """Accept nothing more. What was accepted shall run, so it ends a pause."""
        self.paused = False
        if self.state is State.OPEN:
            self.state = State.CLOSING

    @step
    def cancel_waiting(self, cancelled: list[Task], *, checked_out: bool = False) -> None:
        """Close for good, and move what waits to `cancelled`; and if `checked_out`, what is checked out."""
        self.state = State.CLOSED
        self.check_out_new = False
        while self.waiting:
            self._end_waiting(self.waiting[0], Outcome.CANCELLED, cancelled)
        for task in [*self.checked_out] if checked_out else ():
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
            self.strike(task)

    # For whoever waits or looks.

    def _running(self) -> list[Task]:
        tasks = [seat.task for seat in self.seats]
        return [task for task in tasks if task is not None and task.life is not Life.ENDED]

    @step
    def running(self) -> list[Task]:
        """Return the tasks that run now."""
        return self._running()

    @step
    def held(self) -> list[Task]:
        """Return the tasks that wait now, those that are checked out first."""
        return [*self.checked_out, *self.waiting]

    @step
    def tasks(self) -> set[Task]:
        """Return the tasks that wait or run now."""
        return self.accepted()

    def accepted(self) -> set[Task]:
        """Return the tasks that wait or run. Part of a step."""
        return {*self.checked_out, *self.waiting, *self._running()}

    @step
    def ended(self) -> int:
        """Return how many tasks have ended."""
        return sum(sum(figures.ended) for figures in list(self.account.by_name.values()))

    @step
    def oldest_wait(self) -> float | None:
        """Return for how many seconds the oldest waiting task has waited; None if none waits."""
        since = [task.spawned_at for task in self.checked_out]
        if self.waiting:
            since.append(self.waiting[0].spawned_at)
        return monotonic() - min(since) if since else None

    def stats(self) -> PoolStats:
        """Return the figures of this moment."""
        return self.stats_by_name()[0]

    def stats_by_name(self) -> tuple[PoolStats, list[NameStats]]:
        """Return the figures of this moment, and what they are made of by the tasks' names."""
        names, of_the_pool = self._copy()
        return PoolStats.sum_of(names, **of_the_pool), sorted(names)

    @step
    def _copy(self) -> tuple[list[NameStats], dict[str, int]]:
        return [figures.copy() for figures in list(self.account.by_name.values())], {
            "capacity": self.capacity,
            "conn_max": self.conn_max,
            "stuck": sum(task.overran for task in self._running()),
            "handoff_failures": self.handoff_failures,
        }
