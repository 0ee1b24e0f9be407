"""The public names: spawning from everywhere, pools, settings, waiting, ending, signals and figures."""

import asyncio
import contextvars
import dataclasses
import enum
import gc
import inspect
import itertools
import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import django
import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.apps import apps
from django.core.checks.registry import registry
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections, transaction
from django.db.models.signals import post_save
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import AsyncClient, Client, TestCase, override_settings
from django.urls import path
from django.utils.safestring import mark_safe
from pytest_django import Settings

import bgtasks
from bgtasks import PoolStats, conf, pools
from bgtasks.checks import check_database_pools, check_lifespan, check_settings
from bgtasks.exceptions import InvalidSettings, PoolDoesNotExist
from bgtasks.pools import _make_task
from bgtasks.queue import State
from bgtasks.signals import task_dropped, task_finished, task_spawned, task_started
from tests.core import own_threads
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.testapp.models import Note

SMALL = {"default": {"CAPACITY": 4, "CONN_MAX": 2}, "email": {"CAPACITY": 2, "CONN_MAX": 1}}
LARGE = {"default": {"CAPACITY": 100_000, "CONN_MAX": 4}}

has_django_tasks = pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks is new in 6.0")


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


@pytest.fixture
def large(small: None) -> Iterator[None]:
    """Give a test that spawns a lot a pool that takes it all."""
    with override_settings(BGTASKS=LARGE):
        yield


@pytest.fixture
def async_db(transactional_db: None) -> Iterator[None]:
    """Let async code of a test use the database on the thread that asgiref keeps for it."""
    yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result(BOUND)


@contextmanager
def full(pool: Any) -> Iterator[Any]:
    """Fill `pool`: its slots run a gate, and its queue has no place left."""
    stats = pool.stats()
    with Gate() as gate:
        for _ in range(stats.conn_max):
            assert pool.spawn("held", gate)
        gate.wait_entered(stats.conn_max)
        for _ in range(stats.capacity):
            assert pool.spawn("waits", gate)
        yield gate


@contextmanager
def heard(*signals: Any) -> Iterator[Any]:
    """Collect what receivers of `signals` are called with: sender and named arguments."""
    calls = []

    def receiver(*, signal: Any, sender: Any, **named: Any) -> None:
        calls.append((sender, named))

    for each in signals:
        each.connect(receiver)
    try:
        yield calls
    finally:
        for each in signals:
            each.disconnect(receiver)


@contextmanager
def connected(receiver: Callable[..., Any], *signals: Any) -> Iterator[None]:
    """Connect `receiver` to `signals` for a while."""
    for each in signals:
        each.connect(receiver)
    try:
        yield
    finally:
        for each in signals:
            each.disconnect(receiver)


@contextmanager
def site(view: Any) -> Iterator[None]:
    """Serve `view` at the root of the tests' site."""
    with override_settings(ROOT_URLCONF=(path("", view),)):
        yield


@contextmanager
def shutting_down(*waited_for: Any, shutdown: Callable[..., Any] = bgtasks.shutdown) -> Iterator[Any]:
    """Run `shutdown` on a thread, and go on when the queues of the pools `waited_for` are closed."""
    queues = [pool._slots.queue for pool in waited_for]
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(shutdown)
        wait_until(lambda: all(queue.state is not State.OPEN for queue in queues))
        yield future


def balance(stats: PoolStats) -> Any:
    """Return the right side of the sum of design G5."""
    return (
        stats.queued
        + stats.running
        + stats.succeeded
        + stats.failed
        + stats.timed_out
        + stats.cancelled
        + stats.dropped
        + stats.handed_off
    )


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def never() -> None:
    """Be a coroutine object that must be closed without having run."""
    pytest.fail("it ran")  # pragma: no cover  # it is what must not happen


def is_closed(coroutine: Any) -> bool:
    return inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


# What spawn takes.


def function(ran: list[Any], *, value: Any) -> None:
    ran.append(value)


async def coroutine_function(ran: list[Any], *, value: Any) -> None:
    await asyncio.sleep(0)
    ran.append(value)


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


PLAIN = {
    "function": function,
    "method": CallableObject().method,
    "classmethod": CallableObject.class_method,
    "partial": partial(function),
    "callable object": CallableObject(),
    "lambda returning a coroutine": lambda ran, *, value: coroutine_function(ran, value=value),
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


def test_spawn_runs_a_coroutine_object() -> None:
    """A coroutine object is awaited to its end."""
    ran: list[Any] = []

    assert bgtasks.spawn("task", coroutine_function(ran, value=7))
    assert bgtasks.drain(BOUND)

    assert ran == [7]


def test_spawn_runs_a_builtin() -> None:
    """A function written in C has no code to look at, and is called all the same."""
    ran: list[Any] = []

    bgtasks.spawn("task", ran.append, 7)
    bgtasks.drain(BOUND)

    assert ran == [7]


@pytest.mark.parametrize("task", PLAIN.values(), ids=PLAIN.keys())
def test_plain_task_is_called_on_a_slot(task: Any) -> None:
    """What is not known to be asynchronous goes to a slot's thread: it may block."""
    assert _make_task("task", task, (), {}).asynchronous is False


@pytest.mark.parametrize("task", ASYNC.values(), ids=ASYNC.keys())
def test_async_task_is_known_before_it_is_called(task: Any) -> None:
    """What is known to be asynchronous goes to the loop, without a slot's thread being woken for nothing."""
    assert _make_task("task", task, (), {}).asynchronous is True


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
    assert _make_task("task", task, (), {}).asynchronous is asynchronous


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


def test_public_names() -> None:
    """The package's functions are those of the default pool, or of all pools together."""
    assert bgtasks.spawn == pools["default"].spawn
    assert bgtasks.spawn_on_commit == pools["default"].spawn_on_commit
    assert bgtasks.aspawn_on_commit == pools["default"].aspawn_on_commit
    assert [bgtasks.stats, bgtasks.drain, bgtasks.adrain] == [pools.stats, pools.drain, pools.adrain]
    assert [bgtasks.shutdown, bgtasks.ashutdown] == [pools.shutdown, pools.ashutdown]
    assert sorted(bgtasks.__all__) == bgtasks.__all__
    assert all(hasattr(bgtasks, name) for name in bgtasks.__all__)


# Where it may be called.


def test_spawn_from_a_thread() -> None:
    """Any thread may spawn."""
    ran: list[Any] = []

    with ThreadPoolExecutor(1) as executor:
        accepted = executor.submit(bgtasks.spawn, "task", ran.append, 7).result(BOUND)
    bgtasks.drain(BOUND)

    assert accepted
    assert ran == [7]


def test_spawn_from_a_sync_view() -> None:
    """A task outlives the request that spawned it."""

    def view(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"accepted": bgtasks.spawn("task", gate)})

    with Gate() as gate, site(view):
        response = Client().get("/")
        gate.wait_entered()

    assert response.json() == {"accepted": True}
    assert bgtasks.drain(BOUND)
    assert bgtasks.stats()["default"].succeeded == 1


@pytest.mark.parametrize("client", [AsyncClient, Client])
def test_spawn_from_an_async_view(client: type[Client | AsyncClient]) -> None:
    """A task goes on when the loop of the view that spawned it is gone (trap 3)."""

    async def view(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"accepted": [bgtasks.spawn("a", gate), bgtasks.spawn("b", gate())]})

    with AsyncGate() as gate, site(view):
        get: Callable[..., Any] = client().get
        response = async_to_sync(get)("/") if client is AsyncClient else get("/")
        gate.wait_entered(2)

    assert response.json() == {"accepted": [True, True]}
    assert bgtasks.drain(BOUND)
    assert bgtasks.stats()["default"].succeeded == 2


@pytest.mark.django_db(transaction=True)
def test_spawn_from_a_signal_receiver() -> None:
    """A receiver of post_save may spawn, and the task sees the row once it is committed."""
    seen = []

    def receiver(*, instance: Any, **kwargs: Any) -> None:
        bgtasks.spawn_on_commit("look", lambda: seen.append(Note.objects.get(pk=instance.pk).text))

    with connected(receiver, post_save), transaction.atomic():
        Note.objects.create(text="saved")
    bgtasks.drain(BOUND)

    assert seen == ["saved"]


def test_spawn_from_a_task() -> None:
    """A task may spawn further ones."""
    ran: list[Any] = []

    bgtasks.spawn("outer", bgtasks.spawn, "inner", ran.append, 7)
    bgtasks.drain(BOUND)
    bgtasks.drain(BOUND)

    assert ran == [7]


def test_spawn_from_a_signal_handler(large: None) -> None:
    """A signal handler that interrupts its thread inside spawn may spawn, and all tasks are accounted for."""
    sent: list[Any] = []
    handled = []
    ran: list[Any] = []
    main = threading.get_ident()
    spawned = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        handled.append(bgtasks.spawn("handler", ran.append, 1))

    def hammer() -> None:
        while not spawned.is_set():
            sent.append(signal.pthread_kill(main, signal.SIGUSR1))
            # One at a time: signals that come faster than they are handled are merged into one.
            wait_until(lambda: len(handled) == len(sent))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with ThreadPoolExecutor(1) as executor:
            hammering = executor.submit(hammer)
            own = 0
            while len(handled) < 100:
                assert bgtasks.spawn("main", ran.append, 0)
                own += 1
            spawned.set()
            hammering.result(BOUND)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bgtasks.drain(BOUND)

    assert all(handled)
    assert (ran.count(0), ran.count(1)) == (own, len(handled))
    assert bgtasks.stats()["default"].spawned == own + len(handled)


def interrupt(function: Callable[..., Any], at: Any, handler: Any) -> Any:
    """Call `function` on a thread, and `handler` there before the line number `at` it runs of the package.

    The trace function stands for a signal handler: it forces each interleaving instead of hoping for it. It
    takes the place of coverage's, so what runs here does not count as covered.
    """

    def trace(frame: Any, event: str, arg: Any) -> Any:  # pragma: no cover
        if "/bgtasks/" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == at:
            sys.settrace(None)
            handler()
        return trace

    def run() -> Any:  # pragma: no cover
        sys.settrace(trace)
        return function()

    lines = itertools.count()
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result(BOUND)


@pytest.mark.parametrize("started", [True, False])
def test_spawn_may_be_interrupted_by_spawn_at_every_line(started: Any) -> None:
    """Wherever a handler that spawns interrupts spawn, also where it builds its pool, nothing is lost."""
    ran: list[Any] = []
    handled: list[Any] = []
    lines = 0

    while len(handled) == lines:
        pools.restart()
        if started:
            pools.start()
        accepted = interrupt(
            partial(bgtasks.spawn, "main", ran.append, 0),
            lines,
            lambda: handled.append(bgtasks.spawn("handler", ran.append, 1)),
        )
        bgtasks.drain(BOUND)
        lines += 1

        assert accepted
        assert bgtasks.stats()["default"].spawned == 1 + (len(handled) == lines)

    assert all(handled)
    assert (ran.count(0), ran.count(1)) == (lines, lines - 1)
    assert lines > 20


def test_pool_that_was_built_in_the_middle_of_its_building_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a finalizer spawns while spawn builds the pool, both tasks go to the pool that was there first."""
    ran: list[Any] = []
    pool_config = conf.pool_config

    def interrupted_pool_config(name: str) -> Any:
        monkeypatch.undo()
        bgtasks.spawn("finalizer", ran.append, 1)
        return pool_config(name)

    monkeypatch.setattr(conf, "pool_config", interrupted_pool_config)

    bgtasks.spawn("main", ran.append, 0)
    bgtasks.drain(BOUND)

    assert sorted(ran) == [0, 1]
    assert bgtasks.stats()["default"].spawned == 2


def test_task_whose_spawner_was_interrupted_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler raises in spawn just after the task was put, an idle slot is woken all the same."""
    ran: list[Any] = []
    pools.start()
    queue = pools.default._slots.queue
    put = queue.put

    def put_and_be_interrupted(task: Any) -> None:
        put(task)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "put", put_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        bgtasks.spawn("task", ran.append, 7)
    wait_until(lambda: bgtasks.stats()["default"].succeeded == 1)

    assert ran == [7]


def test_spawn_from_a_finalizer(large: None) -> None:
    """A `__del__` that the garbage collector calls in the middle of a spawn may spawn."""
    ran: list[Any] = []
    gone: list[Any] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            bgtasks.spawn("finalizer", ran.append, 1)
            gone.append(1)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(500):
            Cycle()
            bgtasks.spawn("main", ran.append, 0)
    finally:
        gc.set_threshold(*threshold)
    deadline = time.monotonic() + BOUND
    while len(gone) < 500 and time.monotonic() < deadline:
        gc.collect()  # does nothing while another thread collects
    bgtasks.drain(BOUND)

    assert (ran.count(0), ran.count(1)) == (500, 500)
    assert bgtasks.stats()["default"].spawned == 1000


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

    assert str(raised.value) == f"the name of a task must be a str, not {name!r}"


@pytest.mark.parametrize("task", [None, "send_welcome", 7])
def test_task_that_cannot_be_called_is_a_type_error(task: Any) -> None:
    """`spawn("n", f())` for `spawn("n", f)` is reported where it is written."""
    with pytest.raises(TypeError) as raised:
        bgtasks.spawn("send-welcome", task)

    assert str(raised.value) == (
        f"task 'send-welcome' is {task!r}, which cannot be called; "
        "pass the function itself and its arguments, not the result of calling it"
    )


def generator() -> Iterator[None]:
    yield  # pragma: no cover  # nothing of it may run


async def async_generator() -> AsyncIterator[None]:
    yield  # pragma: no cover  # nothing of it may run


@pytest.mark.parametrize("task", [generator, async_generator])
def test_generator_function_is_a_type_error(task: Any) -> None:
    """Calling a generator function runs nothing of it, so it cannot be a task."""
    with pytest.raises(TypeError) as raised:
        bgtasks.spawn("report", task)

    assert str(raised.value) == ("task 'report' is a generator function; calling it would run nothing of it")


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


# Drops.


def test_spawn_past_capacity_returns_false() -> None:
    """Running tasks hold no place in the queue; with every place taken, the next task is dropped."""
    with full(pools.default):
        assert bgtasks.spawn("one too many", print) is False

        stats = bgtasks.stats()["default"]
        assert (stats.running, stats.queued, stats.dropped) == (2, 4, 1)


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


def test_drop_is_logged_with_pool_and_capacity(caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the task, the pool and its capacity."""
    with full(pools["email"]):
        pools["email"].spawn("one too many", print)

    assert warned(caplog) == ["task 'one too many' dropped: pool 'email' is full (capacity 2)"]


def test_drop_is_signalled() -> None:
    """task_dropped says which pool dropped which task and why, after task_spawned."""
    with full(pools.default), heard(task_spawned, task_dropped) as calls:
        bgtasks.spawn("one too many", print)

    assert calls == [
        (pools.default, {"name": "one too many"}),
        (pools.default, {"name": "one too many", "reason": "full"}),
    ]


def test_dropped_coroutine_object_is_closed() -> None:
    """A dropped coroutine object gives no warning that it was never awaited."""
    coroutine = never()

    with full(pools.default), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert bgtasks.spawn("one too many", coroutine) is False
        assert is_closed(coroutine)
        del coroutine
        gc.collect()

    assert caught == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_broken_receivers_do_not_reach_the_spawner(error: Any) -> None:
    """Whatever a receiver of task_spawned or task_dropped raises, spawn answers."""

    def receiver(**kwargs: Any) -> None:
        raise error("receiver")

    with full(pools.default), connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("one too many", print) is False
    bgtasks.drain(BOUND)
    with connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("task", function, [], value=7) is True


def test_exact_capacity_with_many_spawners() -> None:
    """64 threads that spawn at once do not get one task more in than there are places."""
    barrier = threading.Barrier(64)

    def spawn() -> bool:
        barrier.wait(BOUND)
        return bgtasks.spawn("task", gate)

    with Gate() as gate:
        for _ in range(2):
            bgtasks.spawn("held", gate)
        gate.wait_entered(2)
        with ThreadPoolExecutor(64) as executor:
            accepted = sum(future.result(BOUND) for future in [executor.submit(spawn) for _ in range(64)])

    assert accepted == 4


def refuse_threads(monkeypatch: pytest.MonkeyPatch, refused: Any = lambda: None) -> None:
    """Stand in for a machine without a free thread: `refused` is called, then the error is raised."""

    def start_new_thread(*args: Any) -> None:
        refused()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("bgtasks.drainer._thread.start_new_thread", start_new_thread)


def test_spawn_without_a_thread_to_be_had_returns_false(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no thread can be started, the task is dropped, closed and reported, and its place is free again."""
    refuse_threads(monkeypatch)
    coroutine = never()

    with heard(task_dropped) as calls:
        assert bgtasks.spawn("task", coroutine) is False

    assert calls == [(pools.default, {"name": "task", "reason": "no_thread"})]
    assert warned(caplog) == ["task 'task' dropped: pool 'default' cannot start a thread"]
    assert is_closed(coroutine)
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.dropped, stats.queued) == (1, 1, 0)


def test_task_that_is_taken_after_all_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that a slot took while its spawner was being refused a thread is not dropped."""
    ran: list[Any] = []

    def another_spawner_starts_the_drainer() -> None:
        # 1. The spawner has put its task and found no slot idle.
        # 2. Somebody else starts the drainer, and a slot takes the task.
        pools.drainer.start()
        gate.wait_entered()
        # 3. Only now is the spawner refused the thread it has asked for.

    refuse_threads(monkeypatch, another_spawner_starts_the_drainer)

    with Gate() as gate:
        assert bgtasks.spawn("task", gate) is True

    assert bgtasks.drain(BOUND)
    assert ran == []
    stats = bgtasks.stats()["default"]
    assert (stats.succeeded, stats.dropped) == (1, 0)


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


# Named pools.


def test_full_pool_leaves_the_others_alone() -> None:
    """A burst in one pool takes neither place nor slot of another."""
    ran: list[Any] = []

    with full(pools.default):
        assert bgtasks.spawn("one too many", print) is False
        assert pools["email"].spawn("mail", ran.append, 7) is True
        assert pools["email"].drain(BOUND)

    assert ran == [7]


def test_unknown_pool_is_an_error_with_the_names_there_are() -> None:
    """A misspelt name is told apart from a KeyError of the project's own, and says what there is."""
    with pytest.raises(PoolDoesNotExist) as raised:
        pools["mial"]

    assert str(raised.value) == "no pool named 'mial'; BGTASKS defines: 'default', 'email'"
    assert isinstance(raised.value, KeyError)


def test_pools_are_a_mapping() -> None:
    """They can be asked for, counted and iterated over as the dictionary in the settings can."""
    assert list(pools) == ["default", "email"]
    assert len(pools) == 2
    assert "email" in pools
    assert "mial" not in pools
    assert pools.get("mial") is None
    assert dict(pools) == {"default": pools["default"], "email": pools["email"]}


@override_settings(BGTASKS={"email": {}})
def test_default_pool_is_always_there() -> None:
    """A project that names other pools only has the default pool too, first."""
    assert list(pools) == ["default", "email"]
    assert bgtasks.stats()["default"].capacity == 1024


def test_pool_is_the_same_object_always() -> None:
    """A handle can be kept in a module, whatever happens to the settings."""
    before = pools["email"]
    with override_settings(BGTASKS={"email": {"CONN_MAX": 3}}):
        during = pools["email"]

    assert before is during is pools["email"]
    assert pools["default"] is pools.default


def test_misspelt_names_leave_nothing_behind() -> None:
    """Names that come from outside cannot fill the memory."""
    before = dict(pools._pools)

    for number in range(10_000):
        assert f"pool-{number}" not in pools

    assert pools._pools == before


def test_repr_of_a_pool_is_a_status_line() -> None:
    """What a pool does is seen in a debugger or a log."""
    assert repr(pools["email"]) == "<Pool 'email' not started>"

    with full(pools["email"]):
        assert repr(pools["email"]) == "<Pool 'email' 1/1 running, 2/2 queued>"


def test_repr_of_pools_names_them() -> None:
    """The mapping shows its keys."""
    assert repr(pools) == "<Pools 'default', 'email'>"


def test_pool_is_built_once() -> None:
    """Threads that use a new pool at the same moment get one queue between them."""
    barrier = threading.Barrier(16)

    def spawn() -> bool:
        barrier.wait(BOUND)
        return bgtasks.spawn("task", function, [], value=7)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as executor:
            for _ in range(20):
                pools.restart()
                results = [executor.submit(spawn) for _ in range(16)]
                for result in results:
                    result.result(BOUND)

                assert bgtasks.stats()["default"].spawned == 16
    finally:
        sys.setswitchinterval(interval)


# Settings.


def test_override_settings_is_in_force_inside() -> None:
    """New options hold inside, and the old ones after."""
    with override_settings(BGTASKS={"default": {"CAPACITY": 7, "CONN_MAX": 3}}):
        inside = bgtasks.stats()["default"]
    after = bgtasks.stats()["default"]

    assert (inside.capacity, inside.conn_max) == (7, 3)
    assert (after.capacity, after.conn_max) == (4, 2)


def test_another_setting_changes_nothing() -> None:
    """Only a change of BGTASKS ends the pools."""
    bgtasks.spawn("task", print, end="")

    with override_settings(USE_THOUSAND_SEPARATOR=True):
        assert bgtasks.stats()["default"].spawned == 1


def test_running_tasks_end_before_new_settings_are_in_force() -> None:
    """A change of the setting waits for the tasks that were accepted under the old one."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        with shutting_down(pools.default, shutdown=pools.restart) as restart:
            bgtasks_stats = bgtasks.stats()["default"]
            assert bgtasks_stats.running == 1
            assert not restart.done()

            gate.open()
            restart.result(BOUND)

    assert gate.entered == 1
    assert bgtasks.stats()["default"].spawned == 0


def test_handle_works_through_a_change_of_settings() -> None:
    """A handle that was taken, and used, before spawns with the new options."""
    handle = pools["email"]
    handle.spawn("task", print, end="")

    with override_settings(BGTASKS={"email": {"CAPACITY": 7}}):
        assert handle.spawn("task", print, end="")
        assert handle.stats().capacity == 7


def test_handle_of_a_removed_pool_says_so() -> None:
    """A handle whose pool is no longer defined raises, and closes a coroutine object."""
    handle = pools["email"]
    coroutine = never()

    with override_settings(BGTASKS={"default": {}}):
        with pytest.raises(PoolDoesNotExist) as raised:
            handle.spawn("task", coroutine)

    assert str(raised.value) == "no pool named 'email'; BGTASKS defines: 'default'"
    assert is_closed(coroutine)


@override_settings(BGTASKS={"default": {"CAPACTIY": 7}})
def test_spawn_with_invalid_settings_raises() -> None:
    """The first spawn says what `manage.py check` says: message, hint and id."""
    with pytest.raises(InvalidSettings) as raised:
        bgtasks.spawn("task", print)

    assert str(raised.value) == (
        "BGTASKS['default']['CAPACTIY'] is not an option of a pool. Did you mean 'CAPACITY'? (bgtasks.E004)"
    )
    assert isinstance(raised.value, ImproperlyConfigured)


@override_settings(BGTASKS={"default": {"CAPACITY": 0}})
def test_ready_with_invalid_settings_leaves_them_to_the_checks() -> None:
    """The app loads with a mistake in its setting, so that `manage.py check` can show it with its hint."""
    apps.get_app_config("bgtasks").ready()

    with pytest.raises(SystemCheckError, match=r"bgtasks\.E006"):
        call_command("check")
    assert repr(pools.default) == "<Pool 'default' not started>"


def test_ready_starts_every_pool() -> None:
    """With good settings, the threads are there before the first spawn."""
    apps.get_app_config("bgtasks").ready()

    started = {"bgtasks-drainer", "bgtasks-default-1", "bgtasks-default-2", "bgtasks-email-1"}
    wait_until(lambda: own_threads() == started)  # there may be some that an earlier test has ended
    assert repr(pools["email"]) == "<Pool 'email' 0/1 running, 0/2 queued>"


def test_ready_registers_the_checks() -> None:
    """`manage.py check` includes the checks of the app, and with --deploy that of the lifespan too."""
    always, deploy = registry.get_checks(), registry.get_checks(include_deployment_checks=True)

    assert {check_settings, check_database_pools} <= set(always)
    assert check_lifespan not in always
    assert check_lifespan in deploy


# Waiting.


def test_drain_is_true_when_all_have_ended() -> None:
    """It waits for tasks of all pools, sync and async."""
    with Gate() as gate, AsyncGate() as async_gate, ThreadPoolExecutor(1) as executor:
        bgtasks.spawn("sync", gate)
        pools["email"].spawn("async", async_gate)
        gate.wait_entered()
        async_gate.wait_entered()
        waiting = executor.submit(bgtasks.drain, BOUND)
        gate.open()

        assert bgtasks.drain(0) is False

        async_gate.open()

        assert waiting.result(BOUND) is True
    assert gate.inside == async_gate.inside == 0


def test_drain_of_nothing_is_true() -> None:
    """With nothing spawned it returns at once, whether or not a pool was ever used."""
    assert bgtasks.drain() is True
    assert asyncio.run(bgtasks.adrain()) is True
    bgtasks.stats()
    assert bgtasks.drain() is True
    assert asyncio.run(bgtasks.adrain()) is True
    assert pools["email"].drain() is True


def test_drain_does_not_wait_for_what_is_spawned_later() -> None:
    """A site that never stops spawning can be drained all the same."""

    def spawn_another(**kwargs: Any) -> None:
        # While the first task ends, the next one runs already.
        bgtasks.spawn("second", second)
        second.wait_entered()

    with Gate() as first, Gate() as second, ThreadPoolExecutor(1) as executor:
        with connected(spawn_another, task_finished):
            bgtasks.spawn("first", first)
            first.wait_entered()
            waiting = executor.submit(bgtasks.drain, BOUND)
            wait_until(lambda: pools.default._slots.queue._landmarks)
            first.open()

            assert waiting.result(BOUND) is True
            assert second.inside == 1


def test_drain_goes_on_accepting() -> None:
    """A pool that is being drained accepts tasks."""
    with Gate() as gate, ThreadPoolExecutor(1) as executor:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        waiting = executor.submit(bgtasks.drain, BOUND)
        wait_until(lambda: pools.default._slots.queue._landmarks)

        assert bgtasks.spawn("meanwhile", gate) is True

        gate.open()
        waiting.result(BOUND)


def test_drain_is_false_at_its_timeout() -> None:
    """It says that something has not ended."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)

        assert bgtasks.drain(0) is False
        assert bgtasks.drain(timeout=0.01) is False
        assert pools.default.drain(0) is False
        assert asyncio.run(bgtasks.adrain(0)) is False
        assert asyncio.run(pools.default.adrain(timeout=0.01)) is False


def test_drain_of_one_pool_does_not_wait_for_another() -> None:
    """A pool's own drain looks at its own tasks only."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)

        assert pools["email"].drain(BOUND) is True
        assert asyncio.run(pools["email"].adrain(BOUND)) is True


def test_drain_inside_a_task_is_an_error() -> None:
    """A task would wait for itself; it is told so."""
    errors = []

    def task() -> None:
        with pytest.raises(RuntimeError) as raised:
            bgtasks.drain()
        errors.append(str(raised.value))

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == ["task 'wait' would wait for itself in drain()"]


def test_drain_inside_a_thread_of_a_task_is_an_error() -> None:
    """Code that a task runs with sync_to_async or to_thread is a part of the task."""
    errors = []

    def part() -> None:
        with pytest.raises(RuntimeError) as raised:
            bgtasks.drain()
        errors.append(str(raised.value))

    async def task() -> None:
        await sync_to_async(part)()
        await asyncio.to_thread(part)

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == ["task 'wait' would wait for itself in drain()"] * 2


def test_drain_of_another_pool_inside_a_task_waits() -> None:
    """A task may wait for the tasks of another pool."""
    ran: list[Any] = []

    def task() -> None:
        pools["email"].spawn("mail", ran.append, "mail")
        pools["email"].drain(BOUND)
        ran.append("task")

    bgtasks.spawn("task", task)
    bgtasks.drain(BOUND)

    assert ran == ["mail", "task"]


def test_drain_on_the_loop_is_an_error() -> None:
    """An async task would block the loop that it waits for; it is told what to use."""
    errors = []

    async def task() -> None:
        for wait in (bgtasks.drain, pools["email"].drain):
            with pytest.raises(RuntimeError) as raised:
                wait()
            errors.append(str(raised.value))
        with pytest.raises(RuntimeError) as raised:
            await bgtasks.adrain()
        errors.append(str(raised.value))
        assert await pools["email"].adrain(BOUND)

    bgtasks.spawn("wait", task)
    bgtasks.drain(BOUND)

    assert errors == [
        "drain() would block the drainer's loop; use 'await adrain()'",
        "drain() would block the drainer's loop; use 'await adrain()'",
        "task 'wait' would wait for itself in drain()",
    ]
    assert bgtasks.stats()["default"].succeeded == 1


def test_adrain_does_not_block_the_loop_of_its_view() -> None:
    """While an async view waits, its loop goes on: here it is the loop that opens the gate."""

    async def view(request: HttpRequest) -> JsonResponse:
        bgtasks.spawn("held", gate)
        waiting = asyncio.create_task(bgtasks.adrain(BOUND))
        await asyncio.sleep(0)
        gate.open()
        return JsonResponse({"complete": await waiting})

    with Gate() as gate, site(view):
        response = async_to_sync(AsyncClient().get)("/")

    assert response.json() == {"complete": True}
    assert bgtasks.stats()["default"].succeeded == 1


def test_cancelled_adrain_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A client that disconnects while its view waits leaves no future that somebody still has to answer."""

    async def main() -> Any:
        waiting = asyncio.create_task(bgtasks.adrain())
        await asyncio.sleep(0)
        [landmark] = pools.default._slots.queue._landmarks
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)  # one turn of the loop, for the callbacks of cancelled futures
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return landmark.reached

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        reached = asyncio.run(main())
    bgtasks.drain(BOUND)

    assert reached.cancelled()
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_drain_starts_threads_that_could_not_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that was accepted while the machine had no thread left runs when there is one again."""
    ran: list[Any] = []
    refused = threading.Event()
    start = threading.Thread.start

    def refuse_once(
        thread: Any,
    ) -> None:  # pragma: no cover  # called on a bare thread, which coverage does not see
        if thread.name == "bgtasks-drainer" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)

    assert bgtasks.spawn("task", ran.append, 7)
    wait_until(lambda: "could not be started" in caplog.text and pools.drainer._start_token)
    assert ran == []

    assert bgtasks.drain(BOUND)
    assert ran == [7]


# Ending.


def test_shutdown_waits_for_accepted_tasks() -> None:
    """Tasks that run and tasks that wait end before it returns True."""
    with Gate() as gate:
        for _ in range(4):
            bgtasks.spawn("task", gate)
        with shutting_down(pools.default) as shutdown:
            gate.open()

    assert shutdown.result(BOUND) is True
    assert bgtasks.stats()["default"].succeeded == 4


def test_spawn_after_shutdown_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A pool that is shut down accepts nothing, and the drop is as visible as any."""
    coroutine = never()
    bgtasks.stats()

    assert bgtasks.shutdown() is True
    with heard(task_dropped) as calls:
        assert bgtasks.spawn("late", coroutine) is False

    assert is_closed(coroutine)
    assert calls == [(pools.default, {"name": "late", "reason": "shutdown"})]
    assert warned(caplog) == ["task 'late' dropped: pool 'default' is shut down"]


def test_spawn_during_shutdown_is_dropped() -> None:
    """From the first moment of a shutdown on, while tasks still run, none is accepted by any pool."""
    pools["email"].stats()
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        with shutting_down(pools.default, pools["email"]) as shutdown:
            assert bgtasks.spawn("late", print) is False
            assert pools["email"].spawn("late", print) is False
            assert not shutdown.done()
            gate.open()

    assert shutdown.result(BOUND) is True


def test_shutdown_ends_the_threads() -> None:
    """Nothing of the package runs after a shutdown."""
    pools.start()

    bgtasks.shutdown()

    wait_until(lambda: not own_threads())


def test_shutdown_again_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A second call, by the server's hook and the interpreter's for instance, changes and reports nothing."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        first = bgtasks.shutdown(timeout=0)
    second = bgtasks.shutdown()
    third = asyncio.run(bgtasks.ashutdown())

    assert (first, second, third) == (False, True, True)
    assert len(warned(caplog)) == 1


def test_shutdown_from_many_threads() -> None:
    """Several calls at once all wait for the tasks, and none fails."""
    barrier = threading.Barrier(9)

    def shutdown() -> bool:
        barrier.wait(BOUND)
        return bgtasks.shutdown()

    with Gate() as gate, ThreadPoolExecutor(8) as executor:
        for _ in range(4):
            bgtasks.spawn("task", gate)
        results = [executor.submit(shutdown) for _ in range(8)]
        barrier.wait(BOUND)
        wait_until(lambda: pools.default._slots.queue.state is not State.OPEN)
        assert not any(result.done() for result in results)
        gate.open()

        assert [result.result(BOUND) for result in results] == [True] * 8
    assert bgtasks.stats()["default"].succeeded == 4


def test_shutdown_from_a_task() -> None:
    """A task may shut its own pool down: the others end, and it is accounted for as well."""
    results = []

    def task() -> None:
        results.append(bgtasks.shutdown())
        results.append(bgtasks.spawn("late", print))

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("shutdown", task)
        wait_until(lambda: pools.default._slots.queue.state is not State.OPEN)
        gate.open()
        bgtasks.drain(BOUND)

    assert results == [True, False]
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.succeeded, stats.dropped) == (3, 2, 1)


@pytest.mark.parametrize("ashutdown", [bgtasks.ashutdown, pools.default.ashutdown])
def test_ashutdown_from_an_async_task(ashutdown: Any) -> None:
    """An async task may shut its own pool down, and goes on to its end with its thread and its loop."""
    results: list[Any] = []

    async def task() -> None:
        await sync_to_async(results.append)("before")
        results.append(await ashutdown())
        results.append(bgtasks.spawn("late", print))
        await sync_to_async(results.append)("after")

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert results == ["before", True, False, "after"]
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.succeeded, stats.dropped) == (2, 1, 1)


def test_shutdown_after_one_from_an_async_task(caplog: pytest.LogCaptureFixture) -> None:
    """The next shutdown ends the threads, and neither waits for nor reports what was cancelled before."""

    async def task() -> None:
        results.append(await bgtasks.ashutdown(timeout=0))

    results: list[Any] = []
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("shutdown", task)
        wait_until(lambda: results and bgtasks.stats()["default"].running == 0)
        results.append(bgtasks.shutdown())

    assert results == [False, True]
    assert warned(caplog) == ["pool 'default' was shut down with 1 tasks cancelled: 1 'held'"]
    assert pools.drainer._groups == []


def test_shutdown_on_the_loop_is_an_error() -> None:
    """An async task would block the loop on which others have to end; it is told what to use."""
    errors = []

    async def task() -> None:
        for shutdown in (bgtasks.shutdown, pools.default.shutdown):
            with pytest.raises(RuntimeError) as raised:
                shutdown()
            errors.append(str(raised.value))

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert errors == ["shutdown() would block the drainer's loop; use 'await ashutdown()'"] * 2


def test_refused_shutdown_leaves_the_pools_open() -> None:
    """A shutdown that raises because of where it was called has shut nothing down."""
    errors = []

    async def task() -> None:
        try:
            bgtasks.shutdown()
        except RuntimeError as error:
            errors.append(error)

    bgtasks.spawn("shutdown", task)
    bgtasks.drain(BOUND)

    assert errors
    assert bgtasks.spawn("task", print, end="") is True
    assert pools["email"].spawn("first of its pool", print, end="") is True


def test_ashutdown_does_not_block_the_loop_of_its_view() -> None:
    """While an async view waits, its loop goes on: here it is the loop that opens the gate."""

    async def view(request: HttpRequest) -> JsonResponse:
        bgtasks.spawn("held", gate)
        waiting = asyncio.create_task(bgtasks.ashutdown())
        await asyncio.sleep(0)
        gate.open()
        return JsonResponse({"complete": await waiting})

    with Gate() as gate, site(view):
        response = async_to_sync(AsyncClient().get)("/")

    assert response.json() == {"complete": True}
    assert bgtasks.spawn("late", print) is False


def test_ashutdown_raises_what_the_shutdown_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong on the thread that does the shutdown is raised in the code that waits for it."""

    def stop() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(pools.drainer, "stop", stop)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(bgtasks.ashutdown())


def test_shutdown_out_of_time_cancels_and_names_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """It returns False, and one warning for each pool has the names and numbers of the cancelled tasks."""
    with full(pools.default):
        assert bgtasks.shutdown(timeout=0) is False

        stats = bgtasks.stats()["default"]
        assert (stats.cancelled, stats.running, stats.queued) == (6, 0, 0)

    assert warned(caplog) == ["pool 'default' was shut down with 6 tasks cancelled: 4 'waits', 2 'held'"]


def test_shutdown_out_of_time_cancels_async_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """An async task is cancelled, and may clean up."""
    cleaned_up = threading.Event()

    async def task() -> None:
        try:
            await gate()
        finally:
            cleaned_up.set()

    with AsyncGate() as gate:
        bgtasks.spawn("async", task)
        gate.wait_entered()

        assert asyncio.run(bgtasks.ashutdown(timeout=0)) is False

    assert cleaned_up.is_set()
    assert warned(caplog) == ["pool 'default' was shut down with 1 tasks cancelled: 1 'async'"]


@override_settings(
    BGTASKS={"default": {"CONN_MAX": 1, "SHUTDOWN_TIMEOUT": 1}, "email": {"SHUTDOWN_TIMEOUT": 3 * BOUND}}
)
def test_shutdown_without_a_timeout_uses_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    """Each pool has its SHUTDOWN_TIMEOUT; here the one second of the default pool runs out."""
    with Gate() as gate, Gate() as email_gate:
        bgtasks.spawn("held", gate)
        pools["email"].spawn("held", email_gate)
        gate.wait_entered()
        email_gate.wait_entered()
        bgtasks.spawn("waits", print)

        def open_email_gate(**kwargs: Any) -> None:
            # The default pool has cancelled what waits: now the task of the email pool may end.
            email_gate.open()

        with connected(open_email_gate, task_finished):
            assert bgtasks.shutdown() is False

    assert bgtasks.stats()["email"].succeeded == 1
    assert warned(caplog) == ["pool 'default' was shut down with 2 tasks cancelled: 1 'waits', 1 'held'"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shutdown_of_one_pool_leaves_the_others_open(asynchronous: bool) -> None:
    """A pool's own shutdown ends that pool only."""
    ran: list[Any] = []
    email = pools["email"]
    email.spawn("mail", ran.append, "mail")

    complete = asyncio.run(email.ashutdown()) if asynchronous else email.shutdown()

    assert complete is True
    assert ran == ["mail"]
    assert email.spawn("late", print) is False
    assert bgtasks.spawn("task", ran.append, "task") is True
    bgtasks.drain(BOUND)
    assert ran == ["mail", "task"]


def test_shutdown_of_one_pool_out_of_time_is_false() -> None:
    """A pool's own shutdown has a timeout and an answer as well."""
    with full(pools["email"]):
        assert pools["email"].shutdown(timeout=0) is False


def test_pool_first_used_after_shutdown_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """A shutdown of the process holds for pools that did not exist yet."""
    bgtasks.shutdown()

    assert pools["email"].spawn("late", print) is False
    assert warned(caplog) == ["task 'late' dropped: pool 'email' is shut down"]
    wait_until(lambda: not own_threads())


def test_pool_that_is_being_built_at_a_shutdown_is_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool that a shutdown could not see, since it was being built, accepts nothing either.

    1. spawner: builds the pool, and has yet to publish it
    2. shutdown: shuts down the pools that there are
    3. spawner: publishes the pool, and has to look whether the process still accepts tasks
    """
    pool_config = conf.pool_config

    def look_up_and_shut_down(name: str) -> Any:
        bgtasks.shutdown()
        return pool_config(name)

    monkeypatch.setattr(conf, "pool_config", look_up_and_shut_down)

    assert pools["email"].spawn("late", print) is False
    assert warned(caplog) == ["task 'late' dropped: pool 'email' is shut down"]


def test_shutdown_with_a_pool_that_was_never_used() -> None:
    """A handle that somebody has asked for, and not used, has nothing to shut down."""
    with override_settings(BGTASKS={"untouched": {}}):
        untouched = pools["untouched"]

        assert bgtasks.shutdown() is True
        assert untouched.shutdown() is True
        assert repr(untouched) == "<Pool 'untouched' not started>"


# Signals.


@pytest.mark.parametrize(("task", "outcome"), [(function, "succeeded"), (coroutine_function, "succeeded")])
def test_signals_of_a_task_that_succeeds(task: Any, outcome: str) -> None:
    """Each signal is sent once, in order, with the pool as its sender and its documented arguments."""
    email = pools["email"]

    with heard(task_spawned, task_started, task_finished, task_dropped) as calls:
        email.spawn("task", task, [], value=7)
        email.drain(BOUND)

    assert calls == [
        (email, {"name": "task"}),
        (email, {"name": "task"}),
        (email, {"name": "task", "outcome": outcome, "error": None}),
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_signal_of_a_task_that_fails(asynchronous: bool) -> None:
    """task_finished carries the exception."""
    error = ValueError("task")

    def task() -> None:
        raise error

    async def async_task() -> None:
        raise error

    with heard(task_finished) as calls:
        bgtasks.spawn("task", async_task if asynchronous else task)
        bgtasks.drain(BOUND)

    assert calls == [(pools.default, {"name": "task", "outcome": "failed", "error": error})]


@pytest.mark.parametrize("task", [function, coroutine_function])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_broken_receivers_do_not_reach_the_task(task: Any, error: Any) -> None:
    """Whatever a receiver raises, the task runs and is counted as what it was."""
    ran: list[Any] = []

    def receiver(**kwargs: Any) -> None:
        raise error("receiver")

    with connected(receiver, task_started, task_finished):
        bgtasks.spawn("task", task, ran, value=7)
        bgtasks.drain(BOUND)

    assert ran == [7]
    assert bgtasks.stats()["default"].succeeded == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_receivers_use_the_connection_of_the_task(asynchronous: bool) -> None:
    """Receivers may use the ORM also for an async task: they are called on the slot's own thread."""
    threads = []

    def receiver(**kwargs: Any) -> None:
        Note.objects.count()
        threads.append(threading.current_thread().name)

    def task() -> None:
        threads.append(threading.current_thread().name)

    with connected(receiver, task_started, task_finished):
        pools["email"].spawn("task", sync_to_async(task) if asynchronous else task)
        pools["email"].drain(BOUND)

    assert threads == ["bgtasks-email-1"] * 3


@pytest.mark.parametrize("task", [function, coroutine_function])
def test_signals_without_receivers_are_not_sent(monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
    """Who does not listen does not pay: no signal is called, nor a slot's thread for an async task's."""
    sent = []
    for each in (task_spawned, task_started, task_finished, task_dropped):
        monkeypatch.setattr(each, "send_robust", lambda *args, **kwargs: sent.append(kwargs))

    with full(pools["email"]):
        pools["email"].spawn("dropped", print)
    bgtasks.spawn("task", task, [], value=7)
    bgtasks.drain(BOUND)

    assert sent == []


# Figures.


def test_stats_has_every_pool() -> None:
    """stats() is a dictionary by name, with pools that were not used yet."""
    stats = bgtasks.stats()

    assert list(stats) == ["default", "email"]
    assert stats["email"] == pools["email"].stats()
    assert (stats["email"].capacity, stats["email"].conn_max, stats["email"].spawned) == (2, 1, 0)


def test_stats_are_frozen() -> None:
    """A snapshot does not change any more."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast(Any, bgtasks.stats()["default"]).spawned = 7


def test_every_figure_is_documented() -> None:
    """The class's docstring explains each field."""
    documented = inspect.getdoc(bgtasks.PoolStats) or ""

    assert [
        f.name for f in dataclasses.fields(bgtasks.PoolStats) if f"\n    {f.name}: " not in documented
    ] == []


def test_stats_agree_with_counts_from_outside_under_load(caplog: pytest.LogCaptureFixture) -> None:
    """Every snapshot adds up while threads spawn, and in the end each figure is as seen from outside."""
    caplog.set_level(logging.CRITICAL, "bgtasks")
    ended: dict[Any, Any] = {"succeeded": [], "failed": []}
    stop = threading.Event()

    def task() -> None:
        ended["succeeded"].append(1)

    async def async_task() -> None:
        ended["succeeded"].append(1)

    def failing_task() -> None:
        ended["failed"].append(1)
        raise ValueError

    def spawner() -> list[Any]:
        return [bgtasks.spawn("task", task) for task in [task, async_task, failing_task] * 300]

    def reader() -> None:
        before = bgtasks.stats()["default"]
        while not stop.is_set():
            stats = bgtasks.stats()["default"]
            assert stats.spawned == balance(stats)
            assert stats.spawned >= before.spawned
            assert 0 <= stats.queued <= stats.capacity
            assert 0 <= stats.running <= stats.conn_max
            before = stats

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as executor:
            reading = executor.submit(reader)
            spawning = [executor.submit(spawner) for _ in range(6)]
            accepted = [answer for future in spawning for answer in future.result(BOUND)]
            bgtasks.drain(BOUND)
            stop.set()
            reading.result(BOUND)
    finally:
        stop.set()
        sys.setswitchinterval(interval)

    stats = bgtasks.stats()["default"]
    assert stats.spawned == len(accepted) == 6 * 900
    assert stats.dropped == accepted.count(False)
    assert stats.succeeded == len(ended["succeeded"])
    assert stats.failed == len(ended["failed"])
    assert stats.queued == stats.running == stats.cancelled == 0
