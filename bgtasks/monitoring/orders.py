"""What somebody has ordered for all processes: to pause a pool, or to cancel what waits under a name.

A pause is a key in the cache that is there as long as the pool is to be paused. A cancellation is a key that
is there for a while, and each process carries it out once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from secrets import token_hex
from time import time
from typing import Any, NamedTuple, cast

from django.core.cache import BaseCache

from bgtasks.core.figures import Outcome
from bgtasks.core.log import log
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.monitoring.cache import ORDERS, order_keys, pause_key

KEPT = 60.0  # seconds that a cancellation stays in the cache, beside the time between two snapshots


class Pause(NamedTuple):
    """Who has paused a pool, and when."""

    id: str
    by: str
    at: float  # seconds since the epoch

    @classmethod
    def new(cls, by: str) -> Pause:
        """Return a pause that begins now."""
        return cls(token_hex(8), by, time())

    @classmethod
    def read(cls, value: Any) -> Pause:
        """Return what is in the cache, whatever that is: the key alone pauses the pool."""
        content = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        at = content.get("at")
        return cls(
            str(content.get("id", ""))[:100],
            str(content.get("by", ""))[:200],
            float(at) if isinstance(at, (int, float)) else 0.0,
        )


class Cancellation(NamedTuple):
    """The order to cancel what waits in a pool under a name."""

    id: str
    pool: str
    name: str
    by: str

    @classmethod
    def new(cls, pool: str, name: str, by: str) -> Cancellation:
        """Return an order of its own."""
        return cls(token_hex(8), pool, name, by)

    @classmethod
    def read(cls, value: Any) -> Cancellation | None:
        """Return what is in the cache; None if it is no such order."""
        content = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if all(isinstance(content.get(field), str) for field in cls._fields):
            return cls(**{field: content[field] for field in cls._fields})
        return None


class Found(NamedTuple):
    """The orders that are in the cache."""

    pauses: Mapping[str, Pause]  # by pool
    cancellations: list[Cancellation]


class Orders:
    """The orders that this process knows of.

    Used by the publisher's thread, and by threads that give an order. Each operation on a collection is
    atomic, and what is done twice does no harm.
    """

    def __init__(self) -> None:
        self.pauses: dict[str, Pause] = {}  # those that this process obeys, by pool
        self.ended: set[str] = set()  # ids of pauses that were ended here, of which the cache does not know
        self._done: deque[str] = deque(maxlen=8 * ORDERS)  # ids of cancellations
        self._begins = True

    def begin(self) -> None:
        """Take the cancellations that are there for old ones: this process had nothing to do until now."""
        self._begins = True

    def read(self, cache: BaseCache, pools: Iterable[str]) -> Found:
        """Return what is ordered for these `pools`, and end in the cache what was ended here."""
        keys = {pause_key(pool): pool for pool in pools}
        numbered = order_keys()
        entries = cache.get_many([*keys, *numbered])
        pauses = {pool: Pause.read(entries[key]) for key, pool in keys.items() if key in entries}
        ended = self.ended.copy()
        for pool, pause in [*pauses.items()]:
            if pause.id in ended:
                cache.delete(pause_key(pool))
                del pauses[pool]
        self.ended -= ended
        orders = [Cancellation.read(entries[key]) for key in numbered if key in entries]
        return Found(pauses, [order for order in orders if order is not None])

    def carry_out(self, found: Found, pools: Iterable[Slots]) -> None:
        """Do what was `found`, as far as it is not done."""
        done = {*self._done.copy()}
        new = [order for order in found.cancellations if order.id not in done]
        self._done.extend(order.id for order in new)
        for slots in pools:
            self._pause_or_resume(slots, found.pauses.get(slots.queue.pool))
            for order in new if not self._begins else ():
                if order.pool == slots.queue.pool:
                    cancel(slots, order)
        self._begins = False

    def _pause_or_resume(self, slots: Slots, pause: Pause | None) -> None:
        queue = slots.queue
        if pause is None:
            self.pauses.pop(queue.pool, None)
            if queue.paused:
                queue.resume()
                log(logging.INFO, "pool %r is resumed", queue.pool)
        elif pause.id not in self.ended:
            self.pauses[queue.pool] = pause
            if not queue.paused and queue.pause():
                log(logging.INFO, "pool %r is paused by %r", queue.pool, pause.by)

    # For whoever gives an order in this process.

    def pause(self, slots: Slots, pause: Pause) -> None:
        """Pause a pool here."""
        self.pauses[slots.queue.pool] = pause
        slots.queue.pause()

    def resume(self, slots: Slots, *, told: bool) -> None:
        """End a pause here. If the cache was not `told`, that is done as soon as it answers."""
        pause = self.pauses.pop(slots.queue.pool, None)
        if pause is not None and not told:
            self.ended.add(pause.id)
        slots.queue.resume()

    def mark_done(self, order: Cancellation) -> None:
        """Carry `order` out no more: whoever gives it does that."""
        self._done.append(order.id)


def cancel(slots: Slots, order: Cancellation) -> int:
    """Cancel what waits in the pool under the name, report it, and return how many tasks that were."""
    cancelled: list[Task] = []
    slots.queue.cancel(lambda task: task.figures.name == order.name, cancelled)
    for task in cancelled:
        task.discard()
        slots.hooks.finished(task, Outcome.CANCELLED, None)
    if cancelled:
        message = "pool %r: %d waiting tasks called %r were cancelled by %r"
        log(logging.WARNING, message, order.pool, len(cancelled), order.name, order.by)
    return len(cancelled)
