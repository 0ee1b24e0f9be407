"""What the mover needs of Django: in which form a task travels, and how the engine gets it.

A task made by ``@django.tasks.task`` travels as itself. A plain function travels inside the one task of
``bgtasks.tasks``, in a payload that is signed: whoever can write to the broker cannot name a function to run.
"""

from __future__ import annotations

import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import Context
from datetime import timedelta, tzinfo
from datetime import timezone as fixed_timezone
from functools import partial
from inspect import iscoroutine, iscoroutinefunction
from time import monotonic
from typing import Any, NamedTuple, cast
from zoneinfo import ZoneInfo

from asgiref.sync import async_to_sync
from django.apps import apps
from django.conf import settings
from django.core import signing
from django.db import InterfaceError, OperationalError, connections, models, router, transaction
from django.utils import timezone, translation
from django.utils.module_loading import import_string

from bgtasks.exceptions import PayloadError
from bgtasks.log import escaped, log
from bgtasks.mover import Fate, Parcel
from bgtasks.pools import _call_with_context
from bgtasks.queue import Recorded, Task
from bgtasks.shell import Shell

SALT = "bgtasks.handoff"
MAX_AGE = timedelta(days=7)  # of a payload: an engine that takes longer runs it no more
NAMES = 1000  # names of tasks that cannot travel which are told apart
COMMIT_GRACE = 5.0  # seconds after which a database other than PostgreSQL has committed or never will

BY_PATH = frozenset({"django_tasks_db", "django_tasks_rq", "huey"})  # packages of engines: see _runs_by_path

JSON_TYPES = (str, int, float, bool, types.NoneType)  # what comes out of JSON as it went in


class Content(NamedTuple):
    """What the engine is asked to enqueue."""

    task: Any  # of django.tasks, or the path of what the signed payload shall name
    args: list[Any]
    kwargs: dict[str, Any]


class Locale(NamedTuple):
    """The language and time zone that travel along; None is the default of the settings."""

    language: list[str | None] | None
    time_zone: str | int | None


class Receipt(NamedTuple):
    """What is known of a parcel whose transaction may have been committed."""

    result_id: str
    transaction: str | None  # PostgreSQL's number of it
    sent_at: float  # monotonic seconds


class CannotTravelError(Exception):
    """A task has to run in this process; the message says why, and is logged."""


class Handoff:
    """The engine of one pool. Implements bgtasks.mover.Engine."""

    def __init__(self, alias: str, pool: str, shell: Shell) -> None:
        self._alias = alias
        self._pool = pool
        self._shell = shell
        self._said: set[str] = set()  # names of tasks whose stay was logged; written by the mover's thread
        self._refused: weakref.WeakSet[Task] = weakref.WeakSet()  # by the engine; likewise

    @property
    def alias(self) -> str:
        """The engine's alias in TASKS."""
        return self._alias

    # Packing.

    def pack(self, task: Task) -> Parcel | None:
        """Return the task as it travels; None if it cannot, which is logged once for each name."""
        if task in self._refused:
            return None
        try:
            return Parcel(task, self._content(task))
        except CannotTravelError as reason:
            self._say(task, str(reason))
            return None

    def _say(self, task: Task, reason: str) -> None:
        if task.name not in self._said and len(self._said) < NAMES:
            self._said.add(task.name)
            message = "task %r of pool %r cannot be handed off to the engine %r, and runs here: %s"
            log(logging.WARNING, message, task.name, self._pool, self._alias, reason)

    def _content(self, task: Task) -> Content:
        locale = Context().run(_locale, self._shell, task)
        function = task.function
        engine = _backend(self._alias)
        if isinstance(function, Recorded):
            content = Content(*function.description())  # its arguments are JSON already
        else:
            args, kwargs = list(task.args), dict(task.kwargs)
            if not _is_json(args) or not _is_json(kwargs):
                raise CannotTravelError(_why_not_json([args, kwargs]))
            known = _known_task(function)
            if known is None:
                queue_name = _queue_name(engine, self._pool)
                return self._signed(Content(_path_of(function), args, kwargs), locale, queue_name)
            content = Content(known, args, kwargs)
        django_task = content.task
        # The signed one is a plain function, which every engine can run, and which every worker has.
        asynchronous = iscoroutinefunction(django_task.func) and not engine.supports_async_task
        if asynchronous or locale != DEFAULT_LOCALE or not _runs_by_path(engine):
            named = content._replace(task=django_task.module_path)
            return self._signed(named, locale, django_task.queue_name)
        return content._replace(task=_using(django_task, self._alias, django_task.queue_name))

    def _signed(self, content: Content, locale: Locale, queue_name: str) -> Content:
        payload = {
            "f": content.task,
            "a": content.args,
            "k": content.kwargs,
            "l": locale.language,
            "z": locale.time_zone,
        }
        carrier = import_string("bgtasks.tasks.run_function")
        return Content(_using(carrier, self._alias, queue_name), [sign(payload)], {})

    # Sending.

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Give the parcels to the engine, in one transaction if it is a database."""
        engine = _backend(self._alias)
        database = _database_of(engine)
        if database is None:
            self._send_each(engine, parcels)
        else:
            self._send_all(engine, parcels, database)

    def _send_each(self, engine: Any, parcels: Sequence[Parcel]) -> None:
        with _robust_receivers():
            for parcel in parcels:
                try:
                    _enqueue(engine, parcel)
                except (TypeError, ValueError, _invalid_task()) as error:
                    self._refuse(parcel, error)
                else:
                    parcel.fate = Fate.TAKEN

    def _send_all(self, engine: Any, parcels: Sequence[Parcel], database: str) -> None:
        connection = connections[database]
        with connection.execute_wrapper(counting := _Counting()):
            with transaction.atomic(using=database, durable=True):
                for parcel in parcels:
                    before = counting.statements
                    try:
                        _enqueue(engine, parcel)
                    except (OperationalError, InterfaceError):
                        raise  # the database, not the task
                    except Exception as error:
                        self._refuse(parcel, error)
                        if counting.statements != before:
                            # What it has written of this one must not be committed. Without it, the others
                            # are sent again.
                            transaction.set_rollback(True, using=database)
                            return
                    else:
                        if counting.statements == before:
                            parcel.fate = Fate.TAKEN  # the engine is no database, whatever its app says
                number = _transaction_number(connection)
                for parcel in parcels:
                    if parcel.fate is Fate.HERE:
                        parcel.receipt = Receipt(cast(str, parcel.receipt), number, monotonic())
                        # From here on an error does not say whether it was committed.
                        parcel.fate = Fate.UNSURE
        for parcel in parcels:
            if parcel.fate is Fate.UNSURE:
                parcel.fate = Fate.TAKEN

    def _refuse(self, parcel: Parcel, error: BaseException) -> None:
        parcel.fate = Fate.REFUSED
        self._refused.add(parcel.task)
        self._say(parcel.task, f"the engine refuses it with {type(error).__qualname__}")

    # After a commit that raised.

    def confirm(self, parcels: Sequence[Parcel]) -> None:
        """Ask the engine's database what has become of transactions whose commit raised."""
        engine = _backend(self._alias)
        database = _database_of(engine)
        assert database is not None  # or nothing was ever unsure
        connection = connections[database]
        connection.close_if_unusable_or_obsolete()
        statuses: dict[str, str | None] = {}
        for parcel in parcels:
            receipt = cast(Receipt, parcel.receipt)
            number = receipt.transaction
            if number is not None and number not in statuses:
                statuses[number] = _transaction_status(connection, number)
            status = None if number is None else statuses[number]
            if status is None:
                status = _status_by_result(engine, receipt, connection.vendor)
            if status == "committed":
                parcel.fate = Fate.TAKEN
            elif status == "aborted":
                parcel.fate = Fate.HERE


class _Counting:
    """Counts what is executed on one connection."""

    def __init__(self) -> None:
        self.statements = 0

    def __call__(self, execute: Callable[..., Any], *args: Any) -> Any:
        self.statements += 1
        return execute(*args)


def _backend(alias: str) -> Any:
    """Return the engine, as this thread knows it."""
    task_backends: Any = import_string("django.tasks.task_backends")
    return task_backends[alias]


def _invalid_task() -> type[Exception]:
    invalid: type[Exception] = import_string("django.tasks.exceptions.InvalidTask")
    return invalid


def _using(task: Any, alias: str, queue_name: str) -> Any:
    try:
        return task.using(backend=alias, queue_name=queue_name)
    except Exception as error:  # InvalidTask, or what a backend written for the backport has in its place
        raise CannotTravelError(f"the engine does not take it: {error}") from None


def _enqueue(engine: Any, parcel: Parcel) -> None:
    content = cast(Content, parcel.content)
    result = engine.enqueue(content.task, content.args, content.kwargs)
    parcel.receipt = result.id
    function = parcel.task.function
    if isinstance(function, Recorded):
        function.sent(engine.alias, result.id)


_here = threading.local()  # `robust` is set on a thread that is sending to a broker


@contextmanager
def _robust_receivers() -> Generator[None]:
    """Let no receiver of Django's ``task_enqueued`` undo, for this thread, what an engine has done.

    Engines send it out of ``enqueue``, most of them when the broker has the task. What a receiver raises then
    would look like a refusal, and the task would be run here as well. Django logs it instead.
    """
    for module in ("django.tasks.signals", "django_tasks.signals"):  # the second is that of the backport
        signal: Any = getattr(sys.modules.get(module), "task_enqueued", None)
        if signal is not None and not hasattr(signal.send, "bgtasks_robust"):
            signal.send = _robust_here(signal.send, signal.send_robust)  # two at once wrap it twice: no harm
    _here.robust = True
    try:
        yield
    finally:
        _here.robust = False


def _robust_here(send: Callable[..., Any], send_robust: Callable[..., Any]) -> Callable[..., Any]:
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (send_robust if getattr(_here, "robust", False) else send)(*args, **kwargs)

    vars(choose)["bgtasks_robust"] = True
    return choose


def _runs_by_path(engine: Any) -> bool:
    """Tell whether the engine's workers import a task by its path, so that they have every one.

    Celery's only run what was registered with them, and django-tasks-celery registers the tasks whose backend
    in TASKS is Celery itself. They would throw away those that belong to a PoolBackend.
    """
    modules = {kind.__module__.partition(".")[0] for kind in type(engine).__mro__}
    return bool(getattr(engine, "runs_by_path", False)) or not modules.isdisjoint(BY_PATH)


def _queue_name(engine: Any, pool: str) -> str:
    """Return the engine's queue for functions of a pool: that of its name, or else the default one."""
    if pool in engine.queues:
        return pool
    default: str = import_string("django.tasks.DEFAULT_TASK_QUEUE_NAME")
    return default if default in engine.queues or not engine.queues else min(engine.queues)


def _database_of(engine: Any) -> str | None:
    """Return the alias of the database in which the engine keeps its tasks; None if it has no models."""
    for kind in reversed(type(engine).__mro__):  # a project's own subclass last
        config = apps.get_containing_app_config(kind.__module__)
        for model in config.get_models() if config is not None else ():
            alias: str = router.db_for_write(model)
            return alias
    return None


def _transaction_number(connection: Any) -> str | None:
    if connection.vendor != "postgresql":
        return None
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()::text")
        [number] = cursor.fetchone()
        return cast(str, number)


def _transaction_status(connection: Any, number: str) -> str | None:
    """Return "committed", "aborted" or "in progress"; None if PostgreSQL no longer knows."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_xact_status(%s::xid8)", [number])
        [status] = cursor.fetchone()
        return cast("str | None", status)


def _status_by_result(engine: Any, receipt: Receipt, vendor: str) -> str | None:
    missing: type[Exception] = import_string("django.tasks.exceptions.TaskResultDoesNotExist")
    # The commit may still be under way on the other side of a lost connection.
    is_late = vendor == "sqlite" or monotonic() - receipt.sent_at > COMMIT_GRACE
    try:
        engine.get_result(receipt.result_id)
    except missing:
        return "aborted" if is_late else None
    return "committed"


# What can travel.


def _is_json(value: object) -> bool:
    """Tell whether `value` comes out of JSON as it went in. A tuple would come out as a list."""
    kind = type(value)
    if kind is dict:
        items = cast("dict[object, object]", value).items()
        return all(type(key) is str and _is_json(item) for key, item in items)
    if kind is list:
        return all(map(_is_json, cast("list[object]", value)))
    return kind in JSON_TYPES


def _why_not_json(value: object) -> str:
    """Return which type among the arguments cannot travel, and what to pass instead. No argument is shown."""
    if type(value) is dict:
        items = cast("dict[object, object]", value)
        for key in items:
            if type(key) is not str:
                return f"a dictionary in its arguments has a key of the type {_name_of(key)}, not a str"
        return _why_not_json([*items.values()])
    if type(value) is list:
        inner = cast("list[object]", value)
        return _why_not_json(next(item for item in inner if not _is_json(item)))
    if isinstance(value, models.Model):
        return f"its arguments hold a model instance, a {_name_of(value)}; pass its primary key"
    return (
        f"its arguments hold a {_name_of(value)}, which does not come out of JSON as it went in; pass text, "
        "numbers, True, False, None, lists, or dictionaries with text as keys"
    )


def _name_of(value: object) -> str:
    return escaped(type(value).__name__)


def _known_task(function: Any) -> Any | None:
    """Return the ``@django.tasks.task`` object that `function` comes from, or None."""
    if isinstance(function, partial) and function.func is _call_with_context:
        return function.args[0]
    found = _find(function)
    return found if _is_task(found) and found.func is function else None


def _is_task(value: Any) -> bool:
    """Tell whether `value` was made by ``@django.tasks.task``."""
    tasks: Any = sys.modules.get("django.tasks.base")
    return tasks is not None and isinstance(value, tasks.Task)


def _find(function: Any) -> Any:
    """Return what lies where `function` says it is defined."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(module, getattr(function, "__qualname__", ""), None)


def _path_of(function: Any) -> str:
    """Return the path under which a worker can import `function`.

    Raises:
        CannotTravelError: There is none.
    """
    if iscoroutine(function):
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


def _locale(shell: Shell, task: Task) -> Locale:
    """Return what is active in the context of `task`. Called in a context of its own."""
    shell.enter(task.context, task.captured)
    language = translation.get_language()
    zone = timezone.get_current_timezone()
    return Locale(
        None if language == settings.LANGUAGE_CODE else [language],
        None if zone == timezone.get_default_timezone() else _zone_name(zone),
    )


DEFAULT_LOCALE = Locale(None, None)


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


# Signed payloads, on both sides.


def sign(payload: dict[str, Any]) -> str:
    """Return `payload` as text that nobody without the SECRET_KEY can make."""
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
        What a ``django.tasks`` task returns. The value of a plain function is nobody's.

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
    is_task = _is_task(function)
    if is_task:
        task: Any = function
        function = task.func
        if task.takes_context:
            args = [_context_for(task, context, args, kwargs), *args]
    with _active(payload["l"], payload["z"]):
        if iscoroutinefunction(function):
            value = async_to_sync(function)(*args, **kwargs)
        else:
            value = function(*args, **kwargs)
            if iscoroutine(value):
                value = async_to_sync(_await)(value)
    return value if is_task else None


async def _await(coroutine: Any) -> Any:
    return await coroutine


def _context_for(task: Any, context: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return the context that the engine would give to `task` itself."""
    from django.tasks import TaskContext

    from bgtasks.backends import _write, snapshot

    result = snapshot(context.task_result)
    _write(result, task=task, args=args, kwargs=kwargs)
    return TaskContext(task_result=result)


@contextmanager
def _active(language: list[str | None] | None, zone: str | int | None) -> Any:
    tag = settings.LANGUAGE_CODE if language is None else language[0]
    with translation.override(tag), timezone.override(_zone(zone)):
        yield
