"""Payloads: what travels along with a function, and how a worker runs it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta, tzinfo
from datetime import timezone as fixed
from typing import Any, cast
from zoneinfo import ZoneInfo

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.core import signing
from django.test import override_settings
from django.urls import get_script_prefix, get_urlconf, set_script_prefix, set_urlconf
from django.urls import path as url
from django.utils import timezone, translation

from bgtasks.exceptions import PayloadError
from bgtasks.handoff import payload
from bgtasks.handoff.payload import NO_SURROUNDINGS
from bgtasks.propagators import Propagator
from tests.handoff.worker import (
    anote,
    context_of,
    empty_engines,
    note,
    note_locale,
    packed,
    ran,
    return_awaitable,
    return_coroutine,
)
from tests.testapp import tasks


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    with empty_engines():
        yield


# Language and time zone.


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("zone", "name"),
    [
        ("Europe/Paris", "Europe/Paris"),
        (ZoneInfo("Asia/Tokyo"), "Asia/Tokyo"),
        (fixed(timedelta(hours=-3)), "UTC-03:00"),
    ],
)
def test_language_and_time_zone_travel_along(zone: str, name: str) -> None:
    """A worker runs the function as if it were where it was spawned."""
    with translation.override("fr"), timezone.override(zone):
        content = packed(note_locale)
    payload.run(None, content.args[0])

    assert ran == [["fr", name]]
    assert translation.get_language() == "en"


def test_no_language_at_all_travels_too() -> None:
    """Deactivated translations are another thing than the default language."""
    with translation.override(None):
        content = packed(note_locale)
    payload.run(None, content.args[0])

    assert ran == [[None, "UTC"]]


def test_a_time_zone_without_a_name_keeps_the_task_here() -> None:
    """What cannot be told to a worker is not guessed there."""

    class Odd(tzinfo):
        def utcoffset(self, when: datetime | None) -> None:
            return None

    with timezone.override(cast(Any, Odd)()):
        assert packed(note_locale) is None


def test_a_django_task_with_a_language_travels_in_the_generic_one() -> None:
    """Engines know nothing of languages. Its value and its context are those of the task itself."""
    with translation.override("fr"):
        locale, context_id = packed(tasks.locale), packed(tasks.context_id)

    assert locale.task.module_path == "bgtasks.tasks.run_function"
    assert payload.run(None, locale.args[0]) == ["fr", "UTC"]
    arguments = {"args": context_id.args, "kwargs": {}}
    context = context_of(context_id.task, arguments)
    assert context_id.task.call(context, *context_id.args) == "on-the-worker"


# Signed payloads.


def test_a_payload_runs_its_function() -> None:
    """Plain, async, and one that returns what can be awaited. What they return is nobody's."""
    for function, args in ((note, [1]), (anote, [2]), (return_coroutine, [3]), (return_awaitable, [4])):
        assert payload.run(None, packed(function, *args).args[0]) is None

    assert ran == [[[1], {}], 2, 3, 4]


PAYLOAD: dict[str, Any] = {"f": "tests.handoff.worker.note", "a": [], "k": {}, "l": None, "z": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tests.handoff.worker.note",
        signing.dumps(PAYLOAD, salt="other"),
        signing.dumps(PAYLOAD, key="another key", salt=payload.SALT),
        None,
    ],
)
def test_a_forged_payload_runs_nothing(text: str) -> None:
    """Not signed at all, for another purpose, or with another key."""
    with pytest.raises(PayloadError, match=r"was not signed by this project, or with another SECRET_KEY"):
        payload.run(None, text)

    assert ran == []


def test_an_altered_payload_runs_nothing() -> None:
    """One character makes it a forged one."""
    [text] = packed(note, 1).args

    with pytest.raises(PayloadError, match="nothing was run"):
        payload.run(None, text[:-1] + ("A" if text[-1] != "A" else "B"))


def test_an_old_payload_is_not_run_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody has recorded cannot be played back for ever."""
    [text] = packed(note, 1).args
    later = time.time() + payload.MAX_AGE.total_seconds() + 60
    monkeypatch.setattr(time, "time", lambda: later)

    with pytest.raises(PayloadError, match="more than 7 days ago"):
        payload.run(None, text)

    assert ran == []


@pytest.mark.parametrize("path", ["tests.handoff.worker.gone", "tests.gone.note"])
def test_a_function_that_is_not_there_is_named(path: Any) -> None:
    """A worker that runs other code than the site says which function it does not have."""
    text = payload.sign(path, [], {}, NO_SURROUNDINGS)

    with pytest.raises(PayloadError, match=rf"the function '{path}' cannot be imported here"):
        payload.run(None, text)


# URLs and propagators.


class Shop(Propagator):
    """Carries the value in `shop`."""

    def capture(self) -> Any:
        return shop.get()

    @contextmanager
    def restore(self, value: Any) -> Iterator[None]:
        ran.append(value)
        yield
        ran.append("left")


shop: ContextVar[Any] = ContextVar("shop", default="of the worker")


def note_urls() -> None:
    ran.append([get_script_prefix(), get_urlconf()])


@contextmanager
def carrying(value: Any, *names: str) -> Iterator[None]:
    """Spawn, in a context of its own, with this value and these propagators."""
    token = shop.set(value)
    with override_settings(BGTASKS_PROPAGATORS=[f"{__name__}.{name}" for name in names]):
        yield
    shop.reset(token)


def test_script_prefix_and_urlconf_travel_along() -> None:
    """A worker reverses URLs as the request does that has spawned the task, and only for that task."""
    set_script_prefix("/app/")
    set_urlconf("tests.site.urls")
    try:
        content = packed(note_urls)
    finally:
        set_script_prefix("/")
        set_urlconf(None)
    payload.run(None, content.args[0])

    assert ran == [["/app/", "tests.site.urls"]]
    assert (get_script_prefix(), get_urlconf()) == ("/", None)


def test_urlconf_without_a_name_keeps_the_task_here() -> None:
    """A worker could not find it."""
    set_urlconf(cast(Any, (url("", cast(Any, print)),)))
    try:
        assert packed(note_urls) is None
    finally:
        set_urlconf(None)


@pytest.mark.parametrize(("function", "args"), [(note, []), (anote, ["text"]), (tasks.answer, [])])
def test_values_of_propagators_travel_along(function: Any, args: Any) -> None:
    """They are restored around the function on the worker, also for one that would travel by its path."""
    with carrying({"id": 5}, "Shop"):
        content = packed(function, *args)
        payload.run(context_of(content.task, {"args": [], "kwargs": {}}), content.args[0])

    assert ran[0] == {"id": 5}
    assert ran[-1] == "left"


def test_value_that_is_no_json_keeps_the_task_here(caplog: pytest.LogCaptureFixture) -> None:
    """The warning says which propagator it is, and shows no value."""
    with carrying((1, 2), "Shop"):
        assert packed(note) is None

    assert f"the propagator '{__name__}.Shop' carries a tuple" in caplog.text


def test_worker_without_the_propagator_runs_nothing() -> None:
    """A task that has lost its tenant must not run in another one."""
    with carrying("ada", "Shop"):
        content = packed(note)

    with pytest.raises(PayloadError, match=f"BGTASKS_PROPAGATORS does not name '{__name__}.Shop' here"):
        payload.run(None, content.args[0])
    assert ran == []
