"""Building what a pool stands for, as BGTASKS says it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from django.apps import apps

from bgtasks import conf
from bgtasks.core.drainer import Drainer
from bgtasks.core.log import log
from bgtasks.core.policy import Options
from bgtasks.core.queue import TaskQueue
from bgtasks.core.shutdown import Shutdown
from bgtasks.core.slots import Slots
from bgtasks.core.task import Hooks
from bgtasks.exceptions import PoolDoesNotExist

NOT_INSTALLED = (
    "'bgtasks' is not in INSTALLED_APPS: its settings are not checked, and what is queued when the process "
    "ends is lost"
)
NOT_SET_UP = (
    "a task is spawned before Django is set up: call django.setup() first, or what is queued when the "
    "process ends is lost"
)


class Built(NamedTuple):
    """What a pool is made of."""

    slots: Slots
    shutdown: Shutdown
    mode: str
    options: Options = Options()  # of each task, unless it has its own


def build(name: str, hooks: Hooks, drainer: Drainer) -> Built:
    """Return what a pool called `name` is made of. Nothing is started.

    Raises:
        PoolDoesNotExist: BGTASKS does not define this pool.
        InvalidSettings: BGTASKS has a mistake.
    """
    config = conf.pool_config(name)
    if config is None:
        raise no_pool(name)
    if apps.ready and not apps.is_installed("bgtasks"):
        log(logging.WARNING, NOT_INSTALLED)
    if not apps.ready and not apps.loading:
        log(logging.WARNING, NOT_SET_UP)
    queue = TaskQueue(name, config.capacity, config.conn_max)
    queue.displaces = config.on_full == conf.DROP_OLDEST
    queue.makes_room = queue.displaces or config.expires is not None
    slots = _type_of_slots(name, config)(
        queue,
        hooks,
        drainer.loop,
        drainer.pace,
        task_timeout=config.task_timeout,
        shutdown_timeout=config.shutdown_timeout,
        notify=drainer.notify,
    )
    options = Options(expires=config.expires, retries=config.retries, retry_delay=config.retry_delay)
    return Built(slots, Shutdown(slots, drainer), config.mode, options)


def _type_of_slots(name: str, config: conf.PoolConfig) -> Callable[..., Slots]:
    if config.handoff_to is None:
        return Slots
    # Only a pool that hands off pays for importing them.
    from bgtasks.handoff.engine import Engine
    from bgtasks.handoff.slots import HandoffSlots

    engine = Engine(config.handoff_to, name)
    return partial(HandoffSlots, engine=engine, always=config.handoff_when == conf.ALWAYS)


def no_pool(name: object) -> PoolDoesNotExist:
    """Return the error that says which pools there are."""
    defined = ", ".join(map(repr, conf.pool_names()))
    return PoolDoesNotExist(f"no pool named {name!r}; BGTASKS defines: {defined}")
