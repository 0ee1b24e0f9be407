"""Spawning: what pools have in common with ``using``, the options of a submission."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from math import isfinite
from typing import Any, ParamSpec, cast, overload

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections, transaction

from bgtasks.core.policy import Options, Policy
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import Recorded
from bgtasks.submission import DjangoTask, OnCommit, is_function, make_task

P = ParamSpec("P")


class Spawning(ABC):
    """What tasks are spawned on."""

    make = staticmethod(make_task)
    slots: Slots | None = None  # if its tasks are dropped when the queue is full
    is_diverted = False  # its tasks go somewhere else than into its queue
    database: str | None = None  # alias of the one whose commit spawn_on_commit waits for

    @abstractmethod
    def submit(self, task: Task) -> bool:
        """Have a `task` run that is made already. See ``spawn``."""

    def refuse(self, name: str) -> bool:
        """Drop a task called `name`, which was not even made."""
        raise NotImplementedError

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
        full = slots is not None and slots.queue.queued >= slots.queue.capacity and not slots.queue.makes_room
        if full and not self.is_diverted and is_function(name, task):
            return self.refuse(name)
        return self.submit(self.make(name, task, args, kwargs))

    @overload
    def spawn_on_commit(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> None: ...

    @overload
    def spawn_on_commit(self, name: str, task: Awaitable[object], /) -> None: ...

    def spawn_on_commit(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> None:
        """Spawn `task` once the surrounding transaction has committed, or at once if there is none.

        Nothing is spawned if it is rolled back. The task's context is that of this call. The transaction is
        the one of the default database, as with Django's ``transaction.on_commit``, or of that which
        ``using(database=...)`` names.

        Raises:
            TypeError: As ``spawn``.
            SynchronousOnlyOperation: Called in async code. Use ``aspawn_on_commit`` there.
        """
        commit = OnCommit(self.submit, self.make(name, task, args, kwargs))
        try:
            transaction.on_commit(commit, using=self.database)
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
        commit = OnCommit(self.submit, self.make(name, task, args, kwargs))
        # On the thread of the caller's ORM calls, where its transaction is.
        await sync_to_async(transaction.on_commit)(commit, using=self.database)


class Using(Spawning):
    """A pool with options for what is spawned through it. It may be kept, and used again.

    >>> urgent = bgtasks.using(expires=5)
    >>> urgent.spawn("ping-partner", ping_partner, partner.pk)
    True
    """

    def __init__(
        self, submit: Callable[[Task], bool], defaults: Callable[[], Options], options: dict[str, Any]
    ) -> None:
        self._submit = submit  # of the pool
        self._defaults = defaults  # of the pool
        self.database = options.pop("database")
        self._options = {name: value for name, value in options.items() if value is not None}

    def __repr__(self) -> str:
        given = self._options if self.database is None else {**self._options, "database": self.database}
        return f"using({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def make(self, name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
        """Return the task that ``spawn`` asks for."""
        made = make_task(name, task, args, kwargs)
        if self._options.get("retries") and not callable(made.function):
            made.discard()
            raise TypeError(
                f"task {name!r} is a coroutine object, which cannot be tried again; pass the function itself"
            )
        return made

    def submit(self, task: Task) -> bool:
        """Have a `task` run with these options."""
        task.policy = policy_for(task, self._defaults()._replace(**self._options))
        return self._submit(task)


def policy_for(task: Task, options: Options) -> Policy:
    """Return what `options` mean for `task`."""
    if not callable(task.function) or isinstance(task.function, Recorded):
        options = options._replace(retries=0)  # a coroutine object runs once, and a result is written once
    return Policy(options, task.name, task.function, task.asynchronous, task.spawned_at)


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return `options`, as ``using`` was given them.

    Raises:
        TypeError: One has a wrong type.
        ValueError: One is out of range, or names no database.
    """
    _check_number(options, "expires", int | float)
    _check_number(options, "retry_delay", int | float)
    _check_number(options, "retries", int)
    for name in ("key", "database"):
        if not isinstance(options[name], str | None):
            raise TypeError(f"{name} must be a str, not {options[name]!r}")
    if options["key"] is not None:
        options["key"] = str.__str__(options["key"])  # of a SafeString, say
    if options["database"] is not None and options["database"] not in connections:
        raise ValueError(f"database is {options['database']!r}, which is no alias in DATABASES")
    if options["retry_on"] is not None:
        options["retry_on"] = _exception_classes(options["retry_on"])
    return options


def _exception_classes(value: Any) -> tuple[type[BaseException], ...]:
    kinds: Any = value if isinstance(value, tuple) else (value,)  # pyright: ignore[reportUnknownVariableType]
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        raise TypeError(f"retry_on must be an exception class or a tuple of these, not {value!r}")
    return cast(tuple[type[BaseException], ...], kinds)


def _check_number(options: dict[str, Any], name: str, kind: Any) -> None:
    value, least = options[name], 0
    if value is None:
        return
    what = "a whole number" if kind is int else "a number of seconds"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, not {value!r}")
    if not isfinite(value) or value < least or (name == "expires" and value == 0):
        raise ValueError(
            f"{name} must be {what}, {'above' if name == 'expires' else 'at least'} 0, not {value!r}"
        )
