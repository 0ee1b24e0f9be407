"""Whether the background tasks of this process are well, for a health check. Needs nothing but the app."""

from __future__ import annotations

from bgtasks.pools import pools
from bgtasks.queue import State
from bgtasks.snapshot import drainer_state, oldest_wait

WAIT_MAX = 60.0  # seconds that a task may wait before that is a problem


def problems(wait_max: float | None = WAIT_MAX) -> list[str]:
    """Return what is wrong with the pools of this process, a sentence each; an empty list if all is well.

    The drainer is dead, a pool is shut down, every slot of a pool is stuck (past ``TASK_TIMEOUT``), or the
    oldest waiting task has waited for too long. A pool that somebody has paused is not ill.

    Args:
        wait_max: Seconds that a task may wait; None for as long as it takes.

    >>> bgtasks.health.problems()
    []
    """
    found = ["the drainer is dead"] if drainer_state(pools.drainer) == "dead" else []
    for slots in pools._built():
        queue = slots.queue
        stats = queue.stats()
        oldest = oldest_wait(slots)
        if queue.state is not State.OPEN:
            found.append(f"pool {queue.pool!r} is shut down")
        if stats.stuck >= slots.runners:
            found.append(f"all {slots.runners} slots of pool {queue.pool!r} are stuck")
        if slots.all and not any(slot.thread.is_alive() for slot in list(slots.all)):
            found.append(f"all slots of pool {queue.pool!r} are dead")
        if wait_max is not None and oldest is not None and oldest > wait_max and not slots.paused:
            found.append(
                f"a task of pool {queue.pool!r} has waited for {oldest:.0f} s (limit {wait_max:g} s)"
            )
    return found
