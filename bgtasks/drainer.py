"""The drainer: one thread for the process, with the event loop on which asynchronous tasks run.

It also starts and stops the threads of the slots, so that they live and end together:

* ``start`` is called by ``AppConfig.ready()``. After a fork the next spawn asks for it through ``ensure``,
  which waits for nothing: a bare thread does the starting.
* Before a fork an idle drainer steps aside with all its slots, so that no thread and no lock of ours is in
  an unknown state in the child. A busy one cannot; then the child leaves all that it inherits untouched.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import enum
import logging
import sys
import threading
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import Context
from functools import partial
from time import monotonic, process_time, sleep, thread_time
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from asgiref.sync import sync_to_async

from bgtasks.log import indented, log, log_end
from bgtasks.pace import CAN_MEASURE, PERIOD, Pace, processor_time
from bgtasks.queue import Outcome, Task
from bgtasks.slots import Owner, Seat, Slot, Slots, current, current_task

P = ParamSpec("P")
T = TypeVar("T")

FORK_PATIENCE = 1.0  # seconds a fork waits for slots that have just ended their last task
STOP_PATIENCE = 0.4  # seconds for cancelled tasks to give in, for slots to end, and for the loop to end
BURST = 64  # asynchronous tasks that may end without ever waiting before their slot lets the loop go on

QUIET = 60.0  # seconds between two records that say so:
SLOWED_DOWN = "tasks compute while other threads wait for the GIL: a plain function is started every %.1f ms"

# Most of what a task costs that never waits is the trip through the loop. An eager start (3.12) saves it.
EAGER = sys.version_info >= (3, 12)
_asyncio_task = cast(Callable[..., "asyncio.Task[None]"], asyncio.Task)

# What a child process has inherited and must neither run nor end: see Drainer.after_fork_in_child.
_inherited: list[object] = []


class Companion(Protocol):
    """A thread beside the drainer that lives only while tasks come and go."""

    def stir(self) -> None:
        """Have the thread there. Any thread may call this, and it waits for nothing."""
        ...

    def halt(self) -> list[threading.Thread]:
        """Let the thread end soon, and return it for joining if it is there."""
        ...

    def threads(self) -> list[threading.Thread]:
        """Return the thread, if it is there."""
        ...

    def forget(self) -> None:
        """Know of no thread: this is a forked child."""
        ...


class Life(enum.Enum):
    """Whether the drainer and the slots have their threads."""

    STOPPED = "stopped"
    RUNNING = "running"
    ASIDE = "aside"  # a fork is under way


class Drainer:
    """The event loop on which asynchronous tasks run, its thread, and the slots it keeps alive."""

    def __init__(
        self, may_start: Callable[[], bool] = lambda: True, close: Callable[[], None] = lambda: None
    ) -> None:
        self.companion: Companion | None = None  # written once, before the start
        self._close_connections = close  # those of the calling thread
        self._may_start = may_start  # False in a process whose threads would be missing in its workers
        self._reset()

    def _reset(self) -> None:
        self.life = Life.STOPPED  # written under _lock, read without it
        self.accepting = True  # False once the process is shutting down
        self._lock = threading.RLock()  # serialises start, stop and fork; spawners never take it
        self._groups: list[Slots] = []  # under _lock
        self._forks = 0  # forks under way; under _lock
        self._start_token: deque[None] = deque([None])  # whoever pops it starts the drainer
        self._loop: asyncio.AbstractEventLoop | None = None  # written under _lock, read without it
        self._thread: threading.Thread | None = None  # under _lock
        self._watching = False  # a look at overrunning tasks is due; set by slots, cleared by the loop
        self._pace = Pace()
        self._pacing = False  # a look at the pace is due; set by slots, cleared by the loop
        self._quiet_until = 0.0  # monotonic seconds, from when on it is said again that slots are slowed down

    # Life.

    def add(self, group: Slots) -> None:
        """Keep the slots of `group` alive from the next start on, which ``ensure`` asks for."""
        with self._lock:
            self._groups.append(group)

    def ensure(self, group: Slots) -> bool:
        """Have the threads of `group` started if they are not there. False if it is impossible.

        Waits for nothing: a thread of its own does the starting.
        """
        if self.life is Life.ASIDE or (self.life is Life.RUNNING and group.all):
            return True
        if not self._may_start():
            return False
        try:
            self._start_token.pop()
        except IndexError:
            return True  # somebody is starting it
        try:
            # Thread.start() would wait, and take a lock that the very frame a signal interrupted may hold.
            _thread.start_new_thread(self._start_aside, (self._start_token,))
        except RuntimeError:
            # The interpreter is exiting, or the machine has no thread left.
            self._start_token.append(None)
            return False
        return True

    def _start_aside(self, token: deque[None]) -> None:
        try:
            self.start()
        except BaseException as error:
            log(logging.ERROR, "the drainer could not be started", error=error)
            return
        finally:
            token.append(None)
        # A fork may have turned us away, and have been over *just* before the token was back.
        self._ensure_waiting()

    def _ensure_waiting(self) -> None:
        for group in list(self._groups):
            if group.queue.held():
                self.ensure(group)

    def start(self) -> None:
        """Start the threads, unless they are there, a fork is under way, or they may not be started.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is exiting.
        """
        with self._lock:
            life = self.life
            # Without a pool there is nothing to start: a shutdown may have come *just* before us.
            if life is Life.ASIDE or not self._groups or not self._may_start():
                return
            try:
                if life is Life.STOPPED:
                    self._start_loop()
                for group in self._groups:
                    if not group.all:
                        group.open()
            except BaseException:
                if life is Life.STOPPED:
                    self._halt()
                raise
            self.life = Life.RUNNING
        if life is Life.STOPPED:
            log(logging.INFO, "the drainer has started")

    def stop(self) -> None:
        """Let all threads end after what they do now, and wait a moment for them."""
        with self._lock:
            if self.life is not Life.RUNNING:
                return
            self.life = Life.STOPPED
            threads = self._halt()
        _join(threads, STOP_PATIENCE)
        log(logging.INFO, "the drainer has stopped")

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_default_executor(_Helpers(self._close_connections))
        return loop

    def _start_loop(self) -> None:
        loop = self._new_loop()
        thread = threading.Thread(target=self._main, args=(loop,), name="bgtasks-drainer", daemon=True)
        self._loop, self._thread = loop, thread
        self._watching = self._pacing = False
        self._pace.free()
        try:
            thread.start()
        except BaseException:
            self._loop = self._thread = None
            loop.close()
            raise

    def _halt(self) -> list[threading.Thread]:
        """Tell every thread to end, and return them for joining."""
        threads = [slot.thread for group in self._groups for slot in group.halt()]
        if self.companion is not None:
            threads += self.companion.halt()
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop, context=Context())
            threads.append(thread)
        return threads

    def threads(self) -> set[threading.Thread]:
        """Return the threads of the loop and of all slots, as far as they have been started."""
        with self._lock:
            slots = {thread for group in self._groups for thread in group.threads()}
            return slots if self._thread is None else {self._thread, *slots}

    def is_alive(self) -> bool:
        """Tell whether the loop has its thread."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def is_own_thread(self) -> bool:
        """Tell whether the caller is on the drainer's loop."""
        return threading.current_thread() is self._thread

    def is_own_loop(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether `loop` is the drainer's."""
        return loop is self._loop

    # Shutdown.

    def close(self, plan: Mapping[Slots, float]) -> int | None:
        """Accept no more tasks, let the accepted ones end until the deadlines, then cancel what is left.

        May be called again, by another thread or after an exception (a signal handler may raise SystemExit
        in the middle of it): every step starts from what it finds, and the earliest deadline is in force.

        Args:
            plan: The slots of the pools to shut down, and their deadlines in monotonic seconds.

        Returns:
            The number of tasks that were cancelled. None if a task asks for a shutdown that is under way: it
            would only hold it up by waiting for it.
        """
        own = current_task()
        groups = sorted(plan, key=lambda group: group.queue.pool)  # everybody locks in this order
        for group in groups:
            group.queue.close()
            group.resume()  # what it has accepted would be lost otherwise
            if own is None:
                group.hasten(plan[group])  # somebody else may be at it on another thread, and have more time
        with contextlib.ExitStack() as stack:
            for group in groups:
                if not group.closing.acquire(blocking=own is None):
                    return None
                stack.callback(group.closing.release)
                group.hasten(plan[group])
            groups = [group for group in groups if not group.closed]
            for group in sorted(groups, key=lambda group: group.deadline or 0):
                self._wind_up(group, own)
            patience = monotonic() + STOP_PATIENCE
            for group in groups:
                self._give_up(group, patience)
            return self._conclude(groups, own)

    def _wind_up(self, group: Slots, own: Task | None) -> None:
        """Wait until `group` is empty or its time is over; cancel what waits, and ask the rest to end."""
        queue = group.queue
        assert group.deadline is not None
        group.wind_up(group.deadline)
        self._wait_until_empty(group, own)
        queue.sweep()
        _tell_swept(group)
        # Those that an interrupted shutdown has asked to end are in it from then, ended by now or not.
        running = queue.running_steadily()
        group.asked += [task for task in running if task is not own and task not in group.asked]
        for task in group.asked:
            runner = task.runner
            if runner is not None:
                task.cancelling = True
                self._call_soon(runner.cancel)

    def _wait_until_empty(self, group: Slots, own: Task | None) -> None:
        """Wait until nothing but `own`, the task that asks for the shutdown, waits or runs."""
        assert group.deadline is not None
        except_for = () if own is None else (own,)
        while True:
            hurry: Future[bool] = Future()
            group.hurry = hurry
            # After that: whoever brings the deadline forward from now on lets us know.
            left = group.deadline - monotonic()
            if left <= 0:
                return
            # Whoever put the last task may have been interrupted before it could wake a slot.
            if group.queue.held() and not group.wake() and not self.ensure(group):
                return  # nobody is there to run them
            landmark = group.queue.all_ended(except_for=except_for)
            wait((landmark, hurry), left, FIRST_COMPLETED)
            landmark.cancel()
            if group.queue.is_empty(except_for=except_for):
                return
            sleep(0.001)  # a spawner has taken a place, and is about to append its task or to withdraw it

    def _give_up(self, group: Slots, patience: float) -> None:
        """Wait until `patience` (monotonic seconds) for cancelled tasks, and give up those that still run."""
        queue = group.queue
        hopeless = [task for task in queue.running() if not task.cancelling]
        landmark = queue.all_ended(except_for=hopeless)
        wait((landmark,), max(0.0, patience - monotonic()))
        landmark.cancel()
        group.abandon()
        _tell_swept(group)
        for task in group.asked:
            if queue.give_up(task) and queue.may_tell(task, group):
                group.hooks.finished(task, Outcome.CANCELLED, None)
            if task.outcome is Outcome.CANCELLED and task not in group.cancelled:
                group.cancelled.append(task)

    def _conclude(self, groups: list[Slots], own: Task | None) -> int:
        """Report what was cancelled, and let the threads end."""
        threads: list[threading.Thread] = []
        number = 0
        for group in groups:
            _report_cancelled(group)
            number += len(group.queue.swept) + len(group.cancelled)
            # No call in between, so it is said again as a whole or not at all.
            group.queue.swept, group.cancelled, group.asked = [], [], []
            group.told = 0
            if own is not None and own.asynchronous and own in group.queue.running():
                continue  # it goes on, and needs its slot and the loop; the next call, at exit, ends these
            with self._lock:
                if group in self._groups:
                    self._groups.remove(group)
                # The thread of a plain function that was given up ends with it, if ever.
                threads += [slot.thread for slot in group.halt() if slot.task is None]
            group.closed = True
        _join(threads, STOP_PATIENCE)
        return number

    # Forks.

    def before_fork(self) -> None:
        """Step aside if nothing runs. Never waits for the thread it is called on.

        What waits for the loop to take it, or for the end of a pause, waits until the fork is over.
        """
        with self._lock:
            self._forks += 1
            own = threading.current_thread() in self.threads()
            if self.life is Life.RUNNING and (own or not self._seize()):
                return
            self.life = Life.ASIDE
            threads = self._halt()
        _join(threads, FORK_PATIENCE)

    def _seize(self) -> bool:
        """Take all slots of all groups; False, and none is taken, if one of them has something to do."""
        if self._loop is not None and asyncio.all_tasks(self._loop):
            return False  # coroutines that tasks have left behind, and that would be cancelled
        deadline = monotonic() + FORK_PATIENCE
        seized: list[Slots] = []
        for group in self._groups:
            if not group.seize(deadline):
                for other in seized:
                    other.release(other.all)
                return False
            seized.append(group)
        return True

    def after_fork_in_parent(self) -> None:
        """Let the next spawn start the threads again, or have them started now if tasks wait."""
        with self._lock:
            self._forks -= 1
            if self._forks or self.life is not Life.ASIDE:
                return
            self.life = Life.STOPPED
        self._ensure_waiting()

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, loop and slots."""
        for group in self._groups:
            for task in group.queue.held():
                task.discard()
        if self._loop is not None:
            # If they were collected here, the parent's coroutines would run their finally blocks in this
            # process, and a loop closed here would be deaf in the parent: the two share an epoll object.
            _inherited.append((self._loop, asyncio.all_tasks(self._loop), self._groups))
        self._reset()
        if self.companion is not None:
            self.companion.forget()

    # For slots and spawners: any thread.

    def launch(self, slot: Slot, task: Task) -> None:
        """Run the asynchronous `task` on the loop, holding `slot`."""
        if not self._call_soon(self._launch, slot, task):
            # The loop ends only after a shutdown that has given this task up, so there is nobody to tell.
            task.discard()
            slot.group.queue.end(task, Outcome.CANCELLED)

    def watch(self) -> None:
        """Look at the tasks that overrun their TASK_TIMEOUT for as long as any plain function runs."""
        if not self._watching:
            self._watching = True
            self._call_soon(self._watch)

    def poll(self, group: Slots) -> bool:
        """Have the loop take asynchronous tasks for idle slots of `group`; False if it is not there."""
        loop = self._loop
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(self._poll, group, context=Context())
        except RuntimeError:
            return False  # it has been closed since we looked
        # One that has been told to end may not come to it. If that happens from now on, what waits is seen by
        # whoever replaces the loop, opens the slots again, or shuts them down.
        return self._loop is loop

    def stir(self) -> None:
        """Hear that a slot was idle and is no longer."""
        if self.companion is not None:
            self.companion.stir()

    def keep_pace(self, waiting: Collection[Task]) -> None:
        """Wait until a slot that has ended a plain function may take the next of the `waiting` ones."""
        if self._pace.interval:
            self._pace.wait(waiting)
        elif CAN_MEASURE and not self._pacing:
            self._pacing = True
            self._call_soon(self._look_at_pace, monotonic())

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        """Call `callback` on the loop in `delay` seconds, unless the drainer stops before."""
        loop = self._loop
        if loop is not None:
            self._call_soon(partial(loop.call_later, delay, callback))

    def _call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        loop = self._loop
        while loop is not None:
            try:
                # In a context of its own: the default, the caller's, would be kept, and seen, by the loop.
                loop.call_soon_threadsafe(callback, *args, context=Context())
            except RuntimeError:
                # It has been closed since we looked: for good, or another one has taken its place.
                closed, loop = loop, self._loop
                if closed is loop:
                    return False
            else:
                return True
        return False

    # The thread.

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._loop is loop:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio lets these two pass. They come from a child task that a task has left behind.
                log(logging.ERROR, "the drainer's loop was interrupted; it goes on", error=error)
            except BaseException as error:
                log(logging.ERROR, "the drainer's loop has died; it is replaced", error=error)
                loop = self._replace(loop)
            else:
                if self._loop is loop:
                    log(logging.ERROR, "the drainer's loop was stopped by a task; it goes on")
        _close(loop)

    def _replace(self, dead: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        """Go on with a new loop. What ran on the `dead` one has failed."""
        loop = self._new_loop()
        with self._lock:
            if self._loop is not dead:
                return loop  # the drainer was stopped in the meantime
            self._loop = loop
            groups = list(self._groups)
        with contextlib.suppress(Exception):
            dead.close()
        for group in groups:
            group.polled = False  # the dead one will not look
            group.wake()
        # The timers that looked at plain functions and at the pace have died as well.
        self._pace.free()
        self._pacing = False
        self._watching = True
        loop.call_soon(self._watch, context=Context())
        for slot in [slot for group in groups for slot in group.all]:
            task = slot.loan
            if slot.owner is not Owner.LOOP or task is None:
                continue
            if slot.lending is task:
                # It has not begun, and may have been lent to the new loop *just* now: nothing died under it.
                self.launch(slot, task)
            else:
                slot.loan = None
                self._bury(slot, task)
        return loop

    def _bury(self, slot: Slot, task: Task) -> None:
        queue = slot.group.queue
        log(logging.ERROR, "task %r of pool %r failed: the loop died under it", task.name, queue.pool)
        if slot.group.hooks.watched() and queue.may_tell(task, slot):
            slot.group.hooks.finished(task, Outcome.FAILED, None)
        slot.call(partial(slot.land, task, Outcome.FAILED))

    # On the loop.

    def _poll(self, group: Slots) -> None:
        """Take asynchronous tasks for idle slots of `group`."""
        group.polled = False  # before we look: whoever puts a task *just* after that polls again
        loop = asyncio.get_running_loop()
        try:
            # A loop that has been told to end may come to this late, when the slots are another one's.
            while self._loop is loop and (slot := group.claim()) is not None:
                # Only now: nobody who has seized the slots, for a fork or for good, has a thread started.
                with contextlib.suppress(Exception):
                    self.stir()
                self._pump(slot, group.next_for(slot))
        finally:
            group.wake()  # for a plain function that is the next by now

    def _launch(self, slot: Slot, task: Task) -> None:
        if slot.lending is task:  # or an interrupted slot has launched it twice
            slot.lending = None
            self._pump(slot, task)

    def _pump(self, slot: Slot, task: Task | None) -> None:
        """Run tasks for `slot` until one has to wait, or is a plain function, or none is left."""
        for _ in range(BURST):
            if task is None:
                return
            if not task.asynchronous:
                slot.call(partial(slot.accept, task))
                return
            slot.loan = task
            runner = self._start_task(slot, task)
            if not runner.done():
                task.runner = runner
                runner.add_done_callback(partial(self._land, slot, task), context=Context())
                return
            task = self._end(slot, task, runner)
        if task is not None:
            slot.loan = slot.lending = task
            asyncio.get_running_loop().call_soon(self._launch, slot, task, context=Context())

    def _start_task(self, slot: Slot, task: Task) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        run = _run(slot, task)
        if EAGER:
            return _asyncio_task(run, loop=loop, context=Context(), eager_start=True)
        return loop.create_task(run, context=Context())

    def _land(self, slot: Slot, task: Task, runner: asyncio.Task[None]) -> None:
        self._pump(slot, self._end(slot, task, runner))

    def _end(self, slot: Slot, task: Task, runner: asyncio.Task[None]) -> Task | None:
        """Count `task` as ended and take the next one: here or, if the slot's thread was used, there."""
        task.runner = None
        outcome = self._verdict(slot, task, runner)
        slot.loan = None
        if slot.touched:
            slot.touched = False
            slot.call(partial(slot.land, task, outcome))
            return None
        slot.group.queue.end(task, outcome)
        return slot.group.next_for(slot)

    def _verdict(self, slot: Slot, task: Task, runner: asyncio.Task[None]) -> Outcome:
        error = None if runner.cancelled() else runner.exception()
        if task.verdict is not None and error is None:
            return task.verdict
        task.discard()  # it may never have begun
        if task.verdict is None and task.cancelling:
            return Outcome.CANCELLED
        pool = slot.group.queue.pool
        log(logging.ERROR, "task %r of pool %r failed outside its own code", task.name, pool, error=error)
        return Outcome.FAILED if task.verdict is None else task.verdict

    def _watch(self) -> None:
        now = monotonic()
        due: list[float] = []
        for slot, task, at in self._timed_functions():
            if at <= now:
                _report_overrun(slot, task)
            else:
                due.append(at)
        if due:
            asyncio.get_running_loop().call_later(min(due) - now, self._watch)
            return
        self._watching = False
        # A slot that began a task *just* after we looked has found the flag set, so we have to look again.
        if self._timed_functions():
            self.watch()

    def _look_at_pace(self, due: float) -> None:
        """Look whether slots hold up others, while they have tasks. It was `due` at that monotonic second."""
        again = False
        try:
            if self._set_pace(due):
                next_due = monotonic() + PERIOD
                asyncio.get_running_loop().call_later(PERIOD, self._look_at_pace, next_due, context=Context())
                again = True
        finally:
            if not again:
                self._pace.free()  # even if an exception from outside has come: nobody would ever do it
                self._pacing = False  # the next slot that goes from one task to another sets it again

    def _set_pace(self, due: float) -> bool:
        now = monotonic()
        groups = list(self._groups)
        slots = [slot for group in groups for slot in list(group.all)]
        if all(slot.owner is Owner.NOBODY for slot in slots):
            return False
        if any(group.deadline is not None for group in groups):
            self._pace.free()  # a shutdown waits for them
            return True
        used = _processor_time(thread for group in groups for thread in group.threads())
        others = process_time() - thread_time() - used
        if self.companion is not None:
            others -= _processor_time(self.companion.threads())
        ended = sum(sum(slot.account.ended) for slot in slots)
        again = self._pace.look(now, late=now - due, slots=used, others=others, ended=ended)
        if self._pace.held and now >= self._quiet_until:
            self._quiet_until = now + QUIET
            log(logging.INFO, SLOWED_DOWN, self._pace.interval * 1000)
        return again

    def _timed_functions(self) -> list[tuple[Slot, Task, float]]:
        """Return the plain functions under a TASK_TIMEOUT, and when it is over (monotonic seconds)."""
        return [
            (slot, task, task.started_at + group.task_timeout)
            for group in list(self._groups)
            if group.task_timeout is not None
            for slot in list(group.all)
            if (task := slot.task) is not None and not task.overran
        ]


async def _run(slot: Slot, task: Task) -> None:
    """Run an asynchronous `task`, with `slot` as the thread of its ORM calls, and note how it ended."""
    group = slot.group
    hooks = group.hooks
    hooks.enter(task.context, task.captured)
    current.set(weakref.ref(task))
    seat = Seat(slot)
    seat.take()
    error: BaseException | None = None
    timer: asyncio.TimerHandle | None = None
    try:
        watched = hooks.watched()
        if watched and not task.continued:  # of a plain function that returned a coroutine they know
            await sync_to_async(hooks.started)(task)
        if group.task_timeout is not None:
            timer = _start_timer(task, group.task_timeout)
        try:
            await task.call()
            outcome = Outcome.TIMED_OUT if task.overran else Outcome.SUCCEEDED
        except BaseException as exception:
            outcome, error = _how_it_failed(task, exception)
        if timer is not None:
            timer.cancel()
        task.verdict = outcome
        log_end(group.queue, task, outcome, error)
        if watched and group.queue.may_tell(task, slot):
            await sync_to_async(hooks.finished)(task, outcome, error)
        hooks.leave()
    finally:
        seat.leave()
        del error


def _how_it_failed(task: Task, error: BaseException) -> tuple[Outcome, BaseException | None]:
    if task.overran:
        return Outcome.TIMED_OUT, error
    if task.cancelling:
        return Outcome.CANCELLED, None  # by shutdown, which reports it
    return Outcome.FAILED, error


def _start_timer(task: Task, task_timeout: float) -> asyncio.TimerHandle:
    left = task.started_at + task_timeout - monotonic()
    runner = asyncio.current_task()
    assert runner is not None  # we run in one
    return asyncio.get_running_loop().call_later(left, _time_out, task, runner, context=Context())


def _time_out(task: Task, runner: asyncio.Task[Any]) -> None:
    task.overran = True
    runner.cancel()


def _report_overrun(slot: Slot, task: Task) -> None:
    """Report a plain function that is past its TASK_TIMEOUT, with its stack. Nothing can stop it."""
    task.overran = True
    frame = sys._current_frames().get(slot.thread.ident or 0)
    log(
        logging.ERROR,
        "task %r of pool %r runs for longer than %g s and holds slot %r at:\n%s",
        task.name,
        slot.group.queue.pool,
        slot.group.task_timeout,
        slot.name,
        indented("".join(traceback.format_stack(frame))),
    )


def _tell_swept(group: Slots) -> None:
    """Tell the listeners of the swept tasks that they do not know of yet."""
    swept = group.queue.swept
    while group.told < len(swept):
        task = swept[group.told]
        group.told += 1
        group.hooks.finished(task, Outcome.CANCELLED, None)


def _report_cancelled(group: Slots) -> None:
    """Say in one warning, by name and number, what a shutdown has cancelled."""
    cancelled = [*group.queue.swept, *group.cancelled]
    if not cancelled:
        return
    names = Counter(task.name for task in cancelled)
    log(
        logging.WARNING,
        "pool %r was shut down with %d tasks cancelled: %s",
        group.queue.pool,
        len(cancelled),
        ", ".join(f"{count} {name!r}" for name, count in names.most_common()),
    )


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what tasks have left behind on the `loop`, and close it."""
    try:
        left = asyncio.all_tasks(loop)
        for runner in left:
            runner.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=STOP_PATIENCE / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except BaseException as error:
        log(logging.ERROR, "the drainer's loop could not be emptied", error=error)
    finally:
        loop.close()


def _processor_time(threads: Iterable[threading.Thread]) -> float:
    return sum(processor_time(thread.native_id) for thread in threads)


def _join(threads: Iterable[threading.Thread], patience: float) -> None:
    """Wait `patience` seconds at most for `threads` to end, but never for the caller's own."""
    deadline = monotonic() + patience
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - monotonic()))


class _Helpers(ThreadPoolExecutor):
    """The threads of ``asyncio.to_thread`` and of look-ups on the drainer's loop.

    They lie outside of a task's bound. At least they keep no connection: nobody else would ever close it.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__(thread_name_prefix="bgtasks-helper")
        self._close = close

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn` on one of the threads, and close what it has opened there."""
        return super().submit(self._call, partial(fn, *args, **kwargs))

    def _call(self, fn: Callable[[], T]) -> T:
        try:
            return fn()
        finally:
            self._close()
