"""What can travel to a worker of the engine, and how the worker runs it.

A task made by ``@django.tasks.task`` travels as itself. A plain function travels inside the one task of
``bgtasks.tasks``, in a payload that is signed: somebody who can write to the broker still cannot name a
function to run.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import Context
from datetime import timedelta, tzinfo
from datetime import timezone as fixed_timezone
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, NamedTuple, cast
from zoneinfo import ZoneInfo

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core import signing
from django.db import models
from django.utils import timezone, translation
from django.utils.module_loading import import_string

from bgtasks.core.log import escaped
from bgtasks.core.task import Hooks, Task, as_coroutine
from bgtasks.django_tasks import call_with_context, is_task
from bgtasks.exceptions import PayloadError

SALT = "bgtasks.handoff"
MAX_AGE = timedelta(days=7)  # of a payload: it is not run if the engine takes longer
JSON_TYPES = (str, int, float, bool, types.NoneType)  # what comes out of JSON as it went in
DEPTH_MAX = 100  # lists and dictionaries in each other; Python's reader and writer of JSON are recursive
INT_BITS = 14_284  # of 4,300 digits: Python reads and writes no longer number by default
TOO_DEEP = f"its arguments are nested more than {DEPTH_MAX} levels deep; pass text, or a key to look them up"
TOO_LONG = "its arguments hold an int of more than 4300 digits; pass it as text, such as hex(number)"


class CannotTravelError(Exception):
    """A task has to run in this process; the message says why, and is logged."""


class Locale(NamedTuple):
    """The language and time zone that travel along; None is the default of the settings."""

    language: list[str | None] | None
    time_zone: str | int | None


DEFAULT_LOCALE = Locale(None, None)


# What can travel.


def why_not_json(value: object, depth: int = DEPTH_MAX) -> str | None:
    """Return what in `value` does not come out of JSON as it went in, and what to pass; None if all does.

    No argument is shown. At most `depth` levels of lists and dictionaries are looked at: one more is a reason
    to stay here, and so is a list that contains itself.
    """
    kind = type(value)
    if kind in JSON_TYPES:
        return TOO_LONG if kind is int and cast(int, value).bit_length() > INT_BITS else None
    if kind is not dict and kind is not list:  # a tuple would come out as a list
        return _why_not_type(value)
    if not depth:
        return TOO_DEEP
    items: Iterable[object] = cast("list[object]", value)
    if kind is dict:
        mapping = cast("dict[object, object]", value)
        for key in mapping:
            if type(key) is not str:
                return f"a dictionary in its arguments has a key of the type {_name_of(key)}, not a str"
        items = mapping.values()
    return next(filter(None, (why_not_json(item, depth - 1) for item in items)), None)


def _why_not_type(value: object) -> str:
    if isinstance(value, models.Model):
        return f"its arguments hold a model instance, a {_name_of(value)}; pass its primary key"
    return (
        f"its arguments hold a {_name_of(value)}, which does not come out of JSON as it went in; pass text, "
        "numbers, True, False, None, lists, or dictionaries with text as keys"
    )


def _name_of(value: object) -> str:
    return escaped(type(value).__name__)


def known_task(function: Any) -> Any | None:
    """Return the ``@django.tasks.task`` object that `function` comes from, or None."""
    if isinstance(function, partial) and function.func is call_with_context:
        return function.args[0]
    found = _find(function)
    return found if is_task(found) and found.func is function else None


def _find(function: Any) -> Any:
    """Return what lies where `function` says it is defined; None if it has no name, as most objects."""
    if not isinstance(function, types.FunctionType | types.BuiltinFunctionType):
        return None
    module = sys.modules.get(function.__module__ or "")
    return getattr(module, function.__qualname__, None)


def path_of(function: Any) -> str:
    """Return the path under which a worker can import `function`.

    Raises:
        CannotTravelError: There is none.
    """
    if not callable(function):
        raise CannotTravelError("it is a coroutine object; pass the function and its arguments")
    if not isinstance(function, types.FunctionType | types.BuiltinFunctionType):
        raise CannotTravelError(f"it is a {type(function).__qualname__}, not a function of a module")
    name = function.__qualname__
    if function.__name__ == "<lambda>":
        raise CannotTravelError("it is a lambda")
    if "<locals>" in name:
        raise CannotTravelError("it is defined inside another function")
    if function.__module__ == "__main__":
        raise CannotTravelError("it is defined in the script that was started, which a worker cannot import")
    if _find(function) is not function:
        raise CannotTravelError("it is not what its module has under its name")
    return f"{function.__module__}.{name}"


# Language and time zone.


def locale_of(hooks: Hooks, task: Task) -> Locale:
    """Return the language and time zone that were active where `task` was spawned.

    Raises:
        CannotTravelError: The time zone has no name.
    """
    return Context().run(_locale, hooks, task)


def _locale(hooks: Hooks, task: Task) -> Locale:
    hooks.enter(task.context, task.captured)
    language = translation.get_language()
    zone = timezone.get_current_timezone()
    return Locale(
        None if language == settings.LANGUAGE_CODE else [language],
        None if zone == timezone.get_default_timezone() else _zone_name(zone),
    )


def _zone_name(zone: tzinfo) -> str | int:
    if isinstance(zone, ZoneInfo) and zone.key:
        return zone.key
    offset = zone.utcoffset(None)
    if offset is None:
        raise CannotTravelError("its time zone has no name")
    return round(offset.total_seconds())


def _zone(name: str | int | None) -> tzinfo:
    if name is None:
        return timezone.get_default_timezone()
    return ZoneInfo(name) if isinstance(name, str) else fixed_timezone(timedelta(seconds=name))


# Signed payloads.


def sign(path: str, args: list[Any], kwargs: dict[str, Any], locale: Locale) -> str:
    """Return a call of the function at `path` as text that nobody without the SECRET_KEY can make."""
    payload = {"f": path, "a": args, "k": kwargs, "l": locale.language, "z": locale.time_zone}
    return signing.dumps(payload, salt=SALT, compress=True)


def unsign(text: str) -> dict[str, Any]:
    """Return the payload of a signed text.

    Raises:
        PayloadError: It was forged, or is too old.
    """
    try:
        payload: dict[str, Any] = signing.loads(text, salt=SALT, max_age=MAX_AGE)
    except signing.SignatureExpired:
        raise PayloadError(
            f"the function was handed off more than {MAX_AGE.days} days ago, and is not run any more"
        ) from None
    except Exception:
        raise PayloadError(
            "the payload was not signed by this project, or with another SECRET_KEY; nothing was run"
        ) from None
    return payload


def run(context: Any, text: str) -> Any:
    """Run, on a worker, the function of a signed payload.

    Returns:
        What a ``django.tasks`` task returns. The value of a plain function is not kept.

    Raises:
        PayloadError: The payload is forged, expired, or names a function that is not there.
    """
    payload = unsign(text)
    path = payload["f"]
    try:
        function = import_string(path)
    except ImportError as error:
        raise PayloadError(
            f"the function {path!r} cannot be imported here; does the worker run the same code? ({error})"
        ) from error
    args, kwargs = payload["a"], payload["k"]
    returns = is_task(function)
    if returns:
        task: Any = function
        function = task.func
        if task.takes_context:
            args = [_context_for(task, context, args, kwargs), *args]
    with _active(payload["l"], payload["z"]):
        if iscoroutinefunction(function):
            value = async_to_sync(function)(*args, **kwargs)
        else:
            value = function(*args, **kwargs)
            if (coroutine := as_coroutine(value)) is not None:
                value = async_to_sync(_await)(coroutine)
    return value if returns else None


async def _await(coroutine: Any) -> Any:
    return await coroutine


def _context_for(task: Any, context: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return the context that the engine would give to `task` itself."""
    from django.tasks import TaskContext

    from bgtasks.results import snapshot, write

    result = snapshot(context.task_result)
    write(result, task=task, args=args, kwargs=kwargs)
    return TaskContext(task_result=result)


@contextmanager
def _active(language: list[str | None] | None, zone: str | int | None) -> Generator[None]:
    tag = settings.LANGUAGE_CODE if language is None else language[0]
    with translation.override(cast(Any, tag)), timezone.override(_zone(zone)):
        yield
