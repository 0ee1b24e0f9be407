"""Making a task of what ``spawn`` was given."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import FunctionType
from typing import Any, ParamSpec, Protocol

from django.conf import settings
from django.core import mail

from bgtasks import context, django_tasks
from bgtasks.clock import monotonic
from bgtasks.core.task import Task, as_coroutine
from bgtasks.hooks import misplaced_option
from bgtasks.text import encodable

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_COROUTINE = inspect.CO_COROUTINE

_MAIL = vars(mail)  # Django's test environment, and only that, puts an outbox there

P = ParamSpec("P")


class Development:
    """Whether DEBUG is on. To look it up would cost each spawn 0.1 µs."""

    debug = False

    @classmethod
    def configure(cls) -> None:
        """Look at the setting: the process starts, or it was overridden."""
        cls.debug = settings.DEBUG


class DjangoTask(Protocol[P]):
    """A task made by ``@django.tasks.task`` (Django 6.0)."""

    @property
    def func(self) -> Callable[P, object]:
        """The decorated function."""
        ...


def make_task(name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    """Return the task that ``spawn(name, task, *args, **kwargs)`` asks for, with the caller's context.

    Raises:
        TypeError: `name` is not a string, or `task` is nothing that can be run.
    """
    if type(name) is not str or not name.isascii():
        name = _plain_name(name, task)
    try:
        flags = task.__code__.co_flags
    except Exception:
        flags = None  # it is no function, or has a ``__getattr__`` that raises
    if type(flags) is not int:  # a proxy has every attribute
        task, asynchronous = _resolve(name, task, args, kwargs)
    else:
        if flags & _GENERATOR and not flags & inspect.CO_ITERABLE_COROUTINE:
            raise TypeError(
                f"task {name!r} is a generator function; calling it only creates a generator, "
                "and its body would never run"
            )
        asynchronous = flags & _COROUTINE != 0
    if Development.debug or "outbox" in _MAIL:
        _check_call(name, task, args, kwargs)
    return Task(name, task, args, kwargs, asynchronous, copy_context(), context.capture())


def is_function(name: object, task: Any) -> bool:
    """Tell whether these are an ordinary name and function, which need no closer look."""
    return (
        type(name) is str
        and name.isascii()
        and type(task) is FunctionType
        and not task.__code__.co_flags & _GENERATOR
    )


def _plain_name(name: object, task: object) -> str:
    if not isinstance(name, str):
        _close(task)
        called = getattr(name, "__name__", "")
        hint = f"; write spawn({called!r}, {called}, ...)" if type(name) is FunctionType else ""
        raise TypeError(f"the name of a task must be a str, not {name!r}{hint}")
    return encodable(str.__str__(name))  # of a StrEnum or a SafeString


def _check_call(name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError if `task` takes no such arguments, where it is developed or tested.

    Elsewhere the task fails. A wrapper is asked itself, as it may pass others than it is given.
    """
    try:
        signature = inspect.signature(task, follow_wrapped=False) if callable(task) else None
    except Exception:
        return  # it is written in C, or a ``__getattr__`` that raises
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            why = (
                f"task {name!r} cannot be called with these arguments: {error}{misplaced_option(str(error))}"
            )
            raise TypeError(why) from None


def _close(task: object) -> None:
    """Close a coroutine object that will not run, so that Python does not warn of it."""
    if not callable(task) and (coroutine := as_coroutine(task)) is not None:
        coroutine.close()


def _resolve(name: str, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Return what to run of a `task` that is no function, and whether it is asynchronous."""
    if django_tasks.is_task(task):
        function = partial(django_tasks.call_with_context, task) if task.takes_context else task.func
        return function, inspect.iscoroutinefunction(task.func)
    if callable(task):
        return task, _is_asynchronous(task)
    if asyncio.isfuture(task):
        raise TypeError(
            f"task {name!r} is {task!r}, which runs on the event loop that it was made on; "
            "pass the function itself and its arguments, not the result of calling it"
        )
    coroutine = as_coroutine(task)
    if coroutine is None:
        raise TypeError(
            f"task {name!r} is {task!r}, which cannot be called; "
            "pass the function itself and its arguments, not the result of calling it"
        )
    if args or kwargs:
        coroutine.close()
        raise TypeError(f"task {name!r} is a coroutine object, which takes no arguments")
    return coroutine, True


def _is_asynchronous(task: Any) -> bool:
    """Tell whether a callable is known to return an awaitable. Every result is checked anyway."""
    try:
        return inspect.iscoroutinefunction(task) or inspect.iscoroutinefunction(type(task).__call__)
    except Exception:
        return False  # its ``__getattr__`` raises


class OnCommit:
    """Submits a task when a transaction commits. If it never does, a coroutine object is closed."""

    def __init__(self, submit: Callable[[Task], object], task: Task) -> None:
        self.name = task.name
        self._submit = submit
        self._task: Task | None = task

    def __call__(self) -> None:
        """Submit the task, unless that was done before."""
        task, self._task = self._task, None
        if task is not None:
            task.spawned_at = monotonic()
            self._submit(task)

    def __del__(self) -> None:
        if self._task is not None:
            self._task.discard()
