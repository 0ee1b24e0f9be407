"""Whether the pools of a site are well, and what is to do if not."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]

RECENT = 300.0  # seconds for which a drop or a failure is mentioned
WAIT_MAX = 60.0  # seconds that a task may wait before that is mentioned
NAMED_MAX = 3  # processes that a sentence names


class Condition(enum.Enum):
    """How a pool is. The first one that is true of a process counts."""

    NOT_SEEN = "not seen"
    STUCK = "stuck"
    PAUSED = "paused"
    FULL = "full"
    WELL = "well"


ADVICE = {
    Condition.NOT_SEEN: (
        "{who} has not been seen for longer than it should: it was killed, is stopped, or cannot reach the "
        "cache. Check whether it is still running, and look at its log."
    ),
    Condition.PAUSED: "It accepts tasks and runs none, until somebody resumes it.",
    Condition.FULL: (
        "The queue is full in {who}: a new task is dropped, or replaces the oldest one. Let more tasks run "
        "at once (CONN_MAX) or wait (CAPACITY), or spawn fewer or shorter tasks."
    ),
}
STUCK = {  # by the state of the process
    "blocked": "A coroutine blocks the event loop of {who}, so no other one can run. The log has its stack.",
    "dead": "The drainer of {who} is dead. Restart the process; the log says why the drainer ended.",
    "": (
        "Every slot of {who} is stuck past TASK_TIMEOUT, so no task starts. 'Running now' shows where the "
        "tasks are. If they do not end, restart the process, and set a time-out for what they wait for."
    ),
}


def of_process(process: Json, pool: Json) -> Condition:
    """Return how `pool` is in one `process`, whose state is known."""
    stats = pool["stats"]
    if process["state"] == "silent":
        return Condition.NOT_SEEN
    if process["state"] in {"dead", "blocked"} or stats["stuck"] >= stats["runners"]:
        return Condition.STUCK
    if pool["paused"]:
        return Condition.PAUSED
    return Condition.FULL if stats["queued"] >= stats["capacity"] else Condition.WELL


def of_pool(parts: Sequence[tuple[Json, Json]]) -> Condition:
    """Return how a pool is over all processes: as in the one where it is worst, of those that are seen."""
    found = {of_process(process, pool) for process, pool in parts}
    if found == {Condition.NOT_SEEN}:
        return Condition.NOT_SEEN
    order = (Condition.STUCK, Condition.PAUSED, Condition.FULL)
    return next((condition for condition in order if condition in found), Condition.WELL)


def advice(parts: Sequence[tuple[Json, Json]], pool: Json, now: float) -> list[str]:
    """Return what is to be known and done about a pool, a sentence or two each; [] if nothing is."""
    return [*_advice_on_processes(parts), *_advice_on_tasks(pool, now)]


def _advice_on_processes(parts: Sequence[tuple[Json, Json]]) -> Iterator[str]:
    hit: dict[str, list[str]] = {}
    for process, pool in parts:
        condition = of_process(process, pool)
        if condition is Condition.STUCK:
            text = STUCK[process["state"] if process["state"] in STUCK else ""]
        else:
            text = ADVICE.get(condition, "")
        hit.setdefault(text, []).append(f"{process['host']}:{process['pid']}")
    for text, names in hit.items():
        if text:
            yield text.replace("{who}", _listed(names))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return shown if len(names) <= NAMED_MAX else f"{shown} and {len(names) - NAMED_MAX} more"


def _advice_on_tasks(pool: Json, now: float) -> Iterator[str]:
    stats = pool["stats"]
    if 0 < stats["stuck"] < stats["runners"]:
        yield f"{stats['stuck']} of {stats['runners']} slots are stuck past TASK_TIMEOUT."
    if pool["oldest"] is not None and pool["oldest"] > WAIT_MAX and not pool["paused"]:
        yield f"The oldest task has waited for over {WAIT_MAX:g} s: tasks are spawned faster than they run."
    if any(failure["at"] > now - RECENT for failure in pool["failures"]):
        yield "Tasks have failed within the last 5 minutes: see the last failures."
    if any((drop["at"] or 0.0) > now - RECENT for drop in pool["drops"]):
        yield "Tasks were not accepted within the last 5 minutes: see the last drops."
    if stats["handoff_failures"]:
        yield f"The engine could not be reached, or failed, {stats['handoff_failures']} times: see the log."
