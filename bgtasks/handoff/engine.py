"""The durable engine of a pool: in which form a task travels to it, and what it has after each failure."""

from __future__ import annotations

import enum
import logging
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import iscoroutinefunction
from typing import Any, NamedTuple, cast

from django.apps import apps
from django.db import InterfaceError, OperationalError, connections, router, transaction
from django.utils.module_loading import import_string

from bgtasks.clock import monotonic
from bgtasks.core.log import log
from bgtasks.core.task import Task
from bgtasks.django_tasks import seconds_until
from bgtasks.handoff import payload
from bgtasks.handoff.payload import CannotTravelError, Surroundings
from bgtasks.hooks import Recorded

NAMES = 1000  # names of tasks that cannot travel that are kept separate
COMMIT_GRACE = 5.0  # seconds after which a database other than PostgreSQL has committed or never will

BY_PATH = frozenset({"django_tasks_db", "django_tasks_rq", "huey"})  # packages of engines: see _runs_by_path


class Content(NamedTuple):
    """What the engine is asked to enqueue."""

    task: Any  # of django.tasks
    args: list[Any]
    kwargs: dict[str, Any]


class Receipt(NamedTuple):
    """What is known of a parcel whose transaction may have been committed."""

    result_id: str
    transaction: str | None  # PostgreSQL's number of it
    sent_at: float  # monotonic seconds


class Fate(enum.Enum):
    """What is known of a task that is sent. Written by the engine."""

    HERE = "here"  # the engine does not have it
    UNSURE = "unsure"  # the engine may have it
    TAKEN = "taken"  # the engine has it
    REFUSED = "refused"  # the engine does not have it, and need not be asked again


class Parcel:
    """One task in the form in which it travels."""

    __slots__ = ("content", "fate", "receipt", "task")

    def __init__(self, task: Task, content: Content) -> None:
        self.task = task
        self.content = content
        self.receipt: object = None  # a Receipt if the fate is UNSURE
        self.fate = Fate.HERE


class Engine:
    """The engine of one pool. Called on the mover's thread only, but for what is enqueued for later."""

    def __init__(self, alias: str, pool: str) -> None:
        self.alias = alias  # in TASKS
        self._pool = pool
        self._logged: set[str] = set()  # names of tasks of which it was logged that they cannot travel

    # Packing.

    def pack(self, task: Task) -> Parcel | None:
        """Return the task as it travels; None if it cannot, which is logged once for each name."""
        try:
            return Parcel(task, self.content(task))
        except CannotTravelError as reason:
            self._log_stay(task, str(reason))
        except Exception as error:
            if self._is_new(task):
                message = "task %r of pool %r could not be packed, and runs here"
                log(logging.ERROR, message, task.name, self._pool, error=error)
        return None

    def _log_stay(self, task: Task, reason: str) -> None:
        if self._is_new(task):
            message = "task %r of pool %r cannot be handed off to the engine %r, and runs here: %s"
            log(logging.WARNING, message, task.name, self._pool, self.alias, reason)

    def _is_new(self, task: Task) -> bool:
        """Tell whether it was not logged yet that a task of this name stays. From now on it was."""
        new = task.name not in self._logged and len(self._logged) < NAMES
        if new:
            self._logged.add(task.name)
        return new

    def content(self, task: Task) -> Content:
        """Return what the engine is to enqueue.

        Raises:
            CannotTravelError: The task has to stay.
        """
        along = payload.surroundings_of(task)
        engine = backend(self.alias)
        function = task.function
        if isinstance(function, Recorded):
            if task.policy.options.expires is not None:
                raise CannotTravelError("it expires, and a worker would run it however old it is")
            known, args, kwargs = function.description()
        else:
            known, args, kwargs = payload.known_task(function), [*task.args], {**task.kwargs}
        reason = payload.why_not_json(args) or payload.why_not_json(kwargs)
        if reason is not None:
            raise CannotTravelError(reason)
        if known is None:
            path, queue = payload.path_of(function), queue_name(engine, self._pool)
            return self._signed(None, path, args, kwargs, along, queue)
        # The signed one is a plain function, which every engine can run, and which every worker has.
        asynchronous = iscoroutinefunction(known.func) and not engine.supports_async_task
        if asynchronous or along != payload.NO_SURROUNDINGS or not _runs_by_path(engine):
            return self._signed(known, known.module_path, args, kwargs, along, known.queue_name)
        return Content(_using(known, self.alias, known.queue_name, known), args, kwargs)

    def _signed(  # noqa: PLR0917
        self, known: Any, path: str, args: list[Any], kwargs: dict[str, Any], along: Surroundings, queue: str
    ) -> Content:
        carrier = _using(import_string("bgtasks.tasks.run_function"), self.alias, queue, known)
        return Content(carrier, [payload.sign(path, args, kwargs, along)], {})

    # Sending.

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Give the parcels to the engine, in one transaction if it is a database, and write the fate of each.

        Whatever it raises, the fates are right: the engine certainly has none that is HERE or REFUSED.
        """
        engine = backend(self.alias)
        database = database_of(engine)
        if database is None:
            self._send_each(engine, parcels)
        else:
            self._send_all(engine, parcels, database)

    def give(self, content: Content, task: Task) -> None:
        """Give one task to the engine, for the code that enqueues it. Raises what the engine raises."""
        _enqueue(backend(self.alias), Parcel(task, content))

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
                    if not self._write(engine, parcel, counting):
                        # What it has written of this one must not be committed. Without it, the others
                        # are sent again.
                        transaction.set_rollback(True, using=database)
                        return
                number = transaction_number(connection)
                for parcel in parcels:
                    if parcel.fate is Fate.HERE:
                        parcel.receipt = Receipt(cast(str, parcel.receipt), number, monotonic())
                        # From here on an error does not say whether it was committed.
                        parcel.fate = Fate.UNSURE
        for parcel in parcels:
            if parcel.fate is Fate.UNSURE:
                parcel.fate = Fate.TAKEN

    def _write(self, engine: Any, parcel: Parcel, counting: _Counting) -> bool:
        """Enqueue one parcel inside a transaction; False if the engine refuses it and has written of it."""
        before = counting.statements
        try:
            _enqueue(engine, parcel)
        except (OperationalError, InterfaceError):
            raise  # the database, not the task
        except Exception as error:
            self._refuse(parcel, error)
            return counting.statements == before
        if counting.statements == before:
            parcel.fate = Fate.TAKEN  # the engine is no database, whatever its app says
        return True

    def _refuse(self, parcel: Parcel, error: BaseException) -> None:
        parcel.fate = Fate.REFUSED
        self._log_stay(parcel.task, f"the engine refuses it with {type(error).__qualname__}")

    # After a commit that raised.

    def confirm(self, parcels: Sequence[Parcel]) -> None:
        """Ask the engine's database what has become of UNSURE parcels. What remains UNSURE is asked again."""
        engine = backend(self.alias)
        database = database_of(engine)
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
                status = status_by_result(engine, receipt, connection.vendor)
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


# The backend in TASKS.


def backend(alias: str) -> Any:
    """Return the engine, as this thread knows it."""
    task_backends: Any = import_string("django.tasks.task_backends")
    return task_backends[alias]


def queue_name(engine: Any, pool: str) -> str:
    """Return the engine's queue for functions of a pool: that of its name, or else the default one."""
    if pool in engine.queues:
        return pool
    default: str = import_string("django.tasks.DEFAULT_TASK_QUEUE_NAME")
    return default if default in engine.queues or not engine.queues else min(engine.queues)


def _runs_by_path(engine: Any) -> bool:
    """Tell whether the engine's workers import a task by its path, so that they have every one.

    Celery's only run what was registered with them, and django-tasks-celery registers the tasks whose backend
    in TASKS is Celery itself. They would throw away those that belong to a PoolBackend.
    """
    modules = {kind.__module__.partition(".")[0] for kind in type(engine).__mro__}
    return bool(getattr(engine, "runs_by_path", False)) or not modules.isdisjoint(BY_PATH)


def _invalid_task() -> type[Exception]:
    invalid: type[Exception] = import_string("django.tasks.exceptions.InvalidTask")
    return invalid


def _using(task: Any, alias: str, queue: str, known: Any) -> Any:
    """Return the `task` for the engine, with the priority and ``run_after`` of the `known` one, if any.

    A priority is left out if the engine supports none, and a time that has passed in any case.
    """
    changes: dict[str, Any] = {"backend": alias, "queue_name": queue}
    if known is not None:
        prioritizes = getattr(backend(alias), "supports_priority", False)
        changes["priority"] = known.priority if prioritizes else 0
        changes["run_after"] = known.run_after if seconds_until(known.run_after) > 0 else None
    try:
        return replace(task, **changes)
    except Exception as error:  # InvalidTask, or what a backend written for the backport has in its place
        raise CannotTravelError(f"the engine does not accept it: {error}") from None


def _enqueue(engine: Any, parcel: Parcel) -> None:
    result = engine.enqueue(*parcel.content)
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


# The database of the engine, if it has one.


def database_of(engine: Any) -> str | None:
    """Return the alias of the database in which the engine keeps its tasks; None if it has no models."""
    for kind in reversed(type(engine).__mro__):  # a project's own subclass last
        config = apps.get_containing_app_config(kind.__module__)
        for model in config.get_models() if config is not None else ():
            alias: str = router.db_for_write(model)
            return alias
    return None


def transaction_number(connection: Any) -> str | None:
    """Return PostgreSQL's number of the transaction under way; None on another database."""
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


def status_by_result(engine: Any, receipt: Receipt, vendor: str) -> str | None:
    """Return "committed" or "aborted", by whether the engine knows the result; None if it is too early."""
    missing: type[Exception] = import_string("django.tasks.exceptions.TaskResultDoesNotExist")
    # The commit may still be under way on the other side of a lost connection.
    is_late = vendor == "sqlite" or monotonic() - receipt.sent_at > COMMIT_GRACE
    try:
        engine.get_result(receipt.result_id)
    except missing:
        return "aborted" if is_late else None
    return "committed"
