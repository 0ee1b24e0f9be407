"""One pool: where tasks are spawned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bgtasks import conf, drops, tracing
from bgtasks.building import Built, build
from bgtasks.context import FAILED
from bgtasks.core.drainer import Drainer
from bgtasks.core.figures import DropReason, Outcome, ShedReason
from bgtasks.core.places import State
from bgtasks.core.policy import NO_POLICY, Options
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import DjangoHooks, Recorded
from bgtasks.monitoring.figures import PoolStats, read_stats
from bgtasks.process import lifespan
from bgtasks.signals import task_spawned
from bgtasks.spawning import Spawning, Using, check_options, policy_for
from bgtasks.submission import make_task
from bgtasks.waiting import Waitable


class Diverted(NamedTuple):
    """Where the tasks of all pools go: to a function, or with None to the real queues."""

    take: Callable[[Pool, Task], bool] | None


class Pool(Waitable, Spawning):
    """One queue and its slots, under one name.

    The object stays the same until the process ends. Its queue and slots are built from BGTASKS when it is
    first used, and again in a forked child and after the setting was overridden.

    >>> email = bgtasks.pools["email"]
    >>> email.spawn("send-welcome", send_welcome, user.pk)
    True
    """

    def __init__(
        self, name: str, drainer: Drainer, diverted: Callable[[], Diverted | None] = lambda: None
    ) -> None:
        super().__init__(drainer)
        self.make = make_task
        self.is_diverted = False
        self._diverted = diverted  # says where the tasks of all pools go
        self.name = name
        self.hooks = DjangoHooks(self)
        # Takes tasks in place of the queue: the MODE "inline", or bgtasks.testing.
        self._divert: Callable[[Pool, Task], bool] | None = None
        self._options: Options | None = None  # of its settings, if any task has a policy
        self._built: dict[str, Built] = {}  # by our name, and at most one; see use
        self.slots: Slots | None = None  # what runs the pool's tasks; written last

    def __repr__(self) -> str:
        if self.slots is None:
            return f"<Pool {self.name!r} not started>"
        stats = read_stats(self.slots.queue)
        running = f"{stats.running}/{stats.conn_max} running"
        return f"<Pool {self.name!r} {running}, {stats.queued}/{stats.capacity} queued>"

    # Spawning.

    def using(
        self,
        *,
        expires: float | None = None,
        key: str | None = None,
        retries: int | None = None,
        retry_delay: float | None = None,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] | None = None,
        database: str | None = None,
    ) -> Using:
        """Return the pool with options for the tasks that are spawned through it.

        The result has ``spawn``, ``spawn_on_commit`` and ``aspawn_on_commit``. You can keep it and reuse it.
        If an option is left out, or None, the pool's settings apply.

        >>> bgtasks.using(expires=60, retries=3).spawn("send-welcome", send_welcome, user.pk)
        True

        Args:
            expires: Seconds that a task may wait, above 0; one that is older is not run.
            key: If a task of the same name and key waits, the new one takes its place in the queue.
            retries: How many times a failed task is retried, 0 or more.
            retry_delay: Seconds before the first of these tries, 0 or more; doubled with each, up to 60. Each
                delay is up to a quarter longer or shorter, at random.
            retry_on: Exception classes after which a task is tried again: ``Exception`` by default. A
                time-out counts as TimeoutError.
            database: Alias of the database whose commit ``spawn_on_commit`` waits for.

        Returns:
            An immutable object, which is cheap to create.

        Raises:
            TypeError: An option has a wrong type.
            ValueError: An option is out of range, or there is no such database.
        """
        options = {
            "expires": expires,
            "key": key,
            "retries": retries,
            "retry_delay": retry_delay,
            "retry_on": retry_on,
            "database": database,
        }
        return Using(self.submit, self.default_options, check_options(options))

    def default_options(self) -> Options:
        """Return what the pool's settings say of tasks without options of their own."""
        return self.build().options

    def submit(self, task: Task) -> bool:
        """Run a `task` that is already made. See ``spawn``."""
        if not tracing.tracers:
            return self._submit(task)
        accepted, ends = False, tracing.spawning(self.name, task)
        try:
            accepted = self._submit(task)
        finally:
            tracing.submitted(ends, accepted)
        return accepted

    def _submit(self, task: Task) -> bool:
        slots = self.slots or self._build_for(task)
        if self._options is not None and task.policy is NO_POLICY:
            task.policy = policy_for(task, self._options)
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
            return self.drop(task, slots.queue.refuse(task.name, reason))
        try:
            reason = slots.queue.put(task)
            if slots.look is not None:
                slots.look()
        finally:
            if not slots.all:
                self._ensure_threads(task, slots)  # a fork may have ended the threads *just* before that
        return reason is None or self.drop(task, reason)

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

    def refuse(self, name: str) -> bool:
        """Drop a task called `name` without making it."""
        slots = self.build().slots
        if task_spawned.receivers:
            self.hooks.spawned(name)
        reason = slots.queue.refuse(name)
        if slots.look is not None:
            slots.look()
        tracing.refused(self.name, name)
        return self.note_drop(name, reason)

    def drop(self, task: Task, reason: DropReason) -> bool:
        """Report the drop of a `task`, which the queue has counted, and return False."""
        if isinstance(task.function, Recorded):
            task.function.dropped(drops.why(self.build().slots.queue, reason))
        return self.note_drop(task.name, reason)

    def note_drop(self, name: str, reason: DropReason) -> bool:
        """Report a drop that the queue has counted, and return False."""
        drops.warn(self.build().slots.queue, name, reason)
        self.hooks.dropped(name, reason)
        return False

    def _note_shed(self, task: Task, reason: ShedReason) -> None:
        """Report a task that the queue has given up and counted."""
        if task.outcome is Outcome.SHED:
            drops.warn(self.build().slots.queue, task.name, reason)
        self.hooks.shed(task, reason)

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
        self._set_target(new.mode)
        options = new.options
        self._options = options if options.retries or options.expires is not None else None
        new.slots.queue.on_shed = self._note_shed
        built = self._built.setdefault(self.name, new)
        self.drainer.add(built.slots)
        # A shutdown may have passed by *just* before that.
        if not self.drainer.accepting:
            built.slots.queue.close()
        self.slots = built.slots  # from here on spawners do not come here any more
        if self._built.get(self.name) is not built:
            self.slots = None  # the pools were built anew *just* before that
            self.drainer.pools.pop(built.slots, None)
        return built

    def set_divert(self) -> None:
        """Look where tasks go: to the queue, or inline, or where a test tool has them go."""
        built = self._built.get(self.name)
        self._set_target(conf.POOL if built is None else built.mode)

    def _set_target(self, mode: str) -> None:
        diverted = self._diverted()
        if diverted is not None:
            self._divert = diverted.take
        else:
            self._divert = run_inline if mode == conf.INLINE else None
        self.is_diverted = self._divert is not None

    def forget(self) -> None:
        """Build anew at the next use. The drainer has let go of the slots."""
        self.hooks = DjangoHooks(self)
        self._options, self._built = None, {}
        self.slots = None

    def parts(self) -> Sequence[Built]:
        """Return what the pool is made of, if it is in use."""
        return list(self._built.values())

    def stats(self) -> PoolStats:
        """Return the pool's figures, which all belong to the same moment.

        Raises:
            PoolDoesNotExist: BGTASKS no longer defines this pool.
            InvalidSettings: BGTASKS has a mistake.
        """
        return read_stats(self.build().slots.queue)


def run_inline(pool: Pool, task: Task) -> bool:
    """Run `task` at once, in the code that spawns it."""
    from bgtasks import inline

    queue = pool.build().slots.queue
    pool.hooks.spawned(task.name)
    if queue.state is not State.OPEN:
        task.discard()
        return pool.drop(task, queue.refuse(task.name))
    inline.run(queue, pool.hooks, task)
    return True
