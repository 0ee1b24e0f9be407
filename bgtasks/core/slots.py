"""Slots: the rights to run of one pool, each with a thread of its own.

A slot runs one task at a time. It calls a plain function on its thread, and takes the next task by itself. An
asynchronous task runs on the drainer's loop while its slot's thread serves as the executor of the task's ORM
calls. Either way one task has one thread, and Django keeps connections per thread, so a pool never holds more
than CONN_MAX of them per alias.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from typing import Any, cast

from asgiref.sync import SyncToAsync, sync_to_async

from bgtasks.core.figures import Outcome
from bgtasks.core.log import log, log_end
from bgtasks.core.loop import Loop
from bgtasks.core.pace import Pace
from bgtasks.core.places import Place, Seat
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Hooks, Life, Task, current

STALE_AFTER = 1.0  # seconds of idleness after which a thread looks at its connections before it uses them
BURST = 64  # asynchronous tasks that may end without ever waiting before their slot lets the loop go on

# Most of what a task costs that never waits is the trip through the loop. An eager start (3.12) saves it.
_eager: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
_new_runner = cast(Callable[..., "asyncio.Task[None]"], partial(asyncio.Task, **_eager))


class ThreadCall(Future[Any]):
    """A call on a slot's thread, and the future of its result, which is set on the loop.

    Not on the thread: an exception from outside in the middle of that would leave the lock of the future
    held, and the loop would wait for it.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function: Callable[[], Any] | None = function  # None once it has begun
        self.skipped = False  # it was cancelled

    def cancel(self) -> bool:
        """Do not make the call if it has not begun."""
        self.skipped = True
        return super().cancel()

    def answer(self, result: Any, error: BaseException | None) -> None:
        """Set the result or the `error`, unless that was done or it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)


class Slot(Seat, Executor):
    """One right to run, its thread, and the executor of its task's thread-sensitive calls."""

    def __init__(self, pool: Slots, number: int) -> None:
        Seat.__init__(self)
        self.pool = pool
        self.queue = pool.queue
        self.name = f"bgtasks-{pool.queue.pool}-{number}"
        self.thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._new_context = pool.hooks.slot_context(self)
        self._touched = False  # the task on the loop has used the thread; cleared on the loop
        # What the task on the loop calls here. Any thread appends, and rings; the slot's thread pops.
        self._calls: deque[ThreadCall] = deque()
        self._stale = True  # idle for so long that connections may have died; written by the slot's thread
        self._stopping = False  # written once, by whoever ends the pool
        self._stopped = False  # written once, by the slot's thread

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} {self.place.value}>"

    # For any thread.

    def start(self) -> None:
        """Have the slot's thread, or the loop if it was lent the slot's task, go on."""
        task = self.task
        if self.place is not Place.LOOP:
            self.bell.put(None)
        elif task is not None and task.life is Life.LENT and not self.pool.loop.call_soon(self._begin, task):
            # The loop ends only after a shutdown that has given this task up, so there is nobody to tell.
            task.discard()
            self.queue.end(self, task, Outcome.CANCELLED)

    def stop(self) -> None:
        """Have the slot's thread end after what it does now."""
        self._stopping = True
        self.bell.put(None)

    def cancel(self, task: Task) -> None:
        """Have an asynchronous `task` end as cancelled, if it runs."""
        self.pool.loop.call_soon(self._stop_task, task, Outcome.CANCELLED)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` on the slot's thread. asgiref does so with the thread-sensitive calls of the slot's task.

        Raises:
            RuntimeError: The slot's thread has ended.
        """
        # Stale connections are looked at once a task, not in the middle of it: it may have a cursor open.
        call = ThreadCall(partial(_call if self._touched else self._call_fresh, fn, args, kwargs))
        self._calls.append(call)
        self._touched = True
        self.bell.put(None)
        if self._stopped:  # after the call is in: the thread ends with a look at what it has left
            call.answer(None, RuntimeError("the slot has stopped"))
            raise RuntimeError(f"slot {self.name!r} has stopped")
        return call

    def _call_fresh(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._freshen()
        return fn(*args, **kwargs)

    # On the slot's thread.

    def _make(self, call: ThreadCall) -> None:
        """Make a `call` for the task on the loop, unless it was cancelled."""
        function, call.function = call.function, None
        result: Any = None
        error: BaseException | None = None
        try:
            if function is not None and not call.skipped:
                result = function()
        except BaseException as exception:
            error = exception
        finally:
            # asgiref has noted here for which loop it was called. The next task on this thread may be a plain
            # function, and what it passes to async_to_sync shall not run on the drainer's loop, and block it.
            vars(SyncToAsync.threadlocal).clear()
        self._answer(call, result, error)
        del function, call, error  # the error's traceback refers to this frame, and it to these

    def _answer(self, call: ThreadCall, result: Any, error: BaseException | None) -> None:
        if not self.pool.loop.call_soon(call.answer, result, error):
            call.answer(result, error)

    def _main(self) -> None:
        interruption: BaseException | None = None
        while not self._stopped:
            try:
                if interruption is not None:
                    error, interruption = interruption, None
                    self._recover(error)
                    del error
                self._serve()
                self._stopped = True
            except BaseException as exception:
                # No task can raise into this: it is an exception set from outside, or an error of ours.
                interruption = exception
        try:
            for call in tuple(self._calls):
                self._answer(call, None, RuntimeError("the slot has stopped"))
            self.pool.hooks.close()
        except BaseException as error:
            log(logging.ERROR, "slot %r was interrupted as it ended", self.name, error=error)

    def _serve(self) -> None:
        while not self._stopping:
            while self._calls:
                self._make(self._calls[0])
                self._calls.popleft()
            # The task is held by nobody but the call: an idle slot keeps nothing of its last one alive.
            if not self._go_on(self.queue.take(self)) and not self._calls:
                since = monotonic()
                self.bell.get()
                self._stale = self._stale or monotonic() - since >= STALE_AFTER

    def _go_on(self, task: Task | None) -> bool:
        """Run `task` and those after it, until none waits or the loop has the slot; False without a task."""
        if task is None:
            return False
        queue, pace = self.queue, self.pool.pace
        self.pool.notify()
        while task is not None and (outcome := self._run(task)) is not None:
            if queue.waiting and pace.applies():
                queue.end(self, task, outcome, take=False)
                task = None
                pace.wait(queue.waiting)
                task = queue.next(self)
            else:
                task = queue.end(self, task, outcome, take=not self._stopping)
        return True

    def _run(self, task: Task) -> Outcome | None:
        """Run `task`, and return how it ended; None if the loop goes on with it."""
        if task.asynchronous and (self.place is not Place.THREAD or self.task is not task):
            self.start()  # unless the loop has begun it: another thread's `repair` may have asked it to
            return None
        outcome = task.verdict  # of an asynchronous task that has used this thread
        if outcome is None:
            self._freshen()
            outcome = Context().run(self._call, task)
            if outcome is None and self.queue.lend(self, task):
                self.start()
                return None
        if outcome is None:
            task.discard()  # a shutdown has given it up
            outcome = Outcome.CANCELLED
        self._clean()
        return outcome

    def _call(self, task: Task) -> Outcome | None:
        """Call the task inside its context; None if it returned a coroutine to go on with."""
        hooks, queue = self.pool.hooks, self.queue
        error: BaseException | None = None
        result: object = None
        watched = hooks.watched()
        try:
            hooks.enter(task.context, task.captured)
            current.set(weakref.ref(task))
            if watched:
                hooks.started(task)
            result = task.call()
            if result is not None and self._is_coroutine(task, result):
                context, captured = copy_context(), hooks.capture()
                hooks.leave()  # what it has opened on this thread does not go along
                task.continue_with(cast(Any, result), context, captured)
                return None
            outcome = Outcome.SUCCEEDED
        except BaseException as exception:
            outcome, error = Outcome.FAILED, exception
            if inspect.iscoroutine(result):
                result.close()  # an exception from outside has come before the task could go on as it
        log_end(queue, hooks, task, outcome, error)
        if watched and queue.decide(task, outcome):
            hooks.finished(task, outcome, error)
        hooks.leave()
        del error  # its traceback refers to this frame, and this frame to it
        return outcome

    @staticmethod
    def _is_coroutine(task: Task, result: object) -> bool:
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError(f"task {task.name!r} returned a generator; its body would never run")
        return inspect.iscoroutine(result)

    def _recover(self, error: BaseException) -> None:
        """Go on after an exception from outside: the task it has hit ends as failed, or as what it was."""
        log(logging.ERROR, "slot %r was interrupted; it goes on", self.name, error=error)
        self.queue.repair()
        while self._calls and self._calls[0].function is None:
            self._answer(self._calls[0], None, error)
            self._calls.popleft()
        task = self.queue.interrupted(self)
        if task is not None:
            self._clean()
            if task.verdict is None:
                task.discard()  # it may have gone on as a coroutine that the loop has not begun
            self._go_on(self.queue.end(self, task, Outcome.FAILED if task.verdict is None else task.verdict))

    def _freshen(self) -> None:
        """Drop connections that died or expired while the slot was idle, as Django does before a request."""
        if self._stale:
            self._clean()

    def _clean(self) -> None:
        self.pool.hooks.clean()
        self._stale = False

    # On the loop, while the slot's place is LOOP.

    def _begin(self, task: Task) -> None:
        if self.queue.begin(task):
            self.pump(task)

    def pump(self, task: Task | None) -> None:
        """Run tasks until one has to wait, or is a plain function, or none is left."""
        loop = asyncio.get_running_loop()
        for _ in range(BURST):
            if task is None:
                return
            self._touched = task.continued
            runner = _new_runner(self._arun(task), loop=loop, context=Context())
            if not runner.done():
                task.runner = runner
                runner.add_done_callback(partial(self._land, task), context=Context())
                return
            task = self._finish(task, runner)
        loop.call_soon(self.pump, task, context=Context())

    def _land(self, task: Task, runner: asyncio.Task[None]) -> None:
        self.pump(self._finish(task, runner))

    def _finish(self, task: Task, runner: asyncio.Task[None]) -> Task | None:
        """Count `task` as ended, and return the next one; leave both to the thread if `task` has used it."""
        task.runner = None
        outcome = task.verdict = self._verdict(task, runner)
        if self._touched:
            self.queue.return_to_thread(self)
            self.bell.put(None)
            return None
        following = self.queue.end(self, task, outcome, take=not self._stopping)
        if following is not None and not following.asynchronous:
            self.bell.put(None)
            return None
        return following

    def _verdict(self, task: Task, runner: asyncio.Task[None]) -> Outcome:
        error = None if runner.cancelled() else runner.exception()
        if task.verdict is not None and error is None:
            return task.verdict
        task.discard()  # it may never have begun
        if task.verdict is None and task.stop_reason is not None:
            return task.stop_reason
        message = "task %r of pool %r failed outside its own code"
        log(logging.ERROR, message, task.name, self.queue.pool, error=error)
        return Outcome.FAILED if task.verdict is None else task.verdict

    async def _arun(self, task: Task) -> None:
        """Run an asynchronous `task`, with the slot as the thread of its ORM calls, and note how it ended."""
        hooks, queue = self.pool.hooks, self.queue
        hooks.enter(task.context, task.captured)
        current.set(weakref.ref(task))
        error: BaseException | None = None
        timer: asyncio.TimerHandle | None = None
        with self._new_context():
            watched = hooks.watched()
            if watched and not task.continued:  # of a plain function that returned a coroutine they know
                await sync_to_async(hooks.started)(task)
            if self.pool.task_timeout is not None:
                timer = self._start_timer(task, self.pool.task_timeout)
            try:
                await task.call()
                outcome = Outcome.TIMED_OUT if task.overran else Outcome.SUCCEEDED
            except BaseException as exception:
                outcome, error = task.stop_reason or Outcome.FAILED, exception
            if timer is not None:
                timer.cancel()
            shown = None if outcome is Outcome.CANCELLED else error  # a shutdown reports it
            log_end(queue, hooks, task, outcome, shown)
            if not watched:
                task.verdict = outcome
            elif queue.decide(task, outcome):
                await sync_to_async(hooks.finished)(task, outcome, shown)
            hooks.leave()
        del error, shown  # its traceback refers to this frame, and this frame to it

    def _start_timer(self, task: Task, task_timeout: float) -> asyncio.TimerHandle:
        left = task.started_at + task_timeout - monotonic()
        loop = asyncio.get_running_loop()
        return loop.call_later(left, self._stop_task, task, Outcome.TIMED_OUT, context=Context())

    def _stop_task(self, task: Task, reason: Outcome) -> None:
        """Cancel an asynchronous `task` that has not ended, for this `reason`."""
        if task.verdict is not None or task.life is Life.ENDED:
            return
        if task.runner is None:  # its turn to begin comes first
            asyncio.get_running_loop().call_soon(self._stop_task, task, reason, context=Context())
            return
        task.overran = task.overran or reason is Outcome.TIMED_OUT
        task.stop_reason = task.stop_reason or reason
        task.runner.cancel()


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


class Slots:
    """The slots of one pool, and what they share."""

    def __init__(
        self,
        queue: TaskQueue,
        hooks: Hooks,
        loop: Loop,
        pace: Pace,
        *,
        task_timeout: float | None,
        shutdown_timeout: float,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue = queue
        self.hooks = hooks
        self.loop = loop
        self.pace = pace
        self.task_timeout = task_timeout  # seconds
        self.shutdown_timeout = shutdown_timeout  # seconds
        self.notify = notify  # called as an idle slot begins to work
        self.look: Callable[[], None] | None = None  # called after each put, if the pool hands tasks off
        self.runners = queue.conn_max  # slots that run tasks
        queue.ask_loop = partial(loop.call_soon, self._claim)
        self.all: list[Slot] = []  # those that have threads; written under the drainer's lock

    def __repr__(self) -> str:
        stats = self.queue.stats()
        running = f"{stats.running}/{stats.conn_max} running"
        return f"<Slots {self.queue.pool!r} {running}, {stats.queued}/{stats.capacity} queued>"

    def open(self) -> None:
        """Start the slots' threads.

        Raises:
            RuntimeError: Not one thread could be started.
        """
        slots: list[Slot] = []
        for number in range(1, self.runners + 1):
            slot = Slot(self, number)
            try:
                Context().run(slot.thread.start)
            except RuntimeError as error:
                if not slots:
                    raise
                log(logging.ERROR, "pool %r has only %d slots", self.queue.pool, len(slots), error=error)
                break
            slots.append(slot)
        self.all = slots
        self.queue.seat(slots)

    def _claim(self) -> None:
        """Run asynchronous tasks in idle slots. Called on the loop."""
        while (seat := self.queue.claim()) is not None:
            self.notify()
            cast(Slot, seat).pump(seat.task)

    def stop(self) -> list[threading.Thread]:
        """Tell every slot to end after what it does now, and return the threads of those that do nothing."""
        self.queue.seat([])
        slots = self.all
        for slot in slots:
            slot.stop()
        self.all = []  # not before: if this is interrupted, the next call stops all of them
        # The thread of a plain function that was given up ends with it, if ever.
        return [slot.thread for slot in slots if slot.task is None]

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the slots."""
        return [slot.thread for slot in self.all]

    def unseat_if_idle(self) -> bool:
        """Have nothing start, for a fork; False if something runs."""
        return self.queue.unseat_if_idle()

    def wind_up(self, deadline: float) -> None:
        """Prepare for a shutdown that gives up what is left at `deadline` (monotonic seconds)."""

    def abandon(self, cancelled: list[Task]) -> None:
        """Give up what is left and neither waits nor runs, and move it to `cancelled`."""
