"""The slots of a pool that hands tasks off: the mover takes the place of one of them."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from bgtasks.core.log import log
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.handoff.engine import Engine
from bgtasks.handoff.mover import Mover


@dataclass(eq=False, repr=False, kw_only=True)
class HandoffSlots(Slots):
    """The slots of one pool, of which one is the mover."""

    engine: Engine
    always: bool  # hand off every task that can travel, not only those that are too many

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runners -= 1
        self.mover = Mover(self.queue, self.hooks, self.engine, self.loop, always=self.always)
        self.look = self.mover.look

    def open(self) -> None:
        """Start the slots' threads, and the mover's. Without that one, everything runs here."""
        try:
            super().open()
        finally:
            if self.all and self.mover.thread is None:
                self._open_mover()

    def _open_mover(self) -> None:
        try:
            self.mover.open()
        except RuntimeError as error:
            self.mover.bypass()
            log(logging.ERROR, "pool %r hands nothing off", self.queue.pool, error=error)

    def stop(self) -> list[threading.Thread]:
        """Have every slot end after what it does now, and return the threads to join."""
        return [*self.mover.stop(), *super().stop()]

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the slots."""
        mover = self.mover.thread
        return super().threads() if mover is None else [*super().threads(), mover]

    def step_aside_if_idle(self) -> bool:
        """Have nothing start, for a fork; False if something runs or is being moved."""
        if not super().step_aside_if_idle():
            return False
        # From here on the mover begins no pass: it does so only while there are slots.
        if self.mover.thread is None or not (self.mover.in_pass or self.queue.checked_out):
            return True
        self.queue.add_slots(self.all)
        return False

    def wind_up(self, deadline: float, cancelled: list[Task]) -> None:  # noqa: ARG002  # the engine has them
        """Have everything that waits, and can travel, moved until `deadline` (monotonic seconds)."""
        self.mover.wind_up(deadline)

    def abandon(self, cancelled: list[Task]) -> None:
        """Give up what is still checked out, and move it to `cancelled`."""
        asked = self.mover.unanswered()
        before = len(cancelled)
        self.queue.cancel_waiting(cancelled, checked_out=True)
        number = len(asked.intersection(cancelled[before:]))
        if number:
            message = "the engine %r has not answered for %d tasks of pool %r: it may have them, or not"
            log(logging.WARNING, message, self.mover.engine.alias, number, self.queue.pool)
