"""The bounded queue of one pool, and the account of every task it was given.

This is the bottom of the core: it starts no thread, knows no event loop and imports no Django.

No lock lies on the way of a task. Spawners may be any thread, a signal handler or a ``__del__``, and a
spawner that is interrupted in the middle of a spawn by another spawn must not deadlock. Slots would queue up
behind a lock, one change of threads for each task. Instead:

* A place in the queue is a permit in a deque. ``deque.pop`` and ``deque.append`` are atomic, so the bound is
  exact.
* Whoever removes a task from the set of running ones, which is atomic as well, is the one who counts it.
* Every slot counts in an account of its own, which only it writes. A reader adds the accounts up, and looks
  again if one of them has changed meanwhile. If that goes on, it asks the slots not to take another task
  until it has seen them at rest, so that it need not be lucky.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextvars import Context
from dataclasses import dataclass
from time import monotonic, sleep, time
from typing import Any, TypeVar

from bgtasks.figures import BOUNDS, LAST, NAMES_MAX, OTHERS, Drop, Failure, NameFigures, NameStats, add_up

T = TypeVar("T")

READ_ATTEMPTS = 20  # at a consistent snapshot, before a reader asks the slots to pause
READ_PAUSE = 0.0005  # seconds that a reader then leaves them between two attempts
READ_HUSH = 0.05  # seconds that they pause for a reader who does not come back, or who waits in vain
READ_PATIENCE = 1.0  # seconds of such pauses, after which a reader takes what it gets


class Outcome(enum.IntEnum):
    """How an accepted task ended: every one in exactly one way. The number is the place in an account."""

    SUCCEEDED = 0
    FAILED = 1
    TIMED_OUT = 2
    CANCELLED = 3
    HANDED_OFF = 4

    @property
    def label(self) -> str:
        """The outcome in logs, signals and figures, such as ``"timed_out"``."""
        return self.name.lower()


class DropReason(enum.Enum):
    """Why a task was not accepted."""

    __hash__ = object.__hash__  # members are single objects, and Enum's own is a slow function in Python

    FULL = "full"
    SHUTDOWN = "shutdown"
    NO_THREAD = "no_thread"


class State(enum.Enum):
    """The life of a queue, in one direction only."""

    OPEN = "open"
    CLOSING = "closing"  # accepts nothing more, what it holds still runs
    CLOSED = "closed"  # swept: holds nothing that will ever run


class Recorded(ABC):
    """A task's function that keeps a record of its own, as those of ``django.tasks`` do.

    It has logged by itself what it raises. Of an end that it does not see, it is told.
    """

    @abstractmethod
    def __call__(self) -> Any:
        """Run the task, or return its coroutine."""

    @abstractmethod
    def finished(self, outcome: Outcome) -> None:
        """Hear that the task was cancelled or handed off."""

    @abstractmethod
    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task of ``django.tasks``, and its arguments in a form that travels."""

    @abstractmethod
    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""


class Task:
    """One named unit of work, from ``spawn`` to its outcome."""

    __slots__ = (
        "__weakref__",
        "account",
        "args",
        "asynchronous",
        "cancelling",
        "captured",
        "context",
        "continued",
        "function",
        "kwargs",
        "name",
        "outcome",
        "overran",
        "runner",
        "spawned_at",
        "started_at",
        "verdict",
    )

    # Written when a slot takes the task, so that spawners need not. See ``begin``.
    started_at: float  # monotonic seconds
    account: Account  # of the slot
    verdict: Outcome | None  # how it ended on the loop, until that is counted; written there
    continued: bool  # as a coroutine that its plain function returned
    cancelling: bool  # shutdown has asked its runner to end; written by whoever shuts down
    overran: bool  # past TASK_TIMEOUT and still running; written by the drainer
    runner: asyncio.Task[None] | None  # while it waits on the loop; written by the drainer

    def __init__(  # noqa: PLR0917  # keywords would cost every spawn 0.1 µs
        self,
        name: str,
        function: Callable[..., Any] | Coroutine[Any, Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        asynchronous: bool,
        context: Context,
        captured: object,
    ) -> None:
        self.name = name
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.asynchronous = asynchronous  # may become True once: a plain function can return a coroutine
        self.context = context
        self.captured = captured  # what the shell captured beside the context; opaque to the core
        self.spawned_at = monotonic()
        self.outcome: Outcome | None = None  # written once, by whoever counts it

    def begin(self, account: Account) -> None:
        """Be taken by the slot that has `account`."""
        self.account = account
        self.started_at = monotonic()
        self.verdict = self.runner = None
        self.continued = self.cancelling = self.overran = False

    def call(self) -> Any:
        """Call the function with its arguments; for a coroutine object, return it."""
        function = self.function
        return function(*self.args, **self.kwargs) if callable(function) else function

    def continue_with(self, coroutine: Coroutine[Any, Any, Any], context: Context, captured: object) -> None:
        """Go on as `coroutine`, which the task's plain function has returned in `context`."""
        self.function = coroutine
        self.context, self.captured = context, captured
        self.asynchronous = self.continued = True

    def discard(self) -> None:
        """Close the coroutine object of a task that will not run, so that Python does not warn of it."""
        if not callable(self.function):
            self.function.close()


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool's figures at one moment.

    ``spawned == queued + running + succeeded + failed + timed_out + cancelled + dropped + handed_off``
    holds in every snapshot, not only at rest.

    Attributes:
        capacity: Tasks that may wait.
        conn_max: Tasks that may run at once.
        spawned: Calls of ``spawn`` so far in this process, dropped ones included.
        queued: Tasks that wait now.
        running: Tasks that run now.
        succeeded: Tasks that returned.
        failed: Tasks that raised.
        timed_out: Asynchronous tasks that were cancelled after ``TASK_TIMEOUT`` seconds.
        cancelled: Accepted tasks that shutdown gave up, waiting or running.
        dropped: Tasks that were not accepted.
        handed_off: Tasks that were given to the engine.
        stuck: Of the running ones, those past ``TASK_TIMEOUT``, which nothing can stop.
        handoff_failures: How often the engine could not be reached, or failed; the tasks ran here.
    """

    capacity: int
    conn_max: int
    spawned: int
    queued: int
    running: int
    succeeded: int
    failed: int
    timed_out: int
    cancelled: int
    dropped: int
    handed_off: int
    stuck: int
    handoff_failures: int


class Tally:
    """A count that any thread may raise without a lock: ``next`` on an ``itertools.count`` is atomic."""

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self.add: Callable[[], int] = self._count.__next__

    @property
    def value(self) -> int:
        """How often it was raised. The text form is the only way to read a count without raising it."""
        return int(repr(self._count)[len("count(") : -1]) - 1


class Account:
    """The tasks of one slot that have ended, by outcome. Only the owner of the slot writes it.

    The epoch is odd while a task is on its way from one state to the next, and in two places or in none.
    """

    __slots__ = ("by_name", "ended", "ending", "epoch", "taking", "verdict")

    def __init__(self) -> None:
        self.epoch = 0
        self.ended = [0] * len(Outcome)
        self.by_name: dict[str, NameFigures] = {}  # the same, by the tasks' name
        # What the owner is about, for ``settle``. The interpreter delivers an exception from outside only
        # after a call, so what stands between two calls is done as a whole.
        self.taking = False  # a task has left the waiting ones, and its permit is not back
        self.ending: Task | None = None  # is about to leave the running ones, or not yet told to have left
        self.verdict = Outcome.FAILED  # of the task in `ending`


class TaskQueue:
    """At most `capacity` waiting tasks, and the account of all that were ever spawned."""

    def __init__(self, pool: str, capacity: int, conn_max: int) -> None:
        self.pool = pool
        self.capacity = capacity
        self.conn_max = conn_max
        self.state = State.OPEN  # written under _lock, read without it
        self.waiting: deque[Task] = deque()  # appended to by spawners, popped by slots
        self.accounts = [Account() for _ in range(conn_max)]  # one for each slot
        self._permits: deque[None] = deque(itertools.repeat(None, capacity))  # one for each free place
        # Where spawners append. A pool that hands every task off has the mover look at them first.
        self.inbox = self.waiting  # or outbox; written by the mover and, when that is late, by spawners
        self.outbox: deque[Task] = deque()  # appended to by spawners, popped by the mover
        self._passing: Task | None = None  # from outbox to waiting; under _lock
        self._moving: set[Task] = set()  # on their way to the engine, with their permits
        self._running: set[Task] = set()  # added to by slots; whoever removes a task counts it
        self._names: dict[str, str] = {}  # those that are told apart; never removed
        self._dropped: dict[tuple[str, DropReason], Tally] = {}  # by name and reason
        # The last ones, to be looked at. To append is one atomic step.
        self.failures: deque[Failure] = deque(maxlen=LAST)
        self._last_drops: deque[tuple[float, str, DropReason]] = deque(maxlen=LAST)
        self.handoff_failures = 0  # written by the mover
        self._hush = 0.0  # monotonic seconds until which slots leave it to readers; written by both
        self._told: dict[Task, object] = {}  # by whom the listeners were told of a task's end
        self._landmarks: list[Landmark] = []
        self._lost = Tally()  # tasks that the deque has given away and nobody has received
        self._lock = threading.RLock()  # for the few who act without a slot: withdraw, close, sweep, give_up
        self._rest = Account()  # what they count; under _lock
        self._removed: list[None] = []  # something if _rest.ending left the running ones; under _lock
        self.swept: list[Task] = []  # what a sweep has cancelled; under _lock, cleared when it was reported

    # For tasks that run in the code that spawns them, and so never wait.

    def begin_beside(self, task: Task) -> None:
        """Note that `task` begins, without a slot."""
        task.begin(self._rest)

    def count_beside(self, task: Task, outcome: Outcome) -> None:
        """Count `task` as spawned and ended in one."""
        with self._lock:
            self._rest.epoch += 1
            self._rest.verdict = outcome
            try:
                self._count(self._rest, task)
            finally:
                self._rest.epoch += self._rest.epoch % 2  # not counted: a signal handler has raised

    # For spawners.

    def put(self, task: Task) -> DropReason | None:
        """Accept `task` and return None, or count a drop and return its reason."""
        state = self.state
        if state is not State.OPEN or not self._permits:
            task.discard()
            return self.refuse(task.name)
        try:
            self._permits.pop()
            self.inbox.append(task)
        except IndexError:  # the last one is gone since we looked
            return self._drop(task, DropReason.FULL)
        except BaseException:
            self._undo(task)
            raise
        # The queue may have been closed, and even swept, since we looked: now that the task is in it,
        # we know for real. Either the sweep has seen it, or it is still there for us to take back.
        if self.state is not State.OPEN and self.withdraw(task, DropReason.SHUTDOWN):
            return DropReason.SHUTDOWN
        return None

    def refuse(self, name: str) -> DropReason:
        """Count the drop of a task called `name` that finds no place, and return its reason."""
        reason = DropReason.FULL if self.state is State.OPEN else DropReason.SHUTDOWN
        self._count_drop(name, reason)
        return reason

    def _undo(self, task: Task) -> None:
        """Give the permit back unless `task` is in the queue: a signal handler has raised inside ``put``."""
        if not self._steady(lambda: task in self._accepted() or task.outcome is not None):
            self._permits.append(None)
            task.discard()

    def _drop(self, task: Task, reason: DropReason) -> DropReason:
        self._count_drop(task.name, reason)
        task.discard()
        return reason

    def _count_drop(self, name: str, reason: DropReason) -> None:
        key = self._label(name), reason
        tally = self._dropped.get(key) or self._dropped.setdefault(key, Tally())
        tally.add()
        self._last_drops.append((time(), name, reason))

    def _label(self, name: str) -> str:
        """Return what tasks called `name` are counted under: always the same, and one of a bounded number."""
        known = self._names.get(name)
        if known is None:
            known = self._names.setdefault(name, name) if len(self._names) < NAMES_MAX else OTHERS
        return known

    def withdraw(self, task: Task, reason: DropReason) -> bool:
        """Take back a `task` that was just put; False if it was taken, and so accounted for, by now."""
        with self._lock:
            self._rest.epoch += 1
            try:
                try:
                    self.waiting.remove(task)
                except ValueError:
                    self.outbox.remove(task)
                self._drop(task, reason)
                self._permits.append(None)
            except ValueError:
                return False
            finally:
                self._rest.epoch += 1
        self._strike(task)
        return True

    # For slots and the drainer.

    def take(self, account: Account) -> Task | None:
        """Move the oldest waiting task to the running ones of the slot that has `account`."""
        if not self.waiting:
            return None
        if self._hush:
            self._let_read()
        account.epoch += 1
        account.taking = True
        try:
            task = self.waiting.popleft()
        except IndexError:
            account.taking = False
            account.epoch += 1
            return None
        task.begin(account)
        # In this order: at no moment does the queue look empty while it holds this task.
        self._running.add(task)
        account.taking = False
        self._permits.append(None)
        account.epoch += 1
        return task

    def end(self, task: Task, outcome: Outcome) -> None:
        """Count a running task as ended, unless shutdown has given it up, and counted it, before."""
        account = task.account
        account.epoch += 1
        account.ending, account.verdict = task, outcome
        try:
            self._running.remove(task)
        except KeyError:
            account.epoch += 1
        else:
            self._count(account, task)
        if self._told:
            self._told.pop(task, None)
        if self._landmarks:
            self._strike(task)
        account.ending = None

    def _count(self, account: Account, task: Task) -> None:
        figures = account.by_name.get(task.name) or self._figures(account, task.name)
        verdict = account.verdict
        waited = task.started_at - task.spawned_at
        ran = monotonic() - task.started_at
        wait = bisect_left(BOUNDS, waited)
        run = bisect_left(BOUNDS, ran)
        # No call from here on, so all of it is counted or nothing.
        account.ended[verdict] += 1
        figures.ended[verdict] += 1
        figures.waits[wait] += 1
        figures.runs[run] += 1
        figures.wait_seconds += waited
        figures.run_seconds += ran
        task.outcome = verdict
        account.epoch += 1

    def _figures(self, account: Account, name: str) -> NameFigures:
        label = self._label(name)
        return account.by_name.get(label) or account.by_name.setdefault(label, NameFigures(len(Outcome)))

    def settle(self, account: Account) -> None:
        """Put in order what an exception from outside has interrupted. For the owner of `account`."""
        lost = account.taking and not any(task.account is account for task in self.running())
        if account.taking:
            account.taking = False
            self._permits.append(None)
        self._settle_ending(account, self._running, self._count)
        if lost:
            self._count_unrun(account, OTHERS, Outcome.FAILED)
            self._lost.add()  # before the landmarks are looked at; see all_ended
            self._strike_lost()

    def _settle_ending(
        self, account: Account, left: set[Task], count: Callable[[Account, Task], None]
    ) -> None:
        """Count the task that was about to leave `left`, if it has."""
        task = account.ending
        if task is not None and task not in left:
            if task.outcome is None:
                count(account, task)
            self._strike(task)
        account.ending = None
        account.epoch += account.epoch % 2

    def _strike_lost(self) -> None:
        """Strike off what the deque has given away and nobody has received."""
        # What is waited for comes first: it was spawned before, so if it is alive, it is among the accepted.
        waited = set[Task]().union(*(landmark.pending() for landmark in tuple(self._landmarks)))
        for task in waited - self._steady(self._accepted):
            if task.outcome is None:
                task.discard()
                task.outcome = Outcome.FAILED
                self._strike(task)

    def may_tell(self, task: Task, teller: object) -> bool:
        """Tell whether `teller` is the one, and the only one, to tell the listeners that `task` ended."""
        return self._told.setdefault(task, teller) is teller

    # For the mover, which hands tasks off.

    def lift(self, account: Account, source: deque[Task], *, oldest: bool) -> Task | None:
        """Take the oldest or the newest task out of `source`, and put it on its way. Its permit stays."""
        with self._lock:  # not beside a sweep
            if self.state is State.CLOSED or not source:
                return None
            account.epoch += 1
            try:
                return self._lift(source, oldest=oldest)
            except IndexError:
                return None  # a slot has taken the last one since we looked
            finally:
                account.epoch += 1

    def _lift(self, source: deque[Task], *, oldest: bool) -> Task | None:
        task = source[0 if oldest else -1]
        # Before it leaves the others: an exception from outside must not find it nowhere.
        self._moving.add(task)
        try:
            taken = source.popleft() if oldest else source.pop()
        except IndexError:
            self._moving.discard(task)  # a slot has taken it *just* before us
            return None
        if taken is not task:  # so it was with this one, or a spawner has put a newer one
            self._moving.add(taken)
            self._moving.discard(task)
        return taken

    def lower(self, account: Account, task: Task) -> None:
        """Give a `task` that was on its way to the slots, unless it is no longer on its way.

        Once the queue is swept, nobody would run it. Then it stays until the next sweep.
        """
        with self._lock:
            if task not in self._moving or self.state is State.CLOSED:
                return
            account.epoch += 1
            try:
                self.waiting.append(task)
                self._moving.discard(task)
            finally:
                account.epoch += 1

    def hand_off(self, account: Account, task: Task) -> bool:
        """Count a `task` that the engine has; False if it has been given up, and counted, before."""
        account.epoch += 1
        account.ending = task
        try:
            self._moving.remove(task)
        except KeyError:
            account.ending = None
            account.epoch += 1
            return False
        self._count_moved(account, task)
        self._strike(task)
        account.ending = None
        return True

    def _count_moved(self, account: Account, task: Task) -> None:
        figures = self._figures(account, task.name)
        # No step in which an exception could be delivered from here to the permit.
        account.ended[Outcome.HANDED_OFF] += 1
        figures.ended[Outcome.HANDED_OFF] += 1
        task.outcome = Outcome.HANDED_OFF
        self._permits.append(None)
        account.epoch += 1

    def settle_moving(self, account: Account) -> None:
        """Put in order what an exception from outside has interrupted. For the mover."""
        self._settle_ending(account, self._moving, self._count_moved)
        with self._lock:
            self._moving.difference_update(self._not_lifted())

    def _not_lifted(self) -> list[Task]:
        """Return those that are on their way and elsewhere: interrupted in the middle of a step."""
        elsewhere = {*self.waiting.copy(), *self.outbox.copy(), *self._running.copy()}
        return [task for task in self._moving if task in elsewhere or task.outcome is not None]

    def moving(self) -> list[Task]:
        """Return the tasks that are on their way."""
        return list(self._moving)

    def bypass(self) -> None:
        """Let slots run what waits to be handed off."""
        with self._lock:
            self.inbox = self.waiting
            self._rest.epoch += 1
            try:
                left = self._passing  # by an exception from outside
                if left is not None and left.outcome is None and left not in self._accepted():
                    self.waiting.append(left)
                while self.outbox:
                    self._passing = self.outbox[0]
                    self.outbox.popleft()  # that very one: all who take from here hold the lock
                    self.waiting.append(self._passing)
                self._passing = None
            finally:
                self._rest.epoch += 1

    # For those who wait, stop or look.

    def running(self) -> list[Task]:
        """Return the tasks that run now."""
        return list(self._running)

    def running_steadily(self) -> list[Task]:
        """Return the tasks that run now, one that a slot is just taking among them."""
        return self._steady(self.running)

    @property
    def drops(self) -> list[Drop]:
        """The last tasks that were not accepted, oldest first."""
        return [Drop(at, name, reason.value) for at, name, reason in self._last_drops.copy()]

    def is_empty(self, *, except_for: Iterable[Task] = ()) -> bool:
        """Tell whether nothing waits or runs, but for the running tasks `except_for`."""
        return len(self._permits) == self.capacity and self._running.issubset(except_for)

    def all_ended(self, *, except_for: Iterable[Task] = ()) -> Future[bool]:
        """Return a future of the moment when every task now in the queue or running has ended.

        Tasks spawned later are not waited for, whatever order they end in: the future waits for these
        very tasks. `except_for` names tasks that shall not be waited for.
        """
        landmark = Landmark()
        # Before the tasks are looked at: one that ends while we look is struck off.
        self._landmarks.append(landmark)
        lost = self._lost.value
        landmark.seal(self._steady(self._accepted).difference(except_for))
        if self._lost.value != lost:  # whoever lost one since we looked may have found nothing sealed
            self._strike_lost()
        self._tidy()
        return landmark.reached

    def _accepted(self) -> set[Task]:
        # A copy of a deque or a set is one atomic step, iterating one that others write to is not.
        return {*self.held(), *self._running.copy()}

    def held(self) -> list[Task]:
        """Return the tasks that do not run yet, also those on their way to the engine."""
        return [*self.waiting.copy(), *self.outbox.copy(), *self._moving.copy()]

    def _strike(self, task: Task) -> None:
        for landmark in tuple(self._landmarks):
            if landmark.strike(task):
                self._tidy()

    def _tidy(self) -> None:
        """Forget the landmarks that are reached, and those that nobody waits for any more."""
        for landmark in tuple(self._landmarks):
            if landmark.reached.done():
                with contextlib.suppress(ValueError):  # somebody else does the same
                    self._landmarks.remove(landmark)

    def close(self) -> bool:
        """Accept nothing more. False if that was so before."""
        with self._lock:
            if self.state is not State.OPEN:
                return False
            self.state = State.CLOSING
            return True

    def sweep(self, *, moving: bool = False) -> list[Task]:
        """Close for good, cancel what still waits and return it.

        If `moving`, what is on its way to the engine is cancelled too: the engine may have it, or not.
        May be called again, after an exception (a signal handler may raise in the middle of it): it returns
        all that was ever swept, and goes on with what it finds.
        """
        with self._lock:
            # CLOSED before the sweep: a spawner that appends after it sees CLOSED, and looks for itself.
            self.state = State.CLOSED
            self._rest.epoch += 1
            try:
                takes: list[Callable[[], Task]] = [self.waiting.popleft, self.outbox.popleft]
                if moving:
                    takes.append(self._moving.pop)
                for take in takes:
                    with contextlib.suppress(IndexError, KeyError):
                        # No bytecode runs between two tasks, so whatever has left the deque is in the list.
                        self.swept.extend(iter(take, None))
                for task in self.swept:
                    if task.outcome is None:
                        self._count_swept(task)
            finally:
                self._rest.epoch += 1
            swept = list(self.swept)
        for task in swept:
            task.discard()
            self._strike(task)
        return swept

    def _count_swept(self, task: Task) -> None:
        account, cancelled = self._rest, Outcome.CANCELLED
        figures = self._figures(account, task.name)
        # No call before the last one, so all of it is done or nothing.
        account.ended[cancelled] += 1
        figures.ended[cancelled] += 1
        task.outcome = cancelled
        self._permits.append(None)

    def give_up(self, task: Task) -> bool:
        """Count a running `task` as cancelled, whatever becomes of it; False if it has ended before.

        Either way its outcome is there afterwards, so that a shutdown can report it.
        """
        with self._lock:
            self._rest.epoch += 1
            try:
                self._count_given_up()  # the last one, if an exception has come between
                self._rest.ending = task
                with contextlib.suppress(KeyError):
                    # No bytecode runs between the removal and the note of it.
                    self._removed.extend(map(self._running.remove, (task,)))
                given_up = self._count_given_up()
            finally:
                self._rest.epoch += 1
        if task.outcome is None:
            self._steady(lambda: None)  # its slot has removed it, and is about to count it
        if task.outcome is not None:
            self._strike(task)
        return given_up

    def _count_given_up(self) -> bool:
        """Count the task that was removed from the running ones, if it was."""
        account, cancelled = self._rest, Outcome.CANCELLED
        task = account.ending
        if task is None or not self._removed:
            account.ending = None
            return False
        figures = self._figures(account, task.name)
        # No call before the last one, so all of it is done or nothing.
        account.ended[cancelled] += 1
        figures.ended[cancelled] += 1
        task.outcome = cancelled
        account.ending = None
        self._removed.clear()
        return True

    def _count_unrun(self, account: Account, name: str, outcome: Outcome) -> None:
        """Count a task of whose run nothing can be said."""
        figures = self._figures(account, name)
        account.ended[outcome] += 1
        figures.ended[outcome] += 1

    def stats(self) -> PoolStats:
        """Return one consistent snapshot."""
        return self._steady(self._add_up)

    def stats_by_name(self) -> tuple[PoolStats, list[NameStats]]:
        """Return one consistent snapshot, and what it is made of by the tasks' names."""
        stats, queued, running, dropped, ended = self._steady(self._copy)
        names = {*queued, *running, *(name for name, _ in dropped), *(name for name, *_ in ended)}
        return stats, [_name_stats(name, queued, running, dropped, ended) for name in sorted(names)]

    def _copy(self) -> tuple[PoolStats, Counter[str], Counter[str], _Drops, _Rows]:
        return (
            self._add_up(),
            Counter(self._label(task.name) for task in self.waiting.copy()),
            Counter(self._label(task.name) for task in self._running.copy()),
            {key: tally.value for key, tally in self._dropped.copy().items()},
            [
                (name, (*of.ended,), (*of.waits,), (*of.runs,), of.wait_seconds, of.run_seconds)
                for account in self._all_accounts()
                for name, of in account.by_name.copy().items()
            ],
        )

    def _add_up(self) -> PoolStats:
        queued = self.capacity - len(self._permits)
        running = self._running.copy()
        ended = [
            sum(numbers) for numbers in zip(*(account.ended for account in self._all_accounts()), strict=True)
        ]
        dropped = sum(tally.value for tally in self._dropped.copy().values())
        return PoolStats(
            capacity=self.capacity,
            conn_max=self.conn_max,
            spawned=queued + len(running) + sum(ended) + dropped,
            queued=queued,
            running=len(running),
            succeeded=ended[Outcome.SUCCEEDED],
            failed=ended[Outcome.FAILED],
            timed_out=ended[Outcome.TIMED_OUT],
            cancelled=ended[Outcome.CANCELLED],
            dropped=dropped,
            handed_off=ended[Outcome.HANDED_OFF],
            stuck=sum(task.overran for task in running),
            handoff_failures=self.handoff_failures,
        )

    def _all_accounts(self) -> list[Account]:
        return [*self.accounts, self._rest]

    def _steady(self, read: Callable[[], T]) -> T:
        """Return what `read` returns at a moment at which no task is on its way between two states.

        After READ_PATIENCE it takes what it gets: a signal handler or a ``__del__`` that asks for the figures
        may have interrupted the very step it would wait for.
        """
        try:
            return self._at_rest(read)
        finally:
            self._hush = 0.0  # another reader that waits for it sets it again

    def _at_rest(self, read: Callable[[], T]) -> T:
        attempt, late = 0, False
        stuck: set[tuple[int, int]] = set()  # steps under way since `until` was set
        until = 0.0  # monotonic seconds: the slots are asked to pause up to then
        while True:
            before = [account.epoch for account in self._all_accounts()]
            under_way = {step for step in enumerate(before) if step[1] % 2}
            if late or not under_way:
                result = read()
                if late or before == [account.epoch for account in self._all_accounts()]:
                    return result
            attempt += 1
            if attempt < READ_ATTEMPTS:
                sleep(0)  # lets the thread that is on its way go on
                continue
            # Not by the clock: if the whole process was stopped, nobody has had the time to end a step.
            late = (attempt - READ_ATTEMPTS) * READ_PAUSE > READ_PATIENCE
            stuck &= under_way
            if not stuck:  # or a longer pause is of no use: it is not the slots that keep us waiting
                stuck, until = under_way, monotonic() + READ_HUSH
            self._hush = until
            sleep(READ_PAUSE)

    def _let_read(self) -> None:
        """Wait, between two tasks, for a reader that does not find the slots at rest. Never for long."""
        while (left := self._hush - monotonic()) > 0:
            sleep(min(left, READ_PAUSE))
        self._hush = 0.0


_Drops = dict[tuple[str, DropReason], int]
# Of one slot and one name: the name, then what NameFigures holds.
_Rows = list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], float, float]]


def _name_stats(
    name: str, queued: Counter[str], running: Counter[str], dropped: _Drops, ended: _Rows
) -> NameStats:
    rows = [row for row in ended if row[0] == name]
    nothing = NameFigures(len(Outcome))
    return NameStats(
        name=name,
        queued=queued[name],
        running=running[name],
        ended=add_up([nothing.ended, *(row[1] for row in rows)]),
        dropped={reason.value: dropped[name, reason] for reason in DropReason if (name, reason) in dropped},
        waits=add_up([nothing.waits, *(row[2] for row in rows)]),
        runs=add_up([nothing.runs, *(row[3] for row in rows)]),
        wait_seconds=sum(row[4] for row in rows),
        run_seconds=sum(row[5] for row in rows),
    )


class Landmark:
    """A set of tasks, and the future of the moment when all of them have ended."""

    def __init__(self) -> None:
        self.reached: Future[bool] = Future()
        self._pending: set[Task] = set()
        self._early: set[Task] = set()  # ended before the landmark was sealed
        self._sealed = False

    def seal(self, tasks: set[Task]) -> None:
        """Wait for `tasks`, but for those that have ended since they were looked at."""
        self._pending = tasks
        self._sealed = True
        # Sealed first: whoever struck a task off *just* before has left it in _early for us, and whoever
        # sees the seal strikes it off by itself.
        tasks.difference_update(self._early.copy())
        self._announce()

    def pending(self) -> set[Task]:
        """Return the tasks that are waited for."""
        return self._pending.copy()

    def strike(self, task: Task) -> bool:
        """Wait for `task` no longer: it has ended. True if it was the last one.

        Slots call this at the end of each task. So as long as others are left, it touches no lock: the slots
        would queue up behind the future's.
        """
        if not self._sealed:
            self._early.add(task)
        if not self._sealed:
            return False
        self._pending.discard(task)
        return self._announce()

    def _announce(self) -> bool:
        if self._pending:
            return False
        # Somebody else may have struck the last one off at the same time, or have stopped waiting.
        with contextlib.suppress(InvalidStateError):
            self.reached.set_result(True)
        return True
