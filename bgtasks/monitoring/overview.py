"""What all processes of a site do, put together from their snapshots."""

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
from bgtasks.monitoring import condition
from bgtasks.monitoring.condition import Condition
from bgtasks.monitoring.figures import Times
from bgtasks.monitoring.history import POINTS, STEP, shifted, total
from bgtasks.monitoring.names import merge, most_important
from bgtasks.monitoring.publisher import LOSSES, Publisher
from bgtasks.monitoring.reading import published
from bgtasks.monitoring.snapshot import NAME_MAX, share

Json = dict[str, Any]

SILENT_AFTER = 3  # intervals without a snapshot after which an active process counts as silent
# Of all pools together, so that an answer is small and quick however many there are:
NAMES_MAX = 400
RUNNING_MAX = 200
FAILURES_MAX = 100
DROPS_MAX = 200
ENDED = tuple(outcome.label for outcome in Outcome)

# Of a process, for each pool.
OF_PROCESS = ("queued", "capacity", "running", "conn_max", "stuck", "succeeded", "failed", "dropped", "shed")
# From the worst condition to the best.
WORST_FIRST = (Condition.STUCK, Condition.FULL, Condition.PAUSED, Condition.NOT_SEEN, Condition.WELL)
ORDER = [of.value for of in WORST_FIRST]

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

    Without its `own`, this process is left out: a management command is none of the site's. The fields are
    described in docs/observability.md.
    """
    now = time()
    read, unread, sight = snapshots(pools)
    seen = [process for process in read if own or not process["here"]]
    losses = _losses(seen)
    found: list[Json] = [
        {**process, "state": _state(process, now)}
        for process in seen
        if not _is_reported(process, losses, now)
    ]
    parts: dict[str, list[tuple[Json, Json]]] = {}
    for process in found:
        of_process: list[Json] = process["pools"]
        for pool in of_process:
            parts.setdefault(pool["name"], []).append((process, pool))
    shown = [_pool(name, parts[name], now, len(parts)) for name in sorted(parts)]
    states = [pool["state"] for pool in shown]
    return {
        "at": now,
        "sight": sight,
        "minutes": STEP * POINTS / 60,
        "state": min(states, key=ORDER.index, default=Condition.NOT_SEEN.value),
        "losses": losses,
        "processes": [_process(process, now) for process in found],
        "unread": unread,
        "pools": shown,
    }


def _losses(processes: Iterable[Json]) -> list[Json]:
    """Return the losses of killed processes, the latest first, whichever process has reported them."""
    losses = [loss for process in processes for loss in process["losses"]]
    return sorted(losses, key=lambda loss: loss["at"], reverse=True)[:LOSSES]


def snapshots(pools: OwnPools) -> tuple[list[Json], list[Json], str]:
    """Return the snapshots of all processes, this one's first; those that cannot be read; and the sight.

    That is "all", "local" or "none" if the cache is in the memory of one process or keeps nothing, "off" if
    nothing is published, and "broken" if the cache could not be read.
    """
    pools.stats()  # for those pools, too, that this process has not used yet, such as after a fork
    own = {**json.loads(json.dumps(pools.publisher.snapshot())), "here": True}
    config = conf.snapshot_config()
    if config is None:
        return [own], [], "off"
    sight = UNSHARED.get(_backend(config.cache), "all")
    try:
        found, unread = published(config.cache)
    except Exception as error:
        log(logging.WARNING, "the snapshots could not be read", error=error)
        return [own], [], "broken"
    place = pools.publisher.identity.place
    others = [
        {**other, "here": False} for other in found if other["id"] != own["id"] and not _is_gone(other, place)
    ]
    others.sort(key=lambda other: (other["host"], other["started"], other["id"]))
    return [own, *others], unread, sight


def _backend(alias: str) -> str:
    cache = type(caches[alias])
    return f"{cache.__module__}.{cache.__qualname__}"


def _is_gone(process: Json, place: str) -> bool:
    """Tell whether `process` was killed. Of one at another `place` than ours that cannot be told."""
    if process["place"] != place or not CAN_PROBE:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # it lives, as another user; or it is none that a process can have
    return False


def _state(process: Json, now: float) -> str:
    if process["drainer"] in {"dead", "blocked"}:
        return str(process["drainer"])
    if process["here"] or (not process["idle"] and not _is_silent(process, now)):
        busy = any(pool["stats"]["queued"] or pool["stats"]["running"] for pool in process["pools"])
        return "active" if busy else "idle"
    return "idle" if process["idle"] else "silent"


def _is_silent(process: Json, now: float) -> bool:
    return bool(now - process["at"] > SILENT_AFTER * process["interval"] + 1)


def _is_reported(process: Json, losses: Iterable[Json], now: float) -> bool:
    """Tell whether one of the `losses` is that of `process`, which has published nothing since.

    In a container that has started again, a process may have the host name and the id of the one before it.
    """
    if process["idle"] or not _is_silent(process, now):
        return False
    who = process["host"], process["pid"]
    return any((loss["host"], loss["pid"]) == who and loss["at"] >= process["at"] for loss in losses)


def _process(process: Json, now: float) -> Json:
    return {
        "id": process["id"],
        "host": process["host"],
        "pid": process["pid"],
        "here": process["here"],
        "state": process["state"],
        "age": max(0.0, now - process["at"]),
        "up": max(0.0, now - process["started"]),
        "pools": [
            {
                "name": pool["name"],
                "state": condition.of_process(process, pool).value,
                **{key: pool["stats"][key] for key in OF_PROCESS},
                "delayed": pool["delayed"],
                "oldest": pool["oldest"],
            }
            for pool in process["pools"]
        ],
    }


def _pool(name: str, parts: Sequence[tuple[Json, Json]], now: float, pools: int) -> Json:
    waits = [pool["oldest"] for _, pool in parts if pool["oldest"] is not None]
    dues = [pool["due"] for _, pool in parts if pool["due"] is not None]
    pauses = [pool["pause"] for _, pool in parts if pool["pause"] is not None]
    names = _by_name([row for _, pool in parts for row in pool["names"]])
    drops = _drops(parts)
    running = _merged(parts, "running", key="seconds")
    failures = _failures(parts)
    found = {
        "name": name,
        "state": condition.of_pool(parts).value,
        "paused": any(pool["paused"] for _, pool in parts),
        "pause": max(pauses, key=lambda pause: float(pause["at"]), default=None),
        "processes": len(parts),
        "stats": {key: sum(pool["stats"][key] for _, pool in parts) for key in parts[0][1]["stats"]},
        "oldest": max(waits, default=None),
        "delayed": sum(pool["delayed"] for _, pool in parts),
        "due": min(dues, default=None),
        "names": [_name(row) for row in most_important(names, share(NAMES_MAX, pools))],
        "names_known": len(names),
        "running": running[: share(RUNNING_MAX, pools)],
        "failures": failures[: share(FAILURES_MAX, pools)],
        "failures_known": len(failures),
        "drops": drops[: share(DROPS_MAX, pools)],
        "drops_known": len(drops),
        "history": total(_history(process, pool, now) for process, pool in parts),
    }
    return {**found, "advice": condition.advice(parts, found, now)}


def _merged(parts: Iterable[tuple[Json, Json]], what: str, *, key: str) -> list[Json]:
    """Return the entries of all processes, the largest first, each with the process it is of."""
    entries = [
        {**entry, "process": process["id"], "host": process["host"], "pid": process["pid"]}
        for process, pool in parts
        for entry in pool[what]
    ]
    return sorted(entries, key=lambda entry: float(entry[key]), reverse=True)


def _failures(parts: Iterable[tuple[Json, Json]]) -> list[Json]:
    """Return the groups of failures over all processes, what failed last first.

    What is not counted is of the last failure of the group.
    """
    groups: dict[tuple[str, ...], Json] = {}
    for failure in _merged(parts, "failures", key="at"):
        key = tuple(failure[part] for part in ("name", "outcome", "error", "where"))
        last = groups.setdefault(key, {**failure, "times": 0, "processes": 0})
        last["times"] += failure["times"]
        last["processes"] += 1
        last["since"] = min(last["since"], failure["since"])
    return list(groups.values())


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
                "process": process["id"],
                "host": process["host"],
                "pid": process["pid"],
            }
            for name, reason in {**last, **counts}
        ]
    return sorted(rows, key=lambda row: (row["at"] or 0.0, row["count"] or 0), reverse=True)


def _by_name(rows: Iterable[Json]) -> list[Json]:
    by_name: dict[str, list[Json]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    return [merge(name, of) for name, of in by_name.items()]


def _name(row: Json) -> Json:
    waits, runs = _times(row["waits"]), _times(row["runs"])
    return {
        "name": row["name"],
        "single": row["name"] != OTHERS and len(row["name"]) < NAME_MAX,  # or it may be cut
        **{key: row[key] for key in ("spawned", "queued", "running", "retried", "delayed", "oldest", "due")},
        **{outcome: row["ended"].get(outcome, 0) for outcome in ENDED},
        "dropped": sum(row["dropped"].values()),
        "wait_p50": waits.percentile(0.5),
        "wait_p95": waits.percentile(0.95),
        "run_p50": runs.percentile(0.5),
        "run_p95": runs.percentile(0.95),
    }


def _times(times: Json) -> Times:
    counts = [0] * (len(BOUNDS) + 1)
    for bucket, count in times["counts"].items():
        counts[int(bucket)] = count
    return Times(counts, times["seconds"], times["longest"])


def _history(process: Json, pool: Json, now: float) -> dict[str, list[int]]:
    goes_on = not process["idle"] and process["state"] != "silent"
    points: dict[str, list[int]] = pool["history"]
    return {what: shifted(of, now - process["at"], goes_on=goes_on) for what, of in points.items()}
