"""How long does the page in the admin wait for its data, on a large site?

50 processes, each with 20 pools of 250 names, have published their snapshots, as long as they can be, in a
cache in memory. Reading and checking them, adding them up and writing the answer are what a request for the
data of the page does between the login and the last byte. Beside it: what `json` alone takes to parse them.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.measure import QUICK, Result, interleaved, set_up, timed

PROCESSES, POOLS, NAMES = (5, 2, 25) if QUICK else (50, 20, 250)
LIMIT = 0.3  # seconds


def large_site(content: dict[str, Any], pool: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what so many processes would publish, made of one's `content`, with pools that are like `pool`.

    For each process the key of its place, its id and its snapshot.
    """
    from bgtasks.monitoring.cache import place_keys
    from bgtasks.monitoring.publisher import encode
    from bgtasks.monitoring.snapshot import LEAST, NAMES_SHOWN, share

    most = share(NAMES_SHOWN, POOLS)
    rest = {
        **pool,
        "history": {"queued": list(range(100)), "running": [8] * 100},
        "failures": pool["failures"][:LEAST],
        "names": pool["names"][: most - 1] + pool["names"][-1:],
    }
    pools = [{**rest, "name": f"pool {number}"} for number in range(POOLS)]
    for number, key in enumerate(place_keys()[:PROCESSES]):
        host = f"web{number}"
        of = {"id": f"{host}:1:x", "pid": 1, "host": host, "place": host, "pools": pools}
        yield key, f"{host}:1:x", encode({**content, **of})


def publish() -> list[str]:
    """Publish them, and return the snapshots."""
    logging.getLogger("bgtasks").setLevel(logging.CRITICAL)  # some of the tasks fail
    for number in range(NAMES):
        bgtasks.spawn(f"task {number}", int, "x" if number % 10 == 0 else "1")
    bgtasks.drain()
    content = pools.publisher.snapshot()
    [pool] = [pool for pool in content["pools"] if pool["name"] == "default"]
    site = list(large_site(content, pool))
    for key, process, text in site:
        cache.set_many({key: process, snapshot_key(process): text})
    return [text for _, _, text in site]


def seconds(call: Callable[[], object]) -> Callable[[], Mapping[str, float]]:
    """Return a measure of how long `call` takes."""
    return lambda: {"seconds": timed(call, 1)[0] / 1e9}


def main() -> None:
    """Measure, print, keep."""
    texts = publish()
    answer = JsonResponse(overview(pools)).content
    shown = json.loads(answer)
    assert (len(shown["processes"]), shown["unread"]) == (PROCESSES + 1, [])
    found = interleaved(
        {
            "the answer": seconds(lambda: JsonResponse(overview(pools))),
            "json.loads() of the snapshots": seconds(lambda: [json.loads(text) for text in texts]),
        }
    )
    result = Result("How long does the page wait for its data, on a large site?", ["", "ms", "kB"])
    sizes = {"the answer": len(answer), "json.loads() of the snapshots": sum(map(len, texts))}
    result.rows = [(name, each["seconds"] * 1000, sizes[name] / 1000) for name, each in found.items()]
    result.target("the answer / 300 ms", found["the answer"]["seconds"] / LIMIT, at_most=1.0)
    result.finish()


if __name__ == "__main__":
    set_up()
    from django.core.cache import cache
    from django.http import JsonResponse

    import bgtasks
    from bgtasks.monitoring.cache import snapshot_key
    from bgtasks.monitoring.overview import overview
    from bgtasks.pools import pools

    main()
