"""The pools of a project, by name, and what they have in common: the drainer and the life of the process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from bgtasks import conf, database
from bgtasks.building import Built, no_pool
from bgtasks.core.drainer import Drainer
from bgtasks.core.lock import new_lock
from bgtasks.core.slots import Slots
from bgtasks.forks import Forks
from bgtasks.greenlets import may_have_loop
from bgtasks.helpers import Helpers
from bgtasks.monitoring.figures import PoolStats
from bgtasks.monitoring.journal import Journal
from bgtasks.monitoring.log_writer import LogWriter
from bgtasks.monitoring.loop_watch import LoopWatch
from bgtasks.monitoring.pace import MeasuredPace
from bgtasks.monitoring.publisher import Publisher
from bgtasks.monitoring.switching import SwitchWatch
from bgtasks.monitoring.watchdog import Watchdog
from bgtasks.pool import Diverted, Pool
from bgtasks.process import ProcessHooks, is_command, may_have_threads
from bgtasks.repeats import repeats
from bgtasks.waiting import Waitable, check_timeout


class Pools(Waitable, Mapping[str, Pool]):
    """The pools that BGTASKS defines, by name."""

    def __init__(self) -> None:
        super().__init__(Drainer(may_have_threads, new_executor=Helpers, may_have_loop=may_have_loop))
        self.default = Pool(conf.DEFAULT_POOL, self.drainer, self._get_diverted)
        self._pools = {conf.DEFAULT_POOL: self.default}  # handles, once asked for; never removed
        # The same, to go through. A fork of a free-threaded Python may leave the lock of a dictionary held in
        # the child; a tuple has none.
        self._handles: tuple[Pool, ...] = (self.default,)
        self._adding = new_lock()
        self.diverted: Diverted | None = None  # in force for all pools, whatever their MODE; see divert
        self.publisher = Publisher(self.drainer, self.built)
        self.journal = Journal(self.built, self.publisher.note_loss)
        watches = Watchdog(self.built), LoopWatch(self.drainer, self.built), SwitchWatch(self.built)
        writer = LogWriter(self.drainer, may_have_threads, repeats)
        self.drainer.background += [self.publisher, self.journal, *watches, writer]
        self.drainer.pace = MeasuredPace(self.drainer)
        self._forks = Forks(self.drainer)
        self._hooks = ProcessHooks(self.shutdown, self._start, self._after_fork_in_child)

    def __repr__(self) -> str:
        return f"<Pools {', '.join(map(repr, self))}>"

    def __getitem__(self, name: str) -> Pool:
        pool = self._pools.get(name)
        if pool is not None and pool.slots is not None:
            return pool  # built, so BGTASKS defines it
        if conf.pool_config(name) is None:
            raise no_pool(name)
        with self._adding:
            if name not in self._pools:
                self._pools[name] = Pool(name, self.drainer, self._get_diverted)
                self._handles = (*self._handles, self._pools[name])
        return self._pools[name]

    if not TYPE_CHECKING:  # or every attribute would be right for a type checker

        def __getattr__(self, name: str) -> NoReturn:
            known = not name.startswith("_") and name in conf.pool_names()
            hint = f"; write pools[{name!r}]" if known else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(conf.pool_names())

    def __len__(self) -> int:
        return len(conf.pool_names())

    def parts(self) -> Sequence[Built]:
        """Return what each pool is made of that is in use."""
        return [part for pool in self._handles for part in pool.parts()]

    def built(self) -> list[Slots]:
        """Return what runs the tasks of each pool that is in use."""
        return [part.slots for part in self.parts()]

    def stats(self) -> dict[str, PoolStats]:
        """Return the figures of every pool, by its name. The figures of a pool all belong to the same moment.

        >>> bgtasks.stats()["default"].queued
        0

        Returns:
            A dictionary of ``PoolStats``.

        Raises:
            InvalidSettings: BGTASKS has a mistake.
        """
        return {name: pool.stats() for name, pool in self.items()}

    def shutdown(self, timeout: float | None = None) -> bool:
        """Accept no more tasks, wait for the accepted ones, cancel what is left, and stop the drainer.

        It is called automatically when the server or the process shuts down; see the docs, "Deploying".
        A second call waits until the first one has finished. All pools are shut down at the same time.

        >>> bgtasks.shutdown(timeout=5)
        True

        Args:
            timeout: Seconds to wait at most; None stands for the SHUTDOWN_TIMEOUT of each pool.

        Returns:
            True if no task was cancelled. Otherwise False, and a warning names the cancelled tasks.

        Raises:
            TypeError: `timeout` is not a number. Nothing is shut down.
            RuntimeError: Called on the drainer's event loop. Use ``ashutdown`` there.
        """
        check_timeout(timeout)
        self.refuse_on_loop()
        self.drainer.accepting = False
        parts = self.parts()
        complete = super().shutdown(timeout)
        repeats.flush()
        # Not if another shutdown is under way, or if the one who asked is on the loop, and goes on.
        if all(part.shutdown.complete for part in parts):
            self.drainer.stop()
            self.publisher.leave()
            self.journal.close()
        return complete

    async def ashutdown(self, timeout: float | None = None) -> bool:
        """Shut all pools down as ``shutdown`` does, without blocking the event loop.

        If a task on the drainer's loop calls it, the drainer runs until the process exits.

        >>> async def main():
        ...     return await bgtasks.ashutdown(timeout=5)
        >>> asyncio.run(main())
        True

        Args:
            timeout: Seconds to wait at most; None stands for the SHUTDOWN_TIMEOUT of each pool.

        Returns:
            True if no task was cancelled. Otherwise False, and a warning names the cancelled tasks.

        Raises:
            TypeError: `timeout` is not a number. Nothing is shut down.
            RuntimeError: No thread can be started, and this is the drainer's event loop.
        """
        check_timeout(timeout)
        self.drainer.accepting = False
        return await super().ashutdown(timeout)

    async def aopen(self) -> None:
        """Accept tasks again if all pools were shut down before. Their figures begin anew."""
        if not self.drainer.accepting:
            await self.ashutdown()  # it may be under way
            self._build_anew()

    def _get_diverted(self) -> Diverted | None:
        return self.diverted

    def divert(self, diverted: Diverted | None) -> Diverted | None:
        """Have `diverted` say where the tasks of all pools go, and return what did so far."""
        before, self.diverted = self.diverted, diverted
        for pool in self._handles:
            pool.set_divert()
        return before

    # The life of the process.

    def start(self) -> None:
        """Start the drainer. Called by ``AppConfig.ready()``.

        Raises:
            InvalidSettings: BGTASKS has a mistake.
        """
        # Before a fork the last one comes first: the drainer stops the publisher's thread as well.
        self._hooks.install(self.publisher, self._forks)
        self.publisher.configure()
        self.journal.configure()
        for pool in self.values():
            pool.build()
        self._hooks.start()

    def _start(self) -> None:
        self.drainer.start()
        # It looks for what died before. Not in a command, such as the `migrate` of a deploy: that would tell
        # a terminal, and the site would not tell it again.
        if self.drainer.running and not is_command():
            self.journal.notify()

    def restart(self) -> None:
        """Shut all pools down, and let them be built anew, from the settings of then, when they are used."""
        self.shutdown()
        self._build_anew()

    def _build_anew(self) -> None:
        for slots in self.built():
            self.drainer.remove(slots)  # of a pool that was built during the shutdown as well
        self.drainer.accepting = True
        conf.forget()
        self.journal.configure()
        for pool in self._handles:
            pool.forget()

    def _after_fork_in_child(self) -> None:
        self._adding = new_lock()
        self._forks.after_fork_in_child()
        database.let_go_of_inherited()
        for pool in self._handles:
            pool.forget()


pools = Pools()
