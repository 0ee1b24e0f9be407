"""The ASGI lifespan: the wrapper between a server and an application that may know nothing of it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
from django.core.asgi import get_asgi_application
from django.test import override_settings

import bgtasks
import bgtasks.asgi
from bgtasks import pools, process
from bgtasks.core.queue import State
from tests.gate import BOUND, AsyncGate

LIFESPAN = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
STARTUP = {"type": "lifespan.startup"}
SHUTDOWN = {"type": "lifespan.shutdown"}
STARTUP_COMPLETE = {"type": "lifespan.startup.complete"}
SHUTDOWN_COMPLETE = {"type": "lifespan.shutdown.complete"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Give every test new pools, and end them after it."""
    with override_settings(BGTASKS={"default": {"CAPACITY": 4, "CONN_MAX": 2}}):
        yield


# ASGI promises an awaitable; ours is a coroutine, which a task can be made of.
lifespan: Callable[[Any], Callable[..., Coroutine[Any, Any, None]]] = cast(Any, bgtasks.asgi.lifespan)


class Protocol:
    """A server's side of one lifespan: the messages it sends, and what it is answered."""

    def __init__(self, application: Any) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._run: asyncio.Task[None] = asyncio.create_task(
            lifespan(application)(LIFESPAN, self._messages.get, self.answers.put)
        )

    async def ask(self, message: Any) -> Any:
        """Send `message`, and return the answer."""
        await self._messages.put(message)
        async with asyncio.timeout(BOUND):
            return await self.answers.get()

    async def end(self) -> list[Any]:
        """Wait for the application's end, and return the answers that nobody has asked for."""
        async with asyncio.timeout(BOUND):
            await self._run
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [self.answers.get_nowait() for _ in range(self.answers.qsize())]


def run_lifespan(application: Any) -> Any:
    """Start `application` up and shut it down; return the answers of the wrapper around it."""

    async def main() -> Any:
        protocol = Protocol(application)
        answers = [await protocol.ask(STARTUP), await protocol.ask(SHUTDOWN)]
        return answers + await protocol.end()

    return asyncio.run(main())


def test_wrapper_answers_for_django() -> None:
    """Django does not know the protocol, up to 6.1 it raises: the wrapper speaks for it."""
    assert run_lifespan(get_asgi_application()) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]


def test_shutdown_waits_for_tasks() -> None:
    """The server hears that it is complete when the tasks have ended, and none is accepted after."""

    async def main() -> list[Any]:
        protocol = Protocol(get_asgi_application())
        await protocol.ask(STARTUP)
        bgtasks.spawn("held", gate)
        shutdown = asyncio.create_task(protocol.ask(SHUTDOWN))
        while pools.default.slots.queue.state is State.OPEN:  # noqa: ASYNC110  # it cannot say
            await asyncio.sleep(0)

        assert protocol.answers.empty()

        gate.open()
        return [await shutdown, *await protocol.end()]

    with AsyncGate() as gate:
        assert asyncio.run(main()) == [SHUTDOWN_COMPLETE]

    assert bgtasks.stats()["default"].running == 0
    assert bgtasks.spawn("late", print) is False


def test_startup_leaves_the_pools_open() -> None:
    """Between startup and shutdown tasks are accepted and run."""

    async def main() -> Any:
        protocol = Protocol(get_asgi_application())
        await protocol.ask(STARTUP)
        accepted = bgtasks.spawn("task", ran.append, 7)
        complete = await bgtasks.adrain(BOUND)
        await protocol.ask(SHUTDOWN)
        await protocol.end()
        return accepted, complete

    ran: list[Any] = []

    assert asyncio.run(main()) == (True, True)
    assert ran == [7]


class Knowing:
    """An application that knows the protocol; it notes what it hears and if tasks were accepted then."""

    def __init__(self, startup: Any = STARTUP_COMPLETE, shutdown: Any = SHUTDOWN_COMPLETE) -> None:
        self.heard: list[Any] = []
        self.scopes: list[Any] = []
        self._startup = startup
        self._shutdown = shutdown

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        self.scopes.append(scope)
        for answer in (self._startup, self._shutdown):
            message = await receive()
            self.heard.append((message["type"], bgtasks.spawn("task", print, end="")))
            await send(answer)


def test_application_that_knows_the_protocol_goes_on_getting_it() -> None:
    """It gets the scope and the messages, the server its answers; the pools are shut down between."""
    application = Knowing()

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]

    assert application.scopes == [LIFESPAN]
    assert application.scopes[0]["state"] is LIFESPAN["state"]
    assert application.heard == [("lifespan.startup", True), ("lifespan.shutdown", False)]


def test_answers_of_the_application_are_passed_on_whole() -> None:
    """What it says beside the type, as in a failed shutdown, reaches the server."""
    failed = {"type": "lifespan.shutdown.failed", "message": "no"}

    assert run_lifespan(Knowing(shutdown=failed)) == [STARTUP_COMPLETE, failed]


def test_failed_startup_is_passed_on_and_ends_it() -> None:
    """An application that cannot start is not asked to shut down, and the pools stay open for a retry."""
    failed = {"type": "lifespan.startup.failed", "message": "no"}

    async def main() -> list[Any]:
        protocol = Protocol(application)
        answer = await protocol.ask(STARTUP)
        return [answer, *await protocol.end()]

    application = Knowing(startup=failed)

    assert asyncio.run(main()) == [failed]
    assert application.heard == [("lifespan.startup", True)]
    assert bgtasks.spawn("task", print, end="") is True


@pytest.mark.parametrize("error", [None, ValueError("inner"), SystemError("inner")])
def test_application_that_ends_in_between_is_answered_for(error: Any) -> None:
    """If it ends after its startup, with or without an exception, the pools are shut down all the same."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(STARTUP_COMPLETE)
        if error is not None:
            raise error

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]
    assert bgtasks.spawn("late", print) is False


def test_application_that_ends_at_shutdown_is_answered_for() -> None:
    """If it ends when it hears of the shutdown, without an answer, the server gets one."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(STARTUP_COMPLETE)
        await receive()

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]


def test_application_that_goes_on_is_cancelled() -> None:
    """What it still does after its last answer ends with the lifespan."""
    ends = []

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await Knowing()(scope, receive, send)
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]
    assert ends == ["cancelled"]


def test_server_that_gives_up_leaves_nothing() -> None:
    """A lifespan that the server cancels leaves no task behind, and the application is cancelled with it."""
    ends = []

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        try:
            await Knowing()(scope, receive, send)
        finally:
            ends.append("ended")

    async def main() -> None:
        protocol = Protocol(application)
        await protocol.ask(STARTUP)
        protocol._run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await protocol._run
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())

    assert ends == ["ended"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_other_scopes_are_untouched(kind: str) -> None:
    """A request goes to the application with the server's very own scope and functions."""
    calls = []

    async def application(*args: Any) -> None:
        calls.append(args)

    async def receive() -> None:
        raise NotImplementedError  # pragma: no cover  # only passed on

    async def send(message: Any) -> None:
        raise NotImplementedError  # pragma: no cover  # only passed on

    scope = {"type": kind, "path": "/"}
    asyncio.run(lifespan(application)(scope, receive, send))

    [call] = calls
    assert all(mine is its for mine, its in zip((scope, receive, send), call, strict=True))


def test_process_that_was_told_of_a_lifespan_does_not_miss_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has announced its lifespan will announce its end."""
    monkeypatch.setattr(process.lifespan, "settled", False)

    async def main() -> None:
        protocol = Protocol(get_asgi_application())
        await protocol.ask(STARTUP)
        await protocol.ask(SHUTDOWN)
        await protocol.end()

    asyncio.run(main())

    assert process.lifespan.settled is True
