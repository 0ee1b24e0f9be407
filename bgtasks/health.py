"""Whether the background tasks of this process are well, for a health check. Needs nothing but the app."""

from __future__ import annotations

from bgtasks.monitoring import health
from bgtasks.pools import pools

WAIT_MAX = 60.0  # seconds that a task may wait before that is a problem


def problems(wait_max: float | None = WAIT_MAX) -> list[str]:
    """Return what is wrong with the pools of this process, a sentence each; an empty list if all is well.

    The drainer is dead, a pool is shut down, every slot of a pool is stuck (past ``TASK_TIMEOUT``), or the
    oldest waiting task has waited for too long. Tasks may wait for as long as they like in a paused pool.

    Args:
        wait_max: Seconds that a task may wait; None for no limit.

    >>> bgtasks.health.problems()
    []
    """
    return health.problems(pools.drainer, pools.built(), wait_max)
