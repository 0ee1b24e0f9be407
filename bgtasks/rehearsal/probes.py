"""The side of the server: each process registers, and on order keeps its pools filled with probes.

A probe is a task that sleeps: plain, asynchronous, or with a query that changes nothing. The pools are kept
filled until they shut down, as they would be by the requests of a site.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

from django.db import connection

from bgtasks import conf
from bgtasks.core.figures import DropReason, Outcome
from bgtasks.pool import Pool
from bgtasks.pools import pools
from bgtasks.process import may_have_threads
from bgtasks.rehearsal.accounts import (
    ACCEPTED,
    CLOSING,
    DROPPED,
    NO_DATABASE,
    READY,
    Participant,
    append,
    read_order,
)
from bgtasks.servers import only_reloads, server_facts
from bgtasks.signals import task_dropped, task_finished, task_shed

POLL = 0.05  # seconds between two looks for an order, and between two times that the pools are filled
SHORTEST = 0.25  # seconds that a probe sleeps at least
NAME = "rehearsal-"  # which the names of all probes begin with

_part: _Part | None = None  # of this process, or of the parent that it was forked from


def take_part(folder: str) -> None:
    """Take part in the rehearsal whose files are in `folder`. Called by ``AppConfig.ready()``."""
    global _part
    if only_reloads():
        return
    _part = _Part(Path(folder))
    _part.register()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_part.register)
    uwsgi: Any = sys.modules.get("uwsgi")  # built in there; it forks past Python's hooks
    if hasattr(uwsgi, "worker_id") and not may_have_threads():
        other_hook = getattr(uwsgi, "post_fork_hook", lambda: None)
        uwsgi.post_fork_hook = partial(_call_both, other_hook, _part.register)


def _call_both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


class _Part:
    """The part that this process takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = server_facts()
        self._drops: list[str] = []  # why probes were not accepted; written by the thread that spawns them

    def register(self) -> None:
        """Say who this process is, and wait for an order on a thread of its own, if it may have one."""
        configs = {name: conf.pool_config(name) for name in conf.pool_names()}
        queued = [config for config in configs.values() if config and config.mode != conf.INLINE]
        participant = Participant(
            os.getpid(),
            os.getppid(),
            self._server,
            conf.longest_shutdown(),
            inline=not queued,
            handoff=tuple(name for name, config in configs.items() if config and config.handoff_to),
        )
        try:
            participant.write(self._folder)
        except OSError:
            return  # the rehearsal is over, or this process may not write there
        if may_have_threads():
            threading.Thread(target=self._work, name="bgtasks-rehearsal", daemon=True).start()

    def note(self, event: str) -> None:
        """Write an event to the account of this process."""
        append(self._folder, os.getpid(), event)

    def _work(self) -> None:
        """Wait for the order, and carry it out until the pools are shut down."""
        while (seconds := read_order(self._folder, os.getpid())) is None:
            if not self._folder.exists():
                return
            time.sleep(POLL)
        task_finished.connect(self._on_finished)
        task_dropped.connect(self._on_dropped)
        task_shed.connect(self._on_shed)
        fillings = [_Filling(pool, seconds) for pool in pools.values() if not pool.is_diverted]
        ready = False
        while all(self._fill(filling) for filling in fillings):
            if not ready and all(filling.pool.stats().running for filling in fillings):
                ready = True
                self.note(READY)
            time.sleep(POLL)
        self.note(CLOSING)

    def _fill(self, filling: _Filling) -> bool:
        """Spawn what is missing in one pool. Return False if it shuts down."""
        for kind, probe in filling.missing():
            if filling.pool.spawn(NAME + kind, probe, filling.sleep):
                self.note(ACCEPTED)
                continue
            reason = self._drops.pop()
            if reason == DropReason.SHUTDOWN.value:
                return False
            if reason != DropReason.FULL.value:
                self.note(f"{DROPPED}{kind} {reason}")
                filling.leave_out(kind)
        return True

    def _on_finished(self, name: str, outcome: str, **_named: object) -> None:
        if name.startswith(NAME):
            self.note(outcome)

    def _on_shed(self, name: str, **_named: object) -> None:
        if name.startswith(NAME):
            self.note(Outcome.SHED.label)

    def _on_dropped(self, name: str, reason: str, **_named: object) -> None:
        if name.startswith(NAME):
            self._drops.append(reason)


class _Filling:
    """How one pool is kept filled with so many seconds of work."""

    def __init__(self, pool: Pool, seconds: float) -> None:
        self.pool = pool
        stats = pool.stats()
        # Half of the queue is left to tasks of the project.
        self._waiting = min(ceil(seconds * stats.conn_max / SHORTEST), max(1, stats.capacity // 2))
        self.sleep = max(SHORTEST, seconds * stats.conn_max / self._waiting)  # seconds of each probe
        self._probes = probes()
        self._kinds = cycle(list(self._probes.items()))

    def missing(self) -> list[tuple[str, Callable[[float], object]]]:
        """Return the probes that are to be spawned now."""
        if not self._probes:
            return []
        stats = self.pool.stats()
        number = self._waiting + stats.conn_max - stats.queued - stats.running
        return [next(self._kinds) for _ in range(number)]

    def leave_out(self, kind: str) -> None:
        """Spawn no more of a kind that cannot run here."""
        self._probes.pop(kind, None)
        self._kinds = cycle(list(self._probes.items()))


def probes() -> dict[str, Callable[[float], object]]:
    """Return the kinds of probes that this project can run, by name.

    They are no functions of a module, so none can travel to an engine, whose tables are the project's.
    """
    kinds: dict[str, Callable[[float], object]] = {"plain": partial(_plain), "async": partial(_async)}
    if connection.settings_dict["ENGINE"] != "django.db.backends.dummy":
        kinds["orm"] = partial(_orm)
    return kinds


def _plain(seconds: float) -> None:
    time.sleep(seconds)


async def _async(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _orm(seconds: float) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT 1{connection.features.bare_select_suffix}")
    except Exception as error:  # the database is none of what is rehearsed
        if _part is not None:
            _part.note(NO_DATABASE + type(error).__name__)
    time.sleep(seconds)
