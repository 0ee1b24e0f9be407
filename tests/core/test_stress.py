"""A million spawns: nothing is lost, nothing is kept, no thread is left.

The burst runs in an interpreter of its own, not measured by coverage: its memory is what is looked at.
"""

import asyncio
import gc
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from tests.processes import run_python

pytestmark = [pytest.mark.servers, pytest.mark.stress]  # where slow tests run

THREADS = 16
SPAWNS = 1_000_000  # by all threads together
WARM_UP = 50_000  # the same burst before it: what is built once, such as threads, is not counted as growth
# Of the memory after the warm-up. A free-threaded Python has an allocator for each thread, which keeps some.
GROWTH = 1.15 if "t" in sys.abiflags else 1.05
LIMIT = 150  # seconds, for a machine that is busy with other things


class Failure(Exception):  # noqa: N818  # what a task raises on purpose
    pass


class Tally:  # pragma: no cover  # not measured
    """A count that threads raise."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1


class Work:  # pragma: no cover  # not measured
    """Tasks that count themselves: what was to become of them, and that it did."""

    def __init__(self, core: Any) -> None:
        self.begun = {outcome: Tally() for outcome in ("succeeded", "failed", "timed_out")}
        self.accepted = Tally()
        self.dropped = Tally()
        # What is spawned with options, in place of each so-and-so-many-th task.
        pool = core.pool
        self.options: list[tuple[int, str, Any, Any]] = [
            (2003, "succeed", self.succeed, pool.using(expires=1e-4)),
            (503, "key", self.succeed, pool.using(key="the one")),
            (1009, "retry", self.fail, pool.using(retries=2, retry_delay=1e-3)),
            (1511, "retry", self.afail, pool.using(retries=1, retry_delay=0, key="retried")),
            (3001, "hang", self.hang, pool),
        ]

    def succeed(self, payload: bytes) -> None:
        self.begun["succeeded"].add()

    def fail(self, payload: bytes) -> None:
        self.begun["failed"].add()
        raise Failure

    async def asucceed(self, payload: bytes) -> None:
        self.begun["succeeded"].add()

    async def wait(self, payload: bytes) -> None:
        await asyncio.sleep(0)
        self.begun["succeeded"].add()

    async def afail(self, payload: bytes) -> None:
        await asyncio.sleep(0)
        self.begun["failed"].add()
        raise Failure

    async def hang(self, payload: bytes) -> None:
        self.begun["timed_out"].add()
        await asyncio.get_running_loop().create_future()

    def spawner(self, core: Any, number: int) -> threading.Thread:
        """Return a thread that spawns so many tasks of all kinds."""
        kinds = [self.succeed, self.asucceed, self.wait, self.succeed, self.asucceed, self.wait] * 16
        kinds[10] = self.fail
        kinds[50] = self.afail
        names = [kind.__name__ for kind in kinds]

        def spawn() -> None:
            for i in range(number):
                kind = i % len(kinds)
                pool, name, task = core.pool, names[kind], kinds[kind]
                for interval, *special in self.options:
                    if i % interval == interval - 1:
                        name, task, pool = cast("tuple[str, Any, Any]", special)
                (self.accepted if pool.spawn(name, task, bytes(100)) else self.dropped).add()
                if i % 128 == 127:
                    # Spawners that never wait would see nothing but a full queue.
                    core.pool.drain()

        return threading.Thread(target=spawn)

    def burst(self, core: Any, number: int) -> None:
        """Spawn so many tasks on all threads at once, and wait until they have ended."""
        spawners = [self.spawner(core, number // THREADS) for _ in range(THREADS)]
        for thread in spawners:
            thread.start()
        for thread in spawners:
            thread.join()
        core.pool.drain()


def sums_of(figures: Any) -> tuple[int, int]:  # pragma: no cover  # not measured
    """Return how many tasks of one name were spawned, and how many are accounted for."""
    unfinished, _running = figures.counts  # the first includes the second
    return figures.spawned, unfinished + sum(figures.ended) + sum(figures.dropped.values())


def resident() -> int:  # pragma: no cover  # not measured
    """Return the bytes of memory that this process holds."""
    gc.collect()
    return psutil.Process().memory_info().rss


def main() -> None:  # pragma: no cover  # not measured
    """Run the burst, and print what came of it."""
    import django

    django.setup()
    from bgtasks.repeats import repeats
    from tests.pool import Core

    records = Tally()
    logging.getLogger("bgtasks").propagate = False
    before = set(threading.enumerate())
    with Core(capacity=1024, conn_max=8, task_timeout=0.02) as core:
        work = Work(core)
        logs: Any = core.logs
        logs.emit = lambda record: records.add()  # counted, and not kept
        work.burst(core, WARM_UP)
        begin = resident()
        work.burst(core, SPAWNS)
        end = resident()
        stats = core.stats()
        repeats.flush()  # so that the thread that writes what was left out has nothing to wait for
        by_name = core.queue.read(lambda queue: {name: sums_of(each) for name, each in queue.account.items()})
    for thread in set(threading.enumerate()) - before:
        thread.join(LIMIT)
    result = {
        "begin": begin,
        "end": end,
        "stats": {name: getattr(stats, name) for name in stats.__dataclass_fields__},
        "by_name": by_name,
        "accepted": work.accepted.value,
        "dropped": work.dropped.value,
        "begun": {outcome: tally.value for outcome, tally in work.begun.items()},
        "records": records.value,
        "threads": [thread.name for thread in threading.enumerate() if thread not in before],
    }
    json.dump(result, sys.stdout)


def test_million_spawns_leave_nothing_behind() -> None:
    """To the last task each is accounted for; memory is back where it began, and every thread has ended.

    16 threads spawn plain and asynchronous tasks into a pool that runs, fails, tries again, times out, sheds,
    coalesces and drops them.
    """
    done = run_python(
        Path(__file__),
        env={"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""},
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stats = result["stats"]

    total = SPAWNS + WARM_UP
    assert stats["spawned"] == result["accepted"] + result["dropped"] == total
    assert stats["dropped"] == result["dropped"] > 0
    ended = {outcome: stats[outcome] for outcome in ("succeeded", "failed", "timed_out")}
    # Each try of a task begins it.
    assert {**ended, "failed": ended["failed"] + stats["retried"]} == result["begun"]
    ended |= {outcome: stats[outcome] for outcome in ("shed", "coalesced")}
    assert sum(ended.values()) == result["accepted"]
    assert min(*ended.values(), stats["retried"]) > 0
    assert all(spawned == accounted for spawned, accounted in result["by_name"].values())
    assert sum(spawned for spawned, _ in result["by_name"].values()) == total
    assert stats["queued"] == stats["running"] == stats["cancelled"] == stats["handed_off"] == 0
    assert result["threads"] == []
    assert result["end"] <= result["begin"] * GROWTH
    assert done.stderr == ""


if __name__ == "__main__":  # pragma: no cover  # not measured
    main()
