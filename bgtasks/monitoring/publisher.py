"""Where a process tells the others of its site what it does, through Django's cache.

A thread publishes a snapshot every INTERVAL seconds while tasks are spawned or run, and one after they have
ended. Then it ends: an idle process makes no wake-ups. It is no slot, so it works while all slots are stuck;
and it is not the drainer's loop, so a slow cache does not delay a task. Of a database cache
it uses one connection, for the moment of publishing.

The cache has no list of its keys. So each process claims one of PLACES keys of known names with ``add``,
which is atomic, and writes its id there; the snapshot lies under the id.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any

from django.core.cache import BaseCache, caches

from bgtasks import conf, database
from bgtasks.clock import monotonic
from bgtasks.core.drainer import FORK_PATIENCE, STOP_PATIENCE, Drainer
from bgtasks.core.log import log
from bgtasks.core.slots import Slots
from bgtasks.monitoring import snapshot
from bgtasks.monitoring.cache import PLACES, place_keys, site_cache, snapshot_key
from bgtasks.monitoring.figures import PoolStats, read_stats
from bgtasks.monitoring.history import History
from bgtasks.monitoring.journal_file import Loss
from bgtasks.monitoring.orders import Orders
from bgtasks.monitoring.thread import MonitorThread

KEPT = 3600  # seconds that the cache keeps a snapshot
SIZE_MAX = 900_000  # bytes of a snapshot; Memcached takes a million
LOSSES = 20  # killed processes that are shown
COMPLAIN_INTERVAL = 60.0  # seconds between two warnings that a snapshot could not be published


class Publisher(MonitorThread):
    """The thread that publishes, while there is something to publish."""

    role = "publisher"

    def __init__(self, drainer: Drainer, built: Callable[[], Iterable[Slots]]) -> None:
        self._drainer = drainer
        self._built = built  # what runs the tasks of each pool
        self.listeners: list[Callable[[], None]] = []  # called before each publishing, on its thread
        self.config: conf.SnapshotConfig | None = None  # written by configure
        self._complained_at = -COMPLAIN_INTERVAL  # monotonic seconds
        super().__init__()

    def forget(self) -> None:
        """Be another process, with no thread and nothing published: this is a forked child."""
        super().forget()
        self.identity = snapshot.Identity()
        self.place: str | None = None  # the key that holds our id; written by the thread
        self.history: dict[str, History] = {}  # by pool; written by the thread
        self.orders = Orders()
        self.losses: deque[snapshot.Json] = deque(maxlen=LOSSES)  # told by this process; see note_loss
        self._seen: dict[str, PoolStats] = {}  # the last time we looked; written by the thread
        self._io = threading.Lock()  # held while the cache is used
        self._forking = False  # a fork holds _io; written by whoever forks

    def configure(self) -> None:
        """Read the setting BGTASKS_SNAPSHOT."""
        self.config = conf.snapshot_config()

    # The life of the process.

    def before_fork(self) -> None:
        """Let no fork happen in the middle of a use of the cache, whose locks the child would inherit."""
        self._forking = self._io.acquire(timeout=FORK_PATIENCE)

    def after_fork_in_parent(self) -> None:
        """Let the thread go on."""
        if self._forking:
            self._forking = False
            self._io.release()

    def leave(self) -> None:
        """Take back what was published, and call the listeners a last time: the process ends."""
        if self.place is None and not self.listeners:
            return
        thread = threading.Thread(target=self._leave, name="bgtasks-publisher", daemon=True)
        try:
            Context().run(thread.start)
        except RuntimeError:
            return  # too late: the others will see that the process is gone
        thread.join(STOP_PATIENCE)  # the cache may not answer

    def note_loss(self, loss: Loss) -> None:
        """Show what a killed process has lost, of which this one has told. Called by the journal's thread."""
        self.losses.append(snapshot.loss(loss))
        self.notify()

    # The thread.

    def _is_wanted(self) -> bool:
        return self.config is not None or bool(self.listeners)

    def _is_needed(self) -> bool:
        return self._look()[1]

    def _run(self, stop: threading.Event) -> None:
        interval = self.config.interval if self.config else conf.SnapshotConfig().interval
        self.orders.begin()
        try:
            while self._beat(stopping=stop.is_set()) and not stop.is_set():
                stop.wait(interval)
        finally:
            self._close()

    def _look(self) -> tuple[dict[str, PoolStats], bool]:
        """Return the figures of all pools, and whether anything happens."""
        pools = list(self._built())
        stats = {slots.queue.pool: read_stats(slots.queue) for slots in pools}
        busy = any(of.queued or of.running for of in stats.values())
        ordered = bool(self.orders.ended) or any(slots.queue.paused for slots in pools)
        return stats, busy or ordered or stats != self._seen

    def _beat(self, *, stopping: bool) -> bool:
        """Publish, and carry out what is ordered; False if nothing happens any more."""
        self._seen, busy = self._look()
        self._remember(monotonic())
        self._call_listeners()
        if self.config is not None:
            try:
                self._exchange(self.config.cache, idle=not busy or stopping)
            except Exception as error:
                self._complain("the snapshot could not be published", error)
            finally:
                # The connection of a database cache is nothing to keep between two beats.
                database.close()
        return busy

    def _remember(self, now: float) -> None:
        for pool, of in self._seen.items():
            self.history.setdefault(pool, History()).add(now, of.queued, of.running)

    def _call_listeners(self) -> None:
        for listener in self.listeners:
            try:
                listener()
            except Exception as error:
                self._complain("a listener of the publisher has failed", error)

    def _exchange(self, alias: str, *, idle: bool) -> None:
        pools = list(self._built())
        content = encode(self.snapshot(idle=idle))
        # Nothing in here takes a pool's lock: a fork holds them all while it waits for this one.
        with self._io, site_cache(alias) as cache:
            self._publish(cache, content)
            found = self.orders.read(cache, [slots.queue.pool for slots in pools])
        self.orders.carry_out(found, pools)

    def _publish(self, cache: BaseCache, content: str) -> None:
        mine = self.identity.id
        # It may have expired, or the cache have been cleared, and the place be somebody else's by now.
        if self.place is None or cache.get(self.place) != mine:
            self.place = self._claim(cache)
        if self.place is None:
            self._complain(f"more than {PLACES} processes publish; this one cannot be seen", None)
            return
        refused: Any = cache.set_many({self.place: mine, snapshot_key(mine): content}, KEPT)
        if refused:
            self._complain("the cache has refused the snapshot", None)

    def _claim(self, cache: BaseCache) -> str | None:
        keys = place_keys()
        first = random.randrange(PLACES)  # noqa: S311  # only so that most find a free place at once
        for key in (*keys[first:], *keys[:first]):
            if cache.add(key, self.identity.id, KEPT):
                return key
        return None

    def _leave(self) -> None:
        place, self.place = self.place, None
        try:
            self._call_listeners()
            if place is not None and self.config is not None:
                with site_cache(self.config.cache) as cache:
                    cache.delete(snapshot_key(self.identity.id))
                    if cache.get(place) == self.identity.id:
                        cache.delete(place)
        except Exception as error:
            self._complain("the snapshot could not be taken back", error)
        finally:
            self._close()

    def _close(self) -> None:
        """Let go of what this thread holds open."""
        try:
            for cache in caches.all(initialized_only=True):
                cache.close()
        except Exception as error:
            self._complain("a cache could not be closed", error)
        database.close()

    def _complain(self, what: str, error: BaseException | None) -> None:
        if monotonic() - self._complained_at >= COMPLAIN_INTERVAL:
            self._complained_at = monotonic()
            log(logging.WARNING, what, error=error)

    # For readers.

    def snapshot(self, *, idle: bool = False) -> snapshot.Json:
        """Return what this process does now."""
        interval = conf.SnapshotConfig().interval if self.config is None else self.config.interval
        return snapshot.take(
            self.identity,
            snapshot.drainer_state(self._drainer),
            list(self._built()),
            {pool: history.read() for pool, history in self.history.copy().items()},
            pauses={pool: pause._asdict() for pool, pause in self.orders.pauses.copy().items()},
            losses=list(self.losses.copy()),
            idle=idle,
            interval=interval,
        )


def encode(content: snapshot.Json) -> str:
    """Return a snapshot as JSON, without its longest parts if it would be too large for a cache."""
    text = json.dumps(content, separators=(",", ":"))
    if len(text) <= SIZE_MAX:
        return text
    for pool in content["pools"]:
        for entry in [*pool["running"], *pool["failures"]]:
            entry["stack" if "stack" in entry else "traceback"] = None
    return json.dumps(content, separators=(",", ":"))
