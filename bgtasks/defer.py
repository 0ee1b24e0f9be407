"""Tasks of ``django.tasks`` with ``run_after``: who keeps them until then, their pool or its engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from django.tasks import task_backends
from django.tasks.exceptions import InvalidTask

from bgtasks import conf
from bgtasks.clock import monotonic
from bgtasks.core.policy import Options
from bgtasks.core.task import Task
from bgtasks.django_tasks import seconds_until
from bgtasks.pool import Pool
from bgtasks.spawning import policy_for

DEFER_MAX = 60.0  # seconds for which a pool keeps a task, by default
LONGEST = 86400.0  # seconds: what DEFER_MAX may be at most


def engine_for(task: Any, pool: Pool, longest: float) -> str | None:
    """Return the alias of the engine that has to keep `task`; None if its `pool` can, for `longest` seconds.

    Raises:
        InvalidTask: Neither can.
    """
    if seconds_until(task.run_after) <= longest:
        return None
    config = conf.pool_config(pool.name)
    alias = None if config is None else config.handoff_to
    late = f"run_after is more than {longest:g} s ahead (DEFER_MAX), and"
    if alias is None:
        raise InvalidTask(f"{late} pool {pool.name!r} has no engine that could keep the task (HANDOFF_TO)")
    if not task_backends[alias].supports_defer:
        raise InvalidTask(f"{late} the engine {alias!r} of pool {pool.name!r} does not support run_after")
    return alias


def passing_on(queued: Task, pool: Pool, alias: str) -> Callable[[Task], None]:
    """Return what gives a task, once it is called with it, to the engine `alias`.

    Raises:
        InvalidTask: It cannot travel.
    """
    # Only a project that hands off pays for importing them.
    from bgtasks.handoff.engine import Engine
    from bgtasks.handoff.payload import CannotTravelError

    engine = Engine(alias, pool.name)
    try:
        return partial(engine.give, engine.content(queued))
    except CannotTravelError as reason:
        problem = f"task {queued.name!r} cannot be handed off to the engine {alias!r}: {reason}"
        raise InvalidTask(problem) from None


def set_policy(queued: Task, options: Options, seconds: float) -> None:
    """Give a task its policy, by which it runs after so many `seconds` at the earliest."""
    if seconds <= 0:
        queued.policy = policy_for(queued, options)
        return
    queued.spawned_at = monotonic() + seconds  # its age counts from then
    # Without a key: in its place, a newer task would run too late, or in that of an older one, it too early.
    queued.policy = policy_for(queued, options._replace(key=None))
    queued.policy.due_at = queued.spawned_at
