"""What all processes of a site do, put together from their snapshots; and the switch that pauses a pool."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from time import time
from typing import Any, Protocol

from django.core.cache import caches

from bgtasks import conf
from bgtasks.core.figures import BOUNDS, OTHERS, Outcome
from bgtasks.core.log import log
from bgtasks.core.slots import Slots
from bgtasks.hooks import LAST
from bgtasks.monitoring import snapshot
from bgtasks.monitoring.cache import site_cache
from bgtasks.monitoring.figures import Times
from bgtasks.monitoring.publisher import HISTORY, PLACES, Publisher, pause_key, place_key, snapshot_key

Json = dict[str, Any]

SILENT_AFTER = 3  # intervals without a snapshot after which an active process counts as silent
POINTS = 150  # of a chart of all processes
POINTS_EACH = 75  # of the chart of one
DROPS_MAX = 100  # rows of what a pool has dropped
ENDED = tuple(outcome.label for outcome in Outcome)

CAN_PROBE = os.name == "posix"  # elsewhere os.kill(pid, 0) is no question: on Windows it sends Ctrl-C

# Caches that the processes of a site do not share.
UNSHARED = {
    "django.core.cache.backends.locmem.LocMemCache": "local",
    "django.core.cache.backends.dummy.DummyCache": "none",
}


class OwnPools(Protocol):
    """What is asked of the pools of this process."""

    publisher: Publisher

    def stats(self) -> object:
        """Look at every pool of BGTASKS, also at those that were not used yet."""
        ...

    def built(self) -> Iterable[Slots]:
        """Return what runs the tasks of each pool that is in use."""
        ...


def overview(pools: OwnPools, *, own: bool = True) -> Json:
    """Return what the processes of the site do, as plain JSON: each of them, and each pool over all.

    Without its `own`, this process is left out: a management command is none of the site's.
    """
    now = time()
    found, sight = snapshots(pools)
    found = [process for process in found if own or not process.get("here")]
    names = sorted({pool["name"] for process in found for pool in process["pools"]})
    return {
        "at": now,
        "sight": sight,
        "minutes": HISTORY / 60,
        "processes": [_process(process, now) for process in found],
        "pools": [_pool(name, found, now) for name in names],
    }


def snapshots(pools: OwnPools) -> tuple[list[Json], str]:
    """Return the snapshots of all processes, this one's first, and how much of the site can be seen.

    That is "all", "local" or "none" if the cache is in the memory of one process or keeps nothing, "off" if
    nothing is published, and "broken" if the cache could not be read.
    """
    pools.stats()  # for those pools, too, that this process has not used yet, such as after a fork
    own = json.loads(json.dumps(pools.publisher.snapshot()))
    own["here"] = True
    config = conf.snapshot_config()
    if config is None:
        return [own], "off"
    sight = UNSHARED.get(_backend(config.cache), "all")
    try:
        others = _published(config.cache)
    except Exception as error:
        log(logging.WARNING, "the snapshots could not be read", error=error)
        return [own], "broken"
    place = pools.publisher.identity.place
    others = [other for other in others if other["id"] != own["id"] and not _is_gone(other, place)]
    return [own, *sorted(others, key=lambda other: (other["host"], other["started"]))], sight


def _backend(alias: str) -> str:
    cache = type(caches[alias])
    return f"{cache.__module__}.{cache.__qualname__}"


def _published(alias: str) -> list[Json]:
    with site_cache(alias) as cache:
        places = cache.get_many([place_key(number) for number in range(PLACES)])
        texts = cache.get_many([snapshot_key(str(process)) for process in places.values()])
    return [
        content for text in texts.values() if (content := json.loads(text))["version"] == snapshot.VERSION
    ]


def _is_gone(process: Json, place: str) -> bool:
    """Tell whether `process` was killed. Of one at another `place` than ours that cannot be told."""
    if process["place"] != place or not CAN_PROBE:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, as another user
    return False


def _state(process: Json, now: float) -> str:
    if process["drainer"] in {"dead", "blocked"}:
        return str(process["drainer"])
    if process.get("here") or (not process["idle"] and not _is_silent(process, now)):
        busy = any(pool["stats"]["queued"] or pool["stats"]["running"] for pool in process["pools"])
        return "active" if busy else "idle"
    return "idle" if process["idle"] else "silent"


def _is_silent(process: Json, now: float) -> bool:
    return bool(now - process["at"] > SILENT_AFTER * process["interval"] + 1)


def _process(process: Json, now: float) -> Json:
    return {
        "id": process["id"],
        "host": process["host"],
        "pid": process["pid"],
        "here": process.get("here", False),
        "state": _state(process, now),
        "age": max(0.0, now - process["at"]),
        "up": max(0.0, now - process["started"]),
        "pools": [
            {
                "name": pool["name"],
                "paused": pool["paused"],
                "stats": pool["stats"],
                "oldest": pool["oldest"],
                "history": _history([(pool["history"], process["interval"])], now, POINTS_EACH),
            }
            for pool in process["pools"]
        ],
    }


def _pool(name: str, processes: Iterable[Json], now: float) -> Json:
    parts = [(process, pool) for process in processes for pool in process["pools"] if pool["name"] == name]
    stats = {key: sum(pool["stats"].get(key, 0) for _, pool in parts) for key in parts[0][1]["stats"]}
    waits = [pool["oldest"] for _, pool in parts if pool["oldest"] is not None]
    return {
        "name": name,
        "paused": any(pool["paused"] for _, pool in parts),
        "processes": len(parts),
        "stats": stats,
        "oldest": max(waits, default=None),
        "names": _names([row for _, pool in parts for row in pool["names"]]),
        "running": _merged(parts, "running", key="seconds", last=snapshot.RUNNING_MAX),
        "failures": _merged(parts, "failures", key="at", last=LAST),
        "drops": _drops(parts),
        "history": _history([(pool["history"], process["interval"]) for process, pool in parts], now, POINTS),
    }


def _merged(parts: Iterable[tuple[Json, Json]], what: str, *, key: str, last: int) -> list[Json]:
    """Return the entries of all processes, the largest first, each with the process it is of."""
    entries = [
        {**entry, "host": process["host"], "pid": process["pid"]}
        for process, pool in parts
        for entry in pool[what]
    ]
    return sorted(entries, key=lambda entry: entry[key], reverse=True)[:last]


def _drops(parts: Iterable[tuple[Json, Json]]) -> list[Json]:
    """Return what was dropped, by task, reason and process, what was dropped last first.

    How many there were since the process started is counted by name. Of the last one the time is known, as
    long as it is among the LAST that the process keeps. A process that left names out of its snapshot, which
    would have been too large, has no number for them.
    """
    rows: list[Json] = []
    for process, pool in parts:
        counts: Counter[tuple[str, str]] = Counter()
        for of in pool["names"]:
            counts.update({(of["name"], reason): count for reason, count in of["dropped"].items()})
        last: dict[tuple[str, str], float] = {}
        for drop in pool["drops"]:  # in the order of time
            key = drop["name"], drop["reason"]
            last[key if key in counts or (OTHERS, key[1]) not in counts else (OTHERS, key[1])] = drop["at"]
        rows += [
            {
                "name": name,
                "reason": reason,
                "count": counts.get((name, reason)),
                "at": last.get((name, reason)),
                "host": process["host"],
                "pid": process["pid"],
            }
            for name, reason in {**last, **counts}
        ]
    return sorted(rows, key=lambda row: (row["at"] or 0.0, row["count"] or 0), reverse=True)[:DROPS_MAX]


def _names(rows: Iterable[Json]) -> list[Json]:
    by_name: dict[str, list[Json]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    return [_name(name, of) for name, of in sorted(by_name.items())]


def _name(name: str, rows: Sequence[Json]) -> Json:
    waits, runs = _times(row["waits"] for row in rows), _times(row["runs"] for row in rows)
    return {
        "name": name,
        **{key: sum(row[key] for row in rows) for key in ("spawned", "queued", "running")},
        **{outcome: sum(row["ended"].get(outcome, 0) for row in rows) for outcome in ENDED},
        "dropped": sum(sum(row["dropped"].values()) for row in rows),
        "wait_p50": waits.percentile(0.5),
        "wait_p95": waits.percentile(0.95),
        "run_p50": runs.percentile(0.5),
        "run_p95": runs.percentile(0.95),
    }


def _times(parts: Iterable[Json]) -> Times:
    """Return the times of all processes together."""
    counts = [0] * (len(BOUNDS) + 1)
    seconds = longest = 0.0
    for part in parts:
        for bucket, count in part["counts"].items():
            counts[int(bucket)] += count
        seconds += part["seconds"]
        longest = max(longest, part["longest"])
    return Times(counts, seconds, longest)


def _history(histories: Iterable[tuple[Sequence[Sequence[float]], float]], now: float, points: int) -> Json:
    """Return queued and running tasks at `points` moments, the last of which is now.

    A process says nothing while it is idle, so long after a sample there was nothing. Within one point, the
    largest figure of a process counts: a short burst shall be seen.
    """
    step = HISTORY / points
    total = {"queued": [0] * points, "running": [0] * points}
    for samples, interval in histories:
        ends = [*(sample[0] for sample in samples[1:]), now]
        for place, figures in enumerate(total.values(), start=1):
            mine = [0] * points
            for sample, end in zip(samples, ends, strict=False):
                figure, at = int(sample[place]), sample[0]
                until = min(end, at + SILENT_AFTER * interval) if figure else at
                first, last = (points - 1 - int((now - moment) / step) for moment in (at, until))
                for point in range(max(first, 0), min(last, points - 1) + 1):
                    mine[point] = max(mine[point], figure)
            figures[:] = map(sum, zip(figures, mine, strict=True))
    return total


def set_paused(pools: OwnPools, pool: str, paused: bool, *, by: str) -> None:  # noqa: FBT001  # of a switch
    """Have every process of the site pause or resume `pool`: each at its next beat, this one at once.

    Raises:
        LookupError: Nothing is published, so the other processes would not learn of it.
    """
    config = conf.snapshot_config()
    if config is None:
        raise LookupError("BGTASKS_SNAPSHOT is None, so a pool cannot be paused")
    with site_cache(config.cache) as cache:
        if paused:
            cache.set(pause_key(pool), {"by": by, "at": time()}, None)
        else:
            cache.delete(pause_key(pool))
    pools.stats()
    for slots in pools.built():
        if slots.queue.pool != pool:
            continue
        if paused:
            slots.queue.pause()
            pools.publisher.notify()  # which ends the pause when the key is gone
        else:
            slots.queue.resume()
