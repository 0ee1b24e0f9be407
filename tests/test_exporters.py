"""Half of a character (a lone surrogate), which UTF-8 cannot encode, ends no exporter."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import BaseCache
from django.test import Client
from django.urls import reverse
from pytest_django import Settings

import bgtasks
from bgtasks.pools import pools
from tests.gate import BOUND
from tests.monitoring.test_journal import content, leave
from tests.monitoring.test_publisher import cache, other, publish
from tests.public import full
from tests.test_admin import DATA, login
from tests.test_command import run

__all__ = ["cache"]  # the fixture

HALF = "half \ud800"
WRITTEN = "half \\ud800"


def fail(*_args: object) -> None:
    """Raise what has a half in its message, in the name of its type and in a note."""
    error = type("Bad", (Exception,), {})(HALF)
    type(error).__qualname__ = HALF
    error.add_note(HALF)
    raise error


@pytest.fixture(autouse=True)
def anew(settings: Settings) -> None:
    """Pools that have counted nothing yet."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}


def account() -> dict[str, Any]:
    """Return the figures by name."""
    slots = pools.default.slots
    assert slots is not None
    return slots.queue.account


def busy() -> None:
    """Fail, run, hold and drop tasks of such a name."""
    bgtasks.spawn(HALF, fail, HALF)
    assert bgtasks.drain(BOUND)
    with full(bgtasks.pools["default"]):
        assert not bgtasks.spawn(HALF, fail)
    assert bgtasks.drain(BOUND)


def test_every_text_that_is_kept_can_be_encoded(cache: BaseCache) -> None:
    """Names, types and tracebacks: a snapshot is UTF-8 even for those who read the text in it."""
    busy()
    snapshot = pools.publisher.snapshot()

    [pool] = snapshot["pools"]
    assert WRITTEN in [row["name"] for row in pool["names"]]
    [failure] = pool["failures"]
    assert WRITTEN in failure["traceback"]
    assert json.dumps(snapshot, ensure_ascii=False).encode()


@pytest.mark.django_db(transaction=True)
@pytest.mark.urls("tests.browser.urls")
def test_command_and_page(cache: BaseCache, client: Client) -> None:
    """Both show the name, written out."""
    busy()
    login(client, is_superuser=True)
    seen = json.dumps(client.get(reverse(DATA)).json(), ensure_ascii=False)
    publish(cache, other(pools=pools.publisher.snapshot()["pools"]))
    texts = [run(*arguments)[0] for arguments in ([], ["--json"])]

    assert WRITTEN.replace("\\", "\\\\") in seen
    assert all("half " in text.encode().decode() for text in [seen, *texts])


def test_prometheus() -> None:
    """A scrape is encoded as a whole."""
    client = pytest.importorskip("prometheus_client")
    from bgtasks.contrib import prometheus  # noqa: PLC0415  # it may lack its module

    registry = client.CollectorRegistry()
    prometheus.register(registry)
    busy()

    assert f'task="{HALF[:5]}\\\\ud800"' in client.generate_latest(registry).decode()


def test_opentelemetry(caplog: pytest.LogCaptureFixture) -> None:
    """A batch of spans is encoded as a whole, and no attribute is left out of it."""
    pytest.importorskip("opentelemetry.sdk")
    encoder: Any = pytest.importorskip("opentelemetry.exporter.otlp.proto.common.trace_encoder")
    from tests.test_opentelemetry import Telemetry  # noqa: PLC0415  # it may lack its module

    with closing(Telemetry()) as telemetry:
        busy()
        spans = telemetry.exporter.get_finished_spans()
    caplog.clear()
    batch = str(encoder.encode_spans(spans))

    assert not caplog.messages
    assert f"run {WRITTEN}" in [span.name for span in spans]
    assert batch.count("exception.stacktrace") == batch.count("exception.message") == 1


def test_journal(tmp_path: Path) -> None:
    """The next process can tell of such a task."""
    loss = content(leave(tmp_path, HALF))

    assert loss is not None
    assert loss.tasks[0].name == "half ?"


def test_task_of_django(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a task of django.tasks is that of its function, which may be anything."""
    tasks: Any = pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")
    settings.TASKS = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}
    monkeypatch.setattr(fail, "__qualname__", HALF)
    tasks.task(fail).enqueue()
    assert bgtasks.drain(BOUND)

    assert f"{__name__}.{WRITTEN}" in account()
