"""The drainer: the loop and the slots of all pools, started and stopped together.

``start``, called by ``AppConfig.ready()``, starts the loop. A pool's slots get their threads with its first
task, which asks for it by ``ensure`` and waits for nothing: a bare thread does the starting.
"""

from __future__ import annotations

import _thread
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Protocol

from bgtasks.clock import monotonic
from bgtasks.core.lock import free, new_lock
from bgtasks.core.log import log
from bgtasks.core.loop import Loop
from bgtasks.core.pace import Pace
from bgtasks.core.slots import Slots

FORK_PATIENCE = 1.0  # seconds a fork waits for slots that have just ended their last task
RETRY_INTERVAL = 1.0  # seconds between two attempts to start threads, on a machine that has none left
STOP_PATIENCE = 0.4  # seconds for cancelled tasks to end, for slots to end, and for the loop to end

# These versions cannot start a thread while the interpreter exits, and a script may spawn just before that.
START_SLOTS_AT_ONCE = (3, 12) <= sys.version_info < (3, 12, 3)


class BackgroundThread(Protocol):
    """A thread beside the drainer that exists only while tasks are spawned or run."""

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


class Drainer:
    """Starts and stops the threads of all pools."""

    def __init__(
        self,
        may_start: Callable[[], bool] = lambda: True,
        new_executor: Callable[[], ThreadPoolExecutor] = ThreadPoolExecutor,
        may_have_loop: Callable[[], bool] = lambda: True,
    ) -> None:
        self.background: list[BackgroundThread] = []  # written before the start
        self.pace = Pace()  # of the slots of all pools; written before the start
        self._may_start = may_start  # False in a process whose threads would be missing in its workers
        self._new_executor = new_executor
        self._may_have_loop = may_have_loop
        self.reset()

    def reset(self) -> None:
        """Know of no pool and no thread: nothing was started yet, or this is a forked child."""
        self.accepting = True  # False once the process is shutting down
        self.running = False  # written under the lock
        self.loop = Loop(self._new_executor, self._may_have_loop)
        self.lock = new_lock()  # serializes start, stop and fork; spawners never take it
        self.pools: dict[Slots, None] = {}  # added to by spawners, with no lock; see add
        self._wanted: dict[Slots, None] = {}  # pools whose slots are to be started; likewise
        self._starting = False  # a bare thread is starting; two of them do no harm
        self.failing = False  # it has failed, and tries again; written by it

    def add(self, pool: Slots) -> None:
        """Start the slots of `pool` when it has tasks. Spawners call this, so it waits for nothing."""
        self.pools[pool] = None

    def remove(self, pool: Slots) -> list[threading.Thread]:
        """Let the threads of `pool` end, and return them for joining."""
        with self.lock:
            self.pools.pop(pool, None)
            return pool.stop()

    def notify(self) -> None:
        """Tell the threads beside the drainer that an idle slot begins to work."""
        for thread in self.background:
            try:
                thread.notify()
            except BaseException as error:
                log(logging.ERROR, "a thread beside the drainer could not be started", error=error)

    def ensure(self, pool: Slots) -> bool:
        """Have the threads of `pool` started, without waiting for them; False if that is impossible."""
        if pool.all:
            return True
        if not self._may_start():
            return False
        self._wanted[pool] = None
        if self._starting:
            return True
        self._starting = True
        try:
            # Thread.start() would wait, and take a lock that the very frame a signal interrupted may hold.
            _thread.start_new_thread(self._start_wanted, ())
        except BaseException as error:
            self._starting = False
            if not isinstance(error, RuntimeError):
                raise  # what a signal handler has raised
            return False  # the interpreter is exiting, or the machine has no thread left
        return True

    def _start_wanted(self) -> None:
        while self._wanted:
            try:
                with self.lock:  # or a fork in between would end what has just been started
                    self.start()
                    self.open(self._wanted)
                self.failing = False
            except BaseException as error:
                if not self.failing:
                    log(logging.ERROR, "threads could not be started; it is tried again", error=error)
                self.failing = True
                sleep(RETRY_INTERVAL)
            finally:
                free(self.lock)  # which an exception from outside may have left held
        self._starting = False
        for pool in list(self._wanted):  # added *just* before that
            self.ensure(pool)

    def start(self) -> None:
        """Start the loop, unless it is there, or may not be started. Raises as ``Loop.start`` does."""
        with self.lock:
            # Without a pool there is nothing to start: a shutdown may have come *just* before us.
            if self.running or not self.pools or not self._may_start():
                return
            self.pace.free()
            if self.loop.may_run():
                self.loop.start()
            self.running = True
        log(logging.INFO, "the drainer has started")
        if START_SLOTS_AT_ONCE:
            self.open(dict(self.pools))

    def open(self, wanted: dict[Slots, None]) -> None:
        """Start the slots of the pools that are `wanted`, and take these out of it."""
        with self.lock:
            for pool in list(wanted):
                if self.running and pool in self.pools:
                    pool.open()
                wanted.pop(pool, None)

    def replace_loop(self) -> None:
        """Have another loop in place of one that is deaf. Raises as ``Loop.start`` does."""
        with self.lock:
            if self.running:
                self.loop.replace()
                self.pace.free()  # the loop has measured it
                for pool in list(self.pools):
                    pool.leave_loop()

    def stop(self) -> None:
        """Let all threads end after what they do now, and wait a moment for them."""
        with self.lock:
            if not self.running:
                return
            threads = self.stop_threads()
        join(threads, STOP_PATIENCE)
        log(logging.INFO, "the drainer has stopped")

    def stop_threads(self) -> list[threading.Thread]:
        """Let all threads end after what they do now, and return them for joining. Under the lock."""
        self.running = False
        threads = [thread for pool in list(self.pools) for thread in pool.stop()]
        threads += [each for thread in self.background for each in thread.stop()]
        return threads + self.loop.stop()

    def threads(self) -> set[threading.Thread]:
        """Return the threads of the loop and of all slots, as far as they have been started."""
        with self.lock:
            slots = {thread for pool in list(self.pools) for thread in pool.threads()}
            return slots if self.loop.thread is None else {self.loop.thread, *slots}

    def is_own_thread(self) -> bool:
        """Tell whether the caller is on the drainer's loop."""
        return threading.current_thread() is self.loop.thread


def join(threads: Iterable[threading.Thread], patience: float) -> None:
    """Wait `patience` seconds at most for `threads` to end, but never for the caller's own."""
    deadline = monotonic() + patience
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:  # or it was never started
            thread.join(max(0.0, deadline - monotonic()))
