"""What is wrong with the pools of this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bgtasks.core.drainer import Drainer
from bgtasks.core.places import State
from bgtasks.core.slots import Slots
from bgtasks.monitoring.figures import oldest_wait, read_stats
from bgtasks.monitoring.snapshot import drainer_state


def problems(drainer: Drainer, pools: Iterable[Slots], wait_max: float | None) -> list[str]:
    """Return what is wrong with these. See ``bgtasks.health.problems``."""
    state = drainer_state(drainer)
    found = {"dead": ["the drainer is dead"], "blocked": ["a task blocks the drainer's loop"]}.get(state, [])
    return found + [problem for slots in pools for problem in _problems(slots, wait_max)]


def _problems(slots: Slots, wait_max: float | None) -> Iterator[str]:
    queue = slots.queue
    oldest = oldest_wait(queue)
    threads = [slot.thread for slot in slots.all]  # none before the pool's first task
    if queue.state is not State.OPEN:
        yield f"pool {queue.pool!r} is shut down"
    if read_stats(queue).stuck >= slots.runners:
        yield f"all {slots.runners} slots of pool {queue.pool!r} are stuck"
    if threads and not any(thread.is_alive() for thread in threads):
        yield f"all slots of pool {queue.pool!r} are dead"
    if wait_max is not None and oldest is not None and oldest > wait_max and not queue.paused:
        yield f"a task of pool {queue.pool!r} has waited for {oldest:.0f} s (limit {wait_max:g} s)"
