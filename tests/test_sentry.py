"""Sentry: the error of a task carries the task's name, its spawner's trace, and what the task has set."""

from collections.abc import Iterator
from typing import Any

import pytest

sentry_sdk = pytest.importorskip("sentry_sdk")

from sentry_sdk.integrations.logging import LoggingIntegration  # noqa: E402  # after the module it may lack
from sentry_sdk.transport import Transport  # noqa: E402

import bgtasks  # noqa: E402
from tests.gate import BOUND, AsyncGate, Gate  # noqa: E402


class Collected(Transport):
    """Keeps what would be sent."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [item.payload.json for item in envelope.items if item.type == "event"]


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
            bgtasks.spawn("set and fail", task, user, gate)
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
