"""A slot: one right to run, with a thread of its own.

A slot runs one task at a time. It calls a plain function on its thread. A coroutine runs on the drainer's
loop while its slot's thread makes its ORM calls. Either way one task has one thread, and Django keeps
connections per thread, so a pool never holds more than CONN_MAX of them per alias.

A task is begun on the thread; if that makes a coroutine, the loop runs it; and it is concluded on the thread.
A coroutine that needs nothing of the thread is begun, run and concluded on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from queue import Empty
from typing import Any, cast

from bgtasks.clock import monotonic
from bgtasks.core.calls import ThreadCalls
from bgtasks.core.figures import Outcome
from bgtasks.core.log import log
from bgtasks.core.loop import Loop
from bgtasks.core.pace import Pace
from bgtasks.core.places import Place, SlotState
from bgtasks.core.policy import NO_POLICY
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import GENERATORS, Hooks, Task, as_coroutine, current

STALE_AFTER = 1.0  # seconds of idleness after which a thread looks at its connections before it uses them
BURST = 64  # coroutines that may end without ever waiting before their slot lets the loop go on

# Most of what a coroutine costs that never waits is the trip through the loop. An eager start saves it.
_eager: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
_new_runner = cast(Callable[..., "asyncio.Task[None]"], partial(asyncio.Task, **_eager))


@dataclass(eq=False, repr=False)
class SlotPool:
    """What the slots of one pool share."""

    queue: TaskQueue
    hooks: Hooks
    loop: Loop
    pace: Pace
    task_timeout: float | None = field(kw_only=True)  # seconds
    shutdown_timeout: float = field(kw_only=True)  # seconds
    notify: Callable[[], None] = field(kw_only=True, default=lambda: None)  # as an idle slot begins to work


class Slot(SlotState):
    """One right to run, and its thread."""

    def __init__(self, pool: SlotPool, number: int) -> None:
        super().__init__()
        self.pool = pool
        self.queue = pool.queue
        self.name = f"bgtasks-{pool.queue.pool}-{number}"
        self.thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self.calls = ThreadCalls(self.name, pool.loop, self.wake)
        self._new_context = pool.hooks.slot_context(self.calls)
        # Of the task that runs; written by whoever goes on with the slot, the thread or the loop:
        self._ended: tuple[Outcome, BaseException | None] | None = None  # once its coroutine has
        self._stale = True  # idle for so long that connections may have died; written by the slot's thread
        self._stopping = False  # written once, by whoever ends the pool

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} {self.place.value}>"

    # For any thread.

    def go_on(self) -> None:
        """Have the slot's thread look at it, or the loop, if it was lent the slot's task."""
        task = self.task
        if task is None or self.place is not Place.LENT or not self.pool.loop.call_soon(self._run_lent, task):
            self.wake()

    def stop(self) -> None:
        """Have the slot's thread end after what it does now."""
        self._stopping = True
        self.wake()

    def leave_loop(self) -> None:
        """End the task that the loop runs, as failed. Called while the loop does nothing, and never will."""
        task = self.task
        if task is not None and self.place is Place.LOOP:
            error = RuntimeError("the drainer's loop could not be woken, and was replaced")
            self._ended = Outcome.FAILED, error
            self._return_to_thread(task)

    # On the slot's thread.

    def _main(self) -> None:
        interruption: BaseException | None = None
        while not self.calls.stopped:
            try:
                if interruption is not None:
                    error, interruption = interruption, None
                    self._recover(error)
                    del error
                self._serve()
                self.calls.stop()
            except BaseException as exception:
                # No task can raise into this: it is an exception set from outside, or an error of ours.
                interruption = exception
        try:
            self.pool.hooks.close()
        except BaseException as error:
            log(logging.ERROR, "slot %r was interrupted as it ended", self.name, error=error)

    def _serve(self) -> None:
        while not self._stopping:
            self.pool.loop.end_if_forked(None)
            self.calls.make(self._freshen)
            # The task is held by nobody but the call: an idle slot keeps nothing of its last one alive.
            if not self._work(self.queue.take(self)) and not self.calls:
                idle, since = self.task is None, monotonic()
                with contextlib.suppress(Empty):
                    self.signal.get(timeout=self.queue.until_due())
                self._stale = self._stale or (idle and monotonic() - since >= STALE_AFTER)

    def _work(self, task: Task | None) -> bool:
        """Run `task` and those after it, until none waits or the loop has the slot; False without a task."""
        if self.queue.shed:
            self._tell_shed()
        if task is None:
            return False
        queue, pace = self.queue, self.pool.pace
        self.pool.notify()
        while task is not None and (outcome := self._run(task)) is not None:
            if queue.waiting and pace.applies():
                queue.end(self, task, outcome, take=False)
                task = None
                pace.wait(queue.waiting)
                task = queue.take(self)
            else:
                task = queue.end(self, task, outcome, take=not self._stopping)
            if queue.shed:
                self._tell_shed()
        return True

    def _tell_shed(self) -> None:
        while self.queue.shed:
            self.pool.loop.end_if_forked(None)
            self.queue.tell_shed()
        self._clean()  # receivers may have used the ORM

    def _run(self, task: Task) -> Outcome | None:
        """Begin or conclude `task`, and return how it ended; None if the loop goes on with it."""
        self.pool.loop.end_if_forked(None)  # by a receiver or a handler of the task before
        if self._ended is None:
            outcome: Outcome | None = None
            if not task.asynchronous or self.pool.hooks.needs_thread(task):
                self._freshen()
                self.context = Context()
                outcome = self.context.run(self._begin, task)
            if outcome is None:
                lent = self.queue.move(self, task, Place.THREAD, Place.LENT)
                if lent and self.pool.loop.call_soon(self._run_lent, task):
                    return None
                task.discard()  # a shutdown has given it up
                outcome = Outcome.CANCELLED
        else:
            cast(Context, self.context).run(self.pool.hooks.attach, task.captured)
            outcome = self._conclude_coroutine(task)
        self._forget()
        return outcome

    def _begin(self, task: Task) -> Outcome | None:
        """Call the task inside its context; None if there is a coroutine to go on with."""
        hooks = self.pool.hooks
        error: BaseException | None = None
        coroutine: Coroutine[Any, Any, Any] | None = None
        try:
            self._enter(task)
            if hooks.watched():
                task.watched = True
                hooks.started(task)
                self.pool.loop.end_if_forked(None)
            result = task.call()
            coroutine = None if result is None else self._coroutine(task, result)
            if coroutine is not None:
                self.pool.loop.end_if_forked(None)
                task.function, task.asynchronous, self.calls.used = coroutine, True, True
                hooks.detach()
                return None
            outcome = Outcome.SUCCEEDED
        except BaseException as exception:
            outcome, error = Outcome.FAILED, exception
            task.function = coroutine or task.function
            task.discard()
        self.pool.loop.end_if_forked(error)
        self._conclude(task, outcome, error)
        del error  # its traceback refers to this frame, and this frame to it
        return outcome

    def _enter(self, task: Task) -> None:
        self.pool.hooks.enter(task.context, task.captured)
        current.set(weakref.ref(task))

    def _coroutine(self, task: Task, result: object) -> Coroutine[Any, Any, Any] | None:
        coroutine = as_coroutine(result)
        if coroutine is not None and not self.pool.loop.may_run():
            coroutine.close()
            raise RuntimeError(f"task {task.name!r} returned a coroutine, and no loop can run it")
        if coroutine is None and type(result) in GENERATORS:
            raise TypeError(f"task {task.name!r} returned a generator; its body would never run")
        return coroutine

    def _conclude_coroutine(self, task: Task) -> Outcome:
        outcome, error = cast("tuple[Outcome, BaseException | None]", self._ended)
        try:
            cast(Context, self.context).run(self._conclude, task, outcome, error)
        except BaseException as problem:  # of a hook, which none may raise
            log(logging.ERROR, "the end of task %r could not be reported", task.name, error=problem)
        self._ended = self.context = None
        del error  # as above
        return outcome

    def _conclude(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Tell how `task` has ended. Called inside its context."""
        hooks = self.pool.hooks
        if task.policy is NO_POLICY or not self._try_again(task, outcome, error):
            hooks.ended(task, outcome, error, len(self.queue.waiting))
            if not task.watched:
                task.verdict = outcome
            elif self.queue.decide(task, outcome):
                hooks.finished(task, outcome, error)
        hooks.leave()

    def _try_again(self, task: Task, outcome: Outcome, error: BaseException | None) -> bool:
        """Have a task that has failed wait again, if it may and can; False if this is its end."""
        delay = task.policy.delay_after(outcome, error, monotonic())
        if delay is None:
            return False
        if task.watched:
            self.pool.hooks.tried(task, error)  # first, or another slot may have begun the next
        refusal = self.queue.retry(self, task, delay)
        self.pool.hooks.retried(task, task.policy.tries, error, delay, refusal)
        return refusal is None

    def _recover(self, error: BaseException) -> None:
        """Go on after an exception from outside: the task it has hit ends as failed, or as what it was."""
        log(logging.ERROR, "slot %r was interrupted; it goes on", self.name, error=error)
        task = self.queue.interrupted(self)  # first, or the loop may begin what is lent to it
        self.queue.repair()
        self.calls.recover(error)
        if task is not None:
            self._forget()
            if task.verdict is None:
                task.discard()  # it may have gone on as a coroutine that the loop has not begun
            self._work(self.queue.end(self, task, Outcome.FAILED if task.verdict is None else task.verdict))

    def _forget(self) -> None:
        """Keep nothing of a task that has used the thread."""
        self._ended = self.context = None
        self.calls.used = False
        self._clean()

    def _freshen(self) -> None:
        """Drop connections that died or expired while the slot was idle, as Django does before a request."""
        if self._stale:
            self._clean()

    def _clean(self) -> None:
        self.pool.hooks.clean()
        self._stale = False

    # On the loop.

    def _run_lent(self, task: Task) -> None:
        if self.queue.move(self, task, Place.LENT, Place.LOOP):
            self.pool.notify()
            self.run(task)

    def run(self, task: Task | None) -> None:
        """Run coroutines until one has to wait, or the thread has to go on, or none is left."""
        loop = asyncio.get_running_loop()
        for _ in range(BURST):
            if task is None:
                return
            begun = self.context is not None  # on the thread
            if not begun:
                if self.pool.hooks.needs_thread(task):
                    self._return_to_thread(task)
                    return
                self.context, self.calls.used = Context(), False
            runner = _new_runner(self.await_task(task, begun), loop=loop, context=self.context)
            if not runner.done():
                task.runner = runner
                if task.stop_reason is not None:
                    runner.cancel()
                runner.add_done_callback(partial(self._go_on_after, task), context=Context())
                return
            task = self._finish(task, runner)
        loop.call_soon(self.run, task, context=Context())

    async def await_task(self, task: Task, begun: bool) -> None:
        """Await the task's coroutine, with the slot as the thread of its ORM calls, and note how it ended."""
        timer: asyncio.TimerHandle | None = None
        self.pool.loop.end_if_forked(None)
        try:
            if begun:
                self.pool.hooks.attach(task.captured)
            else:
                self._enter(task)
            with self._new_context():
                if self.pool.task_timeout is not None:
                    timer = self._start_timer(task, self.pool.task_timeout)
                await task.call()
            self.pool.loop.end_if_forked(None)
            self._ended = Outcome.TIMED_OUT if task.overran else Outcome.SUCCEEDED, None
        except BaseException as error:
            self.pool.loop.end_if_forked(error)
            self._ended = self._failed(task, error)
        if timer is not None:
            timer.cancel()

    def _failed(self, task: Task, error: BaseException | None) -> tuple[Outcome, BaseException | None]:
        task.discard()
        outcome = task.stop_reason or Outcome.FAILED
        # What was cancelled by a shutdown is reported by that.
        return outcome, None if outcome is Outcome.CANCELLED else error

    def _start_timer(self, task: Task, task_timeout: float) -> asyncio.TimerHandle:
        left = task.started_at + task_timeout - monotonic()
        loop = asyncio.get_running_loop()
        return loop.call_later(left, self.stop_task, task, Outcome.TIMED_OUT, context=Context())

    def stop_task(self, task: Task, reason: Outcome) -> None:
        """Cancel an asynchronous `task` that has not ended, for this `reason`."""
        if self.task is task and self._ended is None:
            task.overran = task.overran or reason is Outcome.TIMED_OUT
            task.stop_reason = task.stop_reason or reason
            if task.runner is not None:
                task.runner.cancel()

    def _go_on_after(self, task: Task, runner: asyncio.Task[None]) -> None:
        self.run(self._finish(task, runner))

    def _finish(self, task: Task, runner: asyncio.Task[None]) -> Task | None:
        """Conclude `task`, and return the next coroutine; leave both to the thread if that was used."""
        task.runner = None
        error = asyncio.CancelledError() if runner.cancelled() else runner.exception()
        if self._ended is None:
            self._ended = self._failed(task, error)  # it has not even begun, or something of ours has failed
        # If a failed one is not tried again after all, its listeners are told, who may use the ORM.
        if self.calls.used or (task.policy is not NO_POLICY and self._ended[1] is not None):
            cast(Context, self.context).run(self.pool.hooks.detach)
            self._return_to_thread(task)
            return None
        outcome = self._conclude_coroutine(task)
        following = self.queue.end(self, task, outcome, take=not self._stopping)
        if self.queue.shed:
            self.wake()  # the thread tells of it
        if following is not None and not following.asynchronous:
            self.wake()
            return None
        return following

    def _return_to_thread(self, task: Task) -> None:
        self.queue.move(self, task, Place.LOOP, Place.THREAD)
        self.wake()
