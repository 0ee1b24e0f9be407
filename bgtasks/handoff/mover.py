"""The mover: a consumer of the queue that gives waiting tasks to the engine, instead of running them.

It has a thread of its own, so it works even while every slot is busy. It takes the place of one of the pool's
CONN_MAX slots, so that CONN_MAX limits the engine's connection too. Only a shutdown waits for it.

A task that it has checked out still counts as queued. It ends as handed off once the engine has it for sure,
and is put back if the engine certainly does not have it. If nobody can tell, it stays checked out until the
engine has answered. So no task is run twice.
"""

from __future__ import annotations

import contextlib
import logging
import queue as queues
import threading
from collections.abc import Iterator
from contextvars import Context
from functools import partial
from weakref import WeakSet

from bgtasks.clock import monotonic
from bgtasks.context import fill
from bgtasks.core.figures import Outcome
from bgtasks.core.log import enabled, log
from bgtasks.core.loop import Loop
from bgtasks.core.places import State
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Hooks, Task
from bgtasks.handoff.engine import Engine, Fate, Parcel
from bgtasks.repeats import repeats
from bgtasks.text import escaped

HIGH = 0.75  # of CAPACITY: with so many queued tasks a pool overflows ...
LOW = 0.5  # ... and tasks are moved until only so many are left
BATCH = 100  # tasks that are sent at once, at most
BATCH_SECONDS = 0.25  # that a batch should take: with a slow engine it is a smaller one
REST = 1.0  # seconds after a failure until the engine is tried again
PAUSE = 0.1  # seconds after a pass that found nothing that can travel
STALL = 5.0  # seconds that a batch may take before tasks that wait behind it are run here

FAILED = (
    "tasks of pool %r could not be handed off to the engine %r; "
    "they run here, and %d that it may have wait for its answer"
)
FAILED_AGAIN = "pool %r again could not hand off to the engine %r (%d more): %s"


class Mover:
    """Hands the tasks of one pool to the engine."""

    def __init__(self, queue: TaskQueue, hooks: Hooks, engine: Engine, loop: Loop, *, always: bool) -> None:
        self.queue = queue
        self.hooks = hooks
        self.engine = engine
        self.always = always  # or else only what overflows, and at shutdown
        self.thread: threading.Thread | None = None  # written under the drainer's lock
        self.in_pass = False  # set under the pool's lock, cleared by the mover's thread
        self._loop = loop
        self._high = int(queue.capacity * HIGH)
        self._low = int(queue.capacity * LOW)
        # Wakes the thread. A new one for each thread: a thread ends once it is replaced.
        self._bell: queues.SimpleQueue[None] = queues.SimpleQueue()
        self._rung = False  # set by whoever rings, cleared before the mover looks; twice is harmless
        self._deadline: float | None = None  # of a shutdown, in monotonic seconds; written once
        self._sent_at = 0.0  # monotonic seconds, while a batch is with the engine; under the pool's lock
        self._watching = False  # a look at a batch that takes too long is due; cleared by that look
        # Written by the mover's thread:
        self._batch: list[Parcel] = []  # taken out of the queue, to be sent
        self._unsure: list[Parcel] = []  # that the engine may have
        self._staying: WeakSet[Task] = WeakSet()  # that cannot travel, so that each is packed only once
        self._rest_until = 0.0  # monotonic seconds, before which the engine is not tried again
        self._each = 0.0  # seconds that the engine took for one task, lately
        queue.check_out_new = always

    def __repr__(self) -> str:
        state = "stopped" if self.thread is None else "open" if self._deadline is None else "winding up"
        return f"<Mover of {self.queue.pool!r} to {self.engine.alias!r} {state}>"

    # For any thread.

    def look(self) -> None:
        """Have the thread look at the queue if there is something to move. Called after each put."""
        queue = self.queue
        full = queue.queued >= self._high
        if full and queue.check_out_new:
            # Tasks come faster than the engine takes them: slots run the new ones.
            queue.set_check_out_new(False)
        if queue.check_out_new or ((full or self.always) and monotonic() >= self._rest_until):
            self.ring()

    def ring(self) -> None:
        """Have the thread look at the queue."""
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    def unanswered(self) -> set[Task]:
        """Return the tasks that the engine may have, or not."""
        return {parcel.task for parcel in [*(self._batch if self._sent_at else ()), *self._unsure]}

    # For the drainer, under its lock.

    def open(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is exiting.
        """
        bell: queues.SimpleQueue[None] = queues.SimpleQueue()
        bell.put(None)  # tasks may have come before the thread
        self._bell, self._rung, self._watching = bell, True, False
        name = f"bgtasks-{self.queue.pool}-mover"
        thread = threading.Thread(target=self._main, args=(bell,), name=name, daemon=True)
        Context().run(thread.start)
        self.thread = thread

    def stop(self) -> list[threading.Thread]:
        """Have the thread end after what it does now, and return it for joining if it is there."""
        bell, self._bell = self._bell, queues.SimpleQueue()
        thread, self.thread = self.thread, None
        bell.put(None)
        return [] if thread is None else [thread]

    def wind_up(self, deadline: float) -> None:
        """Move everything that can travel until `deadline` (monotonic seconds)."""
        self._deadline = deadline
        self.ring()

    def bypass(self) -> None:
        """Have slots run what the engine does not have, and what is put from now on."""
        self.queue.set_check_out_new(False)
        self._put_back(self._left_behind())

    # The thread.

    def _main(self, bell: queues.SimpleQueue[None]) -> None:
        interruption: BaseException | None = None
        while self._bell is bell:
            try:
                if interruption is not None:
                    error, interruption = interruption, None
                    self._recover(error)
                    del error
                self._serve(bell)
            except BaseException as exception:
                # The engine's errors do not get here: it was set from outside, or is an error of ours.
                interruption = exception
        try:
            self.hooks.close()
        except BaseException as error:
            log(logging.ERROR, "%r was interrupted as it ended", self, error=error)

    def _recover(self, error: BaseException) -> None:
        """Go on after an exception from outside: each task is where its fate says, or is put back."""
        log(logging.ERROR, "%r was interrupted; it goes on", self, error=error)
        self.queue.repair()
        self._rung = False  # a ring may be lost. So this comes before the look at what has been put
        self._settle()
        self._put_back(self._left_behind())
        self.in_pass = False

    def _serve(self, bell: queues.SimpleQueue[None]) -> None:
        patience: float | None = None
        while True:
            with contextlib.suppress(queues.Empty):
                bell.get(timeout=patience)
            if self._bell is not bell:
                return
            with self.queue.lock:
                # Without slots a fork is under way, unless it finds that something runs.
                self.in_pass = bool(self.queue.slots)
            if not self.in_pass:
                patience = PAUSE
                continue
            self._rung = False
            try:
                self._pass(bell)
            finally:
                self.hooks.clean()
                self.in_pass = False
            patience = self._patience()

    def _patience(self) -> float | None:
        """Return after how many seconds the thread looks at the queue without being asked."""
        if self._deadline is not None and monotonic() < self._deadline:
            return PAUSE
        return REST if self._unsure else None

    def _pass(self, bell: queues.SimpleQueue[None]) -> None:
        """Move what there is to move."""
        if self._unsure and not self._confirm():
            return
        resting = monotonic() < self._rest_until
        if self.always or self._deadline is not None or (self.queue.queued >= self._high and not resting):
            while self._bell is bell and (size := self._batch_size()) > 0:
                self._collect(size)
                if not self._batch:
                    break
                if not self._send():
                    return
        if self.always and not resting and self.queue.queued < self._high:
            self.queue.set_check_out_new(True)  # the engine takes tasks, and as fast as they come

    def _batch_size(self) -> int:
        """Return how many tasks to send now, at most."""
        seconds = BATCH_SECONDS
        if self._deadline is not None:
            seconds = min(seconds, self._deadline - monotonic())
            if seconds <= self._each:
                return 0
        size = BATCH if self._each * BATCH <= seconds else max(1, int(seconds / self._each))
        return size if self.always or self._deadline is not None else min(size, self.queue.queued - self._low)

    def _collect(self, size: int) -> None:
        """Take up to `size` tasks that can travel out of the queue, as the batch."""
        kept: list[Task] = []
        while len(self._batch) < size and (tasks := self._take(size - len(self._batch))):
            kept += [task for task in tasks if not self._pack(task)]
        self._put_back(kept)
        if not self._batch and not self.always:
            self._rest_until = monotonic() + PAUSE  # or each spawn would have the whole queue searched again

    def _take(self, number: int) -> list[Task]:
        new = [task for task in self._left_behind() if task not in self._staying]
        if new or (self.always and self._deadline is None):
            return new[:number]
        return self.queue.check_out(number)

    def _left_behind(self) -> list[Task]:
        """Return the checked-out tasks that are neither in the batch nor with the engine, oldest first."""
        with self.queue.lock:
            tasks = [*self.queue.checked_out]
        moved = {parcel.task for parcel in [*self._batch, *self._unsure]}
        return [task for task in tasks if task not in moved]

    def _pack(self, task: Task) -> bool:
        """Put `task` into the batch; False if it cannot travel."""
        parcel = None if task in self._staying else self.engine.pack(task)
        if parcel is None:
            self._staying.add(task)
            return False
        self._batch.append(parcel)
        return True

    def _put_back(self, tasks: list[Task]) -> None:
        """Let slots run `tasks`, in the order in which they came."""
        self.queue.put_back(sorted(tasks, key=lambda task: task.spawned_at))

    def _send(self) -> bool:
        """Send the batch; False if the engine has failed, or a shutdown is out of time."""
        begun = monotonic()
        with self.queue.lock:
            if self.queue.state is not State.CLOSED:
                self._sent_at = begun
        if not self._sent_at:
            self._settle()
            return False
        self._watch()
        try:
            self.engine.send(self._batch)
        except Exception as error:
            self._settle()
            self._fail(error)
            return False
        self._each = (monotonic() - begun) / len(self._batch)
        self._settle()
        return True

    def _settle(self) -> None:
        """Go on with each task of the batch as its fate says. If it is interrupted, the next call goes on."""
        with self.queue.lock:
            self._sent_at = 0.0
        batch = self._batch
        self._staying.update(parcel.task for parcel in batch if parcel.fate is Fate.REFUSED)
        self._put_back([parcel.task for parcel in batch if parcel.fate in {Fate.HERE, Fate.REFUSED}])
        while batch:
            parcel = batch[-1]
            if parcel.fate is Fate.TAKEN:
                self._end(parcel.task)
            elif parcel.fate is Fate.UNSURE:
                self._unsure.append(parcel)
            batch.pop()

    def _end(self, task: Task) -> None:
        """Tell the listeners that the engine has a task, and then count it."""
        queue = self.queue
        if queue.note_taken(task):  # or a shutdown has given it up before, and reported it
            if enabled(logging.DEBUG):
                extra = {"task": task.name, "pool": queue.pool, "outcome": Outcome.HANDED_OFF.label}
                message = "task %r of pool %r handed off to the engine %r"
                log(logging.DEBUG, message, task.name, queue.pool, self.engine.alias, extra=extra)
            Context().run(self._tell, task)
        queue.count_handed_off(task)

    def _tell(self, task: Task) -> None:
        fill(task.context, task.captured)
        self.hooks.finished(task, Outcome.HANDED_OFF, None)
        self.hooks.leave()

    # An engine that fails or hangs.

    def _confirm(self) -> bool:
        """Ask the engine for what it may have; False if that is still not known."""
        try:
            self.engine.confirm(self._unsure)
        except Exception as error:
            self._fail(error)
        self._batch, self._unsure = self._unsure, []
        self._settle()
        if self._unsure:
            self._rest_until = monotonic() + REST
        return not self._unsure

    def _fail(self, error: Exception) -> None:
        """Let the engine rest, run here what would have been moved, and warn of it, but not too often."""
        queue = self.queue
        now = monotonic()
        self._rest_until = now + REST
        with queue.lock:
            queue.handoff_failures += 1
        if self.always:
            self.bypass()
        pool, alias = queue.pool, self.engine.alias
        again = partial(self._warn_again, type(error).__name__)
        is_first = repeats.is_first(("handoff", pool, alias), again)
        level = logging.WARNING if is_first else logging.DEBUG
        log(level, FAILED, pool, alias, len(self._unsure), error=error)

    def _warn_again(self, kind: str, pool: str, count: int) -> None:
        log(logging.WARNING, FAILED_AGAIN, pool, self.engine.alias, count, escaped(kind))

    def _watch(self) -> None:
        """Have the drainer's loop check whether a batch takes too long, if tasks wait only for that."""
        if self.always and not self._watching:
            self._watching = True
            self._loop.call_later(STALL, self._look_at_batch)

    def _look_at_batch(self) -> None:
        self._watching = False
        sent_at = self._sent_at
        if not sent_at:
            return
        if monotonic() - sent_at >= STALL:
            self.queue.set_check_out_new(False)
            self.queue.put_back(self._behind_batch(sent_at))
        self._watch()

    def _behind_batch(self, sent_at: float) -> Iterator[Task]:
        """Iterate, under the pool's lock, over what waits behind a batch that is still with the engine."""
        # If that batch has ended *just* before, the mover may be sending the tasks behind it.
        if self._sent_at == sent_at:
            yield from self._left_behind()
