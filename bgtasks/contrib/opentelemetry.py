"""Traces and metrics by OpenTelemetry, with its conventions for messaging.

::

    bgtasks.contrib.opentelemetry.instrument()

A PRODUCER span says where a task was spawned, a CONSUMER span how it ran: in the spawner's trace, or with
``instrument(link=True)`` in a trace of its own that is linked to the spawner's span, for tasks that live for
much longer than their request. The two histograms are ``messaging.client.operation.duration`` of the spawn
and ``messaging.process.duration`` of the run. Exceptions are recorded; arguments are not.

The span is current while the task runs, in the task's own context: nothing is left behind on the slot's
thread or on the drainer's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from weakref import WeakKeyDictionary

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

import bgtasks
from bgtasks.core.figures import EXPORTED, Outcome
from bgtasks.core.task import Task
from bgtasks.hooks import DjangoHooks

SYSTEM = "bgtasks"

Attributes = dict[str, str]


class Tracing:
    """Makes the spans and the histograms of all pools. Implements bgtasks.hooks.Tracer."""

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        link: bool = False,
    ) -> None:
        self._tracer = trace.get_tracer(bgtasks.__name__, tracer_provider=tracer_provider)
        meter = metrics.get_meter(bgtasks.__name__, meter_provider=meter_provider)
        self._link = link
        self._spawning = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "How long spawn took.",
            explicit_bucket_boundaries_advisory=EXPORTED,
        )
        self._processing = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long tasks ran.",
            explicit_bucket_boundaries_advisory=EXPORTED,
        )
        # Of the tasks that run now. An entry goes with its task, whatever becomes of it.
        self._spans: WeakKeyDictionary[Task, tuple[Span, Attributes, float]] = WeakKeyDictionary()

    def spawn(self, pool: str, task: Task, submit: Callable[[], bool]) -> bool:
        """Call `submit` inside a PRODUCER span, which the task's context gets as its current one."""
        attributes = _attributes(pool, task.name, "spawn", "send")
        begun = perf_counter()
        # With spawn_on_commit the context is that of the call, and we are called at the commit.
        around = task.context.run(otel_context.get_current)
        span = self._tracer.start_span(
            f"spawn {task.name}", context=around, kind=SpanKind.PRODUCER, attributes=attributes
        )
        try:
            task.context.run(otel_context.attach, trace.set_span_in_context(span, around))
            accepted = submit()
            if not accepted:
                attributes |= {"error.type": "dropped"}
                _fail(span, "dropped", "the task was dropped")
        finally:
            span.end()
        self._spawning.record(perf_counter() - begun, attributes)
        return accepted

    def refused(self, pool: str, name: str) -> None:
        """Make the PRODUCER span of a task that found the pool full."""
        attributes = _attributes(pool, name, "spawn", "send")
        span = self._tracer.start_span(f"spawn {name}", kind=SpanKind.PRODUCER, attributes=attributes)
        _fail(span, "dropped", "the task was dropped")
        span.end()
        self._spawning.record(0.0, {**attributes, "error.type": "dropped"})

    def started(self, pool: str, task: Task) -> None:
        """Start the CONSUMER span, and make it the current one of the task's context."""
        attributes = _attributes(pool, task.name, "run", "process")
        producer = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            f"run {task.name}",
            context=otel_context.Context() if self._link else None,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(producer)] if self._link and producer.is_valid else None,
        )
        # It is not detached: the context ends with the task.
        otel_context.attach(trace.set_span_in_context(span))
        self._spans[task] = span, attributes, perf_counter()

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """End the CONSUMER span, if there is one: a task that was cancelled in the queue has none."""
        try:
            span, attributes, begun = self._spans.pop(task)
        except KeyError:
            return
        span.set_attribute("bgtasks.outcome", outcome.label)
        if outcome is not Outcome.SUCCEEDED:
            kind = outcome.label if error is None else type(error).__qualname__
            if error is not None:
                span.record_exception(error)
            _fail(span, kind, outcome.label.replace("_", " "))
            attributes |= {"error.type": kind}
        span.end()
        self._processing.record(perf_counter() - begun, attributes)


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    *,
    link: bool = False,
) -> None:
    """Trace the tasks of all pools, from now on.

    Args:
        tracer_provider: Where spans go; the global one by default.
        meter_provider: Where the histograms go; the global one by default.
        link: Give each task a trace of its own, linked to the spawner's span.
    """
    DjangoHooks.tracer = Tracing(tracer_provider, meter_provider, link=link)


def uninstrument() -> None:
    """Trace no more tasks."""
    DjangoHooks.tracer = None


def _attributes(pool: str, name: str, operation: str, kind: str) -> Attributes:
    return {
        "messaging.system": SYSTEM,
        "messaging.destination.name": pool,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "bgtasks.task.name": name,
    }


def _fail(span: Span, kind: str, description: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, description))
