"""What the core needs of Django, and nothing more: the context of a task, and the connections of a slot."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextvars import Context
from datetime import tzinfo
from threading import get_ident
from typing import Any, ClassVar, NamedTuple, Protocol

from asgiref.local import Local
from django.core.cache import caches
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.dispatch import Signal
from django.utils import timezone, translation
from django.utils.translation import trans_real

from bgtasks.log import log
from bgtasks.queue import DropReason, Outcome, Recorded, Task
from bgtasks.signals import task_dropped, task_finished, task_spawned, task_started

NOT_RUN = frozenset({Outcome.CANCELLED, Outcome.HANDED_OFF})  # outcomes of which a task does not know itself

# What a copied context carries of the spawner's thread, by the names of asgiref's context variables:
# thread-tagged storage (it holds the request's cache connections, which sync_to_async would bring to life
# again inside the task) and the executor on which the request runs its thread-sensitive calls.
THREAD_BOUND = frozenset(
    {"asgiref.local", "async_single_thread_context", "deadlock_context", "thread_sensitive_context"}
)


# What is private in there has no type.
_caches: Any = caches
_connections: Any = connections
_timezone: Any = timezone
_translation: Any = trans_real


def _moved(stored: Any) -> Any:
    """Return what asgiref would keep if the calling thread had stored the same."""
    return type(stored)(get_ident(), stored.data)


class Scope(NamedTuple):
    """The language and time zone that are active where a task is spawned.

    Django keeps both in asgiref's ``Local``, which tags its data with a thread: in a copied context they
    are invisible on any other, and a French user's mail would go out in English.
    """

    language: str | None
    time_zone: tzinfo

    @classmethod
    def capture(cls) -> Scope:
        """Return the scope of the caller."""
        return cls(translation.get_language(), timezone.get_current_timezone())

    def activate(self) -> None:
        """Make it the scope of the caller."""
        if self.language is None:
            translation.deactivate_all()
        else:
            translation.activate(self.language)
        timezone.activate(self.time_zone)


def _understands_asgiref() -> bool:
    """Tell whether the data inside a ``Local`` can be moved to another thread as we do it. Tries it.

    To ask the Local itself takes a lock that all threads share, and up to 3 µs, several times a task. What is
    inside is asgiref's own business: if it changes, we go the longer way through public names.
    """
    local: Any = Local()

    def try_it() -> bool:
        local.value = "moved"
        variable = local._storage._data
        stored = variable.get()
        elsewhere = Context()
        elsewhere.run(variable.set, _moved(stored))
        return bool(stored.thread_id == get_ident() and elsewhere.run(getattr, local, "value") == "moved")

    try:
        return Context().run(try_it)
    except Exception:
        return False


UNDERSTANDS_ASGIREF = _understands_asgiref()

# Where a task is spawned, returns what ``Shell.enter`` needs beside a copy of the context: the thread with
# which asgiref has tagged the language and time zone in there, or else these two themselves.
capture: Callable[[], object] = get_ident if UNDERSTANDS_ASGIREF else Scope.capture


def open_connections() -> list[BaseDatabaseWrapper]:
    """Return the database connections that the calling thread has, opened or not."""
    try:
        # On a thread without a running loop the Local has one attribute for each alias. To ask Django costs
        # 0.5 µs an alias, after every task, and most tasks that have used one have used the same one.
        mine: dict[str, object] = _connections._connections._storage.__dict__
    except (AttributeError, TypeError):
        return list(connections.all(initialized_only=True))
    return [connection for connection in mine.values() if isinstance(connection, BaseDatabaseWrapper)]


def close_connections() -> None:
    """Close the database connections of this thread."""
    for connection in open_connections():
        try:
            connection.close()
            if connection.connection is not None and not connection.in_atomic_block:
                # SQLite in memory, as in tests, where Django's own close() does nothing, so as not to lose
                # the data. Those of a test are kept by the connection of the thread that runs it.
                BaseDatabaseWrapper.close(connection)
        except Exception as error:
            log(logging.ERROR, "connection %r could not be closed", connection.alias, error=error)


class Tracer(Protocol):
    """Who follows each task from its spawn to its end. It may raise: that is logged."""

    def spawn(self, pool: str, task: Task, submit: Callable[[], bool]) -> bool:
        """Call `submit` and return what it returns. The task's context may be written to before that."""
        ...

    def refused(self, pool: str, name: str) -> None:
        """Hear that a task called `name` was not even made: the pool is full."""
        ...

    def started(self, pool: str, task: Task) -> None:
        """Hear that `task` starts. Called in the task's context."""
        ...

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Hear that `task` has ended. Called in the task's context if it has run to its end."""
        ...


class Shell:
    """The hooks of one pool. Implements bgtasks.slots.Hooks."""

    tracer: ClassVar[Tracer | None] = None  # of all pools

    def __init__(self, sender: object) -> None:
        self._sender = sender  # of the signals
        self._name: str = getattr(sender, "name", "")

    # The context of a task.

    def capture(self) -> object:
        """Return what ``enter`` needs beside a copy of the caller's context."""
        return capture()

    def enter(self, context: Context, captured: object) -> None:
        """Fill the task's empty context: the spawner's variables, and its language and time zone.

        What else is bound to the spawner's thread stays behind. `context` is a copy of the spawner's, and
        `captured` what ``capture`` returned there.
        """
        if UNDERSTANDS_ASGIREF:
            # Looked up anew each time, since ``override_settings`` replaces Django's Locals.
            language, time_zone = _translation._active._storage._data, _timezone._active._storage._data
        else:
            language = time_zone = None
        for variable, value in context.items():
            if variable.name not in THREAD_BOUND:
                variable.set(value)
            # Data with another thread's tag was not the spawner's: it had only inherited it.
            elif (variable is language or variable is time_zone) and value.thread_id == captured:
                variable.set(_moved(value))
        if isinstance(captured, Scope):
            captured.activate()

    def leave(self) -> None:
        """Close the cache connections of the task's context, as Django does after a request."""
        try:
            if _caches._connections._storage._data.get(None) is None:
                return
        except AttributeError:
            pass  # then ask Django
        for cache in caches.all(initialized_only=True):
            try:
                cache.close()
            except BaseException as error:
                log(logging.ERROR, "a cache could not be closed after a task", error=error)

    # The connections of a slot's thread.

    def clean(self) -> None:
        """Leave each database connection of this thread as Django leaves it between two requests.

        Like the receivers of ``request_started`` and ``request_finished``: a pooled connection goes back to
        its pool, one past its CONN_MAX_AGE or in an error is closed. One that a task has left inside an
        atomic block is thrown away, or all tasks after it would write into a transaction that never ends.
        """
        for connection in open_connections():
            try:
                connection.queries_log.clear()
                if connection.in_atomic_block:
                    connection.close()
                    del connections[connection.alias]
                else:
                    connection.close_if_unusable_or_obsolete()
            except Exception as error:
                log(logging.ERROR, "connection %r could not be reset", connection.alias, error=error)
                with contextlib.suppress(Exception):
                    connection.close()  # or its pool would miss it for ever
                del connections[connection.alias]

    def close(self) -> None:
        """Close the database connections of this thread."""
        close_connections()

    # The signals.

    def watched(self) -> bool:
        """Tell whether ``task_started`` or ``task_finished`` has a receiver, or tasks are traced."""
        return bool(task_started.receivers or task_finished.receivers or self.tracer)

    def spawned(self, name: str) -> None:
        """Send ``task_spawned``."""
        self._send(task_spawned, name=name)

    def dropped(self, name: str, reason: DropReason) -> None:
        """Send ``task_dropped``."""
        self._send(task_dropped, name=name, reason=reason.value)

    def started(self, task: Task) -> None:
        """Send ``task_started``."""
        if self.tracer is not None:
            self._trace(self.tracer.started, self._name, task)
        self._send(task_started, name=task.name)

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Send ``task_finished``, and tell a task that was not run to its end, if it wants to know."""
        if outcome in NOT_RUN and isinstance(task.function, Recorded):
            try:
                task.function.finished(outcome)
            except BaseException as problem:
                log(logging.ERROR, "the end of task %r could not be recorded", task.name, error=problem)
        self._send(task_finished, name=task.name, outcome=outcome.label, error=error)
        if self.tracer is not None:
            self._trace(self.tracer.finished, task, outcome, error)

    def _trace(self, step: Callable[..., None], *args: object) -> None:
        try:
            step(*args)
        except BaseException as error:
            log(logging.ERROR, "a task could not be traced", error=error)

    def _send(self, signal: Signal, **named: Any) -> None:
        if not signal.receivers:
            return
        try:
            signal.send_robust(sender=self._sender, **named)
        except BaseException as error:
            # send_robust lets a SystemExit pass, and cannot run an async receiver beside a running loop.
            log(logging.ERROR, "a receiver could not be called", error=error)
