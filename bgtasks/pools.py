"""Pools: where tasks are spawned, and how a project looks at, waits for and ends them."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from time import monotonic
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, Protocol, overload

from asgiref.sync import AsyncToSync, SyncToAsync, sync_to_async
from django.apps import apps
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction

from bgtasks import conf
from bgtasks.drainer import Drainer, Life
from bgtasks.exceptions import PoolDoesNotExist
from bgtasks.log import DropLog, log
from bgtasks.publisher import Publisher
from bgtasks.queue import DropReason, PoolStats, State, Task, TaskQueue
from bgtasks.shell import Shell, capture, close_connections
from bgtasks.signals import task_dropped, task_spawned
from bgtasks.slots import Slots, current_task

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_COROUTINE = inspect.CO_COROUTINE
_threadlocal = SyncToAsync.threadlocal  # where asgiref notes for which loop a thread works

EXIT_ATTEMPTS = 100  # at a report of what is left, while signal handlers raise

P = ParamSpec("P")


class DjangoTask(Protocol[P]):
    """A task made by ``@django.tasks.task`` (Django 6.0)."""

    @property
    def func(self) -> Callable[P, object]:
        """The decorated function."""
        ...


class Diverted(NamedTuple):
    """Where the tasks of all pools go: to a function, or with None to the real queues."""

    take: Callable[[Pool, Task], bool] | None


class Lifespan:
    """Whether this process will hear of its server's shutdown.

    On uvicorn no exit hook runs: without ``bgtasks.asgi.lifespan`` what is queued is lost at each deploy.
    """

    def __init__(self) -> None:
        self.settled = False  # a lifespan was seen, or its absence was reported; one direction

    def look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report once that a task is spawned on an event `loop`, and no lifespan was ever seen."""
        if pools.drainer.is_own_loop(loop):
            return
        # That of an async view under WSGI lives for one request, and its thread remembers it afterwards.
        if loop in AsyncToSync.loop_thread_executors or not loop.is_running():
            return
        self.settled = True
        log(
            logging.WARNING,
            "tasks are spawned on an event loop, and the server has not announced its lifespan: "
            "under uvicorn they would be lost at shutdown; write in asgi.py: "
            "application = bgtasks.asgi.lifespan(get_asgi_application())",
        )


lifespan = Lifespan()


class Pool:
    """One queue and its slots, under one name.

    A pool is a handle that stays the same for the life of the process. What it stands for is built from
    BGTASKS when it is first used, and anew in a forked child and after the setting was overridden.

    >>> email = bgtasks.pools["email"]
    >>> email.spawn("send-welcome", send_welcome, user.pk)
    True
    """

    def __init__(self, name: str, drainer: Drainer) -> None:
        self.name = name
        self._drainer = drainer
        self._shell = Shell(self)
        self._building = threading.RLock()  # held while the next three are made
        self._slots: Slots | None = None
        self._drops: DropLog | None = None
        self._first: dict[str, tuple[Slots, DropLog]] = {}  # what was built first, by the pool's name
        # Takes tasks in place of the queue: the MODE "inline", or bgtasks.testing. Written with _slots.
        self._divert: Callable[[Pool, Task], bool] | None = None
        self._mode = conf.POOL

    def __repr__(self) -> str:
        slots = self._slots
        if slots is None:
            return f"<Pool {self.name!r} not started>"
        stats = slots.queue.stats()
        running = f"{stats.running}/{stats.conn_max} running"
        return f"<Pool {self.name!r} {running}, {stats.queued}/{stats.capacity} queued>"

    # Spawning.

    @overload
    def spawn(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> bool: ...

    @overload
    def spawn(self, name: str, task: Coroutine[Any, Any, object], /) -> bool: ...

    def spawn(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Have `task` run in the background, and return at once.

        Never blocks, and never raises because of load or state. May be called from anywhere: sync and async
        code, threads, signal handlers.

        Args:
            name: What the task is called in logs and figures. One name for each kind of task.
            task: A plain or ``async def`` function, a coroutine object, or a task made by
                ``@django.tasks.task``.
            *args: Passed to `task`.
            **kwargs: Passed to `task`.

        Returns:
            True if the task was accepted, False if it was dropped, since the queue is full or shut down.

        Raises:
            TypeError: `name` is not a string, or `task` is nothing that can be run.
            PoolDoesNotExist: BGTASKS no longer defines this pool.
            InvalidSettings: BGTASKS has a mistake.
        """
        slots = self._slots
        if (
            slots is not None
            and not slots.queue._permits
            and self._divert is None
            and _is_function(name, task)
        ):
            return self._refuse(slots, name)
        return self._submit(_make_task(name, task, args, kwargs))

    @overload
    def spawn_on_commit(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> None: ...

    @overload
    def spawn_on_commit(self, name: str, task: Coroutine[Any, Any, object], /) -> None: ...

    def spawn_on_commit(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> None:
        """Spawn `task` once the surrounding transaction has committed, or at once if there is none.

        Nothing is spawned if it is rolled back. The task's context is that of this call. The transaction is
        the one of the default database, as with Django's ``transaction.on_commit``.

        Raises:
            TypeError: As ``spawn``.
            SynchronousOnlyOperation: Called in async code. Use ``aspawn_on_commit`` there.
        """
        commit = _Commit(self, _make_task(name, task, args, kwargs))
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
    async def aspawn_on_commit(self, name: str, task: Coroutine[Any, Any, object], /) -> None: ...

    async def aspawn_on_commit(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> None:
        """Do as ``spawn_on_commit`` does, from async code.

        Raises:
            TypeError: As ``spawn``.
        """
        commit = _Commit(self, _make_task(name, task, args, kwargs))
        # On the thread of the caller's ORM calls, where its transaction is.
        await sync_to_async(transaction.on_commit)(commit)

    def _submit(self, task: Task, *, traced: bool = False) -> bool:
        if Shell.tracer is not None and not traced:
            return Shell.tracer.spawn(self.name, task, partial(self._submit, task, traced=True))
        slots = self._slots
        if slots is None:
            try:
                slots = self._build()
            except BaseException:
                task.discard()
                raise
        if self._divert is not None:
            return self._divert(self, task)
        if not lifespan.settled:
            # Of this thread or, in a sync view under ASGI, of the thread that waits for it.
            loop = asyncio._get_running_loop() or vars(_threadlocal).get("main_event_loop")
            if loop is not None:
                lifespan.look(loop)
        if task_spawned.receivers:
            self._shell.spawned(task.name)
        try:
            reason = slots.queue.put(task)
            if slots.look is not None:
                slots.look()
            if reason is None:
                # Most often all slots are busy, and one of them will take the task.
                if not slots.idle and self._drainer.life is Life.RUNNING and slots.all:
                    return True
                # No idle slot: they have just become busy, or there are none yet.
                if task.asynchronous and slots.poll():
                    return True
                if slots.wake() or self._drainer.ensure(slots):
                    return True
                if not slots.queue.withdraw(task, DropReason.NO_THREAD):
                    return True
                reason = DropReason.NO_THREAD
        except BaseException:
            slots.wake()  # a signal handler has raised, perhaps after the task was put
            raise
        return self._note_drop(task.name, reason)

    def _refuse(self, slots: Slots, name: str) -> bool:
        """Drop a task called `name` without making it: under overload that is what costs most."""
        if task_spawned.receivers:
            self._shell.spawned(name)
        reason = slots.queue.refuse(name)
        if slots.look is not None:
            slots.look()
        if Shell.tracer is not None:
            Shell.tracer.refused(self.name, name)
        return self._note_drop(name, reason)

    def _note_drop(self, name: str, reason: DropReason) -> bool:
        assert self._drops is not None
        self._drops.note(name, reason)
        if task_dropped.receivers:
            self._shell.dropped(name, reason)
        return False

    def _build(self) -> Slots:
        with self._building:
            if self._slots is not None:
                return self._slots
            config = conf.pool_config(self.name)
            if config is None:
                raise _no_pool(self.name)
            if apps.ready and not apps.is_installed("bgtasks"):
                log(
                    logging.WARNING,
                    "'bgtasks' is not in INSTALLED_APPS: its settings are not checked, and what is queued "
                    "when the process ends is lost",
                )
            queue = TaskQueue(self.name, config.capacity, config.conn_max)
            slots = self._build_slots(queue, config)
            self._mode = config.mode
            self._set_divert()
            # A signal handler or a __del__ may have spawned, and so built, in the middle of this. What was
            # built first holds: setdefault is one atomic step.
            drops = DropLog(queue, self._drainer.call_later)
            first, self._drops = self._first.setdefault(self.name, (slots, drops))
            self._slots = first
            # A shutdown may have passed by *just* before that.
            if not self._drainer.accepting:
                queue.close()
            elif first is slots:
                self._drainer.add(slots)
            return first

    def _build_slots(self, queue: TaskQueue, config: conf.PoolConfig) -> Slots:
        task_timeout, shutdown_timeout = config.task_timeout, config.shutdown_timeout
        if config.handoff_to is None:
            return Slots(
                queue,
                self._shell,
                self._drainer,
                task_timeout=task_timeout,
                shutdown_timeout=shutdown_timeout,
            )
        # Only who hands off pays for importing them.
        from bgtasks.handoff import Handoff
        from bgtasks.mover import HandoffSlots

        return HandoffSlots(
            queue,
            self._shell,
            self._drainer,
            Handoff(config.handoff_to, self.name, self._shell),
            always=config.handoff_when == conf.ALWAYS,
            task_timeout=task_timeout,
            shutdown_timeout=shutdown_timeout,
        )

    def _set_divert(self) -> None:
        if pools.diverted is not None:
            self._divert = pools.diverted.take
        else:
            self._divert = run_inline if self._mode == conf.INLINE else None

    def _flush(self) -> None:
        """Write of the drops that were only counted so far."""
        if self._drops is not None:
            self._drops.flush()

    def _forget(self) -> None:
        """Build anew at the next use. The drainer has let go of the slots."""
        self._building = threading.RLock()
        self._first = {}
        self._slots = None

    # Looking, waiting, ending.

    def stats(self) -> PoolStats:
        """Return the pool's figures, all of one moment."""
        return (self._slots or self._build()).queue.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every task spawned before this call has ended. More may be spawned meanwhile.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            False if the time was over before.

        Raises:
            RuntimeError: Called inside a task, or on the drainer's loop, which would wait for themselves.
        """
        return _drain(self._built(), timeout, self._drainer)

    async def adrain(self, timeout: float | None = None) -> bool:
        """Do as ``drain`` does, without blocking the event loop.

        Raises:
            RuntimeError: Called inside a task, which would wait for itself.
        """
        return await _adrain(self._built(), timeout, self._drainer)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Accept no more tasks, wait for the accepted ones, and cancel what is left.

        Called again, it waits for the first call to be done.

        Args:
            timeout: Seconds to wait at most; None stands for the pool's SHUTDOWN_TIMEOUT.

        Returns:
            False if tasks were cancelled. A warning names them.

        Raises:
            RuntimeError: Called on the drainer's loop. Use ``ashutdown`` there.
        """
        return _shutdown(self._built(), timeout, self._drainer)

    async def ashutdown(self, timeout: float | None = None) -> bool:
        """Do as ``shutdown`` does, without blocking the event loop."""
        return await _aside(self._built(), partial(_shutdown, self._built(), timeout, self._drainer))

    def _built(self) -> list[Slots]:
        return [] if self._slots is None else [self._slots]


class Pools(Mapping[str, Pool]):
    """The pools that BGTASKS defines, by name."""

    def __init__(self) -> None:
        self.drainer = Drainer(may_start=_has_forked, close=close_connections)
        self.default = Pool(conf.DEFAULT_POOL, self.drainer)
        self._pools = {conf.DEFAULT_POOL: self.default}  # handles, once asked for; never removed
        self._has_hooks = False
        self.diverted: Diverted | None = None  # in force for all pools, whatever their MODE; see divert
        self.publisher = Publisher(self.drainer, self._built)
        self.drainer.companion = self.publisher

    def __repr__(self) -> str:
        return f"<Pools {', '.join(map(repr, self))}>"

    def __getitem__(self, name: str) -> Pool:
        pool = self._pools.get(name)
        if pool is not None and pool._slots is not None:
            return pool  # built, so BGTASKS defines it
        if name not in conf.pool_names():
            raise _no_pool(name)
        return self._pools.setdefault(name, Pool(name, self.drainer))

    def __iter__(self) -> Iterator[str]:
        return iter(conf.pool_names())

    def __len__(self) -> int:
        return len(conf.pool_names())

    def stats(self) -> dict[str, PoolStats]:
        """Return the figures of every pool by its name, each all of one moment."""
        return {name: pool.stats() for name, pool in self.items()}

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every task spawned before this call has ended, in all pools. See ``Pool.drain``."""
        return _drain(self._built(), timeout, self.drainer)

    async def adrain(self, timeout: float | None = None) -> bool:
        """Do as ``drain`` does, without blocking the event loop."""
        return await _adrain(self._built(), timeout, self.drainer)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Shut all pools down, side by side, and end the drainer. See ``Pool.shutdown``.

        Called by a task on the drainer's loop, it leaves the drainer to the shutdown at exit.
        """
        _refuse_on_loop(self.drainer)
        self.drainer.accepting = False
        complete = _shutdown(self._built(), timeout, self.drainer)
        for pool in list(self._pools.values()):
            pool._flush()
        # Not if another shutdown is under way, or if the one who asked is on the loop, and goes on.
        if all(slots.closed for slots in self._built()):
            self.drainer.stop()
            self.publisher.leave()
        return complete

    async def ashutdown(self, timeout: float | None = None) -> bool:
        """Do as ``shutdown`` does, without blocking the event loop."""
        self.drainer.accepting = False
        return await _aside(self._built(), partial(self.shutdown, timeout))

    def _built(self) -> list[Slots]:
        return [slots for pool in list(self._pools.values()) for slots in pool._built()]

    def divert(self, diverted: Diverted | None) -> Diverted | None:
        """Have `diverted` say where the tasks of all pools go, and return what did so far."""
        before, self.diverted = self.diverted, diverted
        for pool in list(self._pools.values()):
            if pool._slots is not None:
                pool._set_divert()
        return before

    # The life of the process.

    def start(self) -> None:
        """Start the threads of all pools. Called by ``AppConfig.ready()``.

        Raises:
            InvalidSettings: BGTASKS has a mistake.
            RuntimeError: The machine has no thread left.
        """
        self._install_hooks()
        self.publisher.configure()
        for pool in self.values():
            pool._build()
        self.drainer.start()

    def restart(self) -> None:
        """Shut all pools down, and let them be built anew, from the settings of then, when they are used."""
        self.shutdown()
        self.drainer.accepting = True
        for pool in self._pools.values():
            pool._forget()

    def _install_hooks(self) -> None:
        if self._has_hooks:
            return
        self._has_hooks = True
        if hasattr(os, "register_at_fork"):
            # Before a fork what was registered last comes first: the drainer steps aside, with the publisher.
            os.register_at_fork(
                before=self.publisher.before_fork, after_in_parent=self.publisher.after_fork_in_parent
            )
            os.register_at_fork(
                before=self.drainer.before_fork,
                after_in_parent=self.drainer.after_fork_in_parent,
                after_in_child=self._after_fork_in_child,
            )
        # At atexit time sync_to_async and to_thread fail already. The hooks of threading run before, newest
        # first, so ours has to come after that of concurrent.futures, which ends the executors.
        importlib.import_module("concurrent.futures.thread")
        register: Callable[[Callable[[], object]], object] = getattr(
            threading, "_register_atexit", atexit.register
        )
        register(self._on_exit)
        if not _has_forked():
            # With its threads from the start, a worker is not caught by a signal while it starts them. If
            # somebody replaces this hook, the worker's first spawn starts them.
            uwsgi: Any = sys.modules["uwsgi"]
            uwsgi.post_fork_hook = partial(
                self._on_uwsgi_fork, getattr(uwsgi, "post_fork_hook", lambda: None)
            )
        # Inside Apache, where a module of that name is built in, neither of them runs reliably.
        mod_wsgi: Any = sys.modules.get("mod_wsgi")
        if hasattr(mod_wsgi, "subscribe_shutdown"):
            mod_wsgi.subscribe_shutdown(self._on_mod_wsgi_shutdown)

    def _on_exit(self) -> None:
        try:
            self.shutdown()
        except BaseException:
            # A second Ctrl-C, or a signal handler that raises SystemExit: nobody wants to wait any longer. A
            # third does not cost the account: what is left to do takes a moment, and goes on each time.
            for _ in range(EXIT_ATTEMPTS):
                with contextlib.suppress(BaseException):
                    self.shutdown(timeout=0)
                    break
            raise

    def _on_uwsgi_fork(self, other_hook: Callable[[], object]) -> None:
        other_hook()
        self.drainer.start()

    def _on_mod_wsgi_shutdown(self, _event: str, **_payload: object) -> None:
        self.shutdown()

    def _after_fork_in_child(self) -> None:
        self.drainer.after_fork_in_child()
        for pool in self._pools.values():
            pool._forget()


def _has_forked() -> bool:
    """Tell whether this process may have threads: False in uWSGI before it forks its workers.

    It loads the application, unless told not to (``lazy-apps``), and then forks in C, past Python's hooks.
    Threads started before would be missing in the workers. They could not even run here, since uWSGI keeps
    the GIL.
    """
    uwsgi: Any = sys.modules.get("uwsgi")  # built in there
    if not hasattr(uwsgi, "worker_id"):
        return True
    # A worker has a number. A mule or a spooler has none, but neither is it the master; 0 is no master.
    return bool(uwsgi.worker_id()) or uwsgi.masterpid() not in {0, os.getpid()}


pools = Pools()


def run_inline(pool: Pool, task: Task) -> bool:
    """Run `task` at once, in the code that spawns it."""
    from bgtasks import inline

    slots = pool._slots or pool._build()
    if task_spawned.receivers:
        pool._shell.spawned(task.name)
    if slots.queue.state is not State.OPEN:
        task.discard()
        return pool._note_drop(task.name, slots.queue.refuse(task.name))
    inline.run(slots.queue, pool._shell, task)
    return True


def _no_pool(name: object) -> PoolDoesNotExist:
    defined = ", ".join(map(repr, conf.pool_names()))
    return PoolDoesNotExist(f"no pool named {name!r}; BGTASKS defines: {defined}")


# Waiting and ending, for one pool or for all.


def _landmarks(groups: Iterable[Slots], drainer: Drainer) -> list[Future[bool]]:
    own = current_task()
    landmarks: list[Future[bool]] = []
    for slots in groups:
        if own is not None and own in slots.queue.running():
            raise RuntimeError(f"task {own.name!r} would wait for itself in drain()")
        if slots.queue.held():
            drainer.ensure(slots)
        landmarks.append(slots.queue.all_ended())
    return landmarks


def _drain(groups: Iterable[Slots], timeout: float | None, drainer: Drainer) -> bool:
    if drainer.is_own_thread():
        raise RuntimeError("drain() would block the drainer's loop; use 'await adrain()'")
    landmarks = _landmarks(groups, drainer)
    late = wait(landmarks, timeout).not_done
    for landmark in late:
        landmark.cancel()
    return not late


async def _adrain(groups: Iterable[Slots], timeout: float | None, drainer: Drainer) -> bool:
    landmarks = [asyncio.wrap_future(landmark) for landmark in _landmarks(groups, drainer)]
    if not landmarks:
        return True
    try:
        _, late = await asyncio.wait(landmarks, timeout=timeout)
    finally:
        for landmark in landmarks:
            landmark.cancel()
    return not late


def _refuse_on_loop(drainer: Drainer) -> None:
    if drainer.is_own_thread():
        raise RuntimeError("shutdown() would block the drainer's loop; use 'await ashutdown()'")


def _shutdown(groups: Iterable[Slots], timeout: float | None, drainer: Drainer) -> bool:
    _refuse_on_loop(drainer)
    now = monotonic()
    return (
        drainer.close(
            {slots: now + (slots.shutdown_timeout if timeout is None else timeout) for slots in groups}
        )
        == 0
    )


async def _aside(groups: Iterable[Slots], shutdown: Callable[[], bool]) -> bool:
    """Call `shutdown` on a thread of its own: the loop's executor may be full of other people's work."""
    for slots in groups:
        slots.queue.close()
    ended: Future[bool] = Future()
    context = copy_context()

    def run() -> None:
        ended.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            ended.set_result(context.run(shutdown))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="bgtasks-shutdown", daemon=True).start()
    return await asyncio.wrap_future(ended)


# Making a task of what spawn was given.


def _make_task(name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    if type(name) is not str:
        name = _plain_name(name, task)
    try:
        flags = task.__code__.co_flags
    except AttributeError:
        task, asynchronous = _resolve(name, task, args, kwargs)
    else:
        if flags & _GENERATOR:
            raise TypeError(f"task {name!r} is a generator function; calling it would run nothing of it")
        asynchronous = flags & _COROUTINE != 0
    return Task(name, task, args, kwargs, asynchronous, copy_context(), capture())


def _is_function(name: object, task: Any) -> bool:
    """Tell whether these are an ordinary name and function, which need no closer look."""
    return type(name) is str and type(task) is FunctionType and not task.__code__.co_flags & _GENERATOR


def _plain_name(name: object, task: object) -> str:
    if not isinstance(name, str):
        if inspect.iscoroutine(task):
            task.close()
        raise TypeError(f"the name of a task must be a str, not {name!r}")
    return str.__str__(name)  # of a StrEnum or a SafeString


def _resolve(name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Return what to run of a `task` that is no function, and whether it is asynchronous."""
    if inspect.iscoroutine(task):
        if args or kwargs:
            task.close()
            raise TypeError(f"task {name!r} is a coroutine object, which takes no arguments")
        return task, True
    # Nobody has an object of a class that nobody has imported, and to import it is a third of our start-up.
    django_tasks: Any = sys.modules.get("django.tasks.base")
    if django_tasks is not None and isinstance(task, django_tasks.Task):
        function = partial(_call_with_context, task) if task.takes_context else task.func
        return function, inspect.iscoroutinefunction(task.func)
    if not callable(task):
        raise TypeError(
            f"task {name!r} is {task!r}, which cannot be called; "
            "pass the function itself and its arguments, not the result of calling it"
        )
    return task, inspect.iscoroutinefunction(task) or inspect.iscoroutinefunction(type(task).__call__)


def _call_with_context(task: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call the function of a ``@task(takes_context=True)`` with the context that a backend would give it."""
    from django.tasks import TaskContext

    from bgtasks.backends import begin, new_result

    result = new_result(task, task.backend, list(args), kwargs)
    begin(result, "bgtasks")
    return task.func(TaskContext(task_result=result), *args, **kwargs)


class _Commit:
    """Spawns a task when a transaction commits. If it never does, a coroutine object is closed."""

    def __init__(self, pool: Pool, task: Task) -> None:
        self._pool = pool
        self._task: Task | None = task

    def __call__(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.spawned_at = monotonic()
            self._pool._submit(task)

    def __del__(self) -> None:
        if self._task is not None:
            self._task.discard()
