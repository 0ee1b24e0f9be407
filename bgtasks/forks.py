"""What a fork finds and leaves: no thread of an idle drainer, no lock held, nothing of the parent's tasks.

Before a fork an idle drainer stops all threads, so that none is in an unknown state in the child. A busy one
cannot; then the child leaves all that it inherits untouched. Parent and child start again at the next spawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from time import sleep

from bgtasks import shortcuts
from bgtasks.child import end_child
from bgtasks.clock import monotonic
from bgtasks.core import drainer as drainers
from bgtasks.core.drainer import Drainer, join
from bgtasks.core.slots import Slots

_inherited: list[object] = []  # what a forked child must neither run nor end; see after_fork_in_child


class Forks:
    """The forks of a process with a `drainer`, whose lock is held from before to after: one at a time."""

    def __init__(self, drainer: Drainer) -> None:
        self._drainer = drainer
        self._held: list[Slots] = []  # pools whose locks are held; written by the thread that forks

    def before_fork(self) -> None:
        """Stop all threads if nothing runs, and hold all locks. Never waits for the calling thread.

        What is spawned meanwhile waits until the fork is over.
        """
        drainer = self._drainer
        drainer.lock.acquire()
        self._held = []
        pools = sorted(drainer.pools, key=lambda pool: pool.queue.pool)
        own = threading.current_thread() in drainer.threads()
        if not drainer.running or (not own and self._step_aside(pools)):
            join(drainer.stop_threads(), drainers.FORK_PATIENCE)
        for pool in pools:
            pool.queue.lock.acquire()
            self._held.append(pool)

    def _step_aside(self, pools: list[Slots]) -> bool:
        """Take the slots away from all pools, so that nothing can start; False if something runs."""
        loop = self._drainer.loop.running
        if loop is not None and asyncio.all_tasks(loop):
            return False  # coroutines that tasks have left behind, and that would be cancelled
        deadline = monotonic() + drainers.FORK_PATIENCE
        if any(pool.queue.waiting and not pool.queue.paused for pool in pools):
            return False  # slots are about to take what waits, or about to be started for it
        for pool in pools:
            while not pool.step_aside_if_idle():
                if pool.queue.running() or pool.queue.checked_out or monotonic() >= deadline:
                    for other in pools:
                        if not other.queue.slots:
                            other.queue.add_slots(other.all)
                    return False
                sleep(0.0005)  # a slot that has ended its task is about to be idle
        return True

    def after_fork_in_parent(self) -> None:
        """Let the next spawn start the threads again, or have them started now if tasks wait."""
        drainer, held = self._drainer, self._held
        # A signal handler may have raised in the middle of `before_fork`: Python still forks.
        with contextlib.suppress(RuntimeError):
            for pool in held:
                pool.queue.lock.release()
            drainer.lock.release()
        for pool in held:
            if pool.queue.queued:
                drainer.ensure(pool)

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, loop and slots."""
        drainer = self._drainer
        for pool in self._held:
            for task in pool.queue.held():
                task.discard()
        drainer.loop.end_if_forked = end_child
        if threading.current_thread() is drainer.loop.thread and drainer.loop.running is not None:
            waits = RuntimeError("a coroutine that has forked cannot wait in the child")
            shortcuts.call_next(drainer.loop.running, partial(end_child, waits))
        if drainer.loop.running is not None:
            # If they were collected here, the parent's coroutines would run their finally blocks in this
            # process, and a loop closed here would be deaf in the parent: the two share an epoll object.
            _inherited.append((drainer.loop, asyncio.all_tasks(drainer.loop.running), drainer.pools))
        self._held = []
        drainer.reset()
        for thread in drainer.background:
            thread.forget()
