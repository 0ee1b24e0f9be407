"""Propagators: what travels from the code that spawns a task to the task.

Context variables, the language, the time zone, the script prefix and the URL configuration always do. What a
project or a library keeps elsewhere, in a ``threading.local`` or on the database connection, needs a
propagator, named in BGTASKS_PROPAGATORS.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from django.conf import settings
from django.utils.module_loading import import_string

from bgtasks.conf import Problem
from bgtasks.exceptions import InvalidSettings, PayloadError
from bgtasks.repeats import report

__all__ = ["Propagator"]


class Propagator(ABC):
    """Carries one value from where a task is spawned to where it runs.

    One object serves the whole process, so it keeps nothing of a task in itself.

    >>> class CurrentTheme(Propagator):
    ...     def capture(self):
    ...         return themes.active()
    ...
    ...     def restore(self, value):
    ...         return themes.use(value)
    """

    @abstractmethod
    def capture(self) -> Any:
        """Return the value, in the code that spawns a task.

        If it raises, that is logged, and the task is dropped. A value that comes out of JSON as it went in
        travels with a handoff as well; a task with another value is not handed off.
        """

    @abstractmethod
    def restore(self, value: Any) -> AbstractContextManager[object]:
        """Return the context manager inside which the task runs.

        It is entered and left on the thread of the task's ORM calls. If this or its entry raises, the task
        fails without running. It does not receive exceptions of the task.
        """


class Carried(NamedTuple):
    """The value of one propagator, for one task."""

    path: str  # in BGTASKS_PROPAGATORS
    propagator: Propagator
    value: Any


# The setting.


def problems(value: Any) -> Iterator[Problem]:
    """Yield every mistake in `value`, the setting BGTASKS_PROPAGATORS."""
    if not isinstance(value, list | tuple):
        yield Problem(
            "bgtasks.E030",
            f"BGTASKS_PROPAGATORS is {value!r}, not a list of dotted paths.",
            'Write BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"].',
        )
        return
    paths = cast("Sequence[Any]", value)
    for number, path in enumerate(paths):
        where = f"BGTASKS_PROPAGATORS[{number}]"
        if path in paths[:number]:
            yield Problem(
                "bgtasks.E033", f"{where} is {path!r}, which is there twice.", "Remove one of the two."
            )
            continue
        try:
            propagator = import_string(path)()
        except Exception as error:
            yield Problem(
                "bgtasks.E031",
                f"{where} is {path!r}, which cannot be imported and called: {error}.",
                "Name a class by its dotted path; it is called without arguments.",
            )
            continue
        if not isinstance(propagator, Propagator):
            yield Problem(
                "bgtasks.E032",
                f"{where} is {path!r}, which is not a propagator.",
                "Derive the class from bgtasks.propagators.Propagator.",
            )


def load() -> list[tuple[str, Propagator]]:
    """Return the propagators of the project, each with its path.

    Raises:
        InvalidSettings: BGTASKS_PROPAGATORS has a mistake.
    """
    paths: Any = getattr(settings, "BGTASKS_PROPAGATORS", ())
    for problem in problems(paths):
        raise InvalidSettings(f"{problem.message} {problem.hint} ({problem.id})")
    return [(path, import_string(path)()) for path in paths]


# Where a task is spawned.


def capture(propagators: Sequence[tuple[str, Propagator]]) -> list[Carried] | None:
    """Return what they carry; None if one of them raises, which is logged."""
    carried: list[Carried] = []
    for path, propagator in propagators:
        try:
            carried.append(Carried(path, propagator, propagator.capture()))
        except Exception as error:
            report(logging.ERROR, "the propagator %r could not capture its value", path, error)
            return None
    return carried


# Where it runs.


# The context managers that are entered around the task.
restored: ContextVar[Sequence[tuple[str, AbstractContextManager[object]]]] = ContextVar(
    "bgtasks.restored", default=()
)


def enter(carried: Sequence[Carried]) -> None:
    """Enter what restores the values, in the current context. If one raises, those before it are left."""
    for path, propagator, value in carried:
        try:
            manager = propagator.restore(value)
            manager.__enter__()
        except BaseException as error:
            error.add_note(f"The propagator {path!r} has raised it, and the task has not run.")
            leave()
            raise
        restored.set((*restored.get(), (path, manager)))


def leave() -> None:
    """Leave what was entered, the last one first."""
    entered = restored.get()
    if not entered:
        return
    restored.set(())
    for path, manager in reversed(entered):
        try:
            manager.__exit__(None, None, None)
        except BaseException as error:
            report(logging.ERROR, "the propagator %r could not be left after a task", path, error)


# On the worker of an engine.


def named(values: dict[str, Any]) -> list[Carried]:
    """Return what a payload carries, for the propagators of this process.

    Raises:
        PayloadError: BGTASKS_PROPAGATORS does not name one of them here.
    """
    here = dict(load()) if values else {}
    if missing := values.keys() - here.keys():
        raise PayloadError(
            f"BGTASKS_PROPAGATORS does not name {', '.join(map(repr, sorted(missing)))} here, "
            "and the task may not run without it"
        )
    return [Carried(path, here[path], value) for path, value in values.items()]
