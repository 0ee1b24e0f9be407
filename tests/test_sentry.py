"""Sentry: the error of a task carries the task's name and its spawner's trace, without any code of ours."""

from collections.abc import Iterator
from typing import Any

import pytest

sentry_sdk = pytest.importorskip("sentry_sdk")

from sentry_sdk.integrations.logging import LoggingIntegration  # noqa: E402  # after the module it may lack
from sentry_sdk.transport import Transport  # noqa: E402

import bgtasks  # noqa: E402
from tests.gate import BOUND  # noqa: E402


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
