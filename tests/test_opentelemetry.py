"""Traces: where a task was spawned and how it ran, in one trace or in two that are linked."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest
from pytest_django import Settings

pytest.importorskip("opentelemetry.sdk")

from django.db import transaction  # noqa: E402  # after the module it may lack
from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

import bgtasks  # noqa: E402
from bgtasks import tracing as registered  # noqa: E402
from bgtasks.contrib import opentelemetry as tracing  # noqa: E402
from bgtasks.core.figures import EXPORTED  # noqa: E402
from bgtasks.pools import pools  # noqa: E402
from bgtasks.repeats import repeats  # noqa: E402
from tests.gate import BOUND, Gate, wait_until  # noqa: E402
from tests.pool import Logs  # noqa: E402
from tests.public import full  # noqa: E402


class Telemetry:
    """An SDK of the test's own, all in memory."""

    def __init__(self, *, link: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.tracer = self.provider.get_tracer("test")
        tracing.instrument(self.provider, self.meters, link=link)

    def spans(self) -> dict[str, object]:
        assert bgtasks.drain(BOUND)
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def close(self) -> None:
        tracing.uninstrument()
        self.provider.shutdown()
        self.meters.shutdown()


@pytest.fixture
def telemetry(request: pytest.FixtureRequest) -> Iterator[Any]:
    telemetry = Telemetry(link=getattr(request, "param", False))
    yield telemetry
    telemetry.close()


def plain(future: Future[Any]) -> None:
    future.set_result(trace.get_current_span())


async def asynchronous(future: Future[Any]) -> None:
    await asyncio.sleep(0)
    future.set_result(trace.get_current_span())


def both(future: Future[Any]) -> Any:
    return asynchronous(future)


@pytest.mark.parametrize("task", [plain, asynchronous, both])
def test_task_runs_in_the_trace_of_its_spawner(task: Any, telemetry: Any) -> None:
    """Request, spawn and run are one line of descent; the run's span is current in the task."""
    future: Future[Any] = Future()
    with telemetry.tracer.start_as_current_span("request") as request:
        bgtasks.spawn("mail", task, future)
        assert trace.get_current_span() is request
    spans = telemetry.spans()
    producer, consumer = spans["spawn mail"], spans["run mail"]

    assert producer.parent.span_id == request.get_span_context().span_id
    assert consumer.parent.span_id == producer.context.span_id
    assert (producer.kind, consumer.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert future.result(0).get_span_context().span_id == consumer.context.span_id
    assert dict(consumer.attributes) == {
        "messaging.system": "bgtasks",
        "messaging.destination.name": "default",
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        "bgtasks.task.name": "mail",
        "bgtasks.outcome": "succeeded",
    }
    assert producer.attributes["messaging.operation.type"] == "send"
    assert [link.context.span_id for link in consumer.links] == [producer.context.span_id]


@pytest.mark.parametrize("telemetry", [True], indirect=True)
def test_task_has_a_trace_of_its_own_if_it_is_linked(telemetry: Any) -> None:
    """With link=True the run starts a trace, and a link leads to the spawn."""
    bgtasks.spawn("mail", plain, Future())
    spans = telemetry.spans()
    producer, consumer = spans["spawn mail"], spans["run mail"]

    assert consumer.parent is None
    assert consumer.context.trace_id != producer.context.trace_id
    assert [link.context.span_id for link in consumer.links] == [producer.context.span_id]


async def fail_on_the_loop(text: str) -> None:
    int(text)


@pytest.mark.parametrize("task", [int, fail_on_the_loop])
def test_exception_is_recorded(task: Any, telemetry: Any) -> None:
    """The span of a failed task is an error, with the exception."""
    bgtasks.spawn("bad", task, "x")
    span = telemetry.spans()["run bad"]

    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "ValueError"
    assert span.attributes["bgtasks.outcome"] == "failed"
    assert [event.name for event in span.events] == ["exception"]


@pytest.mark.parametrize("task", [int, fail_on_the_loop])
@pytest.mark.parametrize("mode", ["pool", "inline"])
def test_each_try_is_a_run(task: Any, mode: str, telemetry: Any, settings: Settings) -> None:
    """A task that is tried again has a span, with its exception, and a duration of each try."""
    settings.BGTASKS = {"default": {"MODE": mode}}
    with suppress(ValueError):  # inline
        bgtasks.using(retries=2, retry_delay=0).spawn("bad", task, "x")
    telemetry.spans()
    tries = [span for span in telemetry.exporter.get_finished_spans() if span.name == "run bad"]

    assert [span.attributes["error.type"] for span in tries] == ["ValueError"] * 3
    assert len({span.parent.span_id for span in tries}) == 1
    assert [point.count for point in telemetry.points()["messaging.process.duration"]] == [3]


def test_task_that_waits_for_another_try_and_is_cancelled(telemetry: Any, settings: Settings) -> None:
    """Its one try has a span, which has ended with that try."""
    bgtasks.using(retries=1, retry_delay=60).spawn("bad", int, "x")
    wait_until(lambda: [span.name for span in telemetry.exporter.get_finished_spans()].count("run bad"))
    bgtasks.shutdown(timeout=0)
    settings.BGTASKS = {}
    [span] = [span for span in telemetry.exporter.get_finished_spans() if span.name == "run bad"]

    assert span.attributes["bgtasks.outcome"] == "retried"


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError


def raise_it() -> None:
    raise UnspeakableError


def test_exception_that_has_no_text(telemetry: Any) -> None:
    """The span ends all the same."""
    bgtasks.spawn("bad", raise_it)
    [event] = telemetry.spans()["run bad"].events

    assert event.attributes["exception.type"] == f"{__name__}.UnspeakableError"
    assert event.attributes["exception.message"] == ""


def refuse(*args: Any, **kwargs: Any) -> None:
    raise LookupError


def test_spawn_that_cannot_be_traced_is_logged(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """Whatever the SDK raises, `spawn` raises nothing, of a task that is accepted or not."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}
    monkeypatch.setattr(type(telemetry.tracer), "start_span", refuse)
    with Logs() as logs:
        with full(bgtasks.pools["default"]):
            assert not bgtasks.spawn("late", int)
        assert bgtasks.drain(BOUND)
        repeats.flush()

    first, more = logs.of("a spawn could not be traced")
    assert first.splitlines()[0] == "a spawn could not be traced: 'Tracing.spawn' has raised"
    assert more == "a spawn could not be traced: 'Tracing.spawn' has raised (2 more): LookupError"


def test_two_tracers_both_follow_a_task(telemetry: Any) -> None:
    """Sentry's and that of OpenTelemetry can be used together; a second call replaces the first."""
    sentry: Any = pytest.importorskip("bgtasks.contrib.sentry")
    sentry.instrument()
    sentry.instrument()
    try:
        kinds = [type(tracer) for tracer in registered.tracers]
        bgtasks.spawn("mail", int)
        names = set(telemetry.spans())
    finally:
        sentry.uninstrument()

    assert kinds == [tracing.Tracing, sentry.Tracing]
    assert names == {"spawn mail", "run mail"}
    assert [type(tracer) for tracer in registered.tracers] == [tracing.Tracing]


@pytest.mark.parametrize(("queue_is", "task"), [("full", int), ("full", plain), ("closing", int)])
def test_drop_is_an_error_of_the_spawn(queue_is: Any, task: Any, telemetry: Any, settings: Settings) -> None:
    """A task that is not accepted, made or not, has a PRODUCER span that says so, and no other."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}
    with Gate() as gate:
        if queue_is == "full":
            bgtasks.spawn("held", gate)
            gate.wait_entered()
            bgtasks.spawn("waits", int)
        else:
            bgtasks.stats()
            pools.built()[0].queue.close()
        assert bgtasks.spawn("late", task) is False
    spans = telemetry.spans()

    assert spans["spawn late"].status.status_code is StatusCode.ERROR
    assert spans["spawn late"].attributes["error.type"] == "dropped"
    assert "run late" not in spans


def test_drop_of_an_inline_task_has_one_span(telemetry: Any, settings: Settings) -> None:
    """A task that would have run in its spawner, but for the shutdown, is no two spawns."""
    settings.BGTASKS = {"default": {"MODE": "inline"}}
    bgtasks.stats()
    pools.built()[0].queue.close()
    assert bgtasks.spawn("late", int) is False

    names = [span.name for span in telemetry.exporter.get_finished_spans()]
    assert names == ["spawn late"]


def test_task_cancelled_in_the_queue_has_no_run(telemetry: Any, settings: Settings) -> None:
    """What never ran has no span that says it did."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", int)
        bgtasks.shutdown(timeout=0)
        names = [span.name for span in telemetry.exporter.get_finished_spans()]
    settings.BGTASKS = {}

    assert "run waits" not in names
    held = [span for span in telemetry.exporter.get_finished_spans() if span.name == "run held"]
    assert [span.attributes["bgtasks.outcome"] for span in held] == ["cancelled"]
    assert held[0].attributes["error.type"] == "cancelled"


def attributes(telemetry: Any, name: str) -> list[Any]:
    spans = telemetry.exporter.get_finished_spans()
    return [span.attributes.get("bgtasks.outcome") for span in spans if span.name == name]


def test_each_try_has_a_span(telemetry: Any) -> None:
    """One that has failed, and is followed by another, ends with its error, in the trace of the spawner."""
    tries = iter([ValueError, None])

    def task() -> None:
        if error := next(tries):
            raise error

    bgtasks.using(retries=3, retry_delay=0.001).spawn("mail", task)
    spawned = telemetry.spans()["spawn mail"]
    spans = [span for span in telemetry.exporter.get_finished_spans() if span.name == "run mail"]

    assert attributes(telemetry, "run mail") == ["retried", "succeeded"]
    assert [span.attributes.get("error.type") for span in spans] == ["ValueError", None]
    assert {span.context.trace_id for span in spans} == {spawned.context.trace_id}


def test_shed_task_has_a_span_that_says_so(telemetry: Any, settings: Settings) -> None:
    """It has an end in the trace of its spawner, though it never ran."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.using(expires=1e-9).spawn("old", int)
    wait_until(lambda: "run old" in telemetry.spans())  # a drain may end *just* before that is told
    spans = telemetry.spans()

    assert attributes(telemetry, "run old") == ["shed"]
    assert spans["run old"].attributes["error.type"] == "shed"
    assert spans["run old"].context.trace_id == spans["spawn old"].context.trace_id


def test_coalesced_spawn_says_so(telemetry: Any, settings: Settings) -> None:
    """The spawn that another one has become has that outcome, and there is one run."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        for _ in range(2):
            bgtasks.using(key="7").spawn("equal", int)
    telemetry.spans()

    assert attributes(telemetry, "spawn equal") == [None, "coalesced"]
    assert attributes(telemetry, "run equal") == ["succeeded"]


def test_nothing_leaks_into_the_drainer(telemetry: Any) -> None:
    """After traced tasks, neither the drainer's loop nor a slot's thread has a current span."""
    with telemetry.tracer.start_as_current_span("request"):
        for task in (plain, asynchronous):
            bgtasks.spawn("traced", task, Future())
    assert bgtasks.drain(BOUND)
    on_loop: Future[Any] = Future()
    pools.drainer.loop.call_later(0, lambda: on_loop.set_result(trace.get_current_span()))
    in_slot: Future[Any] = Future()
    tracing.uninstrument()
    bgtasks.spawn("untraced", plain, in_slot)

    assert not on_loop.result(BOUND).get_span_context().is_valid
    assert not in_slot.result(BOUND).get_span_context().is_valid


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_has_the_trace_of_the_call(telemetry: Any) -> None:
    """The trace is that of the code that asked for the task, not of what commits."""
    with transaction.atomic():
        with telemetry.tracer.start_as_current_span("inner") as inner:
            bgtasks.spawn_on_commit("mail", plain, Future())

    assert telemetry.spans()["spawn mail"].parent.span_id == inner.context.span_id


def test_histograms_have_the_durations(telemetry: Any) -> None:
    """The two histograms of the conventions count each spawn and each run."""
    bgtasks.spawn("good", int)
    bgtasks.spawn("bad", int, "x")
    assert bgtasks.drain(BOUND)
    points = telemetry.points()

    assert sorted(points) == ["messaging.client.operation.duration", "messaging.process.duration"]
    runs = {point.attributes["bgtasks.task.name"]: point for point in points["messaging.process.duration"]}
    assert (runs["good"].count, runs["bad"].count) == (1, 1)
    assert runs["bad"].attributes["error.type"] == "ValueError"
    assert {tuple(point.explicit_bounds) for kind in points.values() for point in kind} == {EXPORTED}


def test_lost_tasks_are_counted(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has told of killed ones is a counter."""
    monkeypatch.setitem(pools.journal.lost, ("default", "lost"), 2)

    [point] = telemetry.points()["bgtasks.tasks.lost"]

    assert point.value == 2
    assert point.attributes == {"messaging.destination.name": "default", "bgtasks.task.name": "lost"}


def test_tracer_that_raises_is_logged(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a tracer does, the task runs."""

    def started(pool: Any, task: Any) -> None:
        raise SystemExit

    [tracer] = registered.tracers
    monkeypatch.setattr(tracer, "started", started)
    with Logs() as logs:
        future: Future[Any] = Future()
        bgtasks.spawn("task", plain, future)
        assert bgtasks.drain(BOUND)
        repeats.flush()

    assert future.done()
    assert logs.of("a task could not be traced")
