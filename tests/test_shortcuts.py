"""The short cuts through private names of Django and asgiref: without each of them, everything is as with it.

The tests of what they do with them are in ``test_hooks`` and ``test_database``.
"""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.core.cache import caches
from django.db import connection, connections, transaction
from django.urls import reverse
from django.utils import timezone, translation
from pytest_django import Settings

import bgtasks
from bgtasks import shortcuts
from bgtasks.context import Scope
from tests.background import (
    by_anyone,
    everywhere,
    hour,
    in_function,
    in_orm_call,
    in_orm_call_in_async_to_sync,
    january,
    run,
    spawn,
)
from tests.gate import BOUND
from tests.test_hooks import URLS_OF_A_REQUEST, RecordingCache, mounted
from tests.testapp.models import Note


@pytest.fixture(autouse=True)
def one_slot(settings: Settings) -> Iterator[None]:
    """One slot, which is started for this test."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    yield

    assert bgtasks.drain(BOUND)


# Language and time zone: `moved`.


@pytest.fixture
def without_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Know nothing of the inside of a Local: language and time zone are asked for and activated."""
    monkeypatch.setattr(shortcuts, "UNDERSTANDS_LOCAL", False)
    monkeypatch.setattr("bgtasks.context.capture", Scope.capture)


@everywhere
@by_anyone
@pytest.mark.usefixtures("without_moved")
def test_language_and_time_zone_are_passed_on(spawner: Callable[..., Any], place: Callable[..., Any]) -> None:
    """A task speaks French, tells Tokyo's time and reverses URLs if its spawner does, wherever both are."""

    def act() -> Any:
        with translation.override("fr"), timezone.override("Asia/Tokyo"), mounted("/app/", URLS_OF_A_REQUEST):
            return spawn(place, lambda: (january(), hour(), reverse("activate")))

    assert spawner(act).result(BOUND) == ("janvier", 21, "/app/activate-here/")


@everywhere
@pytest.mark.usefixtures("without_moved")
def test_translations_that_are_off_are_off(place: Callable[..., Any]) -> None:
    """Translations that the spawner has turned off are off in the task."""
    with translation.override(None):
        seen = run(place, lambda: (translation.get_language(), january()))

    assert seen == (None, "January")


@everywhere
@pytest.mark.usefixtures("without_moved")
def test_defaults_of_the_settings_are_those_of_the_task(
    place: Callable[..., Any], settings: Settings
) -> None:
    """Without an active language or time zone, those of the settings are in force in the task."""
    settings.LANGUAGE_CODE, settings.TIME_ZONE = "fr", "Asia/Tokyo"

    assert contextvars.Context().run(run, place, lambda: (january(), hour())) == ("janvier", 21)


@pytest.mark.usefixtures("without_moved")
def test_function_that_returns_a_coroutine_keeps_its_language() -> None:
    """The coroutine that a plain function returns speaks the language of the function."""
    seen: list[Any] = []

    async def coroutine() -> None:
        seen.append(january())

    def function() -> Any:
        return coroutine()

    with translation.override("fr"):
        bgtasks.spawn("returns a coroutine", function)
    bgtasks.drain(BOUND)

    assert seen == ["janvier"]


@pytest.mark.parametrize("storage", [None, "unknown"])
def test_inside_of_a_local_is_tried(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the inside of a Local is as we know it is found out by moving something."""
    assert shortcuts._understands_local()

    class Other:
        _storage = storage

    monkeypatch.setattr(shortcuts, "Local", Other)

    assert not shortcuts._understands_local()


# The slot as the thread of ORM calls: `SlotContexts`.


@pytest.fixture(params=[True, False], ids=["short cut", "public names"])
def contexts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot's contexts, made in either way."""
    monkeypatch.setattr(shortcuts, "UNDERSTANDS_CONTEXT", request.param)


@by_anyone
@pytest.mark.parametrize("task", [in_orm_call, in_orm_call_in_async_to_sync])
@pytest.mark.usefixtures("contexts")
def test_orm_calls_of_a_task_are_made_on_its_slot(
    task: Callable[..., Any], spawner: Callable[..., Any]
) -> None:
    """Not on the thread of the request, even while that thread waits for the task."""
    thread = spawner(lambda: spawn(task, threading.current_thread).result(BOUND))

    assert thread.name == "bgtasks-default-1"


@pytest.mark.usefixtures("contexts")
def test_what_a_task_leaves_behind_is_kept_from_the_slot() -> None:
    """A child of an async task that goes on after it cannot use the slot, which has another task by then."""
    ended = asyncio.Event()
    refused: Future[Any] = Future()

    async def child() -> None:
        await ended.wait()
        try:
            await sync_to_async(threading.get_ident)()
        except RuntimeError as error:
            refused.set_result(str(error))

    async def parent() -> Any:
        children.append(asyncio.create_task(child()))
        return await sync_to_async(threading.get_ident)()

    async def let_go() -> Any:
        ended.set()
        return await sync_to_async(threading.get_ident)()

    children: list[Any] = []
    slot = run(parent)

    assert run(let_go) == slot
    assert "ThreadSensitiveContext has exited" in refused.result(BOUND)


@pytest.mark.usefixtures("contexts")
def test_slots_that_have_ended_leave_nothing_in_asgiref() -> None:
    """The table in which asgiref notes executors has no slot of a pool that was shut down."""
    run(in_orm_call, threading.get_ident)
    slot = weakref.ref(bgtasks.pools.default.slots.all[0])
    bgtasks.pools.restart()
    gc.collect()

    assert slot() is None


@pytest.mark.parametrize("table", [None, {}])
def test_inside_of_a_context_is_looked_at(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another table of executors, which might hold the slots for ever, is not touched."""
    assert shortcuts._understands_context()

    monkeypatch.setattr(SyncToAsync, "context_to_thread_executor", table)

    assert not shortcuts._understands_context()


# The connections of a slot: `open_connections`.


@pytest.fixture(params=[True, False], ids=["short cut", "public names"])
def connections_inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connections of a thread, looked up in either way."""
    if not request.param:
        monkeypatch.setattr(shortcuts, "_connections", object())


@pytest.mark.django_db(transaction=True, databases=["default", "pooled"])
@pytest.mark.usefixtures("connections_inside")
def test_open_connections_are_those_of_the_thread() -> None:
    """Every connection that this thread has, and none of another."""

    def probe() -> tuple[list[str], list[str]]:
        before = [each.alias for each in shortcuts.open_connections()]
        Note.objects.count()
        return before, [each.alias for each in shortcuts.open_connections()]

    Note.objects.using("pooled").count()

    assert run(probe) == ([], ["default"])


@pytest.mark.usefixtures("connections_inside")
def test_connections_of_a_thread_are_those_that_django_knows() -> None:
    """Also those that are not open."""

    def probe() -> Any:
        _ = connections["default"], connections["sqlite"]
        return shortcuts.open_connections(), connections.all(initialized_only=True)

    found, known = run(in_function, probe)

    assert {each.alias for each in found} >= {"default", "sqlite"}
    assert set(map(id, found)) == set(map(id, known))


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("connections_inside")
def test_connection_in_a_transaction_is_thrown_away() -> None:
    """A task that leaves its connection inside an atomic block does not hand it on to the next one."""

    def leave_atomic() -> Any:
        transaction.atomic().__enter__()
        return connection.connection

    left = run(leave_atomic)

    assert left.closed
    assert run(lambda: connections["default"].in_atomic_block) is False


# The caches of a task: `has_caches`.


@pytest.fixture
def closed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cache objects that were closed so far."""
    monkeypatch.setattr(RecordingCache, "closed", [], raising=False)
    settings.BGTASKS_SNAPSHOT = None  # its thread uses a cache as well
    settings.CACHES = {"default": {"BACKEND": "tests.test_hooks.RecordingCache"}}
    return RecordingCache.closed


@pytest.mark.parametrize("known", [True, False], ids=["short cut", "public names"])
def test_caches_of_a_task_are_closed(known: Any, closed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task has opened is closed at its end, and a task that has opened none closes none."""
    if not known:
        monkeypatch.setattr(shortcuts, "_caches", object())
    run(in_function, lambda: None)
    theirs = run(in_function, lambda: caches["default"])

    assert closed == [theirs]
