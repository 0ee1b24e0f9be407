"""Whether the background tasks of this process are well, for a health check. Needs nothing but the app."""

from __future__ import annotations

from bgtasks.monitoring import health
from bgtasks.pools import pools

WAIT_MAX = 60.0  # seconds that a task may wait before that is a problem


def losses() -> list[str]:
    """Return the losses of killed processes that this one has reported, a sentence each, the latest one last.

    They are not problems of this process, so ``problems`` does not list them. Needs BGTASKS_JOURNAL.

    >>> bgtasks.health.losses()
    []
    """
    return [
        f"process {loss['pid']} of {loss['host']} was killed with {loss['tasks']} tasks: {loss['names']}"
        for loss in pools.publisher.losses.copy()
    ]


def problems(wait_max: float | None = WAIT_MAX) -> list[str]:
    """Return the problems of the pools of this process, a sentence each; an empty list if all is well.

    The drainer is dead, a pool is shut down, every slot of a pool is stuck (past ``TASK_TIMEOUT``), or the
    oldest waiting task has waited too long. In a paused pool, tasks may wait for any time.

    Args:
        wait_max: Seconds that a task may wait; None for no limit.

    >>> bgtasks.health.problems()
    []
    """
    return health.problems(pools.drainer, pools.built(), wait_max)
