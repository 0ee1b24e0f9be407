"""Making a task of what spawn was given: everything that can be run, and the mistakes that can be made."""

import asyncio
import contextvars
import enum
import gc
import logging
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, cast

import django
import pytest
from asgiref.sync import SyncToAsync, async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, TestCase, override_settings
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import mark_safe
from pytest_django import Settings

import bgtasks
from bgtasks import pools
from bgtasks.signals import task_spawned
from bgtasks.submission import make_task
from tests.gate import BOUND, Gate, wait_until
from tests.public import (
    SMALL,
    coroutine_function,
    function,
    heard,
    is_closed,
    never,
    site,
)

has_django_tasks = pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks is new in 6.0")


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


@pytest.fixture
def async_db(transactional_db: None) -> Iterator[None]:
    """Let async code of a test use the database on the thread that asgiref keeps for it."""
    yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result(BOUND)


# What can be run.


class CallableObject:
    def __call__(self, ran: list[Any], *, value: Any) -> None:
        ran.append(value)

    def method(self, ran: list[Any], *, value: Any) -> None:
        ran.append(value)

    async def async_method(self, ran: list[Any], *, value: Any) -> None:
        ran.append(value)

    @classmethod
    def class_method(cls, ran: list[Any], *, value: Any) -> None:
        ran.append(value)


class AsyncCallable:
    async def __call__(self, ran: list[Any], *, value: Any) -> None:
        ran.append(value)


class Awaitable:
    """Can be awaited, and is no coroutine: as a query of an ORM that is lazy."""

    def __init__(self, ran: list[Any], *, value: Any) -> None:
        self._coroutine = coroutine_function(ran, value=value)

    def __await__(self) -> Any:
        return self._coroutine.__await__()


class CallableAwaitable(Awaitable):
    def __call__(self) -> None:
        pytest.fail("it was called")  # pragma: no cover  # it is what must not happen


class OtherCoroutine(Awaitable):
    """Has the methods of a coroutine, and is none of Python's own: as those of aiohttp, Cython and mypyc."""

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)  # pragma: no cover  # who awaits it need not call this

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)  # pragma: no cover  # as above

    def close(self) -> None:
        self._coroutine.close()


@types.coroutine
def old_coroutine_function(ran: list[Any], *, value: Any) -> Any:
    yield from asyncio.sleep(0).__await__()
    ran.append(value)


class Proxy:
    """Has every attribute, each of which can be called: as a method of ``xmlrpc.client.ServerProxy``."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Proxy":
        return Proxy(name)

    def __call__(self, ran: list[Any], *, value: Any) -> None:
        assert self._name == "remote"
        ran.append(value)


class Unready:
    """Raises for any attribute that it does not have: as an object whose set-up is not done."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)

    def __call__(self, ran: list[Any], *, value: Any) -> None:
        ran.append(value)


PLAIN = {
    "function": function,
    "method": CallableObject().method,
    "classmethod": CallableObject.class_method,
    "partial": partial(function),
    "callable object": CallableObject(),
    "lambda returning a coroutine": lambda ran, *, value: coroutine_function(ran, value=value),
    "lambda returning an awaitable": lambda ran, *, value: Awaitable(ran, value=value),
    "lambda returning an awaitable that can be called": lambda ran, *, value: CallableAwaitable(
        ran, value=value
    ),
    "lambda returning another coroutine": lambda ran, *, value: OtherCoroutine(ran, value=value),
    "class of an awaitable": Awaitable,
    "generator-based coroutine": old_coroutine_function,
    "proxy": Proxy().remote,
    "object whose attributes raise": Unready(),
}


ASYNC = {
    "async def": coroutine_function,
    "async method": CallableObject().async_method,
    "partial of async def": partial(coroutine_function),
    "class with async __call__": AsyncCallable(),
}


EVERY_KIND = PLAIN | ASYNC


@pytest.mark.parametrize("task", EVERY_KIND.values(), ids=EVERY_KIND.keys())
def test_spawn_runs_every_kind_of_callable(task: Any) -> None:
    """Whatever can be called is called once with its arguments, and a coroutine it returns is awaited."""
    ran: list[Any] = []

    assert bgtasks.spawn("task", task, ran, value=7)
    assert bgtasks.drain(BOUND)

    assert ran == [7]
    assert bgtasks.stats()["default"].succeeded == 1


OBJECTS = [coroutine_function, OtherCoroutine, Awaitable, old_coroutine_function]


@pytest.mark.parametrize("make", OBJECTS)
def test_spawn_runs_a_coroutine_object(make: Any) -> None:
    """A coroutine object is awaited to its end, and so is whatever else can be awaited."""
    ran: list[Any] = []

    assert bgtasks.spawn("task", make(ran, value=7))
    assert bgtasks.drain(BOUND)

    assert ran == [7]
    assert make_task("task", make, (ran,), {"value": 7}).asynchronous is (make is coroutine_function)


def test_spawn_awaits_a_request_of_aiohttp() -> None:
    """`session.get` is a plain function, and returns an object that sends the request when it is awaited."""
    aiohttp = pytest.importorskip("aiohttp")
    ran: list[Any] = []
    sessions: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ran.append((await reader.readline()).split()[1])
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    async def open_session() -> None:
        sessions.append(aiohttp.ClientSession())

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            bgtasks.spawn("open", open_session)
            await bgtasks.adrain(BOUND)
            bgtasks.spawn("ping", sessions[0].get, f"http://{host}:{port}/0")
            bgtasks.spawn("ping", lambda: sessions[0].get(f"http://{host}:{port}/1"))
            bgtasks.spawn("ping", sessions[0].get(f"http://{host}:{port}/2"))
            await bgtasks.adrain(BOUND)
            bgtasks.spawn("close", sessions[0].close)
            await bgtasks.adrain(BOUND)

    asyncio.run(main())

    assert sorted(ran) == [b"/0", b"/1", b"/2"]
    assert bgtasks.stats()["default"].failed == 0


def test_result_that_is_lazy_is_not_evaluated() -> None:
    """To look whether the result of a task can be awaited does not, say, query the database for it."""
    evaluated: list[Any] = []

    bgtasks.spawn("task", SimpleLazyObject, partial(evaluated.append, 7))
    bgtasks.drain(BOUND)

    assert evaluated == []
    assert bgtasks.stats()["default"].succeeded == 1


def test_spawn_runs_a_builtin() -> None:
    """A function written in C has no code to look at, and is called all the same."""
    ran: list[Any] = []

    bgtasks.spawn("task", ran.append, 7)
    bgtasks.drain(BOUND)

    assert ran == [7]


@pytest.mark.parametrize("task", PLAIN.values(), ids=PLAIN.keys())
def test_plain_task_is_called_on_a_slot(task: Any) -> None:
    """What is not known to be asynchronous goes to a slot's thread: it may block."""
    assert make_task("task", task, ([],), {"value": 7}).asynchronous is False


@pytest.mark.parametrize("task", ASYNC.values(), ids=ASYNC.keys())
def test_async_task_is_known_before_it_is_called(task: Any) -> None:
    """What is known to be asynchronous goes to the loop, without a slot's thread being woken for nothing."""
    assert make_task("task", task, ([],), {"value": 7}).asynchronous is True


@has_django_tasks
@pytest.mark.parametrize("asynchronous", [False, True])
def test_spawn_runs_a_django_task(asynchronous: bool) -> None:
    """An object made by @django.tasks.task is run as the function it decorates is."""
    from tests.site.tasks import async_django_task, django_task

    ran: list[Any] = []
    task = async_django_task if asynchronous else django_task

    assert bgtasks.spawn("task", task, ran, value=7)
    assert bgtasks.drain(BOUND)

    assert ran == [7]
    assert make_task("task", task, ([],), {"value": 7}).asynchronous is asynchronous


@has_django_tasks
@pytest.mark.parametrize("asynchronous", [False, True])
def test_spawn_gives_a_django_task_its_context(asynchronous: bool) -> None:
    """A @task(takes_context=True) gets the context of a first attempt of itself, with its arguments."""
    from tests.site.tasks import async_django_task_with_context, django_task_with_context

    contexts: list[Any] = []
    task = async_django_task_with_context if asynchronous else django_task_with_context

    bgtasks.spawn("task", task, contexts, value=7)
    bgtasks.drain(BOUND)

    [context] = contexts
    result = context.task_result
    assert context.attempt == 1
    assert result.task is task
    assert result.status == "RUNNING"
    assert result.kwargs == {"value": 7}
    assert len(result.args) == 1
    assert len(result.id) == 32
    assert result.finished_at is None
    assert result.enqueued_at <= result.started_at == result.last_attempted_at


# Mistakes of the caller.


class Names(enum.StrEnum):
    MAIL = "send-mail"


@pytest.mark.parametrize("name", [Names.MAIL, mark_safe("send-mail")])
def test_name_of_a_subclass_of_str_becomes_plain(name: str) -> None:
    """A StrEnum or a SafeString is accepted as a name, and is a plain str from then on."""
    with heard(task_spawned) as calls:
        bgtasks.spawn(name, print, end="")
    bgtasks.drain(BOUND)

    [(_, named)] = calls
    assert named == {"name": "send-mail"}
    assert type(named["name"]) is str


@pytest.mark.parametrize("name", [7, None, b"send-mail", function])
@pytest.mark.parametrize("spawn", [bgtasks.spawn, bgtasks.spawn_on_commit])
def test_name_that_is_no_str_is_a_type_error(spawn: Any, name: str) -> None:
    """Name and task in the wrong order, say, are reported where they are written."""
    with pytest.raises(TypeError) as raised:
        spawn(name, function)

    assert str(raised.value).startswith(f"the name of a task must be a str, not {name!r}")


@pytest.mark.parametrize("task", [None, "send_welcome", 7])
def test_task_that_cannot_be_called_is_a_type_error(task: Any) -> None:
    """`spawn("n", f())` for `spawn("n", f)` is reported where it is written."""
    with pytest.raises(TypeError) as raised:
        bgtasks.spawn("send-welcome", task)

    assert str(raised.value) == (
        f"task 'send-welcome' is {task!r}, which cannot be called; "
        "pass the function itself and its arguments, not the result of calling it"
    )


def test_future_of_another_loop_is_a_type_error() -> None:
    """What `asyncio.create_task` returns runs already, and the drainer's loop could not wait for it."""

    async def main() -> None:
        task = asyncio.create_task(asyncio.sleep(0))
        with pytest.raises(TypeError) as raised:
            bgtasks.spawn("ping", task)
        await task

        assert str(raised.value).startswith("task 'ping' is <Task pending")
        assert "which runs on the event loop that it was made on; pass the function itself" in str(
            raised.value
        )

    asyncio.run(main())


def generator() -> Iterator[None]:
    yield  # pragma: no cover  # nothing of it may run


async def async_generator() -> AsyncIterator[None]:
    yield  # pragma: no cover  # nothing of it may run


@pytest.mark.parametrize("task", [generator, async_generator])
def test_generator_function_is_a_type_error(task: Any) -> None:
    """Calling a generator function runs nothing of it, so it cannot be a task."""
    with pytest.raises(TypeError) as raised:
        bgtasks.spawn("report", task)

    assert str(raised.value) == (
        "task 'report' is a generator function; calling it only creates a generator, "
        "and its body would never run"
    )


@pytest.mark.parametrize("make", [Awaitable, OtherCoroutine])
def test_awaitable_object_with_arguments_is_a_type_error(make: Any) -> None:
    """So it is of other objects that can be awaited."""
    task = make([], value=7)

    with pytest.raises(TypeError, match="'ping' is a coroutine object, which takes no arguments"):
        bgtasks.spawn("ping", task, 7)
    with pytest.raises(TypeError, match="the name of a task must be a str"):
        cast(Any, bgtasks.spawn)(7, task)

    task._coroutine.close()


@pytest.mark.parametrize(("args", "kwargs"), [((7,), {}), ((), {"value": 7})])
def test_coroutine_object_with_arguments_is_a_type_error(args: Any, kwargs: Any) -> None:
    """A coroutine object has its arguments already; it is closed, so that Python does not warn of it."""
    coroutine = never()

    with pytest.raises(TypeError) as raised:
        bgtasks.spawn("send-welcome", coroutine, *args, **kwargs)

    assert str(raised.value) == "task 'send-welcome' is a coroutine object, which takes no arguments"
    assert is_closed(coroutine)


def test_coroutine_object_with_a_wrong_name_is_closed() -> None:
    """A coroutine object that is rejected for its name gives no second error about not being awaited."""
    coroutine = never()

    with pytest.raises(TypeError, match="the name of a task must be a str"):
        cast(Any, bgtasks.spawn)(7, coroutine)

    assert is_closed(coroutine)


def test_type_error_is_no_submission() -> None:
    """A call that raises is not counted."""
    with pytest.raises(TypeError):
        cast(Any, bgtasks.spawn)("task", None)

    assert bgtasks.stats()["default"].spawned == 0


def generator_function() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("name", "task"), [(1, print), ("result", None), ("generator", generator_function)], ids=str
)
def test_mistake_raises_even_if_the_pool_is_full(settings: Settings, name: str, task: Any) -> None:
    """A programming error is not taken for a drop: it raises under overload as it does at rest."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", gate)

        with pytest.raises(TypeError):
            bgtasks.spawn(name, task)
        assert bgtasks.stats()["default"].dropped == 0


# On commit.


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_waits_for_the_commit() -> None:
    """The task is spawned when the transaction commits, and not before."""
    ran: list[Any] = []

    with transaction.atomic():
        bgtasks.spawn_on_commit("task", ran.append, 7)

        assert bgtasks.stats()["default"].spawned == 0

    assert bgtasks.drain(BOUND)
    assert ran == [7]


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_spawns_nothing_on_rollback() -> None:
    """Nothing is spawned if the transaction is rolled back, and a coroutine object is closed."""
    coroutine = never()

    with transaction.atomic():
        bgtasks.spawn_on_commit("function", function, [], value=7)
        bgtasks.spawn_on_commit("coroutine", coroutine)
        transaction.set_rollback(True)
    gc.collect()  # the hooks that Django gave up hold the coroutine object

    assert is_closed(coroutine)
    assert bgtasks.stats()["default"].spawned == 0


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_without_a_transaction_spawns_at_once() -> None:
    """With nothing to wait for, it is a spawn."""
    ran: list[Any] = []

    bgtasks.spawn_on_commit("task", ran.append, 7)

    assert bgtasks.stats()["default"].spawned == 1
    assert bgtasks.drain(BOUND)
    assert ran == [7]


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_takes_the_context_of_the_call() -> None:
    """A context variable has in the task the value that it had at the call, not that at the commit."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    with transaction.atomic():
        token = variable.set("at the call")
        bgtasks.spawn_on_commit("task", lambda: seen.append(variable.get()))
        variable.set("at the commit")
    variable.reset(token)
    bgtasks.drain(BOUND)

    assert seen == ["at the call"]


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_counts_the_wait_from_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    """The time a task waited, as its log record says it, has not begun before its transaction ended."""
    caplog.set_level(logging.DEBUG, "bgtasks")

    with transaction.atomic():
        bgtasks.spawn_on_commit("task", print, end="")
        called = time.monotonic()
        wait_until(lambda: time.monotonic() - called > 0.01)  # the clock is all that this waits for
        committed = time.monotonic()
    bgtasks.drain(BOUND)
    ended = time.monotonic()

    [record] = [record for record in caplog.records if getattr(record, "task", None) == "task"]
    assert vars(record)["wait_s"] <= ended - committed


@pytest.mark.django_db(transaction=True)
def test_spawn_on_commit_of_a_named_pool() -> None:
    """Every pool has the method, and the task goes to that pool."""
    with transaction.atomic():
        pools["email"].spawn_on_commit("task", print, end="")

    assert bgtasks.stats()["email"].spawned == 1
    assert bgtasks.stats()["default"].spawned == 0


@pytest.mark.django_db
def test_spawn_on_commit_in_a_test_case() -> None:
    """Django's captureOnCommitCallbacks sees the task, and spawns it if it is told to."""
    ran: list[Any] = []

    with TestCase.captureOnCommitCallbacks(execute=True) as callbacks:
        bgtasks.spawn_on_commit("task", ran.append, 7)

        assert bgtasks.stats()["default"].spawned == 0

    assert len(callbacks) == 1
    assert bgtasks.drain(BOUND)
    assert ran == [7]


@pytest.mark.django_db
def test_commit_spawns_once() -> None:
    """A commit hook that is run twice, as captureOnCommitCallbacks lets a test do, spawns one task."""
    ran: list[Any] = []
    with TestCase.captureOnCommitCallbacks() as [*callbacks]:
        pass
    with TestCase.captureOnCommitCallbacks() as callbacks:
        bgtasks.spawn_on_commit("task", ran.append, 7)

    callbacks[0]()
    callbacks[0]()
    bgtasks.drain(BOUND)

    assert ran == [7]


@pytest.mark.django_db
def test_spawn_on_commit_in_async_code_says_what_to_use() -> None:
    """Async code has no transaction of its own, and is told of aspawn_on_commit; the coroutine is closed."""
    coroutine = never()

    async def main() -> None:
        bgtasks.spawn_on_commit("send-welcome", coroutine)

    with pytest.raises(SynchronousOnlyOperation) as raised:
        asyncio.run(main())

    assert str(raised.value) == (
        "spawn_on_commit('send-welcome', ...) was called in async code, which has no transaction of its own; "
        "use 'await bgtasks.aspawn_on_commit(...)'"
    )
    assert raised.value.__cause__ is None
    raised.value.__traceback__ = raised.value.__context__ = None
    del raised
    gc.collect()
    assert is_closed(coroutine)


def test_aspawn_on_commit_in_async_code_spawns_at_once(async_db: None) -> None:
    """Async code that no transaction surrounds spawns at once."""
    ran: list[Any] = []

    asyncio.run(bgtasks.aspawn_on_commit("task", ran.append, 7))

    assert bgtasks.stats()["default"].spawned == 1
    assert bgtasks.drain(BOUND)
    assert ran == [7]


@pytest.mark.parametrize("client", [AsyncClient, Client])
def test_aspawn_on_commit_in_an_async_view(async_db: None, client: type[Client | AsyncClient]) -> None:
    """An async view may call it under either handler."""

    async def view(request: HttpRequest) -> HttpResponse:
        await bgtasks.aspawn_on_commit("task", ran.append, 7)
        return HttpResponse()

    ran: list[Any] = []
    with site(view):
        get: Callable[..., Any] = client().get
        response = async_to_sync(get)("/") if client is AsyncClient else get("/")
    bgtasks.drain(BOUND)

    assert response.status_code == 200
    assert ran == [7]


@pytest.mark.django_db(transaction=True)
def test_aspawn_on_commit_waits_for_the_transaction_of_sync_code_around_it() -> None:
    """Async code that sync code runs inside its transaction waits for that transaction (trap 4)."""
    ran: list[Any] = []

    with transaction.atomic():
        spawn: Any = async_to_sync(bgtasks.aspawn_on_commit)
        spawn("task", ran.append, 7)

        assert bgtasks.stats()["default"].spawned == 0

    assert bgtasks.drain(BOUND)
    assert ran == [7]


@pytest.mark.django_db(transaction=True)
def test_aspawn_on_commit_spawns_nothing_on_rollback() -> None:
    """It follows the transaction of the sync code around it into a rollback as well."""
    with transaction.atomic():
        spawn: Any = async_to_sync(bgtasks.aspawn_on_commit)
        spawn("task", print)
        transaction.set_rollback(True)

    assert bgtasks.stats()["default"].spawned == 0


def test_aspawn_on_commit_takes_the_context_of_the_call(async_db: None) -> None:
    """The task's context is that of the call in the async code too."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    async def main() -> None:
        variable.set("at the call")
        await bgtasks.aspawn_on_commit("task", lambda: seen.append(variable.get()))

    asyncio.run(main())
    bgtasks.drain(BOUND)

    assert seen == ["at the call"]


def test_aspawn_on_commit_checks_its_arguments_in_the_caller() -> None:
    """A mistake is a TypeError without a look at the database."""
    with pytest.raises(TypeError, match="which cannot be called"):
        asyncio.run(cast(Any, bgtasks.aspawn_on_commit)("task", None))
