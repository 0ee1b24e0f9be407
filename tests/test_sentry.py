"""Sentry: the error of a task carries the task's name, its spawner's trace, and what the task has set."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from pytest_django import Settings

sentry_sdk = pytest.importorskip("sentry_sdk")

from sentry_sdk.integrations.logging import LoggingIntegration  # noqa: E402  # after the module it may lack
from sentry_sdk.transport import Transport  # noqa: E402

import bgtasks  # noqa: E402
from bgtasks.contrib import sentry as tracing  # noqa: E402
from tests.gate import BOUND, AsyncGate, Gate  # noqa: E402
from tests.public import full  # noqa: E402


class Collected(Transport):
    """Keeps what would be sent."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[dict[str, Any]] = []
        self.transactions: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            if item.type in {"event", "transaction"}:
                (self.events if item.type == "event" else self.transactions).append(item.payload.json)


@pytest.fixture
def sentry() -> Iterator[Any]:
    transport = Collected()
    with sentry_sdk.isolation_scope():
        sentry_sdk.init(
            dsn="http://key@127.0.0.1/1",
            transport=transport,
            traces_sample_rate=1.0,
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            enable_backpressure_handling=False,
            integrations=[LoggingIntegration()],
        )
        yield transport
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)


def fail(text: str) -> None:
    raise ValueError("no such address")


async def fail_on_the_loop(text: str) -> None:
    fail(text)


@pytest.mark.parametrize("task", [fail, fail_on_the_loop])
def test_error_of_a_task_has_its_name_and_its_spawners_trace(task: Any, sentry: Any) -> None:
    """The record of the log is what Sentry hears, in the context that the task has from its spawner."""
    with sentry_sdk.start_transaction(name="request", op="http.server") as request:
        bgtasks.spawn("send-welcome", task, "ada")
        assert bgtasks.drain(BOUND)
    [event] = sentry.events

    assert event["logger"] == "bgtasks"
    assert (event["extra"]["task"], event["extra"]["pool"]) == ("send-welcome", "default")
    assert event["extra"]["outcome"] == "failed"
    assert event["exception"]["values"][-1]["value"] == "no such address"
    assert event["contexts"]["trace"]["trace_id"] == request.trace_id


def tell(user: str) -> None:
    sentry_sdk.set_user({"username": user})
    sentry_sdk.set_tag("by", user)
    sentry_sdk.get_current_scope().set_extra("set by", user)


def fail_as(user: str, gate: Gate) -> None:
    tell(user)
    gate()
    raise ValueError(user)


async def fail_on_the_loop_as(user: str, gate: AsyncGate) -> None:
    tell(user)
    await gate()
    raise ValueError(user)


@pytest.mark.parametrize(("task", "kind"), [(fail_as, Gate), (fail_on_the_loop_as, AsyncGate)])
def test_what_a_task_tells_sentry_is_of_that_task_only(task: Any, kind: Any, sentry: Any) -> None:
    """Two tasks at once set a user and a tag each, and fail; then their request fails: each has its own."""
    sentry_sdk.set_user({"username": "of the request"})
    sentry_sdk.set_tag("site", "shop")
    with kind() as gate:
        for user in ("ada", "bob"):
            bgtasks.spawn(f"{user} fails", task, user, gate)
        gate.wait_entered(2)
    assert bgtasks.drain(BOUND)
    sentry_sdk.capture_exception(ValueError("of the request"))

    seen = {event["exception"]["values"][-1]["value"]: event for event in sentry.events}
    assert {name: event["user"]["username"] for name, event in seen.items()} == {name: name for name in seen}
    assert {name: event["tags"].get("by") for name, event in seen.items()} == {
        "ada": "ada",
        "bob": "bob",
        "of the request": None,
    }
    assert [event["tags"]["site"] for event in seen.values()] == ["shop"] * 3
    assert [seen[user]["extra"]["set by"] for user in ("ada", "bob")] == ["ada", "bob"]
    assert "set by" not in seen["of the request"].get("extra", {})


@pytest.fixture
def traced(sentry: Any) -> Iterator[Any]:
    tracing.instrument()
    yield sentry
    tracing.uninstrument()


def published(transactions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one ``queue.publish`` span."""
    [span] = [span for each in transactions for span in each["spans"] if span["op"] == "queue.publish"]
    found: dict[str, Any] = span
    return found


def runs(transactions: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what Sentry has of each run: the trace context of its transaction, and the span in it."""
    return [
        (each["contexts"]["trace"], next(span for span in each["spans"] if span["op"] == "queue.process"))
        for each in transactions
        if each["contexts"]["trace"]["op"] == "queue.task.bgtasks"
    ]


def look_up() -> None:
    with sentry_sdk.start_span(op="db", name="SELECT"):
        pass


async def look_up_on_the_loop() -> None:
    look_up()


@pytest.mark.parametrize("task", [look_up, look_up_on_the_loop])
def test_spawn_and_run_are_on_the_page_of_queues(task: Any, traced: Any) -> None:
    """Spans with Sentry's names, in one trace: that of the spawn in the request, that of the run below it."""
    with sentry_sdk.start_transaction(name="request", op="http.server") as request:
        bgtasks.spawn("send-welcome", task)
        assert sentry_sdk.get_current_span() is request
    assert bgtasks.drain(BOUND)
    publish = published(traced.transactions)
    [(run, process)] = runs(traced.transactions)

    assert publish["parent_span_id"] == request.span_id
    assert run["parent_span_id"] == publish["span_id"]
    assert process["parent_span_id"] == run["span_id"]
    assert {run["trace_id"], publish["trace_id"], process["trace_id"]} == {request.trace_id}
    assert {publish["description"], process["description"]} == {"send-welcome"}
    assert publish["data"]["messaging.destination.name"] == "default"
    assert process["data"]["messaging.destination.name"] == "default"
    assert publish["data"]["messaging.message.id"] == process["data"]["messaging.message.id"]
    assert process["data"]["messaging.message.receive.latency"] >= 0
    assert process["data"]["messaging.message.retry.count"] == 0
    assert (publish["status"], process["status"], run["status"]) == ("ok", "ok", "ok")
    [inner] = [span for each in traced.transactions for span in each["spans"] if span["op"] == "db"]
    assert inner["parent_span_id"] == process["span_id"]


@pytest.mark.parametrize("task", [fail, fail_on_the_loop])
@pytest.mark.parametrize("mode", ["pool", "inline"])
def test_each_try_is_a_run(task: Any, mode: str, traced: Any, settings: Settings) -> None:
    """The tries are counted from 0, each ends with its error, all in the trace of the spawner."""
    settings.BGTASKS = {"default": {"MODE": mode}}
    with sentry_sdk.start_transaction(name="request", op="http.server") as request:
        with suppress(ValueError):  # inline
            bgtasks.using(retries=1, retry_delay=0).spawn("send-welcome", task, "ada")
        assert bgtasks.drain(BOUND)
    tries = runs(traced.transactions)

    assert sorted(process["data"]["messaging.message.retry.count"] for _, process in tries) == [0, 1]
    assert {run["status"] for run, _ in tries} == {"internal_error"}
    assert {run["trace_id"] for run, _ in tries} == {request.trace_id}
    assert len({process["data"]["messaging.message.id"] for _, process in tries}) == 1


def test_task_of_no_transaction_has_a_run(traced: Any) -> None:
    """The spawner has no span of its own, and the run is in the trace that Sentry has for it."""
    trace_id = sentry_sdk.get_traceparent().partition("-")[0]
    bgtasks.spawn("send-welcome", look_up)
    assert bgtasks.drain(BOUND)
    [(run, _)] = runs(traced.transactions)

    assert run["trace_id"] == trace_id


def test_dropped_task_is_a_failed_publish(traced: Any, settings: Settings) -> None:
    """It has no run."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}
    with full(bgtasks.pools["default"]):
        with sentry_sdk.start_transaction(name="request", op="http.server"):
            assert not bgtasks.spawn("late", look_up)
    assert bgtasks.drain(BOUND)

    assert published(traced.transactions)["status"] == "resource_exhausted"
    assert "late" not in [process["description"] for _, process in runs(traced.transactions)]


def test_task_that_is_spawned_before_sentry_is_there(traced: Any) -> None:
    """It runs untraced."""
    client = sentry_sdk.get_client()
    sentry_sdk.get_global_scope().set_client(None)
    with Gate() as gate:
        bgtasks.spawn("early", gate)
        sentry_sdk.get_global_scope().set_client(client)
    assert bgtasks.drain(BOUND)

    assert traced.transactions == []
