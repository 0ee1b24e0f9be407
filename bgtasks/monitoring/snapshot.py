"""What one process shows of itself: plain JSON, of bounded size, without any task's arguments."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from time import monotonic, time
from types import FrameType
from typing import Any

from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import Outcome
from bgtasks.core.slot import Slot
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import DjangoHooks, Recent
from bgtasks.monitoring.figures import NameStats, Times, oldest_wait, read_stats_by_name

VERSION = 2  # of the form of a snapshot and of its BOUNDS; one of another version is not read
STACK_AFTER = 10.0  # seconds that a task runs before its stack is shown, stuck or not
STACKS_MAX = 16  # of each pool
STACK_FRAMES = 12  # the innermost ones
AWAITED_MAX = 100  # coroutines that wait for each other are followed so far
RUNNING_MAX = 100  # running tasks of each pool that are shown, the oldest
NAME_MAX = 100  # characters of a task's name that are shown

Json = dict[str, Any]
Sample = tuple[float, int, int, int, int]  # seconds since the epoch, queued, running, ended, dropped


class Identity:
    """Which process this is. The place tells whether a process id means something to another process."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
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
    drainer: Drainer,
    pools: Iterable[Slots],
    history: Mapping[str, Sequence[Sample]],
    *,
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
        "drainer": drainer_state(drainer),
        "pools": [_pool(slots, history.get(slots.queue.pool, ())) for slots in pools],
    }


def drainer_state(drainer: Drainer) -> str:
    """Return "running", "blocked" by a coroutine, "dead" if its thread has ended unasked, or "stopped"."""
    if not drainer.running:
        return "stopped"
    if drainer.loop.blocked:
        return "blocked"
    # With gevent there is no loop.
    return "dead" if drainer.loop.thread is not None and not drainer.loop.is_alive() else "running"


def _pool(slots: Slots, history: Sequence[Sample]) -> Json:
    queue = slots.queue
    stats, names = read_stats_by_name(queue)
    recent = slots.hooks.recent if isinstance(slots.hooks, DjangoHooks) else Recent()
    return {
        "name": queue.pool,
        "state": queue.state.value,
        "paused": queue.paused,
        "stats": {**asdict(stats), "runners": slots.runners},
        "oldest": oldest_wait(queue),
        "threads": sum(slot.thread.is_alive() for slot in slots.all),
        "names": [_name(of) for of in names],
        "running": _running(slots),
        "failures": [_short(failure._asdict()) for failure in recent.failures.copy()],
        "drops": [_short(drop._asdict()) for drop in recent.drops.copy()],
        "history": list(history),
    }


def _short(entry: Json) -> Json:
    return {**entry, "name": entry["name"][:NAME_MAX]}


def _name(of: NameStats) -> Json:
    return {
        "name": of.name[:NAME_MAX],
        "spawned": of.spawned,
        "queued": of.queued,
        "running": of.running,
        "ended": {outcome.label: of.ended[outcome] for outcome in Outcome if of.ended[outcome]},
        "dropped": dict(of.dropped),
        "waits": _times(of.waits),
        "runs": _times(of.runs),
    }


def _times(times: Times) -> Json:
    """Return `times` as JSON, without the buckets that are empty: most are."""
    counts = {str(bucket): count for bucket, count in enumerate(times.counts) if count}
    return {"counts": counts, "seconds": times.seconds, "longest": times.longest}


def _running(slots: Slots) -> list[Json]:
    now = monotonic()
    by_task = {slot.task: slot for slot in slots.all}
    stacks = 0
    running: list[Json] = []
    for task in sorted(slots.queue.running(), key=lambda task: task.started_at)[:RUNNING_MAX]:
        slot = by_task.get(task)
        seconds = now - task.started_at
        stack = None
        if (task.overran or seconds >= STACK_AFTER) and stacks < STACKS_MAX:
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
