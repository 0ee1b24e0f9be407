"""What the core needs of Django: the context of a task, the connections of a slot, the signals."""

from __future__ import annotations

import logging
import re
import traceback
from abc import ABC, abstractmethod
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from contextvars import Context
from functools import partial
from time import time
from typing import Any, ParamSpec, TypeVar

from django.core.cache import caches
from django.core.exceptions import ObjectDoesNotExist
from django.db import OperationalError
from django.dispatch import Signal

from bgtasks import context as task_context
from bgtasks import database, propagators, shortcuts, tracing
from bgtasks.clock import monotonic
from bgtasks.core.figures import DropReason, Outcome, ShedReason
from bgtasks.core.log import enabled, log
from bgtasks.core.policy import NO_POLICY, Options
from bgtasks.core.task import Hooks, Task
from bgtasks.exceptions import TaskDropped
from bgtasks.recent import MESSAGE_MAX, Failure, Recent
from bgtasks.repeats import repeats, report
from bgtasks.signals import task_dropped, task_finished, task_shed, task_spawned, task_started
from bgtasks.text import encodable, escaped

P = ParamSpec("P")
T = TypeVar("T")

OWN_PACKAGE = "bgtasks.core."  # the frames by which a task is called
SQLITE_LOCKED = re.compile("database( table| schema)? is locked")
FRAMES = 30  # the innermost frames of a traceback that are kept of each exception in it
TEXT_MAX = 4000  # characters of a traceback that are kept: the end of it, which says what happened

NOT_RUN = frozenset(
    {Outcome.CANCELLED, Outcome.HANDED_OFF, Outcome.SHED}
)  # outcomes of which a task does not know itself


class Recorded(ABC):
    """A task's function that keeps a record of its own, as those of ``django.tasks`` do.

    It has logged by itself what it raises, or that it failed, once it has. Of an end that it does not see, it
    is told.
    """

    @abstractmethod
    def __call__(self) -> Any:
        """Run the task, or return its coroutine."""

    @abstractmethod
    def dropped(self, why: str) -> None:
        """Hear that the task was not accepted, and `why`."""

    @abstractmethod
    def finished(self, outcome: Outcome, why: str) -> None:
        """Hear that the task was cancelled, handed off, or shed, and `why` it was shed."""

    @abstractmethod
    def failed(self, error: BaseException) -> None:
        """Hear that the task has failed for good. It may have recorded that itself."""

    @abstractmethod
    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task of ``django.tasks``, and its arguments in a form that travels."""

    @abstractmethod
    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""


def traceback_text(error: BaseException) -> str:
    """Return the traceback of `error`, bounded, with no value of any variable. Never raises."""
    try:
        trace = error.__traceback__
        while trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(OWN_PACKAGE):
            trace = trace.tb_next
        lines = traceback.TracebackException(
            type(error), error, trace or error.__traceback__, limit=-FRAMES, compact=True
        ).format()
        text = encodable("".join(lines).rstrip())
    except BaseException as other:
        text = f"{type(error).__name__} (its traceback raised {type(other).__name__})"
    return text if len(text) <= TEXT_MAX else "[...]\n" + text[-TEXT_MAX:]


def message_of(error: BaseException) -> str:
    """Return what `error` says, bounded. Never raises."""
    try:
        return encodable(str(error))[:MESSAGE_MAX]
    except BaseException:
        return ""


def place_of(error: BaseException) -> str:
    """Return the file and the line that have raised `error`; "" if it has no traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else encodable(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")


class DjangoHooks(Hooks):
    """The hooks of one pool."""

    def __init__(self, sender: object) -> None:
        self._sender = sender  # of the signals
        self._name: str = getattr(sender, "name", "")
        self.recent = Recent()

    # The context of a task.

    def enter(self, context: Context, captured: object) -> None:
        """Make the current context that of a task. See ``bgtasks.context.enter``."""
        task_context.enter(context, captured)

    def needs_thread(self, task: Task) -> bool:
        """Tell whether `task` has propagators, or listeners, who may use the ORM."""
        return isinstance(task.captured, task_context.Captured) or self.watched()

    def attach(self, captured: object) -> None:
        """Go on in the context of a task on this thread. See ``bgtasks.context.attach``."""
        task_context.attach(captured)

    def leave(self) -> None:
        """Leave the propagators, and close the cache connections of the task's context."""
        if shortcuts.has_caches():
            self.detach()
        propagators.leave()

    def detach(self) -> None:
        """Close the cache connections of the task on this thread, as Django does after a request."""
        if not shortcuts.has_caches():
            return
        for cache in caches.all(initialized_only=True):
            try:
                cache.close()
            except BaseException as error:
                report(
                    logging.ERROR,
                    "the cache %r could not be closed after a task",
                    type(cache).__name__,
                    error,
                )

    def slot_context(self, slot: Executor) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes the contexts in which `slot` has the thread-sensitive calls of its tasks."""
        if shortcuts.UNDERSTANDS_CONTEXT:
            return shortcuts.SlotContexts(slot)
        return partial(shortcuts.PublicSlotContext, slot)

    # The connections of a slot's thread.

    def clean(self) -> None:
        """Leave each database connection of this thread as Django leaves it between two requests."""
        database.clean()

    def close(self) -> None:
        """Close the database connections of this thread."""
        database.close()

    # The signals.

    def watched(self) -> bool:
        """Tell whether ``task_started`` or ``task_finished`` has a receiver, or tasks are traced."""
        return bool(task_started.receivers or task_finished.receivers or tracing.tracers)

    def spawned(self, name: str) -> None:
        """Send ``task_spawned``."""
        self._send(task_spawned, name=name)

    def dropped(self, name: str, reason: DropReason) -> None:
        """Send ``task_dropped``, and keep the drop among the last ones."""
        why = reason.value
        self.recent.add_drop(name, why)
        if task_dropped.receivers:
            self._send(task_dropped, name=name, reason=why)

    def started(self, task: Task) -> None:
        """Send ``task_started``."""
        tracing.started(self._name, task)
        self._send(task_started, name=task.name)

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Send ``task_finished``, and tell a task that was not run to its end, if it wants to know."""
        if outcome in NOT_RUN:
            self._tell_recorded(task, outcome)
        self._send(task_finished, name=task.name, outcome=outcome.label, error=error)
        tracing.finished(task, outcome, error)

    def tried(self, task: Task, error: BaseException | None) -> None:
        """Tell the tracers that a try of `task` has failed."""
        tracing.retried(task, error)

    def _tell_recorded(
        self, task: Task, outcome: Outcome, error: BaseException | None = None, why: str = ""
    ) -> None:
        # The task's own function may be the coroutine that it has returned.
        function = task.function if task.policy is NO_POLICY else task.policy.function
        if not isinstance(function, Recorded):
            return
        try:
            if error is None:
                function.finished(outcome, why)
            else:
                function.failed(error)
        except BaseException as problem:
            report(logging.ERROR, "the end of task %r could not be recorded", task.name, problem)

    def shed(self, task: Task, reason: ShedReason) -> None:
        """Tell the listeners that a waiting `task` was given up: shed, or failed if it was tried before."""
        self._tell_recorded(task, Outcome.SHED, why=reason.value)
        if task.outcome is not Outcome.SHED:
            why = f"was to be tried again, and was shed instead: {reason.value}"
            error = TaskDropped(f"task {task.name!r} {why}")
            self.ended(task, Outcome.FAILED, error, 0)
            self.finished(task, Outcome.FAILED, error)
            return
        self._send(task_shed, name=task.name, reason=reason.value)
        tracing.shed(self._name, task)

    def retried(  # noqa: PLR0917
        self, task: Task, tries: int, error: BaseException | None, delay: float, refusal: str | None
    ) -> None:
        """Log that `task` has failed and waits for another try, or why it does not, but not too often."""
        kind = "" if error is None else escaped(type(error).__name__)
        what = f"{kind}: {escaped(message_of(error))}" if error is not None and message_of(error) else kind
        if refusal is None:
            message = "try %d of task %r of pool %r failed (%s); retrying in %.1f s"
            args: tuple[object, ...] = (tries, task.name, self._name, what, delay)
            more = "a try of task %r of pool %r failed again (%d more): %s"
        else:
            message = "task %r of pool %r failed (%s), and is not retried: %s"
            args = (task.name, self._name, what, refusal)
            more = "task %r of pool %r failed again (%d more), and is not retried: %s"
        sort = "retried" if refusal is None else "not retried"
        again = partial(_log_more, logging.WARNING, more, self._name, (kind,))
        is_first = repeats.is_first((sort, task.name, self._name, kind), again)
        log(logging.WARNING if is_first else logging.DEBUG, message, *args)

    def _send(self, signal: Signal, **named: Any) -> None:
        if not signal.receivers:
            return
        try:
            signal.send_robust(sender=self._sender, **named)
        except BaseException as error:
            # send_robust lets a SystemExit pass, and cannot run an async receiver beside a running loop.
            report(logging.ERROR, "a receiver could not be called for task %r", named["name"], error)

    def ended(self, task: Task, outcome: Outcome, error: BaseException | None, waiting: int) -> None:
        """Log how `task` ended: at DEBUG, or at ERROR with what it raised, which is kept as text as well.

        Of failures at the same place, the first is logged at ERROR, and the others at DEBUG.
        """
        if error is None and not enabled(logging.DEBUG):
            return
        if error is not None:
            self._keep(task, outcome, error)
            self._tell_recorded(task, outcome, error)
        # A task of django.tasks has logged by itself what it raised.
        logged = isinstance(task.function, Recorded)
        level = logging.DEBUG
        if error is not None and not logged and self._is_first(task, outcome, error):
            level = logging.ERROR
        if not enabled(level):
            return
        extra = {
            "task": task.name,
            "pool": self._name,
            "outcome": outcome.label,
            "wait_s": task.started_at - task.spawned_at,
            "run_s": monotonic() - task.started_at,
            "queue_length": waiting,
        }
        how = outcome.label.replace("_", " ")
        if error is None:
            log(level, "task %r of pool %r %s", task.name, self._name, how, extra=extra)
        else:
            what = escaped(type(error).__name__) + _hint(error, task)
            log(
                level, "task %r of pool %r %s: %s", task.name, self._name, how, what, error=error, extra=extra
            )

    def _is_first(self, task: Task, outcome: Outcome, error: BaseException) -> bool:
        """Tell whether no task of this name has failed at the same place for a while. If not, count it."""
        how, kind, place = outcome.label, escaped(type(error).__name__), place_of(error)
        more = f"task %r of pool %r {how.replace('_', ' ')} again (%d more): %s, raised in %s"
        again = partial(_log_more, logging.ERROR, more, self._name, (kind, escaped(place)), outcome=how)
        return repeats.is_first((how, task.name, self._name, kind, place), again)

    def _keep(self, task: Task, outcome: Outcome, error: BaseException) -> None:
        waited, ran = task.started_at - task.spawned_at, monotonic() - task.started_at
        message, where, trace = message_of(error), place_of(error), traceback_text(error)
        kind = encodable(type(error).__name__)
        self.recent.add_failure(
            Failure(time(), task.name, outcome.label, kind, message, where, trace, waited, ran)
        )


def _log_more(  # noqa: PLR0917  # it is made with all but the last two
    level: int, message: str, pool: str, args: tuple[object, ...], name: str, count: int, **fields: object
) -> None:
    """Log how many were left out of a kind of record. See ``Repeats.is_first``."""
    extra = {"task": name, "pool": pool, "count": count, **fields}
    log(level, message, name, pool, count, *args, extra=extra)


def _hint(error: BaseException, task: Task) -> str:
    """Return what the likeliest mistake behind `error` is, or ""."""
    if issubclass(type(error), ObjectDoesNotExist):
        return (
            " (a task does not see what a transaction has not committed yet; "
            "inside a transaction, use spawn_on_commit, and in a TestCase bgtasks.testing.inline)"
        )
    if issubclass(type(error), OperationalError) and SQLITE_LOCKED.match(message_of(error)):
        return (
            " (SQLite has one writer at a time: set the database's OPTIONS to "
            "{'transaction_mode': 'IMMEDIATE', 'timeout': 20}; "
            "in a TestCase, use bgtasks.testing.inline)"
        )
    if task.overran and issubclass(type(error), CancelledError):
        return " (it ran for longer than TASK_TIMEOUT; the traceback shows where it was cancelled)"
    if type(error) is TypeError and place_of(error).rpartition(":")[0] == Task.call.__code__.co_filename:
        function: Any = task.function
        name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
        option = misplaced_option(message_of(error))
        return f" ({escaped(name)} cannot be called with the arguments of the spawn{option})"
    return ""


def misplaced_option(problem: str) -> str:
    """Return where an option belongs that, as Python's `problem` says, is no argument of the task; or ""."""
    for option in Options._fields:
        if problem.endswith(f"unexpected keyword argument {option!r}"):
            return f"; an option is given by bgtasks.using({option}=...).spawn(...)"
    return ""
