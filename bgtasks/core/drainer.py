"""The drainer: the loop and the slots of all pools, started and stopped together.

``start``, called by ``AppConfig.ready()``, starts the loop. A pool's slots get their threads with its first
task, which asks for it by ``ensure`` and waits for nothing: a bare thread does the starting. Before a fork an
idle drainer stops all threads, so that none is in an unknown state in the child. A busy one cannot; then the
child leaves all that it inherits untouched. Parent and child start again at the next spawn.
"""

from __future__ import annotations

import _thread
import asyncio
import enum
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, process_time, sleep, thread_time
from typing import Protocol

from bgtasks.core.lock import free, new_lock
from bgtasks.core.log import log
from bgtasks.core.loop import Loop
from bgtasks.core.pace import PERIOD, Pace, processor_time
from bgtasks.core.places import State
from bgtasks.core.slots import Slots

FORK_PATIENCE = 1.0  # seconds a fork waits for slots that have just ended their last task
STOP_PATIENCE = 0.4  # seconds for cancelled tasks to end, for slots to end, and for the loop to end

QUIET = 60.0  # seconds between two records that say so:
SLOWED_DOWN = "tasks compute while other threads wait for the GIL: a plain function is started every %.1f ms"

# These versions cannot start a thread while the interpreter exits, and a script may spawn just before that.
START_SLOTS_AT_ONCE = (3, 12) <= sys.version_info < (3, 12, 3)

_inherited: list[object] = []  # what a forked child must neither run nor end; see after_fork_in_child


class Companion(Protocol):
    """A thread beside the drainer that lives only while tasks come and go."""

    def notify(self) -> None:
        """Have the thread there. Any thread may call this, and it waits for nothing."""

    def stop(self) -> list[threading.Thread]:
        """Let the thread end soon, and return it for joining if it is there."""
        ...

    def threads(self) -> list[threading.Thread]:
        """Return the thread, if it is there."""
        ...

    def forget(self) -> None:
        """Know of no thread: this is a forked child."""


class Life(enum.Enum):
    """Whether the drainer has its threads."""

    STOPPED = "stopped"
    RUNNING = "running"
    ASIDE = "aside"  # a fork is under way


class Drainer:
    """Starts and stops the threads of all pools."""

    def __init__(
        self,
        may_start: Callable[[], bool] = lambda: True,
        new_executor: Callable[[], ThreadPoolExecutor] = ThreadPoolExecutor,
        may_have_loop: Callable[[], bool] = lambda: True,
    ) -> None:
        self.companions: list[Companion] = []  # written before the start
        self._may_start = may_start  # False in a process whose threads would be missing in its workers
        self._new_executor = new_executor
        self._may_have_loop = may_have_loop
        self._reset()

    def _reset(self) -> None:
        self.life = Life.STOPPED  # written under _lock, read without it
        self.accepting = True  # False once the process is shutting down
        self.loop = Loop(self._new_executor, self._may_have_loop)
        self.pace = Pace(lambda: self.loop.call_soon(self._look_at_pace, monotonic()))
        self._lock = new_lock()  # serializes start, stop and fork; spawners never take it
        self._pools: dict[Slots, None] = {}  # added to by spawners, with no lock; see add
        self._forks = 0  # forks under way; under _lock
        self._held: list[Slots] = []  # whose locks a fork under way holds; written by the forking thread
        self._starting = False  # a bare thread is starting; two of them do no harm
        self._quiet_until = 0.0  # monotonic seconds, from when on it is said again that slots are slowed down

    # Life.

    def add(self, pool: Slots) -> None:
        """Start the slots of `pool` when it has tasks. Spawners call this, so it waits for nothing."""
        self._pools[pool] = None

    def remove(self, pool: Slots) -> list[threading.Thread]:
        """Let the threads of `pool` end, and return them for joining."""
        with self._lock:
            self._pools.pop(pool, None)
            return pool.stop()

    def notify(self) -> None:
        """Tell the companions that an idle slot begins to work. What fails there costs no task."""
        for companion in self.companions:
            try:
                companion.notify()
            except BaseException as error:
                log(logging.ERROR, "a thread beside the drainer could not be started", error=error)

    def ensure(self, pool: Slots) -> bool:
        """Have the threads of `pool` started, without waiting for them; False if that is impossible."""
        if self._starting or self.life is Life.ASIDE or (self.life is Life.RUNNING and pool.all):
            return True
        if not self._may_start():
            return False
        self._starting = True
        try:
            # Thread.start() would wait, and take a lock that the very frame a signal interrupted may hold.
            _thread.start_new_thread(self._start_aside, ())
        except BaseException as error:
            self._starting = False
            if not isinstance(error, RuntimeError):
                raise  # what a signal handler has raised
            return False  # the interpreter is exiting, or the machine has no thread left
        return True

    def _start_aside(self) -> None:
        try:
            self.start()
            self._open_pools()
        except BaseException as error:
            log(logging.ERROR, "the drainer could not be started", error=error)
            return
        finally:
            free(self._lock)  # which an exception from outside may have left held
            self._starting = False
        # A task may have been put, or a fork been over, *just* before that.
        self._ensure_waiting()

    def _ensure_waiting(self) -> None:
        for pool in list(self._pools):
            if not pool.all and pool.queue.held():
                self.ensure(pool)

    def start(self) -> None:
        """Start the loop, unless it is there, a fork is under way, or it may not be started.

        Raises:
            RuntimeError: The machine has no thread left, or the interpreter is exiting.
        """
        with self._lock:
            # Without a pool there is nothing to start: a shutdown may have come *just* before us.
            if self.life is not Life.STOPPED or not self._pools or not self._may_start():
                return
            self.pace.free()
            if self.loop.may_run():
                self.loop.start()
            self.life = Life.RUNNING
        log(logging.INFO, "the drainer has started")
        if START_SLOTS_AT_ONCE:
            self._open_pools(waiting=False)

    def _open_pools(self, *, waiting: bool = True) -> None:
        """Start the slots of pools that have none yet: of those only in which tasks are `waiting`."""
        with self._lock:
            for pool in list(self._pools) if self.life is Life.RUNNING else ():
                if not pool.all and (not waiting or pool.queue.held()):
                    pool.open()

    def stop(self) -> None:
        """Let all threads end after what they do now, and wait a moment for them."""
        with self._lock:
            if self.life is not Life.RUNNING:
                return
            self.life = Life.STOPPED
            threads = self._stop_threads()
        join(threads, STOP_PATIENCE)
        log(logging.INFO, "the drainer has stopped")

    def _stop_threads(self) -> list[threading.Thread]:
        threads = [thread for pool in list(self._pools) for thread in pool.stop()]
        threads += [thread for companion in self.companions for thread in companion.stop()]
        return threads + self.loop.stop()

    def threads(self) -> set[threading.Thread]:
        """Return the threads of the loop and of all slots, as far as they have been started."""
        with self._lock:
            slots = {thread for pool in list(self._pools) for thread in pool.threads()}
            return slots if self.loop.thread is None else {self.loop.thread, *slots}

    def is_own_thread(self) -> bool:
        """Tell whether the caller is on the drainer's loop."""
        return threading.current_thread() is self.loop.thread

    # Forks.

    def before_fork(self) -> None:
        """Stop all threads if nothing runs, and hold the pools' locks. Never waits for the calling thread.

        What is spawned meanwhile waits until the fork is over.
        """
        with self._lock:
            self._forks += 1
            own = threading.current_thread() in self.threads()
            threads: list[threading.Thread] = []
            if self.life is not Life.RUNNING or (not own and self._unseat_all()):
                threads = self._stop_threads()
                self.life = Life.ASIDE
            pools = sorted(self._pools, key=lambda pool: pool.queue.pool)
        join(threads, FORK_PATIENCE)
        for pool in pools:
            pool.queue.lock.acquire()
        self._held = pools

    def _unseat_all(self) -> bool:
        """Take the seats of all pools, so that nothing can start; False if something runs."""
        if self.loop.running is not None and asyncio.all_tasks(self.loop.running):
            return False  # coroutines that tasks have left behind, and that would be cancelled
        deadline = monotonic() + FORK_PATIENCE
        for pool in list(self._pools):
            while not pool.unseat_if_idle():
                if pool.queue.running() or pool.queue.checked_out or monotonic() >= deadline:
                    for other in list(self._pools):
                        if not other.queue.seats:
                            other.queue.seat(other.all)
                    return False
                sleep(0.0005)  # a slot that has ended its task is about to be idle
        return True

    def after_fork_in_parent(self) -> None:
        """Let the next spawn start the threads again, or have them started now if tasks wait."""
        held, self._held = self._held, []
        for pool in held:  # before our own lock: another thread that forks may have that, and wait for these
            pool.queue.lock.release()
        with self._lock:
            self._forks -= 1
            if self._forks or self.life is not Life.ASIDE:
                return
            self.life = Life.STOPPED
        self._ensure_waiting()

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, loop and slots."""
        for pool in self._held:
            for task in pool.queue.held():
                task.discard()
        if self.loop.running is not None:
            # If they were collected here, the parent's coroutines would run their finally blocks in this
            # process, and a loop closed here would be deaf in the parent: the two share an epoll object.
            _inherited.append((self.loop, asyncio.all_tasks(self.loop.running), self._pools))
        self._reset()
        for companion in self.companions:
            companion.forget()

    # The pace of tasks that compute, on the loop.

    def _look_at_pace(self, due: float) -> None:
        """Look whether slots hold up others, while they have tasks. It was `due` at that monotonic second."""
        again = False
        try:
            if self._set_pace(due):
                next_due = monotonic() + PERIOD
                self.loop.call_later(PERIOD, self._look_at_pace, next_due)
                again = True
        finally:
            if not again:
                self.pace.free()  # the next slot that goes from one task to another asks again

    def _set_pace(self, due: float) -> bool:
        now = monotonic()
        pools = list(self._pools)
        # Not whether tasks run: a slot that waits until it may start the next one runs none.
        if all(len(pool.queue.idle) == len(pool.queue.seats) for pool in pools):
            return False
        if any(pool.queue.state is not State.OPEN for pool in pools):
            self.pace.speed_up()  # a shutdown waits for them
            return True
        used = _processor_time(thread for pool in pools for thread in pool.threads())
        others = process_time() - thread_time() - used
        others -= _processor_time(thread for companion in self.companions for thread in companion.threads())
        ended = sum(pool.queue.ended() for pool in pools)
        again = self.pace.look(now, late=now - due, slots=used, others=others, ended=ended)
        if self.pace.held and now >= self._quiet_until:
            self._quiet_until = now + QUIET
            log(logging.INFO, SLOWED_DOWN, self.pace.interval * 1000)
        return again


def _processor_time(threads: Iterable[threading.Thread]) -> float:
    return sum(processor_time(thread.native_id) for thread in threads)


def join(threads: Iterable[threading.Thread], patience: float) -> None:
    """Wait `patience` seconds at most for `threads` to end, but never for the caller's own."""
    deadline = monotonic() + patience
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:  # or it was never started
            thread.join(max(0.0, deadline - monotonic()))
