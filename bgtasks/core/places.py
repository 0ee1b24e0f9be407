"""The states of a queue, and the places of the slots that it gives tasks to."""

from __future__ import annotations

import enum
import queue
from collections.abc import Callable
from contextvars import Context
from functools import partial

from bgtasks.core.task import Task


class State(enum.Enum):
    """The life of a queue, in one direction only."""

    OPEN = "open"
    CLOSING = "closing"  # accepts nothing more, what it holds still runs
    CLOSED = "closed"  # what waited was cancelled: holds nothing that will ever run


class Place(enum.Enum):
    """Who goes on with a slot."""

    OUT = "out"  # nobody: it is not open yet, or no more
    IDLE = "idle"  # nobody, until its thread is woken or the loop claims it
    THREAD = "thread"
    LENT = "lent"  # the loop, as soon as it gets to it: the thread has a coroutine for it
    LOOP = "loop"  # while its thread serves the calls of the slot's asynchronous task


class SlotState:
    """What the queue knows of a slot."""

    def __init__(self) -> None:
        self.task: Task | None = None  # that it runs; under the pool's lock
        self.place = Place.OUT  # under the pool's lock
        self.context: Context | None = None  # of the task, once it has begun; written by who goes on with it
        self.signal: queue.SimpleQueue[None] = queue.SimpleQueue()  # its thread sleeps on it
        self.wake: Callable[[], None] = partial(self.signal.put, None)

    def go_on(self) -> None:
        """Have whoever goes on with the slot look at it. Called without the lock; twice is harmless."""
        self.wake()
