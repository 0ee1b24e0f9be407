"""What one process shows of itself: plain JSON, of bounded size, without any task's arguments."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from secrets import token_hex
from time import time
from types import FrameType
from typing import Any

from bgtasks.clock import monotonic
from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import Outcome
from bgtasks.core.slot import Slot
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import DjangoHooks
from bgtasks.monitoring.figures import (
    NameStats,
    Times,
    WaitingStats,
    oldest_wait,
    read_stats_by_name,
    read_waiting,
)
from bgtasks.monitoring.journal_file import Loss, described
from bgtasks.monitoring.names import most_important
from bgtasks.recent import Recent

VERSION = 3  # of the form of a snapshot and of its BOUNDS; one of another version is not read
STACK_AFTER = 10.0  # seconds that a task runs before its stack is shown, stuck or not
STACKS_MAX = 16  # of a snapshot, as all numbers that are shared among its pools
STACK_FRAMES = 12  # the innermost ones
AWAITED_MAX = 100  # coroutines that wait for each other are followed so far
RUNNING_MAX = 100  # running tasks that are shown, the oldest of each pool
FAILURES_MAX = 60  # groups of failures, the last ones of each pool
NAMES_SHOWN = 200  # names; the tasks of all others are counted under OTHERS
LEAST = 3  # of each pool, however many there are
NAME_MAX = 100  # characters of a task's name that are shown
HOST_MAX = 100  # characters of a host's name

NOTHING = WaitingStats(None, 0, None)

Json = dict[str, Any]


def share(number: int, pools: int) -> int:
    """Return how many of a `number` each of so many `pools` may show."""
    return max(LEAST, number // max(1, pools))


class Identity:
    """Which process this is. The place tells whether a process id means something to another process."""

    def __init__(self) -> None:
        # It need not be UTF-8, and then has halves of characters in their place.
        self.host = socket.gethostname().encode(errors="backslashreplace").decode()[:HOST_MAX]
        self.place = f"{self.host}/{_pid_namespace()}"
        self.pid = os.getpid()
        self.started = time()
        self.id = f"{self.host}:{self.pid}:{token_hex(4)}"


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""  # not Linux, which has no such thing


def take(
    identity: Identity,
    drainer: str,
    pools: Sequence[Slots],
    history: Mapping[str, Json],
    *,
    pauses: Mapping[str, Json],
    losses: Sequence[Json],
    idle: bool,
    interval: float,
) -> Json:
    """Return the snapshot of this process."""
    return {
        "version": VERSION,
        "id": identity.id,
        "host": identity.host,
        "place": identity.place,
        "pid": identity.pid,
        "started": identity.started,
        "at": time(),
        "idle": idle,
        "interval": interval,
        "drainer": drainer,
        "losses": losses,
        "pools": [
            {
                **_pool(slots, len(pools)),
                "pause": pauses.get(slots.queue.pool) if slots.queue.paused else None,
                "history": history.get(slots.queue.pool, {"queued": [], "running": []}),
            }
            for slots in pools
        ],
    }


def loss(lost: Loss) -> Json:
    """Return as JSON what a killed process has lost, as it is told now."""
    return {
        "at": time(),
        "host": lost.host,
        "pid": lost.pid,
        "tasks": lost.total,
        "names": described(lost.tasks),
    }


def drainer_state(drainer: Drainer) -> str:
    """Return "running", "blocked" by a coroutine, "dead" if its thread has ended unasked, or "stopped"."""
    if not drainer.running:
        return "stopped"
    if drainer.loop.blocked:
        return "blocked"
    thread = drainer.loop.thread  # None with gevent, which has no loop
    return "dead" if thread is not None and not thread.is_alive() else "running"


def _pool(slots: Slots, pools: int) -> Json:
    queue = slots.queue
    stats, names = read_stats_by_name(queue)
    waiting = read_waiting(queue)
    recent = slots.hooks.recent if isinstance(slots.hooks, DjangoHooks) else Recent()
    return {
        "name": queue.pool,
        "state": queue.state.value,
        "paused": queue.paused,
        "stats": {**asdict(stats), "runners": slots.runners},
        "oldest": oldest_wait(queue),
        "delayed": len(queue.delayed),
        "due": queue.until_due(),
        "threads": sum(slot.thread.is_alive() for slot in slots.all),
        "names": _names(names, waiting, share(NAMES_SHOWN, pools)),
        "running": _running(slots, pools),
        "failures": [_short(failure._asdict()) for failure in recent.failures[-share(FAILURES_MAX, pools) :]],
        "drops": [_short(drop._asdict()) for drop in recent.drops.copy()],
    }


def _short(entry: Json) -> Json:
    return {**entry, "name": entry["name"][:NAME_MAX]}


def _names(names: Sequence[NameStats], waiting: Mapping[str, WaitingStats], most: int) -> list[Json]:
    """Return a row for each of the names that matter most, and one for all others."""
    rows = [_name(of, waiting.get(of.name, NOTHING)) for of in names]
    return most_important(rows, most)


def _name(of: NameStats, waiting: WaitingStats) -> Json:
    return {
        "name": of.name[:NAME_MAX],
        "spawned": of.spawned,
        "queued": of.queued,
        "running": of.running,
        "retried": of.retried,
        **waiting._asdict(),
        "ended": {outcome.label: of.ended[outcome] for outcome in Outcome if of.ended[outcome]},
        "dropped": dict(of.dropped),
        "waits": _times(of.waits),
        "runs": _times(of.runs),
    }


def _times(times: Times) -> Json:
    """Return `times` as JSON, without the buckets that are empty: most are."""
    counts = {str(bucket): count for bucket, count in enumerate(times.counts) if count}
    return {"counts": counts, "seconds": times.seconds, "longest": times.longest}


def _running(slots: Slots, pools: int) -> list[Json]:
    now = monotonic()
    by_task = {slot.task: slot for slot in slots.all}
    stacks = 0
    running: list[Json] = []
    for task in sorted(slots.queue.running(), key=attrgetter("started_at"))[: share(RUNNING_MAX, pools)]:
        slot = by_task.get(task)
        seconds = now - task.started_at
        stack = None
        if (task.overran or seconds >= STACK_AFTER) and stacks < max(1, STACKS_MAX // pools):
            stacks += 1
            stack = stack_of(slot, task)
        running.append(
            {
                "name": task.name[:NAME_MAX],
                "seconds": seconds,
                "slot": None if slot is None else slot.name,
                "stuck": task.overran,
                "asynchronous": task.asynchronous,
                "stack": stack,
            }
        )
    return running


def stack_of(slot: Slot | None, task: Task) -> str | None:
    """Return where `task` is now, the innermost frame last, without the values of variables.

    None if that cannot be told: it has just begun or ended, or is on its way to the loop.
    """
    if slot is None or slot.task is not task:
        return None
    frames: list[FrameType] = []
    if task.runner is not None:
        frames = _awaited(task.runner.get_coro())[-STACK_FRAMES:]
    elif not task.asynchronous:
        frame = sys._current_frames().get(slot.thread.ident or 0)
        frames = [] if frame is None else [each for each, _ in traceback.walk_stack(frame)][:STACK_FRAMES]
        frames.reverse()
    return "\n".join(map(_line, frames)) or None


def _awaited(inner: Any) -> list[FrameType]:
    """Return the frames of a coroutine and of those it waits for, the innermost last."""
    frames: list[FrameType] = []
    while inner is not None and len(frames) < AWAITED_MAX:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None)
        if frame is not None:
            frames.append(frame)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None)
    return frames


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
