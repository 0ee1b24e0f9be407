"""What becomes of the tasks if twice as many come as can be served?

Four pools of eight slots in one process, each with other policies, are offered 160 tasks/s of 0.1 s each, at
random times, for five minutes; each can serve 80. The age of a task is the time from its spawn to the first
line of its function. A slot is busy while it runs a function.
"""

import random
import threading
from collections.abc import Mapping
from statistics import median
from time import monotonic, sleep
from typing import Any

from benchmarks.measure import QUICK, Result, percentile, set_up

SECONDS = 4.0 if QUICK else 300.0  # of load
SLOTS = 8
TASK = 0.1  # seconds
OFFERED = 2 * SLOTS / TASK  # tasks/s
EXPIRES = 1.0 if QUICK else 10.0  # seconds
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "neither": {},
    "`expires=10`": {"EXPIRES": EXPIRES},
    '`"drop_oldest"`': {"ON_FULL": "drop_oldest"},
    "both": {"EXPIRES": EXPIRES, "ON_FULL": "drop_oldest"},
}
CAPACITY = 100 if QUICK else 1024


class Load:
    """The tasks of one pool, and what they have seen."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.started: list[tuple[float, float]] = []  # when, and at what age, in seconds
        self.busy: list[float] = []  # seconds that each task has held its slot
        self._begin = monotonic()

    def task(self, spawned_at: float) -> None:
        """Hold a slot, and note at what age."""
        start = monotonic()
        self.started.append((start - self._begin, start - spawned_at))
        sleep(TASK)
        self.busy.append(monotonic() - start)

    def offer(self) -> None:
        """Spawn tasks at random times, without ever falling behind for long."""
        chance = random.Random(1)  # noqa: S311  # the same times for each pool
        due = self._begin
        while (due := due + chance.expovariate(OFFERED)) < self._begin + SECONDS:
            sleep(max(0.0, due - monotonic()))
            self.pool.spawn("offered", self.task, monotonic())


def measure() -> dict[str, Load]:
    """Offer the load to all pools side by side."""
    loads = {name: Load(bgtasks.pools[name]) for name in SETTINGS}
    threads = [threading.Thread(target=load.offer) for load in loads.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return loads


def main() -> None:
    """Measure, and report."""
    result = Result(
        "What becomes of the tasks if twice as many come as can be served?",
        ["policies", "offered", "run", "shed", "dropped", "median age s", "p95 age s", "oldest s", "busy"],
    )
    loads = measure()
    stats = bgtasks.stats()
    bgtasks.shutdown(0)
    busy = {name: sum(load.busy) / (SLOTS * SECONDS) for name, load in loads.items()}
    for name, load in loads.items():
        ages, counts = [age for _, age in load.started], stats[name]
        given_up = [f"{count:,}" for count in (counts.spawned, len(ages), counts.shed, counts.dropped)]
        figures = [median(ages), percentile(ages, 95), max(ages)]
        result.rows.append((name, *given_up, *figures, f"{busy[name]:.1%}"))
    oldest = max(age for _, age in loads["both"].started)
    result.target("both: the oldest task that is run / `expires`", oldest / EXPIRES, at_most=1.0)
    result.target("both: the time that slots are busy / all of it", busy["both"], at_least=0.95)
    result.notes.append(
        "With `expires` alone, the next task of a pool that is overloaded is always one that has just not "
        "expired. A short queue keeps tasks fresher than a long one: with `drop_oldest`, the age is that of "
        f"CAPACITY ({CAPACITY:,}) tasks at the rate at which they come."
    )
    result.extra = {
        name: [(round(at, 2), round(age, 3)) for at, age in load.started[::10]]
        for name, load in loads.items()
    }
    result.finish()


if __name__ == "__main__":
    set_up()
    from django.test import override_settings

    import bgtasks

    pool = {"CAPACITY": CAPACITY, "CONN_MAX": SLOTS, "SHUTDOWN_TIMEOUT": 1}
    named = {name: {**pool, **policies} for name, policies in SETTINGS.items()}
    with override_settings(BGTASKS={"default": {}, **named}):
        main()
