"""What a task sees of the place that spawned it, and what it must never see."""

import asyncio
import contextvars
import decimal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import pytest
from asgiref.local import Local
from asgiref.sync import AsyncSingleThreadContext, ThreadSensitiveContext, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django import forms
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import ValidationError
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, AsyncRequestFactory
from django.urls import path, reverse, set_script_prefix, set_urlconf
from django.utils import timezone, translation
from pytest_django import Settings

import bgtasks
import bgtasks.testing
from bgtasks.repeats import repeats
from tests.background import (
    by_anyone,
    by_sync_code_of_loop,
    everywhere,
    hour,
    in_async_to_sync,
    in_coroutine,
    in_function,
    in_orm_call,
    in_orm_call_in_async_to_sync,
    january,
    run,
    spawn,
)
from tests.gate import BOUND, AsyncGate, Gate
from tests.processes import run_python

URLS_OF_A_REQUEST = (path("activate-here/", cast("Any", print), name="activate"),)

REQUEST_ID: ContextVar[Any] = ContextVar("request_id", default=None)


def scope_of_a_request() -> dict[str, Any]:
    """Return what a server calls the application with."""
    factory: Any = AsyncRequestFactory()
    scope: dict[str, Any] = factory._base_scope(path="/")
    return scope


@pytest.fixture(autouse=True)
def one_slot(settings: Settings) -> Iterator[None]:
    """One slot, whose next task is the next one spawned, and whose thread no other test has used."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    yield

    assert bgtasks.drain(BOUND)
    REQUEST_ID.set(None)


# Context variables.


@everywhere
def test_task_sees_the_context_variables_of_its_spawner(place: Callable[..., Any]) -> None:
    """A request id that is set where a task is spawned is there in all code of the task."""
    REQUEST_ID.set("42")

    assert run(place, REQUEST_ID.get) == "42"


def test_task_sees_the_context_of_the_moment_it_was_spawned() -> None:
    """What the spawner sets after the spawn is none of the task's business."""
    REQUEST_ID.set("before")
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        seen = spawn(REQUEST_ID.get)
        REQUEST_ID.set("after")

    assert seen.result(BOUND) == "before"


@everywhere
def test_spawner_does_not_see_what_a_task_sets(place: Callable[..., Any]) -> None:
    """A context variable that a task sets stays as it was where the task was spawned."""
    REQUEST_ID.set("of the request")
    run(place, lambda: REQUEST_ID.set("of the task"))

    assert REQUEST_ID.get() == "of the request"


@everywhere
def test_next_task_does_not_see_what_a_task_sets(place: Callable[..., Any]) -> None:
    """A context variable that a task sets is gone for the next task on the same slot."""
    run(place, lambda: REQUEST_ID.set("of the last task"))

    assert run(place, REQUEST_ID.get) is None


@everywhere
def test_values_of_context_variables_may_be_anything(place: Callable[..., Any]) -> None:
    """A value that can be neither hashed nor compared nor shown is passed on as it is."""

    class Awkward:
        __hash__ = __eq__ = __repr__ = cast(Any, None)

    REQUEST_ID.set(value := Awkward())

    assert run(place, lambda: REQUEST_ID.get() is value)


@everywhere
def test_context_may_be_in_use_while_the_task_runs(place: Callable[..., Any]) -> None:
    """A task runs while its spawner is still inside the context that was captured."""
    context = contextvars.Context()
    context.run(REQUEST_ID.set, "42")
    seen = context.run(lambda: spawn(place, REQUEST_ID.get).result(BOUND))

    assert seen == "42"


# Objects in the context that are changed in place.


@everywhere
def test_spawner_and_next_task_do_not_calculate_as_a_task_does(place: Callable[..., Any]) -> None:
    """A task that sets the precision of decimals does so for itself only."""

    def calculate_roughly() -> int:
        decimal.getcontext().prec = 4
        return decimal.getcontext().prec

    decimal.getcontext()  # from now on it is in the spawner's context

    assert run(place, calculate_roughly) == 4
    assert decimal.getcontext().prec == 28
    assert run(place, lambda: decimal.getcontext().prec) == 28


@everywhere
def test_task_calculates_as_its_spawner_does(place: Callable[..., Any]) -> None:
    """The precision that the spawner has set is in force in the task."""
    with decimal.localcontext(prec=9):
        seen = run(place, lambda: decimal.getcontext().prec)

    assert seen == 9


def test_spawner_does_not_calculate_as_an_inline_task_does() -> None:
    """Nor does a task that runs in the code that spawns it change how that calculates."""
    decimal.getcontext()
    with bgtasks.testing.inline():
        bgtasks.spawn("rough", lambda: setattr(decimal.getcontext(), "prec", 4))

    assert decimal.getcontext().prec == 28


def test_warning_filters_of_a_task_are_its_own() -> None:
    """Where warning filters are in the context, a task that changes them does so for itself only."""
    code = (
        "import sys, warnings, django; django.setup(); import bgtasks\n"
        "with warnings.catch_warnings():\n"
        "    before = list(warnings._get_filters())\n"
        "    bgtasks.spawn('task', warnings.simplefilter, 'ignore')\n"
        "    assert bgtasks.drain(30)\n"
        "    assert warnings._get_filters() == before\n"
    )
    if sys.version_info < (3, 14):
        pytest.skip("filters are not in the context before Python 3.14")
    done = run_python(code, env={"PYTHON_CONTEXT_AWARE_WARNINGS": "1"})

    assert (done.returncode, done.stderr) == (0, "")


def test_variable_of_a_familiar_name_is_passed_on_as_it_is() -> None:
    """What is in a variable that only has the name of Sentry's is not copied."""

    def act() -> Any:
        variable.set(value)
        return run(variable.get)

    value = object()
    variable: ContextVar[Any] = ContextVar("current_scope")

    assert contextvars.copy_context().run(act) is value


def test_object_that_cannot_be_copied_is_passed_on_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A fault in another library's copying costs no task."""

    class Context:
        __module__ = "decimal"

        def copy(self) -> Any:
            raise LookupError("on purpose")

    def act() -> Any:
        variable.set(value)
        return run(variable.get)

    value = Context()
    variable: ContextVar[Any] = ContextVar("decimal_context")

    assert contextvars.copy_context().run(act) is value
    repeats.flush()
    assert "the context variable 'decimal_context' could not be copied for a task" in caplog.messages


# Language and time zone.


@everywhere
def test_task_speaks_the_language_of_its_spawner(place: Callable[..., Any]) -> None:
    """What is spawned while French is active is written in French, in all code of the task."""
    with translation.override("fr"):
        written = run(place, january)

    assert written == "janvier"


@everywhere
def test_lazy_texts_of_a_task_are_in_its_language(place: Callable[..., Any]) -> None:
    """A form that a task validates complains in the language of the spawner."""

    def complaint() -> Any:
        with pytest.raises(ValidationError) as caught:
            forms.CharField().clean("")
        return caught.value.messages

    with translation.override("fr"):
        written = run(place, complaint)

    assert written == ["Ce champ est obligatoire."]


@everywhere
@by_anyone
def test_language_of_any_spawner_is_the_tasks(spawner: Callable[..., Any], place: Callable[..., Any]) -> None:
    """French is French on whatever thread or loop the task was spawned."""

    def act() -> Any:
        with translation.override("fr"):
            # The spawner may be what a task would wait for, so it must not wait for the task itself.
            return spawn(place, january)

    assert spawner(act).result(BOUND) == "janvier"


@everywhere
def test_language_of_localemiddleware_is_the_tasks(place: Callable[..., Any], settings: Settings) -> None:
    """A task that an async view spawns for a French browser is in French."""
    settings.MIDDLEWARE = ["django.middleware.locale.LocaleMiddleware"]

    async def view(request: HttpRequest) -> HttpResponse:
        spawned.append(spawn(place, january))
        return HttpResponse()

    spawned: list[Any] = []
    settings.ROOT_URLCONF = (path("", view),)
    response = asyncio.run(AsyncClient().get("/", headers={"accept-language": "fr"}))

    assert response.headers["Content-Language"] == "fr"
    assert spawned[0].result(BOUND) == "janvier"


@everywhere
def test_next_task_does_not_speak_the_language_of_the_last(place: Callable[..., Any]) -> None:
    """A slot that ran a task in French runs the next one in the language that one was spawned in."""
    with translation.override("fr"):
        run(place, january)

    assert run(place, january) == "January"


@everywhere
def test_next_task_does_not_speak_a_language_that_the_last_activated(place: Callable[..., Any]) -> None:
    """A task that activates French, and leaves it active, does so for itself only."""
    run(place, lambda: translation.activate("fr"))

    assert run(place, january) == "January"
    assert january() == "January"


@everywhere
def test_task_has_no_language_if_its_spawner_has_none(place: Callable[..., Any]) -> None:
    """Translations that the spawner has turned off are off in the task, whatever LANGUAGE_CODE says."""
    with translation.override(None):
        seen = run(place, lambda: (translation.get_language(), january()))

    assert seen == (None, "January")


@everywhere
def test_task_has_the_default_language_if_its_spawner_activated_none(
    place: Callable[..., Any], settings: Settings
) -> None:
    """Without an active language LANGUAGE_CODE counts, for the task as for its spawner."""
    settings.LANGUAGE_CODE = "fr"
    seen = contextvars.Context().run(run, place, january)

    assert seen == "janvier"


@everywhere
def test_task_may_be_spawned_without_translations(place: Callable[..., Any], settings: Settings) -> None:
    """With USE_I18N off there is no language to restore, and the task runs."""
    settings.USE_I18N = False

    assert run(place, january) == "January"


@everywhere
def test_task_is_in_the_time_zone_of_its_spawner(place: Callable[..., Any]) -> None:
    """What is spawned while Tokyo's time is active tells Tokyo's time, in all code of the task."""
    with timezone.override("Asia/Tokyo"):
        told = run(place, hour)

    assert told == 21


@everywhere
@by_anyone
def test_time_zone_of_any_spawner_is_the_tasks(
    spawner: Callable[..., Any], place: Callable[..., Any]
) -> None:
    """Tokyo is Tokyo on whatever thread or loop the task was spawned."""

    def act() -> Any:
        with timezone.override("Asia/Tokyo"):
            return spawn(place, hour)

    assert spawner(act).result(BOUND) == 21


@everywhere
def test_next_task_is_not_in_the_time_zone_of_the_last(place: Callable[..., Any]) -> None:
    """Neither what a task was spawned with nor what it activates holds for the next one on its slot."""
    with timezone.override("Asia/Tokyo"):
        run(place, lambda: timezone.activate("America/New_York"))

    assert run(place, hour) == 12
    assert hour() == 12


@everywhere
def test_task_is_in_the_default_time_zone_if_its_spawner_activated_none(
    place: Callable[..., Any], settings: Settings
) -> None:
    """Without an active time zone TIME_ZONE counts, for the task as for its spawner."""
    settings.TIME_ZONE = "Asia/Tokyo"

    assert run(place, hour) == 21


def test_plain_function_that_returns_a_coroutine_keeps_what_it_was_spawned_with() -> None:
    """The coroutine that it returns speaks French, tells Tokyo's time and knows the request."""

    def probe() -> Any:
        return january(), hour(), REQUEST_ID.get()

    async def coroutine() -> None:
        seen.append(await in_orm_call(probe))
        seen.append(probe())

    def function() -> Any:
        return coroutine()

    seen: list[Any] = []
    REQUEST_ID.set("42")
    with translation.override("fr"), timezone.override("Asia/Tokyo"):
        bgtasks.spawn("returns a coroutine", function)
    bgtasks.drain(BOUND)

    assert seen == [("janvier", 21, "42")] * 2


@by_anyone
def test_language_is_captured_after_an_override_of_language_code(
    spawner: Callable[..., Any], settings: Settings
) -> None:
    """Django forgets its active languages when a test overrides LANGUAGE_CODE; the next one is captured."""

    def act() -> Any:
        with translation.override("fr"):
            return spawn(january)

    settings.LANGUAGE_CODE = "en"

    assert contextvars.Context().run(spawner, act).result(BOUND) == "janvier"


# What is bound to the spawner's thread.


@everywhere
def test_task_does_not_see_a_local_of_its_spawner(place: Callable[..., Any]) -> None:
    """Other data in an asgiref Local belongs to the request, and is not there in any code of a task."""
    local = Local()
    local.user = "of the request"

    assert run(place, lambda: hasattr(local, "user")) is False


# URLs.


@everywhere
@by_anyone
def test_task_reverses_urls_as_its_spawner_does(
    spawner: Callable[..., Any], place: Callable[..., Any]
) -> None:
    """The script prefix and the URL configuration of the request are the task's."""

    def act() -> Any:
        with mounted("/app/", URLS_OF_A_REQUEST):
            return spawn(place, lambda: reverse("activate"))

    assert spawner(act).result(BOUND) == "/app/activate-here/"


@everywhere
def test_next_task_does_not_reverse_urls_as_the_last_did(
    place: Callable[..., Any], settings: Settings
) -> None:
    """Neither what a task was spawned with nor what it sets holds for the next one on its slot."""
    settings.ROOT_URLCONF = (path("activate/", cast("Any", print), name="activate"),)
    with mounted("/app/", URLS_OF_A_REQUEST):
        run(place, lambda: set_script_prefix("/set-by-the-task/"))

    assert run(place, lambda: reverse("activate")) == "/activate/"


@by_anyone
def test_orm_of_an_async_task_runs_on_its_slot(spawner: Callable[..., Any]) -> None:
    """Not on the request's thread, even while that thread waits for the task."""
    thread = spawner(lambda: spawn(in_orm_call, threading.current_thread).result(BOUND))

    assert thread.name == "bgtasks-default-1"


@by_anyone
def test_orm_in_async_to_sync_runs_on_the_slot(spawner: Callable[..., Any]) -> None:
    """A plain task that calls async code goes on using its own thread for the ORM."""
    thread = spawner(lambda: spawn(in_orm_call_in_async_to_sync, threading.current_thread).result(BOUND))

    assert thread.name == "bgtasks-default-1"


def test_orm_of_a_task_never_runs_on_the_thread_of_the_request(settings: Settings) -> None:
    """Real ASGI requests, whose views wait for their tasks: the requests' threads see none of them."""

    async def view(request: HttpRequest) -> HttpResponse:
        own = await sync_to_async(threading.current_thread)()
        theirs = await asyncio.wrap_future(spawn(in_orm_call, threading.current_thread))
        seen.append((own, theirs))
        return HttpResponse()

    seen: list[Any] = []
    settings.ROOT_URLCONF = (path("", view),)
    for _ in range(2):
        asyncio.run(respond(ASGIHandler()))

    assert [theirs.name for _, theirs in seen] == ["bgtasks-default-1"] * 2
    assert all(own is not theirs for own, theirs in seen)


async def respond(application: Any) -> None:
    """Send one request, and receive the answer to its end."""
    communicator = ApplicationCommunicator(application, scope_of_a_request())
    await communicator.send_input({"type": "http.request"})
    while (await communicator.receive_output(BOUND)).get("more_body", True):
        pass
    await communicator.wait(BOUND)


def test_loop_of_a_plain_task_does_not_use_the_thread_of_the_request() -> None:
    """Async ORM calls under a task's own asyncio.run are not sent to the thread of the spawner."""

    def task() -> Any:
        return asyncio.run(in_orm_call(threading.current_thread))

    async def view() -> Any:
        async with ThreadSensitiveContext():
            own = await sync_to_async(threading.current_thread)()
            return own, await asyncio.wrap_future(spawn(task))

    own, theirs = asyncio.run(view())

    assert own is not theirs


def test_loop_of_a_plain_task_is_not_taken_for_a_deadlock() -> None:
    """A task spawned on the one thread that asgiref has without a context may use it once it is free."""

    def task() -> Any:
        return asyncio.run(in_orm_call(lambda: "no deadlock"))

    seen = by_sync_code_of_loop(lambda: spawn(task)).result(BOUND)

    assert seen == "no deadlock"


def test_async_code_of_a_plain_task_does_not_use_the_loop_thread_of_the_request() -> None:
    """The thread that an AsyncSingleThreadContext of the request keeps for its loops is not lent out."""
    with AsyncSingleThreadContext():
        own = in_async_to_sync(threading.current_thread)
        theirs = run(in_async_to_sync, threading.current_thread)

    assert own is not theirs


@contextmanager
def mounted(prefix: str, urlconf: Any) -> Iterator[None]:
    """Have the script prefix and the URL configuration of a request."""
    set_script_prefix(prefix)
    set_urlconf(urlconf)
    try:
        yield
    finally:
        set_script_prefix("/")
        set_urlconf(None)


# Tasks outlive what spawned them.


@pytest.mark.parametrize("kind", [Gate, AsyncGate])
def test_task_runs_on_when_the_client_disconnects(kind: type[Gate | AsyncGate], settings: Settings) -> None:
    """A view is cancelled when its client leaves. The task it has spawned is not."""

    async def view(request: HttpRequest) -> None:
        bgtasks.spawn("held", gate)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("view")
            raise

    async def main() -> None:
        application, scope = ASGIHandler(), scope_of_a_request()
        communicator = ApplicationCommunicator(application, scope)
        await communicator.send_input({"type": "http.request"})
        await asyncio.wait_for(started.wait(), BOUND)
        await asyncio.to_thread(gate.wait_entered)
        await communicator.send_input({"type": "http.disconnect"})
        await communicator.wait(BOUND)

    settings.ROOT_URLCONF = (path("", cast("Callable[..., Any]", view)),)
    started = asyncio.Event()
    ended: list[Any] = []
    before = bgtasks.stats()["default"].succeeded
    with kind() as gate:
        asyncio.run(main())

        assert ended == ["view"]
        assert gate.inside == 1

    assert bgtasks.drain(BOUND)
    assert bgtasks.stats()["default"].succeeded == before + 1


@pytest.mark.parametrize("kind", [Gate, AsyncGate])
def test_task_runs_on_when_the_task_that_spawned_it_is_cancelled(kind: type[Gate | AsyncGate]) -> None:
    """Cancelling an asyncio task does not reach what it has spawned."""

    async def spawner() -> None:
        bgtasks.spawn("held", gate)
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(spawner())
        await asyncio.to_thread(gate.wait_entered)
        task.cancel()
        await asyncio.wait([task])

    with kind() as gate:
        asyncio.run(main())
    bgtasks.drain(BOUND)

    assert bgtasks.stats()["default"].succeeded == 1


@pytest.mark.parametrize("make", [lambda gate: gate, lambda gate: gate()], ids=["function", "coroutine"])
def test_task_runs_when_the_loop_that_spawned_it_is_closed(make: Callable[..., Any]) -> None:
    """A task needs nothing of the event loop on which it was spawned."""

    async def main() -> None:
        bgtasks.spawn("first", gate)
        bgtasks.spawn("second", make(gate))

    with AsyncGate() as gate:
        asyncio.run(main())
    bgtasks.drain(BOUND)

    assert bgtasks.stats()["default"].succeeded == 2


# Caches.


class RecordingCache(LocMemCache):
    """A cache that records which of its objects were closed."""

    closed: list["RecordingCache"]

    def close(self, **kwargs: Any) -> None:
        self.closed.append(self)


class BrokenCache(RecordingCache):
    """A cache that cannot be closed."""

    def close(self, **kwargs: Any) -> None:
        super().close(**kwargs)
        raise OSError("no route to cache")


@pytest.fixture
def closed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cache objects that were closed so far."""
    monkeypatch.setattr(RecordingCache, "closed", [], raising=False)
    settings.BGTASKS_SNAPSHOT = None  # its thread uses a cache as well
    settings.CACHES = {
        "default": {"BACKEND": "tests.test_hooks.RecordingCache"},
        "broken": {"BACKEND": "tests.test_hooks.BrokenCache"},
        "last": {"BACKEND": "tests.test_hooks.RecordingCache"},
    }
    return RecordingCache.closed


def open_caches() -> Any:
    return caches.all(initialized_only=True)


@everywhere
@by_anyone
def test_task_never_sees_a_cache_connection_of_its_spawner(
    spawner: Callable[..., Any], place: Callable[..., Any], closed: list[Any]
) -> None:
    """The cache objects of a request do not turn up in any code of a task, only new ones."""

    def act() -> Any:
        own = caches["default"]
        return own, spawn(place, lambda: (open_caches(), caches["default"]))

    own, seen = spawner(act)
    inherited, theirs = seen.result(BOUND)

    assert inherited == []
    assert theirs is not own


@everywhere
def test_cache_connections_of_a_task_are_closed_at_its_end(
    place: Callable[..., Any], closed: list[Any]
) -> None:
    """What a task has opened is closed as Django does it after a request; the spawner's stay open."""
    own = caches["default"]
    theirs = run(place, lambda: caches["default"])

    assert closed == [theirs]
    assert open_caches() == [own]


@pytest.mark.parametrize("place", [in_function, in_coroutine])
def test_cache_connections_of_a_task_that_fails_are_closed(
    place: Callable[..., Any], closed: list[Any]
) -> None:
    """An exception does not leave a cache connection open."""

    def fail() -> None:
        opened.append(caches["default"])
        raise LookupError("on purpose")

    opened: list[Any] = []
    with pytest.raises(LookupError):
        run(place, fail)

    assert closed == opened


def test_cache_connections_of_a_function_that_returns_a_coroutine_are_closed(closed: list[Any]) -> None:
    """What a plain function has opened is closed, even if the task goes on as the coroutine it returns."""

    async def coroutine() -> None:
        opened.append(caches["default"])

    def function() -> Any:
        opened.append(caches["default"])
        return coroutine()

    opened: list[Any] = []
    bgtasks.spawn("returns a coroutine", function)
    bgtasks.drain(BOUND)

    assert len(set(opened)) == 2
    assert closed == opened


@everywhere
def test_next_task_has_no_cache_connection_of_the_last(place: Callable[..., Any], closed: list[Any]) -> None:
    """A task starts without cache objects, on a slot that has used some before."""
    run(place, lambda: caches["default"])

    assert run(place, open_caches) == []


@everywhere
def test_cache_that_cannot_be_closed_is_logged(
    place: Callable[..., Any], closed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """An error in closing a cache is no matter of the task, nor of the other caches."""
    run(place, lambda: [caches[alias] for alias in caches])

    repeats.flush()
    [message] = [record.message for record in caplog.records]
    assert message.startswith("the cache ")
    assert message.endswith(" could not be closed after a task")
    assert "no route to cache" in caplog.text
    assert len(closed) == 3
    assert bgtasks.stats()["default"].succeeded == 1
