"""Traces and metrics by OpenTelemetry, with its conventions for messaging.

::

    bgtasks.contrib.opentelemetry.instrument()

A PRODUCER span says where a task was spawned, a CONSUMER span how it ran, or how each try did: in the
spawner's trace, or with ``instrument(link=True)`` in one of its own, for tasks that live for much longer than
their request. Either way the second span is linked to the first. The conventions name spans by the operation
and the destination; ours are named by the task instead of the pool, which may be one for all. The two
histograms are ``messaging.client.operation.duration`` of the spawn and ``messaging.process.duration`` of the
run. The counter ``bgtasks.tasks.lost`` counts the lost tasks of killed processes.
Exceptions are recorded; arguments are not, but an exception may quote one.

The span is current while the task runs, in the task's own context: nothing is left behind on the slot's
thread or on the drainer's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

import bgtasks
from bgtasks import tracing
from bgtasks.clock import monotonic
from bgtasks.core.figures import EXPORTED, Outcome
from bgtasks.core.task import Task
from bgtasks.hooks import message_of, traceback_text
from bgtasks.pools import pools
from bgtasks.text import encodable

SYSTEM = "bgtasks"

Attributes = dict[str, str]


class Tracing:
    """Makes the spans and the histograms of all pools. Implements bgtasks.tracing.Tracer."""

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
        meter.create_observable_counter(
            "bgtasks.tasks.lost", [_lost], "{task}", "Lost tasks of killed processes, reported by this one."
        )
        # Of the tasks that run now. An entry is removed with its task, however it ends.
        self._spans: WeakKeyDictionary[Task, tuple[Span, Attributes, float]] = WeakKeyDictionary()

    def spawn(self, pool: str, task: Task) -> Callable[[bool], None]:
        """Start a PRODUCER span, which the task's context gets as its current one."""
        # With spawn_on_commit the context is that of the call, and we are called at the commit.
        around = task.context.run(otel_context.get_current)
        span, end = self._producer(pool, task.name, around, task)
        task.context.run(otel_context.attach, trace.set_span_in_context(span, around))
        return end

    def refused(self, pool: str, name: str) -> None:
        """Make the PRODUCER span of a task that found the pool full."""
        _, end = self._producer(pool, name)
        end(False)

    def _producer(
        self, pool: str, name: str, around: otel_context.Context | None = None, task: Task | None = None
    ) -> tuple[Span, Callable[[bool], None]]:
        """Start a PRODUCER span. Return it, and what ends it with whether the task was accepted."""
        attributes, begun = _attributes(pool, name, "spawn", "send"), monotonic()
        span = self._tracer.start_span(
            f"spawn {name}", context=around, kind=SpanKind.PRODUCER, attributes=attributes
        )

        def end(accepted: bool) -> None:
            if not accepted:
                _fail(span, "dropped", "the task was dropped")
            elif task is not None and task.outcome is Outcome.COALESCED:
                span.set_attribute("bgtasks.outcome", Outcome.COALESCED.label)
            span.end()
            failure = {} if accepted else {"error.type": "dropped"}
            self._spawning.record(monotonic() - begun, attributes | failure)

        return span, end

    def started(self, pool: str, task: Task) -> None:
        """Start the CONSUMER span, and make it the current one of the task's context."""
        attributes = _attributes(pool, task.name, "run", "process")
        producer = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            f"run {task.name}",
            context=otel_context.Context() if self._link else None,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(producer)] if producer.is_valid else None,
        )
        # It is not detached: the context ends with the task.
        otel_context.attach(trace.set_span_in_context(span))
        self._spans[task] = span, attributes, monotonic()

    def retried(self, task: Task, error: BaseException | None) -> None:
        """End the CONSUMER span of a try that has failed. The next one has a span of its own."""
        self._end(task, "retried", error, failed=True)

    def shed(self, pool: str, task: Task) -> None:
        """Make a CONSUMER span of no length, with the error "shed"."""
        task.context.run(self.started, pool, task)
        self._end(task, Outcome.SHED.label, None, failed=True)

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """End the CONSUMER span, if there is one: a task that was cancelled in the queue has none."""
        self._end(task, outcome.label, error, failed=outcome is not Outcome.SUCCEEDED)

    def _end(self, task: Task, outcome: str, error: BaseException | None, *, failed: bool) -> None:
        try:
            span, attributes, begun = self._spans.pop(task)
        except KeyError:
            return
        span.set_attribute("bgtasks.outcome", outcome)
        if failed:
            kind = outcome if error is None else encodable(type(error).__qualname__)
            if error is not None:
                span.add_event("exception", _exception(error))
            _fail(span, kind, outcome.replace("_", " "))
            attributes |= {"error.type": kind}
        span.end()
        self._processing.record(monotonic() - begun, attributes)


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
    tracing.add(Tracing(tracer_provider, meter_provider, link=link))


def uninstrument() -> None:
    """Trace no more tasks."""
    tracing.remove(Tracing)


def _lost(_options: CallbackOptions) -> list[Observation]:
    return [
        Observation(number, {"messaging.destination.name": pool, "bgtasks.task.name": name})
        for (pool, name), number in pools.journal.lost.copy().items()
    ]


def _attributes(pool: str, name: str, operation: str, kind: str) -> Attributes:
    return {
        "messaging.system": SYSTEM,
        "messaging.destination.name": pool,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "bgtasks.task.name": name,
    }


def _exception(error: BaseException) -> Attributes:
    """Return what ``Span.record_exception`` would record, as text that every exporter can encode."""
    kind = type(error)
    return {
        "exception.type": encodable(f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")),
        "exception.message": message_of(error),
        "exception.stacktrace": traceback_text(error),
    }


def _fail(span: Span, kind: str, description: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, description))
