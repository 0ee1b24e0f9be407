"""The mover: the slot of a pool that moves waiting tasks to a durable engine, instead of running them.

::

    spawner ──put──► inbox = waiting ──take──► slot 1 … slot CONN_MAX - 1       HANDOFF_WHEN "overflow"
                                └──newest──► mover ──batch──► engine

    spawner ──put──► inbox = outbox ──oldest──► mover ──batch──► engine         HANDOFF_WHEN "always"
                                                  └──what cannot travel──► waiting ──take──► slots

It has a thread of its own, so it acts even while every other slot is busy, and it is one of the pool's
CONN_MAX: the engine's connection lies within the bound. Nobody ever waits for it but a shutdown.

A task that is on its way keeps its permit, so it still counts as queued, until the engine has it for sure.
Three things can become of it, and exactly one does: the engine has it, it goes back to the waiting ones, or
nobody can tell, and it stays on its way until the engine has answered. No interleaving runs it twice: a task
leaves the waiting ones before it is sent, and comes back only if the engine certainly does not have it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Protocol

from bgtasks.log import log, logger
from bgtasks.queue import Outcome, Recorded, State, Task, TaskQueue
from bgtasks.slots import Hooks, Launcher, Slot, Slots, Worker

HIGH = 0.75  # of CAPACITY: above so many queued tasks a pool overflows ...
LOW = 0.5  # ... and moves until only so many are left
BATCH = 100  # tasks that are sent at once, at most
BATCH_SECONDS = 0.25  # that a batch should take: with a slow engine it is a smaller one
REST = 1.0  # seconds after a failure until the engine is tried again
PAUSE = 0.1  # seconds after a look that found nothing that could travel
STALL = 5.0  # seconds that a batch may take before waiting tasks are run here all the same
WARN_INTERVAL = 60.0  # seconds between two warnings of an engine that fails


class Fate(enum.Enum):
    """What is known of a task on its way. Written by the shell, as it sends."""

    HERE = "here"  # the engine does not have it
    UNSURE = "unsure"  # the engine may have it
    TAKEN = "taken"  # the engine has it
    REFUSED = "refused"  # the engine does not have it, and need not be asked again


class Parcel:
    """One task on its way, in the form in which it travels."""

    __slots__ = ("content", "fate", "receipt", "task")

    def __init__(self, task: Task, content: object) -> None:
        self.task = task
        self.content = content  # the shell's
        self.receipt: object = None  # the shell's, once it has sent the parcel
        self.fate = Fate.HERE


class Engine(Protocol):
    """What the core needs of the durable engine, given by the shell. Called on the mover's thread only."""

    @property
    def alias(self) -> str:
        """The engine's name in logs."""
        ...

    def pack(self, task: Task) -> Parcel | None:
        """Return the task as it travels; None if it cannot."""
        ...

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Give the parcels to the engine, all at once if it can, and write the fate of each.

        Whatever it raises, the fates are right: the engine certainly has none that is HERE or REFUSED.
        """
        ...

    def confirm(self, parcels: Sequence[Parcel]) -> None:
        """Ask the engine which of the UNSURE parcels it has. What remains UNSURE will be asked again."""
        ...


class Life(enum.Enum):
    """What the mover's thread is there for, in one direction until it is opened again."""

    CLOSED = "closed"
    OPEN = "open"
    WINDING_UP = "winding_up"  # the pool shuts down: everything that can travel is moved


class Mover:
    """The slot that hands the tasks of one pool to the engine."""

    def __init__(
        self,
        queue: TaskQueue,
        hooks: Hooks,
        engine: Engine,
        *,
        always: bool,
        wake: Callable[[], object],
        later: Callable[[float, Callable[[], object]], object],
    ) -> None:
        self.queue = queue
        self.hooks = hooks
        self.engine = engine
        self.always = always  # or else on overflow and at shutdown only
        self.life = Life.CLOSED  # written by open, wind_up and halt
        self.account = queue.accounts[-1]  # that of the slot which the mover takes the place of
        self.thread = threading.Thread(name=f"bgtasks-{queue.pool}-mover")  # written by open
        self.task: Task | None = None  # of a slot, that of the plain function it runs: never one
        self.deadline = 0.0  # monotonic seconds: no batch is begun after it; written by wind_up
        self.unsure: list[Parcel] = []  # may be the engine's, or not; written by the mover's thread
        self._wake = wake  # wakes a slot if tasks wait
        self._later = later  # calls back after so many seconds, on another thread, or never
        self._room = queue.capacity - int(queue.capacity * HIGH)  # free places of a queue that overflows
        self._low = int(queue.capacity * LOW)
        self._token: deque[None] = deque([None])  # whoever pops it has the mover look at the queue
        self._bell: SimpleQueue[None] = SimpleQueue()  # its put is re-entrant: spawners may ring anywhere
        # All below is written by the mover's thread.
        self._batch: list[Parcel] = []  # on their way
        self._kept: list[Task] = []  # looked at, and not to travel
        self._rest_until = 0.0  # monotonic seconds: spawners do not ring before
        self._sent_at = 0.0  # monotonic seconds, while a batch is being sent
        self._each = 0.0  # seconds that the engine took for one task, lately
        self._told_failures = 0  # those of the queue's handoff_failures that were warned of
        self._quiet_until = 0.0  # monotonic seconds
        self._watching = False  # a look at a batch that takes too long is due; cleared by who looks
        if always:
            queue.inbox = queue.outbox

    def __repr__(self) -> str:
        return f"<Mover of {self.queue.pool!r} to {self.engine.alias!r} {self.life.value}>"

    # For spawners: no lock, no wait.

    def look(self) -> None:
        """Ring the bell if there is something to move and nobody has rung it."""
        queue = self.queue
        if self.always:
            if len(queue._permits) <= self._room:
                queue.inbox = queue.waiting  # the engine is slower than the spawners: slots run these here
            if not queue.outbox and (queue.inbox is queue.outbox or monotonic() < self._rest_until):
                return
        elif len(queue._permits) > self._room or monotonic() < self._rest_until:
            return
        self.ring()

    def ring(self) -> None:
        """Have the mover look at the queue, unless it is about to."""
        try:
            self._token.pop()
        except IndexError:
            return  # it looks again once it has given the token back
        self._bell.put(None)

    # For the drainer, under its lock.

    def open(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is exiting.
        """
        bell: SimpleQueue[None] = SimpleQueue()
        bell.put(None)  # with the token, which is ours: tasks may have come before the thread
        self._bell, self._token = bell, deque()
        if self.always:
            self.queue.inbox = self.queue.outbox
        name = f"bgtasks-{self.queue.pool}-mover"
        self.thread = threading.Thread(target=self._main, args=(bell,), name=name, daemon=True)
        self.life = Life.OPEN
        try:
            self.thread.start()
        except BaseException:
            self.life = Life.CLOSED
            raise

    def halt(self) -> None:
        """Tell the thread to end after what it does now."""
        self.life = Life.CLOSED
        self._bell.put(None)

    def wind_up(self, deadline: float) -> None:
        """Move everything that can travel until `deadline` (monotonic seconds)."""
        self.deadline = deadline
        if self.life is Life.OPEN:
            self.life = Life.WINDING_UP
        self._bell.put(None)  # without the token: the pass that is under way may be the wrong one

    def seize(self) -> bool:
        """Take the token, so that nothing is moved; False if the mover has it."""
        try:
            self._token.pop()
        except IndexError:
            return self.life is Life.CLOSED
        return True

    def release(self) -> None:
        """Put the token back, and look whether it was wanted meanwhile."""
        if not self._token:
            self._token.append(None)
        self.look()

    # The thread.

    def _main(self, bell: SimpleQueue[None]) -> None:
        interruption: BaseException | None = None
        while self._bell is bell and self.life is not Life.CLOSED:
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

    def _serve(self, bell: SimpleQueue[None]) -> None:
        while self._bell is bell and self.life is not Life.CLOSED:
            with contextlib.suppress(Empty):
                bell.get(timeout=self._patience())
            try:
                self._pass()
            finally:
                self.hooks.clean()
            self._rest(bell)

    def _rest(self, bell: SimpleQueue[None]) -> None:
        """Give the token back, unless there is more to do."""
        if self._bell is not bell:
            return
        if not self._token:
            self._token.append(None)
        # Somebody may have put a task *just* after we looked and, finding no token, have left.
        self.look()

    def _patience(self) -> float | None:
        """Return the seconds after which the queue is looked at without anybody asking."""
        if self.life is Life.WINDING_UP and monotonic() < self.deadline:
            return PAUSE
        return REST if self.unsure else None

    def _pass(self) -> None:
        """Move what there is to move."""
        if self.unsure and not self._confirm():
            return
        target = self._target()
        # A pass that nobody has rung for, such as the first, may find a queue that does not overflow.
        if self.life is Life.OPEN and not self.always and len(self.queue._permits) > self._room:
            return
        while (wanted := self._wanted(target)) > 0:
            batch = self._collect(min(wanted, self._batch_size()))
            if not batch:
                self._rest_until = monotonic() + PAUSE  # nothing of it can travel
                break
            if not self._send(batch):
                return
        queue = self.queue
        if self.always and queue.inbox is queue.waiting and len(queue._permits) > self._room:
            queue.inbox = queue.outbox  # the engine has caught up

    def _target(self) -> int:
        """Return how many tasks may be left in the queue."""
        return 0 if self.always or self.life is Life.WINDING_UP else self._low

    def _wanted(self, target: int) -> int:
        """Return how many tasks to move now."""
        queue = self.queue
        if self.life is Life.CLOSED or queue.state is State.CLOSED:
            return 0
        if self.life is Life.WINDING_UP:
            if monotonic() + self._each >= self.deadline:
                return 0
            return len(queue.outbox) + len(queue.waiting)
        if self.always:
            return len(queue.outbox)
        return queue.capacity - len(queue._permits) - target

    def _batch_size(self) -> int:
        seconds = BATCH_SECONDS
        if self.life is Life.WINDING_UP:
            seconds = min(seconds, self.deadline - monotonic())
        return BATCH if self._each * BATCH <= seconds else max(1, int(seconds / self._each))

    def _collect(self, size: int) -> list[Parcel]:
        """Take up to `size` tasks that can travel out of the queue."""
        queue, batch, kept = self.queue, self._batch, self._kept
        source = queue.outbox or queue.waiting
        oldest = source is queue.outbox
        while len(batch) < size:
            task = queue.lift(self.account, source, oldest=oldest)
            if task is None:
                break
            parcel = self._pack(task)
            if parcel is None:
                kept.append(task)
                if oldest:
                    self._put_back()  # at once: a slot can run it
            else:
                batch.append(parcel)
        self._put_back()
        return batch

    def _pack(self, task: Task) -> Parcel | None:
        try:
            return self.engine.pack(task)
        except Exception as error:
            log(
                logging.ERROR,
                "task %r of pool %r could not be packed, and runs here",
                task.name,
                self.queue.pool,
                error=error,
            )
            return None

    def _put_back(self) -> None:
        """Give tasks that are kept to the slots, in the order in which they came."""
        queue, kept = self.queue, self._kept
        while kept:
            queue.lower(self.account, kept[-1])
            kept.pop()
        self._wake()

    def _send(self, batch: list[Parcel]) -> bool:
        """Send a batch, and go on with each task as its fate says; False if the engine has failed."""
        error: BaseException | None = None
        self._sent_at = begun = monotonic()
        self._watch()
        try:
            self.engine.send(batch)
        except Exception as exception:
            error = exception
        self._sent_at = 0.0
        self._each = (monotonic() - begun) / len(batch)
        self._settle()
        if error is None:
            return True
        self._fail(error)
        return False

    def _settle(self) -> None:
        """Go on with each task of the batch as its fate says."""
        batch = self._batch
        while batch:
            parcel = batch[-1]
            if parcel.fate is Fate.UNSURE:
                self.unsure.append(parcel)
            elif parcel.fate is Fate.TAKEN:
                self._end(parcel.task)
            else:
                self.queue.lower(self.account, parcel.task)
            batch.pop()
        self._wake()

    def _end(self, task: Task) -> None:
        """Count a task as handed off, and tell whoever listens."""
        if not self.queue.hand_off(self.account, task):
            return  # a shutdown has given it up before, and reported it
        queue = self.queue
        if logger.isEnabledFor(logging.DEBUG):
            extra = {"task": task.name, "pool": queue.pool, "outcome": Outcome.HANDED_OFF.label}
            message = "task %r of pool %r handed off to the engine %r"
            log(logging.DEBUG, message, task.name, queue.pool, self.engine.alias, extra=extra)
        if self.hooks.watched() or isinstance(task.function, Recorded):
            Context().run(self._tell, task)

    def _tell(self, task: Task) -> None:
        self.hooks.enter(task.context, task.captured)
        self.hooks.finished(task, Outcome.HANDED_OFF, None)
        self.hooks.leave()

    def _confirm(self) -> bool:
        """Ask the engine for what it may have; False if that is still not known."""
        error: BaseException | None = None
        try:
            self.engine.confirm(self.unsure)
        except Exception as exception:
            error = exception
        parcels, self.unsure = self.unsure, []
        self._batch.extend(parcels)
        self._settle()
        if self.unsure:
            self._fail(error)
        return not self.unsure

    def _fail(self, error: BaseException | None) -> None:
        """Let the engine rest, run here what would have been moved, and warn of it, but not too often."""
        now = monotonic()
        self._rest_until = now + REST
        self.queue.handoff_failures += 1
        if self.always:
            self.queue.bypass()
            self._wake()
        if now < self._quiet_until:
            return
        self._quiet_until = now + WARN_INTERVAL
        failures = self.queue.handoff_failures - self._told_failures
        self._told_failures = self.queue.handoff_failures
        log(
            logging.WARNING,
            "tasks of pool %r could not be handed off to the engine %r, %d times since the last warning; "
            "they run here, and %d that it may have wait for its answer",
            self.queue.pool,
            self.engine.alias,
            failures,
            len(self.unsure),
            error=error,
        )

    def _watch(self) -> None:
        """Have somebody look whether a batch takes too long. Only then can tasks wait for nothing else."""
        if self.always and not self._watching:
            self._watching = True
            self._later(STALL, self._check)

    def _check(self) -> None:
        self._watching = False
        sent_at = self._sent_at
        if not sent_at:
            return
        if monotonic() - sent_at >= STALL:
            self.queue.bypass()
            self._wake()
        self._watch()

    def _recover(self, error: BaseException) -> None:
        """Go on after an exception from outside: every task on its way is where its fate says."""
        log(logging.ERROR, "%r was interrupted; it goes on", self, error=error)
        self._sent_at = 0.0
        self.queue.settle_moving(self.account)
        self._settle()
        self._put_back()
        unsure = {parcel.task for parcel in self.unsure}
        for task in self.queue.moving():
            if task not in unsure:
                self.queue.lower(self.account, task)  # it had just been taken out
        self._wake()
        self._bell.put(None)  # the pass that was interrupted is made anew


class HandoffSlots(Slots):
    """The slots of a pool that hands tasks off: the last one of them is the mover."""

    def __init__(
        self,
        queue: TaskQueue,
        hooks: Hooks,
        launcher: Launcher,
        engine: Engine,
        *,
        always: bool,
        task_timeout: float | None,
        shutdown_timeout: float,
    ) -> None:
        super().__init__(queue, hooks, launcher, task_timeout=task_timeout, shutdown_timeout=shutdown_timeout)
        self.runners -= 1
        self.mover = Mover(queue, hooks, engine, always=always, wake=self.wake, later=launcher.call_later)
        self.look = self.mover.look

    def open(self) -> None:
        """Start the slots' threads, and the mover's. Without that one, everything runs here."""
        super().open()
        self.look = self.mover.look
        try:
            self.mover.open()
        except RuntimeError as error:
            self.look = None
            self.queue.bypass()
            log(logging.ERROR, "pool %r hands nothing off", self.queue.pool, error=error)
        self.wake()

    def halt(self) -> list[Worker]:
        """Tell every slot to end after what it does now, and return those that had a thread for joining."""
        open_ = self.mover.life is not Life.CLOSED
        self.mover.halt()
        return [*super().halt(), *([self.mover] if open_ else [])]

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the slots."""
        return [*super().threads(), *([] if self.mover.life is Life.CLOSED else [self.mover.thread])]

    def wind_up(self, deadline: float) -> None:
        """Have everything that waits, and can travel, moved until `deadline` (monotonic seconds)."""
        self.mover.wind_up(deadline)

    def abandon(self) -> None:
        """Give up what is still on its way."""
        before = len(self.queue.swept)
        number = len(self.queue.sweep(moving=True)) - before
        if number:
            message = "the engine %r has not answered for %d tasks of pool %r: it may have them, or not"
            log(logging.WARNING, message, self.mover.engine.alias, number, self.queue.pool)

    def seize(self, deadline: float) -> bool:
        """Take every slot, and the mover, so that nothing runs and nothing can start."""
        while not self.mover.seize():
            if not self.queue.is_empty() or monotonic() >= deadline:
                return False
            sleep(0.0005)
        if super().seize(deadline):
            return True
        self.mover.release()
        return False

    def release(self, seized: list[Slot]) -> None:
        """Put back what ``seize`` took."""
        super().release(seized)
        self.mover.release()
