"""What the core needs of Django: the context of a task, the connections of a slot, the signals."""

from __future__ import annotations

import logging
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from contextvars import Context
from functools import partial
from time import monotonic, time
from typing import Any, ClassVar, NamedTuple, ParamSpec, Protocol, TypeVar

from django.core.cache import caches
from django.core.exceptions import ObjectDoesNotExist
from django.dispatch import Signal

from bgtasks import context as task_context
from bgtasks import database, propagators, shortcuts
from bgtasks.core.figures import DropReason, Outcome, ShedReason
from bgtasks.core.log import enabled, escaped, log
from bgtasks.core.task import Hooks, Task
from bgtasks.exceptions import TaskDropped
from bgtasks.signals import task_dropped, task_finished, task_shed, task_spawned, task_started

P = ParamSpec("P")
T = TypeVar("T")

LAST = 20  # failures and drops of a pool that are kept to be looked at
OWN_PACKAGE = "bgtasks.core."  # the frames by which a task is called
FRAMES = 30  # the innermost frames of a traceback that are kept of each exception in it
TEXT_MAX = 4000  # characters of a traceback that are kept: the end of it, which says what happened

NOT_RUN = frozenset(
    {Outcome.CANCELLED, Outcome.HANDED_OFF, Outcome.SHED}
)  # outcomes of which a task does not know itself


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


class Recorded(ABC):
    """A task's function that keeps a record of its own, as those of ``django.tasks`` do.

    It has logged by itself what it raises. Of an end that it does not see, it is told.
    """

    @abstractmethod
    def __call__(self) -> Any:
        """Run the task, or return its coroutine."""

    @abstractmethod
    def finished(self, outcome: Outcome) -> None:
        """Hear that the task was cancelled, shed or handed off."""

    @abstractmethod
    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task of ``django.tasks``, and its arguments in a form that travels."""

    @abstractmethod
    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""


class Failure(NamedTuple):
    """One of the last tasks that raised. It holds text only, nothing of the task itself."""

    at: float  # seconds since the epoch
    name: str
    outcome: str
    error: str  # the type
    traceback: str  # without the values of variables
    wait_s: float
    run_s: float


class Drop(NamedTuple):
    """One of the last tasks that were not accepted."""

    at: float  # seconds since the epoch
    name: str
    reason: str


class Recent:
    """The last failures and drops of one pool, to be looked at. To append to a deque needs no lock."""

    def __init__(self) -> None:
        self.failures: deque[Failure] = deque(maxlen=LAST)
        self.drops: deque[Drop] = deque(maxlen=LAST)


def traceback_text(error: BaseException) -> str:
    """Return the traceback of `error`, bounded, with no value of any variable. Never raises."""
    try:
        trace = error.__traceback__
        while trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(OWN_PACKAGE):
            trace = trace.tb_next
        lines = traceback.TracebackException(
            type(error), error, trace or error.__traceback__, limit=-FRAMES, compact=True
        ).format()
        text = "".join(lines).rstrip()
    except BaseException as other:
        text = f"{type(error).__name__} (its traceback raised {type(other).__name__})"
    return text if len(text) <= TEXT_MAX else "[...]\n" + text[-TEXT_MAX:]


class DjangoHooks(Hooks):
    """The hooks of one pool."""

    tracer: ClassVar[Tracer | None] = None  # of all pools

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
                log(logging.ERROR, "a cache could not be closed after a task", error=error)

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
        return bool(task_started.receivers or task_finished.receivers or self.tracer)

    def spawned(self, name: str) -> None:
        """Send ``task_spawned``."""
        self._send(task_spawned, name=name)

    def dropped(self, name: str, reason: DropReason) -> None:
        """Send ``task_dropped``, and keep the drop among the last ones."""
        why = reason.value
        self.recent.drops.append(Drop(time(), name, why))
        if task_dropped.receivers:
            self._send(task_dropped, name=name, reason=why)

    def started(self, task: Task) -> None:
        """Send ``task_started``."""
        if self.tracer is not None:
            self._trace(self.tracer.started, self._name, task)
        self._send(task_started, name=task.name)

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Send ``task_finished``, and tell a task that was not run to its end, if it wants to know."""
        self._tell_recorded(task, outcome)
        self._send(task_finished, name=task.name, outcome=outcome.label, error=error)
        if self.tracer is not None:
            self._trace(self.tracer.finished, task, outcome, error)

    def _tell_recorded(self, task: Task, outcome: Outcome) -> None:
        if outcome not in NOT_RUN or not isinstance(task.function, Recorded):
            return
        try:
            task.function.finished(outcome)
        except BaseException as problem:
            log(logging.ERROR, "the end of task %r could not be recorded", task.name, error=problem)

    def shed(self, task: Task, reason: ShedReason) -> None:
        """Tell the listeners that a waiting `task` was given up: shed, or failed if it was tried before."""
        if task.outcome is not Outcome.SHED:
            why = f"was to be tried again, and was shed instead: {reason.value}"
            error = TaskDropped(f"task {task.name!r} {why}")
            self.ended(task, Outcome.FAILED, error, 0)
            self.finished(task, Outcome.FAILED, error)
            return
        self._tell_recorded(task, Outcome.SHED)
        self._send(task_shed, name=task.name, reason=reason.value)
        if self.tracer is not None:
            self._trace(self.tracer.finished, task, Outcome.SHED, None)

    def retried(  # noqa: PLR0917
        self, task: Task, tries: int, error: BaseException | None, delay: float, refusal: str | None
    ) -> None:
        """Log that `task` has failed and waits for another try, or why it does not."""
        kind = "" if error is None else escaped(type(error).__name__)
        if refusal is None:
            message = "try %d of task %r of pool %r has failed (%s); it is tried again in %.1f s"
            log(logging.WARNING, message, tries, task.name, self._name, kind, delay)
        else:
            message = "task %r of pool %r has failed (%s), and is not tried again: %s"
            log(logging.WARNING, message, task.name, self._name, kind, refusal)

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

    def ended(self, task: Task, outcome: Outcome, error: BaseException | None, waiting: int) -> None:
        """Log how `task` ended: at DEBUG, or at ERROR with what it raised, which is kept as text as well."""
        if error is None and not enabled(logging.DEBUG):
            return
        if error is not None:
            self._keep(task, outcome, error)
        # A task of django.tasks has logged by itself what it raised.
        logged = error is None or isinstance(task.function, Recorded)
        level = logging.DEBUG if logged else logging.ERROR
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
            what = escaped(type(error).__name__) + _hint(error)
            log(
                level, "task %r of pool %r %s: %s", task.name, self._name, how, what, error=error, extra=extra
            )

    def _keep(self, task: Task, outcome: Outcome, error: BaseException) -> None:
        waited, ran = task.started_at - task.spawned_at, monotonic() - task.started_at
        kind = type(error).__name__
        self.recent.failures.append(
            Failure(time(), task.name, outcome.label, kind, traceback_text(error), waited, ran)
        )


def _hint(error: BaseException) -> str:
    """Return what the likeliest mistake behind `error` is, or ""."""
    if issubclass(type(error), ObjectDoesNotExist):
        return (
            " (a task does not see what a transaction has not committed yet; "
            "inside a transaction, use spawn_on_commit)"
        )
    return ""
