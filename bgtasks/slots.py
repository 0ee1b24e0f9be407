"""Slots: the rights to run of one pool, each with a thread of its own.

::

    spawner ──put──► TaskQueue ──take──► Slot 1 … Slot CONN_MAX
      │ │                                  ▲ │           ▲
      │ └── wake, if a slot is idle ───────┘ │ lend      │ claim
      │                                      ▼           │
      └──── poll, the same for an ───────► the drainer's loop
            asynchronous task

A slot holds one task at a time. It runs a plain function on its thread and then takes the next task by
itself, so a busy pool needs nobody to dispatch. An asynchronous task runs on the drainer's loop while its
slot's thread serves as the executor of the task's ORM calls. Either way one task has one thread, and
Django keeps connections per thread, so a pool can never hold more than CONN_MAX of them per alias.

A busy slot that takes an asynchronous task lends itself to the loop. If one is idle, the spawner asks the
loop, which claims it: to wake the slot's thread first would be a detour.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Executor, Future, InvalidStateError
from contextvars import Context, ContextVar, copy_context
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Protocol, cast

from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from bgtasks.log import log, log_end
from bgtasks.queue import Outcome, State, Task, TaskQueue

STALE_AFTER = 1.0  # seconds of idleness after which a thread looks at its connections before it uses them
CALL_PATIENCE = 0.1  # seconds; only a slot waits them whose thread was interrupted from outside

# What a Seat needs to find inside asgiref. Where it is not there, the long way through public names is taken.
UNDERSTANDS_ASGIREF = hasattr(ThreadSensitiveContext(), "_exited") and isinstance(
    getattr(SyncToAsync, "context_to_thread_executor", None), weakref.WeakKeyDictionary
)

# The task in which the current code runs. Weak, since it lies in the context that the task itself holds.
current: ContextVar[weakref.ref[Task]] = ContextVar("bgtasks.current")


def current_task() -> Task | None:
    """Return the task that the caller is a part of, on any thread or coroutine that has its context."""
    reference = current.get(None)
    return reference() if reference is not None else None


class Hooks(Protocol):
    """What the core needs of Django, given by the shell. No hook may raise."""

    def capture(self) -> object:
        """Return what ``enter`` needs beside a copy of the caller's context."""
        ...

    def enter(self, context: Context, captured: object) -> None:
        """Make the current context, a new one, the task's, of what was captured where it was spawned."""
        ...

    def leave(self) -> None:
        """Let go of what the task's context holds open. Called inside the task's context."""
        ...

    def clean(self) -> None:
        """Close or return this thread's database connections as Django does after a request."""
        ...

    def close(self) -> None:
        """Close all that this thread holds: it ends."""
        ...

    def watched(self) -> bool:
        """Tell whether anybody listens to ``started`` and ``finished``."""
        ...

    def started(self, task: Task) -> None:
        """Tell the listeners that `task` starts."""
        ...

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Tell the listeners that `task` has ended."""
        ...


class Launcher(Protocol):
    """What slots need of the drainer. Any thread may call it."""

    def launch(self, slot: Slot, task: Task) -> None:
        """Run the asynchronous `task` on the loop, holding `slot`."""
        ...

    def watch(self) -> None:
        """Look at overrunning tasks for as long as plain functions run under a TASK_TIMEOUT."""
        ...

    def poll(self, group: Slots) -> bool:
        """Have the loop take asynchronous tasks for idle slots of `group`; False if it is not there."""
        ...

    def stir(self) -> None:
        """Hear that a slot was idle and is no longer."""
        ...

    def keep_pace(self, waiting: Collection[Task]) -> None:
        """Wait until a slot that has ended a plain function may take the next of the `waiting` ones."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        """Call `callback` on the loop in `delay` seconds, unless the drainer stops before."""
        ...


class Worker(Protocol):
    """What the drainer needs of a slot that is told to end."""

    @property
    def thread(self) -> threading.Thread:
        """The thread to join."""
        ...

    @property
    def task(self) -> Task | None:
        """The plain function that runs on it."""
        ...


class Owner(enum.Enum):
    """Who may use a slot now, and must go on with it. Written by the owner, before it passes the slot on."""

    NOBODY = "nobody"  # the slot is idle
    CALLED = "called"  # a message that makes the slot's thread the owner is on its way
    THREAD = "thread"
    LOOP = "loop"


class Seat(ThreadSensitiveContext):
    """The right of one asynchronous task to the thread of its slot, for its thread-sensitive calls.

    To enter asgiref's own context is 6 µs a task, most of it to note in a weak dictionary which executor it
    stands for. All seats of a slot are equal to the one that the slot has noted once, for good. What a task
    leaves behind keeps its seat, but asgiref takes it no more once the task has ended, or it would meet the
    slot's next task on its connection.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__(executor=slot)
        self._slot = slot

    def __hash__(self) -> int:
        return id(self._slot)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seat) and self._slot is other._slot

    def take(self) -> None:
        """Have thread-sensitive calls in the current context run on the slot's thread."""
        if UNDERSTANDS_ASGIREF:
            SyncToAsync.thread_sensitive_context.set(self)
        else:
            _step(cast(Any, self).__aenter__())

    def leave(self) -> None:
        """Have them refused from now on, in this context and all that were copied from it."""
        if UNDERSTANDS_ASGIREF:
            self._exited = True
        else:
            _step(cast(Any, self).__aexit__(None, None, None))


class _Door(Executor):
    """What asgiref's table of executors has in place of a slot: it would keep the slot, which has the key."""

    def __init__(self, slot: Slot) -> None:
        self._slot = weakref.ref(slot)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` on the slot's thread. Whoever has a seat has the slot, so it is there.

        Raises:
            RuntimeError: The slot's thread has ended.
        """
        slot = self._slot()
        assert slot is not None
        return slot.submit(fn, *args, **kwargs)


def _step(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that waits for nothing."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


class Slot(Executor):
    """One right to run, its thread, and the executor of its task's thread-sensitive calls.

    Other threads tell the slot's thread what to do by messages. A message is called on the thread, and
    returns the task that the slot shall run next, or None if the thread does not own the slot after it.
    """

    def __init__(self, group: Slots, number: int) -> None:
        self.group = group
        self.account = group.queue.accounts[number - 1]
        self.name = f"bgtasks-{group.queue.pool}-{number}"
        self.thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self.owner = Owner.NOBODY
        self.woken = False  # has yet to give the wake token back; written by the owner
        self.task: Task | None = None  # the plain function that runs here; written by the slot's thread
        self._seat = Seat(self)  # the key under which asgiref finds this slot, for as long as it lives
        if UNDERSTANDS_ASGIREF:
            SyncToAsync.context_to_thread_executor[self._seat] = _Door(self)
        self.loan: Task | None = None  # the task that runs on the loop; written by the owner
        self.touched = False  # the loan has used the thread; set by submit, cleared by the owner
        self.lending: Task | None = None  # a loan that the loop has yet to take; cleared by the loop
        self._stopped = False  # written by the slot's thread
        # A message is appended first and the bell rung after, and SimpleQueue.put is re-entrant: a spawner
        # may do it anywhere. A ring too many is harmless, and a message stays in the deque until it is dealt
        # with, so an exception that is set on the thread from outside loses neither.
        self._messages: deque[Callable[[], Task | None] | None] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._begun: Callable[[], Task | None] | None = None  # the message that is being dealt with
        self._stale = True  # idle for so long that connections may have died; written by the slot's thread

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} owned by {self.owner.value}>"

    # For other threads.

    def stop(self) -> None:
        """Have the slot's thread end after what it does now."""
        self._send(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` on the slot's thread. The executor interface that asgiref's ThreadSensitiveContext uses.

        Raises:
            RuntimeError: The slot's thread has ended.
        """
        # Once a task, and not in the middle of one: it may have a transaction or a cursor open.
        freshen = not self.touched
        self.touched = True
        call = _Call(partial(fn, *args, **kwargs), self._freshen if freshen else None)
        self._send(call)
        # After the call is in: the thread ends with a look at what it has left.
        if self._stopped:
            call.refuse()
            raise RuntimeError(f"slot {self.name!r} has stopped")
        return call.future

    def call(self, message: Callable[[], Task | None]) -> None:
        """Pass the slot to its thread, to go on with `message`. For the owner."""
        self.owner = Owner.CALLED
        self._messages.append(message)
        self._bell.put(None)

    def ring(self) -> None:
        """Have the slot's thread look for messages."""
        self._bell.put(None)

    def _send(self, message: Callable[[], Task | None] | None) -> None:
        self._messages.append(message)
        self._bell.put(None)

    # Messages, called on the slot's own thread.

    def wake(self) -> Task | None:
        """Take a task, having been idle."""
        self.owner = Owner.THREAD
        return self.group.awake(self)

    def accept(self, task: Task) -> Task | None:
        """Run `task`, a plain function that the loop has taken for this slot."""
        self.owner = Owner.THREAD
        return task

    def land(self, task: Task, outcome: Outcome) -> Task | None:
        """End an asynchronous task that has used this thread, and take the next one."""
        self.owner = Owner.THREAD
        try:
            self._clean()
        finally:
            self.group.queue.end(task, outcome)
        return self.group.next_for(self)

    def proceed(self) -> Task | None:
        """Take the next task, or go idle."""
        self.owner = Owner.THREAD
        return self.group.next_for(self)

    # The thread.

    def _main(self) -> None:
        interruption: BaseException | None = None
        while not self._stopped:
            try:
                if interruption is not None:
                    error, interruption = interruption, None
                    self._recover(error)
                    del error
                self._serve()
            except BaseException as exception:
                # No task can raise into this: it is an exception set from outside, or an error of ours.
                interruption = exception
        try:
            for message in tuple(self._messages):
                if isinstance(message, _Call):
                    message.refuse()
            self.group.hooks.close()
        except BaseException as error:
            log(logging.ERROR, "slot %r was interrupted as it ended", self.name, error=error)

    def _serve(self) -> None:
        while True:
            if not self._messages:
                since = monotonic()
                while not self._messages:
                    self._bell.get()
                if monotonic() - since >= STALE_AFTER:
                    self._stale = True
            message = self._messages[0]
            if message is None:
                self._stopped = True
                return
            self._begun = message
            task = message()
            self._messages.popleft()
            self._begun = None
            del message  # it may hold a task, and it may be long until the next one comes
            while task is not None:
                proceed = self._run(task)
                task = None  # before the next one is looked for, so that nothing keeps the ended one alive
                if proceed:
                    waiting = self.group.queue.waiting
                    if waiting:
                        self.group.launcher.keep_pace(waiting)
                    task = self.group.next_for(self)

    def _recover(self, error: BaseException) -> None:
        """Account for the task that was interrupted, and go on if this thread owns the slot."""
        log(logging.ERROR, "slot %r was interrupted; it goes on", self.name, error=error)
        queue = self.group.queue
        if self.owner is Owner.THREAD:
            queue.settle(self.account)  # nobody else's: the loop may be in the middle of a step
        self.task = None
        begun, self._begun = self._begun, None
        # A message that passes the slot to this thread has begun as soon as the thread owns the slot.
        dealing = begun is not None and bool(self._messages) and self._messages[0] is begun
        if dealing and self.owner is not Owner.CALLED:
            self._messages.popleft()
        if isinstance(begun, _Call):
            begun.fail(error)
        if self.owner is Owner.THREAD:
            for task in queue.running():
                if task.account is self.account:
                    self._clean()
                    task.discard()  # it may have gone on as a coroutine, and not yet have been lent
                    queue.end(task, Outcome.FAILED)
            self.call(self.wake if self.woken else self.proceed)
        elif self.owner is Owner.LOOP and self.lending is not None:
            self.group.launcher.launch(self, self.lending)
        elif self.owner is Owner.NOBODY and not self._is_cared_for():
            self.call(self.proceed)

    def _is_cared_for(self) -> bool:
        """Tell whether this slot is idle, or whoever has taken it out of the idle ones goes on with it.

        That one calls it or, if it was to be seized or held, puts it back.
        """
        deadline = monotonic() + CALL_PATIENCE
        while self.owner is Owner.NOBODY and not self.group.is_idle(self):
            if monotonic() >= deadline:
                return False
            sleep(0.001)
        return True

    def _run(self, task: Task) -> bool:
        """Run `task`; False if it is asynchronous: then the loop owns the slot, and goes on with it."""
        group = self.group
        if task.asynchronous:
            self._lend(task, touched=False)
            return False
        self.task = task
        self._freshen()
        if group.task_timeout is not None:
            group.launcher.watch()
        outcome = Context().run(self._call, task)
        if outcome is None:
            self.task = None
            self._lend(task, touched=True)
            return False
        self._clean()
        group.queue.end(task, outcome)
        self.task = None  # not before: _recover ends what it finds here
        return True

    def _lend(self, task: Task, *, touched: bool) -> None:
        self.loan, self.touched = task, touched
        self.lending = task
        self.owner = Owner.LOOP
        self.group.launcher.launch(self, task)

    def _call(self, task: Task) -> Outcome | None:
        """Call the task inside its context; None if it returned a coroutine to go on with."""
        group = self.group
        error: BaseException | None = None
        result: object = None
        group.hooks.enter(task.context, task.captured)
        current.set(weakref.ref(task))
        watched = group.hooks.watched()
        if watched:
            group.hooks.started(task)
        try:
            result = task.call()
            if result is not None and self._goes_on(task, result):
                return None
            outcome = Outcome.SUCCEEDED
        except BaseException as exception:
            outcome, error = Outcome.FAILED, exception
            if inspect.iscoroutine(result):
                result.close()  # an exception from outside has come before the task could go on as it
        log_end(group.queue, task, outcome, error)
        if watched and group.queue.may_tell(task, self):
            group.hooks.finished(task, outcome, error)
        group.hooks.leave()
        del error  # its traceback refers to this frame, and this frame to it
        return outcome

    def _goes_on(self, task: Task, result: object) -> bool:
        """Tell whether the `result` of a plain function is a coroutine, as which the task goes on.

        Raises:
            TypeError: It is a generator, of which nothing has run.
        """
        if inspect.iscoroutine(result):
            self.group.hooks.leave()  # what it has opened on this thread does not go along
            task.continue_with(result, copy_context(), self.group.hooks.capture())
            return True
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError(f"task {task.name!r} returned a generator, of which nothing has run")
        return False

    def _freshen(self) -> None:
        """Drop connections that died or expired while the slot was idle, as Django does before a request."""
        if self._stale:
            self._clean()

    def _clean(self) -> None:
        self.group.hooks.clean()
        self._stale = False


class _Call:
    """A call on a slot's thread for the task that the slot is lent to, and the future of its result."""

    def __init__(self, function: Callable[[], Any], before: Callable[[], None] | None) -> None:
        self.future: Future[Any] = Future()
        self._function: Callable[[], Any] | None = function
        self._before = before

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is None or not self.future.set_running_or_notify_cancel():
            return
        try:
            if self._before is not None:
                self._before()
            result = function()
        except BaseException as error:
            self.future.set_exception(error)
            # The error's traceback refers to this frame: without this the two would keep each other alive.
            del self, function
        else:
            self.future.set_result(result)
        finally:
            # asgiref has noted here for which loop it was called. The next task on this thread may be a plain
            # function, and what it passes to async_to_sync shall not run on the drainer's loop, and block it.
            vars(SyncToAsync.threadlocal).clear()

    def fail(self, error: BaseException) -> None:
        """Answer with an `error` if there is no answer yet."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def refuse(self) -> None:
        """Answer that the slot's thread has ended."""
        self._function = None
        self.fail(RuntimeError("the slot has stopped"))


class Slots:
    """The slots of one pool, and which of them are idle.

    An idle slot lies in `idle`, and whoever takes it out of there owns it: that is the semaphore. The last
    one to go idle is woken first: its thread and its connection are warm. Only one slot is being woken at a
    time, by whoever holds the wake token. The woken slot gives the token back and wakes the next one if more
    tasks wait, so that a burst costs its spawner one wake and not CONN_MAX of them.
    """

    def __init__(
        self,
        queue: TaskQueue,
        hooks: Hooks,
        launcher: Launcher,
        *,
        task_timeout: float | None,
        shutdown_timeout: float,
    ) -> None:
        self.queue = queue
        self.hooks = hooks
        self.launcher = launcher
        self.task_timeout = task_timeout  # seconds
        self.shutdown_timeout = shutdown_timeout  # seconds
        self.runners = queue.conn_max  # slots that run tasks
        self.look: Callable[[], None] | None = None  # called after each put, if the pool hands tasks off
        self.all: list[Slot] = []  # written by open and halt, under the drainer's lock
        self.closing = threading.RLock()  # held by whoever shuts the pool down
        self.deadline: float | None = None  # monotonic seconds, when a shutdown gives up; see hasten
        self.hurry: Future[bool] = Future()  # ends the wait of the one who shuts down; replaced under closing
        self.asked: list[Task] = []  # running tasks that the shutdown has asked to end; under closing
        self.cancelled: list[Task] = []  # those of them that it has cancelled; under closing
        self.told = 0  # of the swept tasks, how many the listeners know of; under closing
        self.closed = False  # the shutdown is complete; under closing
        self.idle: deque[Slot] = deque()
        self.paused = False  # no task is taken; written by pause and resume
        self._held: deque[Slot] = deque()  # where idle slots lie while it is
        self._wake_token: deque[None] = deque([None])
        self.polled = False  # the loop is going to look for asynchronous tasks; cleared as it does

    def __repr__(self) -> str:
        stats = self.queue.stats()
        running = f"{stats.running}/{stats.conn_max} running"
        return f"<Slots {self.queue.pool!r} {running}, {stats.queued}/{stats.capacity} queued>"

    # For spawners: no lock, no wait.

    def wake(self) -> bool:
        """Wake an idle slot if a task waits and nobody is being woken; False if no slot is idle."""
        while self.idle:
            # Without a token a slot is on its way: it looks again once it has given the token back.
            if not self.queue.waiting or not self._wake_token:
                return True
            slot: Slot | None = None
            holding = True
            try:
                try:
                    self._wake_token.pop()
                except IndexError:
                    holding = False
                    return True  # taken since we looked
                try:
                    slot = self.idle[-1]
                    self.idle.remove(slot)
                except (IndexError, ValueError):
                    # Another slot may have gone idle, and another spawner have left it asleep because we held
                    # the token. So give it back, and look again.
                    slot, holding = None, False
                    self._wake_token.append(None)
                    continue
                slot.woken = True
                # Its thread, even for an asynchronous task that poll has left: the loop may be blocked, and
                # would keep the token.
                slot.call(slot.wake)
            except BaseException:
                # A signal handler has raised, just after one of these calls.
                if slot is not None:
                    self._wake_again(slot)
                elif holding:
                    self._wake_token.append(None)
                raise
            return True
        return False

    def poll(self) -> bool:
        """Have the loop take an asynchronous task that waits; False if no slot is idle, or it cannot.

        For such a task a slot's thread is only a detour, which would have to wake the loop in its turn.
        """
        if not self.idle or not self.queue.waiting:
            return False
        if self.polled:
            return True
        self.polled = True
        accepted = False
        try:
            accepted = self.launcher.poll(self)
        finally:
            # A signal handler has raised, or the loop is gone. Otherwise it may have looked by now.
            if not accepted:
                self.polled = False
        return accepted

    def _wake_again(self, slot: Slot) -> None:
        """Wake a slot that is out of the idle ones, and may have been called or not."""
        if slot.owner is Owner.NOBODY and not self.is_idle(slot):
            slot.woken = True
            slot.call(slot.wake)
        else:
            slot.ring()

    # For the owner of a slot.

    def awake(self, slot: Slot) -> Task | None:
        """Take a task for the woken `slot`, or put it to rest; then let others be woken."""
        self.launcher.stir()  # while the slot still counts as woken: an exception from outside may hit this
        slot.woken = False
        try:
            return self.next_for(slot)
        finally:
            self._wake_token.append(None)
            self.wake()

    def claim(self) -> Slot | None:
        """Take an idle slot for the loop if the next task to run is asynchronous. Called on the loop."""
        try:
            if not self.queue.waiting[0].asynchronous:
                return None
            slot = self.idle.pop()
        except IndexError:
            return None
        slot.owner, slot.touched = Owner.LOOP, False
        return slot

    def is_idle(self, slot: Slot) -> bool:
        """Tell whether `slot` waits to be woken."""
        return slot in self.idle or slot in self._held

    def next_for(self, slot: Slot) -> Task | None:
        """Take a task for `slot`, or put it to rest and return None: then the caller no longer owns it."""
        owner = slot.owner
        while True:
            task = None if self.paused else self.queue.take(slot.account)
            if task is not None:
                return task
            slot.owner = Owner.NOBODY
            rest = self._held if self.paused else self.idle
            rest.append(slot)
            # A spawner may have appended a task *just* after we looked and, finding nobody idle, have left.
            # And the pool may have been resumed by somebody who did not find us among the held ones yet.
            if self.paused if rest is self._held else not self.queue.waiting:
                return None
            try:
                rest.remove(slot)
            except ValueError:
                return None  # somebody has taken it out, and wakes it
            slot.owner = owner

    # For whoever pauses the pool.

    def pause(self) -> None:
        """Take no task until ``resume``: what runs goes on, and what is spawned waits, up to the capacity.

        A pool that is being shut down is not paused: what it has accepted shall run.
        """
        state = self.queue.state
        if state is not State.OPEN:
            return
        self.paused = True
        # Whoever goes idle from now on, or is woken, comes to lie there by itself.
        with contextlib.suppress(IndexError):
            while True:
                self._held.append(self.idle.pop())
        # The queue may have been closed, and the pool resumed, *just* after we looked.
        if self.queue.state is not State.OPEN:
            self.resume()

    def resume(self) -> None:
        """Take tasks again."""
        self.paused = False
        with contextlib.suppress(IndexError):
            while True:
                self.idle.append(self._held.popleft())
        self.wake()

    # For the drainer, under its lock.

    def open(self) -> None:
        """Start the slots' threads, all of them: CPython 3.12.0-3.12.2 cannot start any at exit.

        Raises:
            RuntimeError: Not one thread could be started.
        """
        self._wake_token = deque([None])
        self.polled = False
        for number in range(1, self.runners + 1):
            slot = Slot(self, number)
            try:
                slot.thread.start()
            except RuntimeError as error:
                if not self.all:
                    raise
                log(logging.ERROR, "pool %r has only %d slots", self.queue.pool, len(self.all), error=error)
                break
            self.all.append(slot)
        self.idle.extend(reversed(self.all))
        self.wake()

    def halt(self) -> list[Worker]:
        """Tell every slot to end after what it does now, and return them for joining."""
        self.idle.clear()
        self._held.clear()
        slots = self.all
        for slot in slots:
            slot.stop()
        self.all = []  # not before: if this is interrupted, the next call stops all of them
        return [*slots]

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the slots."""
        return [slot.thread for slot in self.all]

    def hasten(self, deadline: float) -> None:
        """Have the shutdown give up at `deadline` (monotonic seconds), unless it does so before."""
        self.deadline = min(deadline, self.deadline or deadline)
        with contextlib.suppress(InvalidStateError):
            self.hurry.set_result(True)

    def wind_up(self, deadline: float) -> None:
        """Prepare for a shutdown that gives up what is left at `deadline` (monotonic seconds)."""

    def abandon(self) -> None:
        """Sweep what is left neither waiting nor running."""

    def seize(self, deadline: float) -> bool:
        """Take every slot out of `idle`, so that nothing runs and nothing can start.

        Gives up, and puts them back, as soon as one is not there because it has something to do, or at
        `deadline` (monotonic seconds): a slot that has ended its task needs a moment to get back there.
        """
        seized: list[Slot] = []
        while len(seized) < len(self.all):
            try:
                seized.append(self.idle.pop() if self.idle or not self._held else self._held.pop())
            except IndexError:
                if not self.queue.is_empty() or monotonic() >= deadline:
                    self.release(seized)
                    return False
                sleep(0.0005)
        return True

    def release(self, seized: list[Slot]) -> None:
        """Put back the slots that `seize` took."""
        self.idle.extend(seized)
        self.wake()
