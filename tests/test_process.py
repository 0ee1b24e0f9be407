"""The process's own hooks: what it is told of a server without a lifespan. Exits and forks: core/."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path

import bgtasks
from bgtasks import process
from bgtasks.process import lifespan
from tests.gate import BOUND, Gate
from tests.processes import run_python


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Give every test new pools, and end them after it."""
    with override_settings(BGTASKS={"default": {"CAPACITY": 4, "CONN_MAX": 2}}):
        yield


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Let the process not know whether its server announces the lifespan; return the warnings about it."""
    pytest.importorskip("uvicorn.server")
    monkeypatch.setattr(lifespan, "settled", False)
    monkeypatch.setattr(lifespan, "look_at", 0.0)
    monkeypatch.setattr(process, "LOOK_INTERVAL", 0.0)

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    return warnings


SETUP_WITHOUT_THREADS = """
import threading
threading.stack_size(1 << 60)  # there is no memory for such a stack
import django
django.setup()
threading.stack_size(0)
import bgtasks
print(bgtasks.spawn("task", print, "ran"), bgtasks.drain(10))
"""


def test_site_starts_if_the_drainer_cannot() -> None:
    """A machine without a free thread serves requests; the log says so, and the next spawn tries again."""
    done = run_python(SETUP_WITHOUT_THREADS)

    assert (done.returncode, done.stdout) == (0, "ran\nTrue True\n")
    first, *_, last = done.stderr.splitlines()
    assert first == "the drainer could not be started; the next spawn tries again"
    assert last == "  RuntimeError: can't start new thread"


MISSING = (
    "tasks are spawned on an event loop, and the server has not announced its lifespan: "
    "under uvicorn they would be lost at shutdown; write in asgi.py: "
    "application = bgtasks.asgi.lifespan(get_asgi_application())"
)


async def spawn_a_task() -> None:
    bgtasks.spawn("task", print, end="")


COMMAND = """
import asyncio
import sys
import threading
import django
sys.argv[0] = sys.argv[1].replace("DJANGO", django.__path__[0])
django.setup()
from django.test import override_settings
import bgtasks
override_settings(BGTASKS={"default": {"SHUTDOWN_TIMEOUT": 1}}).enable()
entered = threading.Event()
def hold():
    entered.set()
    threading.Event().wait()
async def main():
    bgtasks.spawn("held", hold)
asyncio.run(main())
entered.wait(30)  # Python 3.12.0 to 3.12.2 cannot start the slots at exit
"""


@pytest.mark.parametrize("script", ["/srv/site/manage.py", "DJANGO/__main__.py"])
def test_command_that_ends_before_its_tasks_is_told_to_drain(script: str) -> None:
    """Its exit hooks run, so nothing is said of a lifespan; what was cut is, and what to do."""
    lines = run_python(COMMAND, script).stderr.splitlines()

    assert lines == [
        "pool 'default' was shut down with 1 tasks cancelled: 1 'held'",
        process.NO_DRAIN,
    ]
    assert "bgtasks.drain()" in process.NO_DRAIN


def test_spawn_on_a_loop_without_a_lifespan_is_reported_once(unsettled: Callable[..., Any]) -> None:
    """Who forgot the wrapper is told of it, with the line to write, the first time a task could get lost."""
    asyncio.run(spawn_a_task())
    asyncio.run(spawn_a_task())

    assert unsettled() == [MISSING]


def test_spawn_in_a_sync_view_without_a_lifespan_is_reported(unsettled: Callable[..., Any]) -> None:
    """A sync view under ASGI runs on a thread for which a loop waits: its tasks could get lost as well."""

    def view(request: HttpRequest) -> HttpResponse:
        bgtasks.spawn("task", print, end="")
        return HttpResponse()

    async def main() -> Any:
        sent = []
        messages = [{"type": "http.request", "body": b""}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        await get_asgi_application()(scope, receive, send)
        return sent[0]["status"]

    with override_settings(ROOT_URLCONF=(path("", view),)):
        status = Context().run(asyncio.run, main())  # nothing of what another test has left in ours

    assert status == 200
    assert unsettled() == [MISSING]


def test_spawn_in_an_async_task_is_not_reported(unsettled: Callable[..., Any]) -> None:
    """The drainer's own loop says nothing about the server."""

    def spawn() -> None:
        bgtasks.spawn("inner", print, end="")

    async def task() -> None:
        await sync_to_async(spawn)()
        spawn()

    bgtasks.spawn("outer", task)
    bgtasks.drain(BOUND)
    bgtasks.drain(BOUND)

    assert unsettled() == []
    assert lifespan.settled is False


def test_spawn_on_a_thread_without_a_loop_is_not_reported(unsettled: Callable[..., Any]) -> None:
    """A WSGI server or a script has no lifespan, and needs none: the exit hooks run."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(bgtasks.spawn, "task", print, end="").result(BOUND)
    with Gate() as gate:
        bgtasks.spawn("task", gate)

    assert unsettled() == []
    assert bgtasks.drain(BOUND)


def test_spawn_on_a_loop_after_a_lifespan_is_not_reported(unsettled: Callable[..., Any]) -> None:
    """A server that has announced its lifespan will announce its end."""
    lifespan.settled = True
    asyncio.run(spawn_a_task())
    asyncio.run(spawn_a_task())

    assert unsettled() == []


def test_loop_is_looked_for_once_a_second(
    unsettled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spawn that finds no loop saves those of the next second the look."""
    monkeypatch.setattr(process, "LOOK_INTERVAL", 1000.0)
    bgtasks.spawn("task", print, end="")
    asyncio.run(spawn_a_task())

    assert unsettled() == []

    lifespan.look_at -= 1000.0
    asyncio.run(spawn_a_task())

    assert unsettled() == [MISSING]


def test_async_view_under_wsgi_is_not_reported(unsettled: Callable[..., Any]) -> None:
    """The loop of an async view under WSGI lives for its request; the server needs no lifespan."""
    async_to_sync(spawn_a_task)()

    assert unsettled() == []
