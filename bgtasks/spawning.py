"""Spawning: what pools have in common with ``using``, the options of a submission."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from math import isfinite
from typing import Any, NoReturn, ParamSpec, cast, overload

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections, transaction

from bgtasks.core.policy import Options, Policy
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.submission import DjangoTask, OnCommit, is_function, make_task

P = ParamSpec("P")


class Spawning(ABC):
    """What tasks are spawned on."""

    # Attributes of the instance, without defaults here, which would cost each spawn 0.1 µs.
    make: Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Task]  # the task that ``spawn`` asks for
    slots: Slots | None  # if its tasks are dropped when the queue is full
    is_diverted: bool  # its tasks go somewhere else than into its queue
    database: str | None = None  # alias of the one whose commit spawn_on_commit waits for

    @abstractmethod
    def submit(self, task: Task) -> bool:
        """Run a `task` that is already made. See ``spawn``."""

    def refuse(self, name: str) -> bool:
        """Drop a task called `name` without making it."""
        raise NotImplementedError

    @overload
    def spawn(
        self, name: str, task: Callable[P, object] | DjangoTask[P], /, *args: P.args, **kwargs: P.kwargs
    ) -> bool: ...

    @overload
    def spawn(self, name: str, task: Awaitable[object], /) -> bool: ...

    def spawn(self, name: str, task: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Run `task` in the background, and return at once.

        Never blocks, and never raises because of load or state. May be called from anywhere: sync and async
        code, threads, signal handlers.

        >>> bgtasks.spawn("send-welcome", send_welcome, user.pk)
        True

        Args:
            name: What the task is called in logs and figures. One name for each kind of task.
            task: A plain or ``async def`` function, a coroutine object, or a task made by
                ``@django.tasks.task``. Whatever awaitable a plain function returns is awaited.
            *args: Passed to `task`.
            **kwargs: Passed to `task`.

        Returns:
            True if the task was accepted; False if it was dropped, because the queue is full or shut down.

        Raises:
            TypeError: `name` is not a string, or `task` cannot be run.
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

        If the transaction is rolled back, nothing is spawned. The task's context is that of this call. The
        transaction is that of the default database, as with Django's ``transaction.on_commit``, or of the
        database that ``using(database=...)`` names.

        >>> with transaction.atomic():
        ...     bgtasks.spawn_on_commit("send-welcome", send_welcome, user.pk)

        Args:
            name: What the task is called in logs and figures. One name for each kind of task.
            task: As for ``spawn``.
            *args: Passed to `task`.
            **kwargs: Passed to `task`.

        Returns:
            None. Whether the task is accepted is not known before the commit.

        Raises:
            TypeError: `name` is not a string, or `task` cannot be run.
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
        """Spawn `task` as ``spawn_on_commit`` does, from async code.

        >>> async def view(request):
        ...     await bgtasks.aspawn_on_commit("send-welcome", send_welcome, request.user.pk)

        Args:
            name: What the task is called in logs and figures. One name for each kind of task.
            task: As for ``spawn``.
            *args: Passed to `task`.
            **kwargs: Passed to `task`.

        Returns:
            None. Whether the task is accepted is not known before the commit.

        Raises:
            TypeError: `name` is not a string, or `task` cannot be run.
        """
        commit = OnCommit(self.submit, self.make(name, task, args, kwargs))
        # On the thread of the caller's ORM calls, where its transaction is.
        await sync_to_async(transaction.on_commit)(commit, using=self.database)


class Using(Spawning):
    """A pool with options for what is spawned through it. It may be kept, and used again, and never changes.

    It has the pool's ``spawn``, ``spawn_on_commit`` and ``aspawn_on_commit``.

    >>> urgent = bgtasks.using(expires=5)
    >>> urgent.spawn("ping-partner", ping_partner, partner.pk)
    True
    """

    _submit: Callable[[Task], bool]  # of the pool
    _defaults: Callable[[], Options]  # of the pool
    _options: dict[str, Any]  # that were given, but for the database

    def __init__(
        self, submit: Callable[[Task], bool], defaults: Callable[[], Options], options: dict[str, Any]
    ) -> None:
        given = {name: value for name, value in options.items() if name != "database" and value is not None}
        vars(self).update(
            make=self._make,
            slots=None,
            is_diverted=False,
            database=options["database"],
            _submit=submit,
            _defaults=defaults,
            _options=given,
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{self!r} cannot be changed; call using() with other options")

    def __repr__(self) -> str:
        given = self._options if self.database is None else {**self._options, "database": self.database}
        return f"using({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _make(self, name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
        made = make_task(name, task, args, kwargs)
        if self._options.get("retries") and not callable(made.function):
            made.discard()
            raise TypeError(
                f"task {name!r} is a coroutine object, which cannot be tried again; pass the function itself"
            )
        return made

    def submit(self, task: Task) -> bool:
        """Run a `task` with these options."""
        task.policy = policy_for(task, self._defaults()._replace(**self._options))
        return self._submit(task)


def policy_for(task: Task, options: Options) -> Policy:
    """Return what `options` mean for `task`."""
    if not callable(task.function):
        options = options._replace(retries=0)  # a coroutine object runs once
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
