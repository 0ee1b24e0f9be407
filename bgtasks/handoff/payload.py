"""What can travel to a worker of the engine, and how the worker runs it.

A task made by ``@django.tasks.task`` travels as itself. A plain function travels inside the one task of
``bgtasks.tasks``, in a payload that is signed: somebody who can write to the broker still cannot name a
function to run.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
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
from django.urls import get_script_prefix, get_urlconf, set_script_prefix, set_urlconf
from django.utils import timezone, translation
from django.utils.module_loading import import_string

from bgtasks import propagators
from bgtasks.context import Captured, fill
from bgtasks.core.task import Task, as_coroutine
from bgtasks.django_tasks import call_with_context, is_task
from bgtasks.exceptions import PayloadError
from bgtasks.text import escaped

SALT = "bgtasks.handoff"
MAX_AGE = timedelta(days=7)  # of a payload: it is not run if the engine takes longer
JSON_TYPES = (str, int, float, bool, types.NoneType)  # what comes out of JSON as it went in
DEPTH_MAX = 100  # lists and dictionaries in each other; Python's reader and writer of JSON are recursive
INT_BITS = 14_284  # of 4,300 digits: Python reads and writes no longer number by default
TOO_DEEP = f"its arguments are nested more than {DEPTH_MAX} levels deep; pass text, or a key to look them up"
TOO_LONG = "its arguments hold an int of more than 4300 digits; pass it as text, such as hex(number)"


class CannotTravelError(Exception):
    """A task has to run in this process; the message says why, and is logged."""


class Surroundings(NamedTuple):
    """What is sent with a call; None stands for a worker's own value."""

    language: list[str | None] | None = None
    time_zone: str | int | None = None
    script_prefix: str | None = None
    urlconf: str | None = None
    carried: dict[str, Any] | None = None  # values of propagators, by their paths


NO_SURROUNDINGS = Surroundings()


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
        return f"its arguments hold an instance of the model {_name_of(value)}; pass its primary key"
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


# What is sent with a call.


def surroundings_of(task: Task) -> Surroundings:
    """Return the language, time zone, URLs and propagated values of the place where `task` was spawned.

    Raises:
        CannotTravelError: One of them cannot be told to a worker.
    """
    return Context().run(_surroundings, task)


def _surroundings(task: Task) -> Surroundings:
    fill(task.context, task.captured)
    language = translation.get_language()
    zone = timezone.get_current_timezone()
    prefix = get_script_prefix()
    return Surroundings(
        None if language == settings.LANGUAGE_CODE else [language],
        None if zone == timezone.get_default_timezone() else _zone_name(zone),
        None if prefix == "/" else prefix,
        _urlconf_name(get_urlconf()),
        _carried(task.captured),
    )


def _urlconf_name(urlconf: Any) -> str | None:
    if urlconf is None or urlconf == settings.ROOT_URLCONF:
        return None
    if not isinstance(urlconf, str):
        raise CannotTravelError("its URL configuration is not the name of a module")
    return urlconf


def _carried(captured: object) -> dict[str, Any] | None:
    if not isinstance(captured, Captured):
        return None
    for path, _, value in captured.carried:
        if why_not_json(value) is not None:
            kind = _name_of(value)
            raise CannotTravelError(
                f"the propagator {path!r} carries a {kind}, which does not come out of JSON as it went in"
            )
    return {path: value for path, _, value in captured.carried}


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


def sign(path: str, args: list[Any], kwargs: dict[str, Any], along: Surroundings) -> str:
    """Return a call of the function at `path` as text that nobody without the SECRET_KEY can make."""
    payload = {"f": path, "a": args, "k": kwargs, "l": along.language, "z": along.time_zone}
    rest = {"s": along.script_prefix, "u": along.urlconf, "p": along.carried}
    payload |= {key: value for key, value in rest.items() if value is not None}
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
            f"the function was handed off more than {MAX_AGE.days} days ago, and is no longer run"
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
    along = Surroundings(*map(payload.get, "lzsup"))
    with _active(along):
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
def _active(along: Surroundings) -> Generator[None]:
    tag = settings.LANGUAGE_CODE if along.language is None else along.language[0]
    carried = propagators.named(along.carried or {})
    with ExitStack() as stack:
        stack.enter_context(translation.override(cast(Any, tag)))
        stack.enter_context(timezone.override(_zone(along.time_zone)))
        stack.callback(set_script_prefix, get_script_prefix())
        set_script_prefix(along.script_prefix or get_script_prefix())
        stack.callback(set_urlconf, get_urlconf())
        set_urlconf(along.urlconf or get_urlconf())
        for _, propagator, value in carried:
            stack.enter_context(propagator.restore(value))
        yield
