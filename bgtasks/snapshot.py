"""What one process shows of itself: plain JSON, of bounded size, without any task's arguments."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from time import monotonic, time
from types import FrameType
from typing import Any

from bgtasks.drainer import Drainer, Life
from bgtasks.figures import NameStats
from bgtasks.queue import Outcome, Task
from bgtasks.slots import Slot, Slots

VERSION = 1  # of the form of a snapshot; one of another version is not read
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
    groups: Iterable[Slots],
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
        "pools": [_pool(slots, history.get(slots.queue.pool, ())) for slots in groups],
    }


def drainer_state(drainer: Drainer) -> str:
    """Return "running", "dead" if its thread has ended unasked, or "stopped"."""
    if drainer.life is not Life.RUNNING:
        return "stopped"
    return "running" if drainer.is_alive() else "dead"


def oldest_wait(slots: Slots) -> float | None:
    """Return for how many seconds the oldest waiting task has waited; None if none waits.

    One that waits for the engine, or is on its way there, waits as well.
    """
    queue = slots.queue
    since = [task.spawned_at for task in queue.moving()]
    for tasks in (queue.waiting, queue.outbox):
        with suppress(IndexError):
            since.append(tasks[0].spawned_at)
    return monotonic() - min(since) if since else None


def _pool(slots: Slots, history: Sequence[Sample]) -> Json:
    queue = slots.queue
    stats, names = queue.stats_by_name()
    return {
        "name": queue.pool,
        "state": queue.state.value,
        "paused": slots.paused,
        "stats": {**asdict(stats), "runners": slots.runners},
        "oldest": oldest_wait(slots),
        "threads": sum(slot.thread.is_alive() for slot in list(slots.all)),
        "names": [_name(of) for of in names],
        "running": _running(slots),
        "failures": [
            {**failure._asdict(), "name": failure.name[:NAME_MAX]} for failure in queue.failures.copy()
        ],
        "drops": [{**drop._asdict(), "name": drop.name[:NAME_MAX]} for drop in queue.drops.copy()],
        "history": list(history),
    }


def _name(of: NameStats) -> Json:
    return {
        "name": of.name[:NAME_MAX],
        "queued": of.queued,
        "running": of.running,
        "ended": {outcome.label: of.ended[outcome] for outcome in Outcome if of.ended[outcome]},
        "dropped": dict(of.dropped),
        "waits": of.waits,
        "runs": of.runs,
        "wait_s": of.wait_seconds,
        "run_s": of.run_seconds,
    }


def _running(slots: Slots) -> list[Json]:
    now = monotonic()
    by_account = {id(slot.account): slot for slot in list(slots.all)}
    stacks = 0
    running: list[Json] = []
    for task in sorted(slots.queue.running(), key=lambda task: task.started_at)[:RUNNING_MAX]:
        slot = by_account.get(id(task.account))
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

    None if it is nowhere: its `slot` has just taken it, or it is on its way to the loop.
    """
    runner = task.runner
    if runner is not None:
        frames = _awaited(runner.get_coro())[-STACK_FRAMES:]
    elif slot is not None and slot.task is task:
        frame = sys._current_frames().get(slot.thread.ident or 0)
        frames = [] if frame is None else [frame for frame, _ in traceback.walk_stack(frame)][:STACK_FRAMES]
        frames.reverse()
    else:
        return None
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
