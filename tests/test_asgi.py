"""The ASGI lifespan: the wrapper between a server and an application that may know nothing of it."""

import asyncio
import logging
import re
import warnings
from collections.abc import Callable, Coroutine, Iterator
from copy import copy
from typing import Any, cast

import pytest
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from uvicorn.config import Config
from uvicorn.lifespan.off import LifespanOff
from uvicorn.lifespan.on import LifespanOn

import bgtasks
import bgtasks.asgi
from bgtasks import pools, process
from bgtasks.core.places import State
from tests.gate import BOUND, AsyncGate, Gate

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

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(failed)

    async def main() -> list[Any]:
        protocol = Protocol(application)
        answer = await protocol.ask(STARTUP)
        return [answer, *await protocol.end()]

    assert asyncio.run(main()) == [failed]
    assert bgtasks.spawn("task", print, end="") is True


def test_application_that_ends_in_between_is_answered_for() -> None:
    """If it ends after its startup, the pools are shut down all the same."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(STARTUP_COMPLETE)

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]
    assert bgtasks.spawn("late", print) is False


@pytest.mark.parametrize("error", [ValueError("inner"), SystemError("inner")])
def test_application_that_raises_in_between_is_reported_and_raises_after_the_shutdown(
    error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A server to which it were raised at once would not announce its shutdown, and tasks would be lost."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(STARTUP_COMPLETE)
        raise error

    async def main() -> None:
        protocol = Protocol(application)
        await protocol.ask(STARTUP)
        accepted.append(bgtasks.spawn("task", ran.append, 7))
        await protocol._messages.put(SHUTDOWN)
        await protocol.end()

    accepted: list[bool] = []
    ran: list[int] = []

    with pytest.raises(type(error), match="inner"):
        asyncio.run(main())

    assert (accepted, ran) == ([True], [7])
    assert bgtasks.spawn("late", print) is False
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == "the application has ended between startup and shutdown"


def test_application_that_ends_at_shutdown_is_answered_for() -> None:
    """If it ends when it hears of the shutdown, without an answer, the server gets one."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        await send(STARTUP_COMPLETE)
        await receive()

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]


def test_application_that_goes_on_after_its_last_answer_is_waited_for() -> None:
    """The lifespan ends when the application does, as it would without the wrapper."""
    ends = []

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await Knowing()(scope, receive, send)
        await asyncio.sleep(0)
        ends.append("ended")

    assert run_lifespan(application) == [STARTUP_COMPLETE, SHUTDOWN_COMPLETE]
    assert ends == ["ended"]


# A second lifespan in the process.


def run_task() -> bool:
    """Spawn a task, and tell whether it was accepted and has run."""
    ran: list[int] = []
    accepted = bgtasks.spawn("task", ran.append, 7)
    assert bgtasks.drain(BOUND)
    return accepted and ran == [7]


@pytest.mark.parametrize("application", [get_asgi_application(), Knowing()])
def test_second_startup_opens_the_pools_again(application: Any) -> None:
    """After a shutdown tasks are accepted again once there is a startup, and run, each time."""

    async def main() -> tuple[bool, bool]:
        protocol = Protocol(application)
        await protocol.ask(STARTUP)
        ran = await asyncio.to_thread(run_task)
        await protocol.ask(SHUTDOWN)
        await protocol.end()
        return ran, bgtasks.spawn("between", print)

    assert [asyncio.run(main()) for _ in range(3)] == [(True, False)] * 3


def test_pools_are_shut_down_with_the_last_lifespan() -> None:
    """A server whose workers are threads of one process may replace one: the others go on spawning."""

    async def main() -> list[bool]:
        old, new = Protocol(get_asgi_application()), Protocol(get_asgi_application())
        await old.ask(STARTUP)
        await new.ask(STARTUP)
        await old.ask(SHUTDOWN)
        ran = [await asyncio.to_thread(run_task)]
        await new.ask(SHUTDOWN)
        ran.append(bgtasks.spawn("late", print))
        await new.end()
        await old.end()
        return ran

    assert asyncio.run(main()) == [True, False]


def test_lifespan_that_ends_without_a_shutdown_keeps_no_pool_open() -> None:
    """A startup that failed is over: the next lifespan is the only one, and its end the last."""

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise OSError("no such file")

    async def main() -> bool:
        failed = Protocol(fail)
        await failed._messages.put(STARTUP)
        with pytest.raises(OSError, match="no such file"):
            await failed.end()
        protocol = Protocol(get_asgi_application())
        await protocol.ask(STARTUP)
        await protocol.ask(SHUTDOWN)
        await protocol.end()
        return bgtasks.spawn("late", print)

    assert asyncio.run(main()) is False


def test_second_startup_waits_for_a_shutdown_that_is_under_way() -> None:
    """What was accepted before it ends before it."""

    async def main() -> bool:
        await asyncio.to_thread(gate.wait_entered)
        shutdown = asyncio.create_task(bgtasks.ashutdown())
        while pools.drainer.accepting:  # noqa: ASYNC110  # it cannot say
            await asyncio.sleep(0)
        protocol = Protocol(get_asgi_application())
        startup = asyncio.create_task(protocol.ask(STARTUP))
        await asyncio.sleep(0)

        assert not startup.done()

        gate.open()
        await startup
        assert await shutdown
        ran = await asyncio.to_thread(run_task)
        await protocol.ask(SHUTDOWN)
        await protocol.end()
        return ran

    with Gate() as gate:
        bgtasks.spawn("held", gate)

        assert asyncio.run(main())


def test_startup_leaves_pools_that_are_open_as_they_are() -> None:
    """A first startup, or one that nobody has shut down before, changes no figure and disturbs no task."""

    async def main() -> None:
        protocol = Protocol(get_asgi_application())
        await protocol.ask(STARTUP)
        assert bgtasks.stats()["default"].running == 1
        gate.open()
        await protocol.ask(SHUTDOWN)
        await protocol.end()

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        asyncio.run(main())

    assert bgtasks.stats()["default"].succeeded == 1


def new_client(application: Any) -> Any:
    """Return Starlette's test client of an application with the wrapper."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for another version of httpx
        from starlette.testclient import TestClient

        return TestClient(cast(Any, lifespan(application)))


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(bgtasks.spawn("task", ran_in_view.append, 7)))


ran_in_view: list[int] = []


@override_settings(ROOT_URLCONF=(path("", view),))
def test_test_client_can_be_entered_twice() -> None:
    """Each `with` of a test client is a lifespan; the tasks of its requests are done at its end."""
    client = new_client(get_asgi_application())
    for number in (1, 2):
        with client:
            assert client.get("/").text == "True"

        assert ran_in_view == [7] * number
    assert client.get("/").text == "False"


@pytest.mark.parametrize("moment", ["startup", "between", "shutdown", "shutdown failed"])
def test_test_client_raises_what_the_application_raises(moment: str) -> None:
    """A client whose lifespan fails does not hang at its exit, and shows why."""

    async def application(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        await receive()
        if moment == "startup":
            raise ZeroDivisionError
        await send(STARTUP_COMPLETE)
        if moment == "between":
            raise ZeroDivisionError
        await receive()
        if moment == "shutdown failed":
            await send({"type": "lifespan.shutdown.failed", "message": "no"})
        raise ZeroDivisionError

    entered = False
    with pytest.raises(ZeroDivisionError), new_client(application):
        entered = True

    assert entered is (moment != "startup")


# What uvicorn observes, with the wrapper and without it: the cases of its own tests/test_lifespan.py.


async def complete(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    await send(STARTUP_COMPLETE)
    scope["state"]["foo"] = 123
    assert (await receive())["type"] == "lifespan.shutdown"
    await send(SHUTDOWN_COMPLETE)


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"


async def raising_at_once(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError


async def failing_startup(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "the lifespan event failed"})


async def raising_after_failed_startup(scope: Any, receive: Any, send: Any) -> None:
    await failing_startup(scope, receive, send)
    raise RuntimeError


async def raising_in_startup(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise RuntimeError


async def silent(scope: Any, receive: Any, send: Any) -> None:
    assert scope == {**LIFESPAN, "state": {}}


async def failing_shutdown(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send(STARTUP_COMPLETE)
    await receive()
    await send({"type": "lifespan.shutdown.failed", "message": "the lifespan event failed"})


async def raising_after_failed_shutdown(scope: Any, receive: Any, send: Any) -> None:
    await failing_shutdown(scope, receive, send)
    raise RuntimeError


async def raising_in_shutdown(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send(STARTUP_COMPLETE)
    await receive()
    raise RuntimeError


CASES: list[tuple[Any, str, dict[str, Any]]] = [
    (complete, "auto", {"state": {"foo": 123}}),
    (complete, "on", {"state": {"foo": 123}}),
    (refusing, "auto", {"error_occurred": True, "should_exit": False}),
    (raising_at_once, "on", {"error_occurred": True, "should_exit": True}),
    (raising_in_startup, "auto", {"error_occurred": True, "should_exit": False}),
    (raising_in_startup, "on", {"error_occurred": True, "should_exit": True}),
    (silent, "on", {"startup_failed": False, "error_occurred": False, "should_exit": False}),
    (raising_in_shutdown, "auto", {"error_occurred": True, "should_exit": False}),
    (raising_in_shutdown, "on", {"error_occurred": True, "should_exit": True}),
]
for mode in ("auto", "on"):
    failed = {"startup_failed": True, "should_exit": True}
    CASES += [
        (failing_startup, mode, {**failed, "error_occurred": False}),
        (raising_after_failed_startup, mode, {**failed, "error_occurred": True}),
    ]
    failed = {"startup_failed": False, "shutdown_failed": True, "should_exit": True}
    CASES += [
        (failing_shutdown, mode, {**failed, "error_occurred": False}),
        (raising_after_failed_shutdown, mode, {**failed, "error_occurred": True}),
    ]


def observed(application: Any, mode: str, caplog: pytest.LogCaptureFixture) -> tuple[Any, Any, list[str]]:
    """Return what uvicorn knows after the startup and after the shutdown, and what it logs."""

    def state() -> dict[str, Any]:
        names = ("error_occurred", "startup_failed", "shutdown_failed", "should_exit", "state")
        return {name: copy(getattr(protocol, name)) for name in names}

    async def main() -> tuple[Any, Any]:
        await protocol.startup()
        started = state()
        if not protocol.should_exit:
            await protocol.shutdown()
        # The application ends at once, but in a task of its own.
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return started, state()

    protocol = LifespanOn(Config(application, lifespan=cast(Any, mode), log_config=None))
    caplog.clear()
    with caplog.at_level(logging.INFO, "uvicorn.error"):
        started, ended = asyncio.run(main())
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    return started, ended, lines


@pytest.mark.parametrize(("application", "mode", "expected"), CASES)
def test_uvicorn_observes_the_same_with_the_wrapper_and_without_it(
    application: Any, mode: str, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the application answers and raises reaches the server, so it exits or goes on as it would."""
    bare = observed(application, mode, caplog)
    wrapped = observed(lifespan(application), mode, caplog)

    assert bare[1].items() >= expected.items()
    assert wrapped == bare


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_uvicorn_starts_django_with_the_wrapper(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Django refuses the lifespan before it receives anything, which is no failure: the wrapper answers."""
    started, ended, lines = observed(lifespan(get_asgi_application()), mode, caplog)

    assert not any([*started.values(), *ended.values()])
    assert "Application startup complete." in lines
    assert "Application shutdown complete." in lines


def test_uvicorn_without_a_lifespan_asks_nobody() -> None:
    """With `--lifespan off` neither the wrapper nor the application is called."""

    async def main() -> None:
        protocol = LifespanOff(Config(lifespan(refusing), lifespan="off", log_config=None))
        await protocol.startup()
        await protocol.shutdown()

    asyncio.run(main())

    assert bgtasks.spawn("task", print, end="") is True


@pytest.mark.parametrize("application", [refusing, raising_in_startup])
def test_application_that_fails_at_its_startup_is_reported(
    application: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With uvicorn's `--lifespan auto` the site serves requests, and would lose its tasks without a word."""
    observed(lifespan(application), "auto", caplog)

    [record] = [record for record in caplog.records if record.name == "bgtasks"]
    assert record.levelno == logging.WARNING
    assert re.fullmatch(
        r"the application failed at startup \((AssertionError|RuntimeError)\): a server that continues "
        "anyway, as uvicorn does, will not announce its shutdown, and its tasks will be lost",
        record.getMessage(),
    )


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
