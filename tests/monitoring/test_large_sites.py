"""A large site: what its page answers is bounded, however much its processes have to say."""

import json
from typing import Any

from django.core.cache import BaseCache

from benchmarks.page import NAMES, POOLS, PROCESSES, large_site
from bgtasks.monitoring import overview
from bgtasks.monitoring.cache import snapshot_key
from bgtasks.monitoring.publisher import SIZE_MAX
from bgtasks.pools import pools
from tests.monitoring.test_publisher import Observed, cache, other

__all__ = ["cache"]  # the fixture


def fill(cache: BaseCache) -> None:
    """Publish what so many processes with so many pools and names would, by the code that does it."""
    with Observed(capacity=10_000) as core:
        core.publisher.config = None
        for number in range(NAMES):
            core.spawn(f"task {number}", int, "x" if number % 10 == 0 else "1")
        core.drain()
        [pool] = core.publisher.snapshot()["pools"]
    for key, process, text in large_site(other(), pool):
        assert len(text) < SIZE_MAX
        cache.set_many({key: process, snapshot_key(process): text})


def test_answer_is_bounded(cache: BaseCache, settings: Any) -> None:
    """Names, failures and drops that are left out are counted, and the answer stays small."""
    fill(cache)
    seen = overview.overview(pools)
    shown = [pool for pool in seen["pools"] if pool["name"] != "default"]

    assert (PROCESSES, POOLS, NAMES) == (50, 20, 250)  # 5,000 names in all
    assert (len(seen["processes"]), len(shown)) == (PROCESSES + 1, POOLS)
    assert seen["unread"] == []
    for pool in shown:
        assert len(pool["names"]) <= pool["names_known"]
        assert pool["stats"]["spawned"] == PROCESSES * NAMES
    assert sum(len(pool["names"]) for pool in shown) <= overview.NAMES_MAX
    assert sum(len(pool["failures"]) for pool in shown) <= overview.FAILURES_MAX
    assert len(json.dumps(seen)) < 1_000_000
