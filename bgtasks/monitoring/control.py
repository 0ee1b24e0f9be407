"""Orders for all processes of the site: to pause a pool, and to cancel what waits under a name."""

from __future__ import annotations

import logging

from bgtasks import conf
from bgtasks.core.log import log
from bgtasks.monitoring.cache import order_keys, pause_key, site_cache
from bgtasks.monitoring.orders import KEPT, Cancellation, Pause, cancel
from bgtasks.monitoring.overview import OwnPools


class NotOrdered(Exception):  # noqa: N818  # what has happened
    """The other processes would not learn of an order. The text says why."""


def set_paused(pools: OwnPools, pool: str, paused: bool, *, by: str) -> bool:  # noqa: FBT001  # of a switch
    """Have every process of the site pause or resume `pool`: each with its next snapshot, this one at once.

    Returns:
        False if only this process has resumed the pool, since the cache does not answer. The others do so
        once it answers.

    Raises:
        NotOrdered: Nothing is published, or the pool is to be paused and the cache does not answer.
    """
    config = _config()
    pause = Pause.new(by)
    told = True
    try:
        with site_cache(config.cache) as cache:
            if paused:
                cache.set(pause_key(pool), pause._asdict(), None)
            else:
                cache.delete(pause_key(pool))
    except Exception as error:
        what = "could not be paused" if paused else "was resumed in this process only"
        log(logging.WARNING, "pool %r %s: the cache does not answer", pool, what, error=error)
        if paused:
            raise NotOrdered("the cache does not answer, so a pool cannot be paused") from error
        told = False
    pools.stats()
    for slots in pools.built():
        if slots.queue.pool == pool and paused:
            pools.publisher.orders.pause(slots, pause)
        elif slots.queue.pool == pool:
            pools.publisher.orders.resume(slots, told=told)
    pools.publisher.notify()  # it ends the pause when the key is gone, and tells the cache of what has ended
    return told


def cancel_waiting(pools: OwnPools, pool: str, name: str, *, by: str) -> int:
    """Have every process cancel what waits in `pool` as `name`: with its next snapshot, this one at once.

    Returns:
        How many tasks this process has cancelled.

    Raises:
        NotOrdered: Nothing is published, the cache does not answer, or too many such orders are under way.
    """
    config = _config()
    order = Cancellation.new(pool, name, by)
    pools.publisher.orders.mark_done(order)  # first, or our own publisher may find it
    try:
        with site_cache(config.cache) as cache:
            kept = KEPT + 2 * config.interval
            given = any(cache.add(key, order._asdict(), kept) for key in order_keys())
    except Exception as error:
        log(logging.WARNING, "waiting tasks could not be cancelled: the cache does not answer", error=error)
        raise NotOrdered("the cache does not answer, so the other processes cannot be notified") from error
    if not given:
        raise NotOrdered("too many such orders are under way; try again in a minute")
    return sum(cancel(slots, order) for slots in pools.built() if slots.queue.pool == pool)


def _config() -> conf.SnapshotConfig:
    config = conf.snapshot_config()
    if config is None:
        raise NotOrdered("BGTASKS_SNAPSHOT is None, so the other processes would not learn of it")
    return config
