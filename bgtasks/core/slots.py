"""The slots of one pool, and the start and end of their threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import cast

from bgtasks.core.slot import Slot, SlotPool
from bgtasks.core.task import Task


@dataclass(eq=False, repr=False)
class Slots(SlotPool):
    """The slots of one pool."""

    def __post_init__(self) -> None:
        self.look: Callable[[], None] | None = None  # called after each put, if the pool hands tasks off
        self.runners = self.queue.conn_max  # slots that run tasks
        self.queue.ask_loop = partial(self.loop.call_soon, self._claim)
        self.all: list[Slot] = []  # those that have threads; written under the drainer's lock

    def __repr__(self) -> str:
        return f"<Slots {self.queue.pool!r} {len(self.queue.running())}/{self.queue.conn_max} running>"

    def open(self) -> None:
        """Start the slots' threads, as far as they are not there.

        Raises:
            RuntimeError: There is no thread for one of them; those before it work.
        """
        slots: list[Slot] = []
        try:
            for number in range(len(self.all) + 1, self.runners + 1):
                slot = Slot(self, number)
                Context().run(slot.thread.start)
                slots.append(slot)
        finally:
            self.all = [*self.all, *slots]
            self.queue.add_slots(slots)

    def _claim(self) -> None:
        """Run a coroutine in an idle slot. Called on the loop."""
        slot = self.queue.claim()
        if slot is not None:
            self.notify()
            cast(Slot, slot).run(slot.task)

    def leave_loop(self) -> None:
        """Go on without the loop, which is deaf: what runs on it has failed. Under the drainer's lock."""
        for slot in self.all:
            slot.leave_loop()
        self.queue.repair()  # the loop has also forgotten what it was asked and lent

    def stop(self) -> list[threading.Thread]:
        """Tell every slot to end after what it does now, and return the threads of those that do nothing."""
        self.queue.remove_slots()
        slots = self.all
        for slot in slots:
            slot.stop()
        self.all = []  # not before: if this is interrupted, the next call stops all of them
        # The thread of a plain function that was given up ends with it, if ever.
        return [slot.thread for slot in slots if slot.task is None]

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the slots."""
        return [slot.thread for slot in self.all]

    def step_aside_if_idle(self) -> bool:
        """Have nothing start, for a fork; False if something runs."""
        return self.queue.remove_slots(if_idle=True)

    def wind_up(self, deadline: float, cancelled: list[Task]) -> None:
        """Prepare for a shutdown at `deadline` (monotonic seconds): move what is due later to `cancelled`."""
        self.queue.cancel(lambda task: task.policy.due_at > deadline, cancelled)

    def abandon(self, cancelled: list[Task]) -> None:
        """Give up what is left and neither waits nor runs, and move it to `cancelled`."""
