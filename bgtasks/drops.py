"""The warnings about tasks that were not accepted, or were shed."""

from __future__ import annotations

import logging
from functools import partial

from bgtasks.core.figures import DropReason, ShedReason
from bgtasks.core.log import log
from bgtasks.core.queue import TaskQueue
from bgtasks.greenlets import NO_GREENLETS, NO_LOOP, patched
from bgtasks.repeats import repeats


def warn(queue: TaskQueue, name: str, reason: DropReason | ShedReason) -> None:
    """Warn that a task called `name` was dropped or shed, but not too often. Waits for no handler."""
    what = "shed" if isinstance(reason, ShedReason) else "dropped"
    more = partial(_warn, queue, reason, what)
    if repeats.is_first((what, name, queue.pool), more):
        repeats.hand_over(partial(more, name, 0))


def why(queue: TaskQueue, reason: DropReason | ShedReason) -> str:
    """Return the `reason` in words."""
    return {
        DropReason.FULL: f"pool {queue.pool!r} is full (capacity {queue.capacity})",
        DropReason.SHUTDOWN: f"pool {queue.pool!r} is shut down",
        DropReason.NO_THREAD: NO_GREENLETS
        if patched() == "eventlet"
        else f"pool {queue.pool!r} cannot start a thread",
        DropReason.NO_LOOP: NO_LOOP,
        DropReason.PROPAGATOR: "a propagator could not capture its value",
        ShedReason.EXPIRED: f"it expired while it waited in pool {queue.pool!r}",
        ShedReason.DISPLACED: f"pool {queue.pool!r} is full (capacity {queue.capacity}); a newer task came",
    }[reason]


def _warn(queue: TaskQueue, reason: DropReason | ShedReason, what: str, name: str, more: int) -> None:
    message = "task %r %s again (%d more): %s" if more else "task %r %s: %s"
    args = (name, what, *((more,) if more else ()), why(queue, reason))
    extra = {"task": name, "pool": queue.pool, "reason": reason.value, "queue_length": len(queue.waiting)}
    log(logging.WARNING, message, *args, extra=extra)
