"""One pool: where tasks are spawned."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, ParamSpec, overload

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction

from bgtasks import conf
from bgtasks.building import Built, build
from bgtasks.context import FAILED
from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import DropReason
from bgtasks.core.places import State
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import DjangoHooks
from bgtasks.monitoring.figures import PoolStats, read_stats
from bgtasks.process import lifespan
from bgtasks.signals import task_spawned
from bgtasks.submission import DjangoTask, OnCommit, is_function, make_task
from bgtasks.waiting import Waitable

P = ParamSpec("P")


class Diverted(NamedTuple):
    """Where the tasks of all pools go: to a function, or with None to the real queues."""

    take: Callable[[Pool, Task], bool] | None


class Pool(Waitable):
    """One queue and its slots, under one name.

    A pool is a handle that stays the same for the life of the process. What it stands for is built from
    BGTASKS when it is first used, and anew in a forked child and after the setting was overridden.

    >>> email = bgtasks.pools["email"]
    >>> email.spawn("send-welcome", send_welcome, user.pk)
    True
    """

    def __init__(
        self, name: str, drainer: Drainer, diverted: Callable[[], Diverted | None] = lambda: None
    ) -> None:
        super().__init__(drainer)
        self._diverted = diverted  # says where the tasks of all pools go
        self.name = name
        self.hooks = DjangoHooks(self)
        # Takes tasks in place of the queue: the MODE "inline", or bgtasks.testing.
        self._divert: Callable[[Pool, Task], bool] | None = None
        self._built: dict[str, Built] = {}  # by our name, and at most one; see use
        self.slots: Slots | None = None  # what runs the pool's tasks; written last

    def __repr__(self) -> str:
        if self.slots is None:
            return f"<Pool {self.name!r} not started>"
        stats = read_stats(self.slots.queue)
        running = f"{stats.running}/{stats.conn_max} running"
        return f"<Pool {self.name!r} {running}, {stats.queued}/{stats.capacity} queued>"

    @property
    def is_diverted(self) -> bool:
        """Whether its tasks go somewhere else than into its queue."""
        return self._divert is not None

    # Spawning.

    @overload
    def spawn(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> bool: ...

    @overload
    def spawn(self, name: str, task: Awaitable[object], /) -> bool: ...

    def spawn(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Have `task` run in the background, and return at once.

        Never blocks, and never raises because of load or state. May be called from anywhere: sync and async
        code, threads, signal handlers.

        Args:
            name: What the task is called in logs and figures. One name for each kind of task.
            task: A plain or ``async def`` function, a coroutine object, or a task made by
                ``@django.tasks.task``. Whatever awaitable a plain function returns is awaited.
            *args: Passed to `task`.
            **kwargs: Passed to `task`.

        Returns:
            True if the task was accepted, False if it was dropped, since the queue is full or shut down.

        Raises:
            TypeError: `name` is not a string, or `task` is nothing that can be run.
            PoolDoesNotExist: BGTASKS no longer defines this pool.
            InvalidSettings: BGTASKS has a mistake.
        """
        slots = self.slots
        # Under overload it is the making of the task that costs most. A look without the lock will do: if the
        # queue fills up just after it, put says so.
        full = slots is not None and slots.queue.queued >= slots.queue.capacity
        if full and self._divert is None and is_function(name, task):
            return self._refuse(name)
        return self.submit(make_task(name, task, args, kwargs))

    @overload
    def spawn_on_commit(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> None: ...

    @overload
    def spawn_on_commit(self, name: str, task: Awaitable[object], /) -> None: ...

    def spawn_on_commit(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> None:
        """Spawn `task` once the surrounding transaction has committed, or at once if there is none.

        Nothing is spawned if it is rolled back. The task's context is that of this call. The transaction is
        the one of the default database, as with Django's ``transaction.on_commit``.

        Raises:
            TypeError: As ``spawn``.
            SynchronousOnlyOperation: Called in async code. Use ``aspawn_on_commit`` there.
        """
        commit = OnCommit(self.submit, make_task(name, task, args, kwargs))
        try:
            transaction.on_commit(commit)
        except SynchronousOnlyOperation:
            raise SynchronousOnlyOperation(
                f"spawn_on_commit({name!r}, ...) was called in async code, which has no transaction "
                "of its own; use 'await bgtasks.aspawn_on_commit(...)'"
            ) from None

    @overload
    async def aspawn_on_commit(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> None: ...

    @overload
    async def aspawn_on_commit(self, name: str, task: Awaitable[object], /) -> None: ...

    async def aspawn_on_commit(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> None:
        """Do as ``spawn_on_commit`` does, from async code.

        Raises:
            TypeError: As ``spawn``.
        """
        commit = OnCommit(self.submit, make_task(name, task, args, kwargs))
        # On the thread of the caller's ORM calls, where its transaction is.
        await sync_to_async(transaction.on_commit)(commit)

    def submit(self, task: Task) -> bool:
        """Have a `task` run that is made already. See ``spawn``."""
        tracer = DjangoHooks.tracer
        if tracer is not None:
            return tracer.spawn(self.name, task, partial(self._submit, task))
        return self._submit(task)

    def _submit(self, task: Task) -> bool:
        slots = self.slots or self._build_for(task)
        if self._divert is not None and task.captured is not FAILED:
            return self._divert(self, task)
        if task.spawned_at >= lifespan.look_at:
            lifespan.look(self.drainer)
        if task_spawned.receivers:
            self.hooks.spawned(task.name)
        reason = None if slots.all and slots.loop.running is not None else self._ensure_threads(task, slots)
        if task.captured is FAILED:
            reason = DropReason.PROPAGATOR
        if reason is not None:
            task.discard()
            return self.note_drop(task.name, slots.queue.refuse(task.name, reason))
        try:
            reason = slots.queue.put(task)
            if slots.look is not None:
                slots.look()
        finally:
            if not slots.all:
                self._ensure_threads(task, slots)  # a fork may have ended the threads *just* before that
        return reason is None or self.note_drop(task.name, reason)

    def _ensure_threads(self, task: Task, slots: Slots) -> DropReason | None:
        """Have the threads there that `task` needs. Return why that is impossible, or None."""
        if slots.queue.state is not State.OPEN:
            return None  # put says so
        if task.asynchronous and slots.loop.running is None and not slots.loop.may_run():
            return DropReason.NO_LOOP
        return None if slots.all or self.drainer.ensure(slots) else DropReason.NO_THREAD

    def _build_for(self, task: Task) -> Slots:
        try:
            return self.build().slots
        except BaseException:
            task.discard()
            raise

    def _refuse(self, name: str) -> bool:
        """Drop a task called `name`, which was not even made."""
        slots = self.build().slots
        if task_spawned.receivers:
            self.hooks.spawned(name)
        reason = slots.queue.refuse(name)
        if slots.look is not None:
            slots.look()
        if DjangoHooks.tracer is not None:
            DjangoHooks.tracer.refused(self.name, name)
        return self.note_drop(name, reason)

    def note_drop(self, name: str, reason: DropReason) -> bool:
        """Tell of a drop that the queue has counted, and return False."""
        self.build().drops.note(name, reason)
        self.hooks.dropped(name, reason)
        return False

    # What it stands for.

    def build(self) -> Built:
        """Return what the pool is made of, once it is made.

        Raises:
            PoolDoesNotExist: BGTASKS no longer defines this pool.
            InvalidSettings: BGTASKS has a mistake.
        """
        built = self._built.get(self.name)
        if built is not None and self.slots is not None:
            return built
        return self.use(built or build(self.name, self.hooks, self.drainer))

    def use(self, new: Built) -> Built:
        """Stand for what is `new`, and return it; or for what was built before, and return that.

        Other threads may build the pool as well, and so may a signal handler or a ``__del__`` between any two
        of these lines: what is in the dictionary first holds. If one raises, the next call does the rest.
        """
        self._divert = self._target(new.mode)
        built = self._built.setdefault(self.name, new)
        self.drainer.add(built.slots)
        # A shutdown may have passed by *just* before that.
        if not self.drainer.accepting:
            built.slots.queue.close()
        self.slots = built.slots  # from here on spawners do not come here any more
        return built

    def set_divert(self) -> None:
        """Look where tasks go: to the queue, or inline, or where a test tool has them go."""
        built = self._built.get(self.name)
        self._divert = self._target(conf.POOL if built is None else built.mode)

    def _target(self, mode: str) -> Callable[[Pool, Task], bool] | None:
        """Return what takes the tasks of a pool in this MODE; None for its queue."""
        diverted = self._diverted()
        if diverted is not None:
            return diverted.take
        return run_inline if mode == conf.INLINE else None

    def forget(self) -> None:
        """Build anew at the next use. The drainer has let go of the slots."""
        self.hooks = DjangoHooks(self)
        self._built = {}
        self.slots = None

    def parts(self) -> Sequence[Built]:
        """Return what the pool is made of, if it is in use."""
        return list(self._built.values())

    def stats(self) -> PoolStats:
        """Return the pool's figures, all of one moment."""
        return read_stats(self.build().slots.queue)


def run_inline(pool: Pool, task: Task) -> bool:
    """Run `task` at once, in the code that spawns it."""
    from bgtasks import inline

    queue = pool.build().slots.queue
    pool.hooks.spawned(task.name)
    if queue.state is not State.OPEN:
        task.discard()
        return pool.note_drop(task.name, queue.refuse(task.name))
    inline.run(queue, pool.hooks, task)
    return True
