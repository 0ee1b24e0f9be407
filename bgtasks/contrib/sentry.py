"""Spans and transactions for the Queues page of Sentry.

::

    bgtasks.contrib.sentry.instrument()

A ``queue.publish`` span in the spawner's transaction says where a task was spawned. Each run, or try, is a
transaction in the same trace, with a ``queue.process`` span. The pool is the queue. Nothing of this is sent
unless Sentry's ``traces_sample_rate`` or ``traces_sampler`` says so; errors are sent without it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

import sentry_sdk
from sentry_sdk.tracing import Span

from bgtasks import tracing
from bgtasks.core.figures import Outcome
from bgtasks.core.task import Task

ORIGIN = "auto.queue.bgtasks"

STATUSES = {
    Outcome.SUCCEEDED: "ok",
    Outcome.TIMED_OUT: "deadline_exceeded",
    Outcome.CANCELLED: "cancelled",
}  # of Sentry's; of all other outcomes "internal_error"


class Message(NamedTuple):
    """What travels from the spawn to the run, in the task's context."""

    id: str
    headers: dict[str, str]  # of the trace


_message: ContextVar[Message] = ContextVar("bgtasks.contrib.sentry.message")


class Tracing:
    """Makes the spans of all pools. Implements bgtasks.tracing.Tracer."""

    def __init__(self) -> None:
        # Of the tasks that run now. An entry is removed with its task, however it ends.
        self._runs: WeakKeyDictionary[Task, list[Span]] = WeakKeyDictionary()

    def spawn(self, pool: str, task: Task) -> Callable[[bool], None]:
        """Start a ``queue.publish`` span, if the spawner has a transaction; leave the task its trace."""
        # With spawn_on_commit the context is that of the call, and we are called at the commit.
        return task.context.run(_publish, pool, task.name)

    def refused(self, pool: str, name: str) -> None:
        """Make the ``queue.publish`` span of a task that found the pool full."""
        copy_context().run(_publish, pool, name)(False)

    def started(self, pool: str, task: Task) -> None:
        """Start the transaction and its ``queue.process`` span, in the scopes of the task."""
        message = _message.get(None)
        if message is None:
            return  # spawned before Sentry was there
        transaction = sentry_sdk.continue_trace(
            message.headers, op="queue.task.bgtasks", name=task.name, source="task", origin=ORIGIN
        )
        run: list[Span] = [sentry_sdk.start_transaction(transaction)]
        self._runs[task] = run
        run[0].__enter__()
        run.append(sentry_sdk.start_span(op="queue.process", name=task.name, origin=ORIGIN))
        _describe(run[1], pool, message.id)
        run[1].set_data("messaging.message.receive.latency", (task.started_at - task.spawned_at) * 1000)
        run[1].set_data("messaging.message.retry.count", task.policy.tries)
        run[1].__enter__()

    def retried(self, task: Task, error: BaseException | None) -> None:  # noqa: ARG002
        """End both. The next try has its own."""
        self._end(task, "internal_error")

    def shed(self, pool: str, task: Task) -> None:
        """Do nothing: the task has not run."""

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:  # noqa: ARG002
        """End both, if there are any: a task that was only waiting has none."""
        self._end(task, STATUSES.get(outcome, "internal_error"))

    def _end(self, task: Task, status: str) -> None:
        for span in reversed(self._runs.pop(task, [])):
            span.set_status(status)
            span.__exit__(None, None, None)


def instrument() -> None:
    """Tell Sentry of the tasks of all pools, from now on. It may be called before ``sentry_sdk.init``."""
    tracing.add(Tracing())


def uninstrument() -> None:
    """Tell Sentry of no more tasks than those that fail."""
    tracing.remove(Tracing)


def _publish(pool: str, name: str) -> Callable[[bool], None]:
    """Start a span in the current context, and leave there what the run needs. Return what ends the span."""
    span = None
    if sentry_sdk.get_client().is_active():
        message = uuid4().hex
        if sentry_sdk.get_current_span() is not None:
            span = sentry_sdk.start_span(op="queue.publish", name=name, origin=ORIGIN)
            _describe(span, pool, message)
        headers = sentry_sdk.get_current_scope().iter_trace_propagation_headers(span=span)
        _message.set(Message(message, dict(headers)))

    def end(accepted: bool) -> None:
        if span is not None:
            span.set_status("ok" if accepted else "resource_exhausted")
            span.finish()

    return end


def _describe(span: Span, pool: str, message: str) -> None:
    span.set_data("messaging.system", "bgtasks")
    span.set_data("messaging.destination.name", pool)
    span.set_data("messaging.message.id", message)
