"""Propagators: what a project has travel from the code that spawns a task to the task."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core import checks
from django.utils import translation
from pytest_django import Settings

import bgtasks
from bgtasks import testing
from bgtasks.exceptions import InvalidSettings
from bgtasks.propagators import Propagator
from bgtasks.repeats import repeats
from bgtasks.submission import make_task
from tests.background import in_coroutine, in_function, in_orm_call, january, run, spawn
from tests.gate import BOUND
from tests.snippets import ROOT, blocks

# That of the thread, as libraries for a current user keep it, and that of the context.
theme = threading.local()
in_context: ContextVar[Any] = ContextVar("theme", default=None)

asynchronous = pytest.mark.parametrize("place", [in_coroutine, in_orm_call])


class Theme(Propagator):
    """Carries the theme of the thread."""

    def capture(self) -> Any:
        return getattr(theme, "name", None)

    @contextmanager
    def restore(self, value: Any) -> Iterator[None]:
        token = in_context.set(value)
        events.append(("enter", value, threading.current_thread().name))
        before, theme.name = theme_of_thread(), value
        try:
            yield
        finally:
            theme.name = before
            in_context.reset(token)
            events.append(("leave", value, threading.current_thread().name))


class Language(Propagator):
    """Turns what it carries into the language of the task."""

    def capture(self) -> Any:
        return "fr"

    def restore(self, value: Any) -> Any:
        return translation.override(value)


class NotCaptured(Theme):
    def capture(self) -> Any:
        raise LookupError("no theme here")


class NotRestored(Theme):
    def restore(self, value: Any) -> Any:
        raise LookupError("no such theme")


class NotLeft(Theme):
    @contextmanager
    def restore(self, value: Any) -> Iterator[None]:
        yield
        raise LookupError("cannot leave it")


class NoPropagator:
    pass


events: list[tuple[str, Any, str]] = []  # of Theme, in their order


@pytest.fixture(autouse=True)
def one_slot(settings: Settings) -> Iterator[None]:
    """One slot, and a spawner with a theme of its own, which it carries to its tasks."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    use(settings, "Theme")
    theme.name = "dark"
    events.clear()
    yield

    assert bgtasks.drain(BOUND)
    del theme.name


def use(settings: Settings, *names: str) -> None:
    settings.BGTASKS_PROPAGATORS = [f"{__name__}.{name}" for name in names]


def theme_of_thread() -> Any:
    return getattr(theme, "name", None)


def outcomes() -> dict[str, int]:
    stats = bgtasks.stats()["default"]
    figures = {name: getattr(stats, name) for name in ("succeeded", "failed", "dropped")}
    return {name: number for name, number in figures.items() if number}


# Around plain functions.


def test_function_has_what_was_captured_where_it_was_spawned() -> None:
    """The value is there on the thread and in the context of the task, whatever the spawner has by then."""
    seen = spawn(in_function, lambda: (theme_of_thread(), in_context.get()))
    theme.name = "light"

    assert seen.result(BOUND) == ("dark", "dark")
    assert bgtasks.drain(BOUND)
    assert events == [(step, "dark", "bgtasks-default-1") for step in ("enter", "leave")]


def test_next_task_does_not_have_the_value_of_the_last(settings: Settings) -> None:
    """What is restored for a task is left when it has ended, also if it has raised."""

    def fail() -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        run(in_function, fail)
    settings.BGTASKS_PROPAGATORS = []

    assert run(in_function, lambda: (theme_of_thread(), in_context.get())) == (None, None)


def test_propagators_are_entered_in_their_order_and_left_in_reverse(settings: Settings) -> None:
    """A propagator may rely on those before it."""
    use(settings, "Theme", "Other")
    run(in_function, theme_of_thread)

    assert [(step, value) for step, value, _ in events] == [
        *(("enter", "dark"), ("enter", "other")),
        *(("leave", "other"), ("leave", "dark")),
    ]


class Other(Theme):
    def capture(self) -> Any:
        return "other"


def test_propagator_may_change_the_language_of_a_task(settings: Settings) -> None:
    """The built-in ones come first."""
    use(settings, "Language")

    assert run(in_function, january) == "janvier"
    assert january() == "January"


def test_task_of_a_task_has_what_that_one_has() -> None:
    """A task carries on what it was given."""
    seen: list[Any] = []
    bgtasks.spawn("parent", lambda: bgtasks.spawn("child", lambda: seen.append(theme_of_thread())))
    assert bgtasks.drain(BOUND)
    assert bgtasks.drain(BOUND)

    assert seen == ["dark"]


def test_function_that_returns_a_coroutine_leaves_what_it_has_entered() -> None:
    """Whatever the coroutine has, the next task does not have it."""

    async def coroutine() -> None:
        pass

    def function() -> Any:
        return coroutine()

    bgtasks.spawn("returns a coroutine", function)
    assert bgtasks.drain(BOUND)
    steps = [step for step, _, _ in events]

    assert steps.count("enter") == steps.count("leave")
    assert run(in_function, in_context.get) == "dark"


# Around coroutines.


def test_hooks_follow_a_coroutine_from_its_thread_to_the_loop_and_back() -> None:
    """What the core calls around a coroutine: the slot's thread, the loop's and the slot's again."""

    async def on_the_loop() -> None:
        hooks.attach(task.captured)
        seen.append((in_context.get(), january()))
        hooks.detach()
        seen.append(in_context.get())

    def loop_has_it() -> None:
        with asyncio.Runner() as runner:
            runner.run(on_the_loop(), context=context)

    seen: list[Any] = []
    hooks, context = bgtasks.pools.default.hooks, Context()
    with translation.override("fr"):
        task = make_task("task", on_the_loop, (), {})
    with ThreadPoolExecutor(1, "slot") as slot, ThreadPoolExecutor(1, "loop") as loop:
        slot.submit(context.run, hooks.enter, task.context, task.captured).result(BOUND)
        loop.submit(loop_has_it).result(BOUND)
        slot.submit(context.run, hooks.leave).result(BOUND)

    assert hooks.needs_thread(task)
    assert seen == [("dark", "janvier"), "dark"]
    assert events == [("enter", "dark", "slot_0"), ("leave", "dark", "slot_0")]
    assert context.get(in_context) is None


@asynchronous
def test_coroutine_has_the_value_in_its_context_and_on_its_thread(place: Callable[..., Any]) -> None:
    """It is entered and left on the slot's thread, and the context variable is there on the loop too."""
    assert run(place, in_context.get) == "dark"
    assert [thread for _, _, thread in events] == ["bgtasks-default-1"] * 2


def test_orm_calls_of_a_coroutine_have_the_value_of_the_thread() -> None:
    """What is kept by thread is there where the task's ORM calls run, before and after it has waited."""

    async def task() -> Any:
        return [await sync_to_async(theme_of_thread)() for _ in range(2)]

    assert run(task) == ["dark", "dark"]
    assert run(in_function, in_context.get) == "dark"


@asynchronous
def test_coroutine_speaks_the_language_of_a_propagator(place: Callable[..., Any], settings: Settings) -> None:
    """What a propagator has changed in Django's own storage on the slot's thread is there on the loop."""
    use(settings, "Language")

    assert run(place, january) == "janvier"
    assert run(in_coroutine, january) == "janvier"


def test_coroutine_whose_value_cannot_be_restored_has_failed(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not run."""
    use(settings, "NotRestored")
    ran: list[Any] = []

    async def task() -> None:
        ran.append("ran")

    bgtasks.spawn("task", task)
    assert bgtasks.drain(BOUND)

    assert ran == []
    assert outcomes() == {"failed": 1}
    assert "no such theme" in caplog.text


def test_coroutine_of_a_function_has_the_value(settings: Settings) -> None:
    """A plain function that returns a coroutine passes on what it was given."""
    seen: list[Any] = []

    async def coroutine() -> None:
        seen.append(in_context.get())
        seen.append(await sync_to_async(theme_of_thread)())

    def function() -> Any:
        return coroutine()

    bgtasks.spawn("returns a coroutine", function)
    assert bgtasks.drain(BOUND)

    assert seen == ["dark", "dark"]
    assert {thread for _, _, thread in events} == {"bgtasks-default-1"}


# What raises.


@pytest.mark.parametrize("diverted", [False, True], ids=["pool", "inline"])
def test_task_whose_value_cannot_be_captured_is_dropped(
    diverted: bool, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a propagator is logged with its traceback, and the drop is a drop like any other."""
    use(settings, "NotCaptured")

    async def coroutine() -> None: ...

    if diverted:
        with testing.inline():
            accepted = [bgtasks.spawn("task", print), bgtasks.spawn("task", coroutine())]
    else:
        accepted = [bgtasks.spawn("task", print), bgtasks.spawn("task", coroutine())]
    repeats.flush()

    assert accepted == [False, False]
    assert outcomes() == {"dropped": 2}
    assert bgtasks.stats()["default"].spawned == 2
    assert "task 'task' dropped: a propagator could not capture its value" in caplog.messages
    assert f"the propagator '{__name__}.NotCaptured' could not capture its value" in caplog.messages
    assert caplog.text.count("LookupError: no theme here") == 1
    assert any("could not capture its value (1 more): LookupError" in line for line in caplog.messages)


def test_task_whose_value_cannot_be_restored_has_failed(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not run, what was entered before is left, and the log names the propagator."""
    use(settings, "Theme", "NotRestored")
    ran: list[Any] = []
    bgtasks.spawn("task", ran.append, 1)
    assert bgtasks.drain(BOUND)

    assert ran == []
    assert outcomes() == {"failed": 1}
    assert [step for step, _, _ in events] == ["enter", "leave"]
    assert "no such theme" in caplog.text
    assert f"The propagator '{__name__}.NotRestored' has raised it, and the task has not run." in caplog.text


def test_propagator_that_cannot_be_left_is_logged(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome of the task stays, and those before it are left all the same."""
    use(settings, "Theme", "NotLeft")
    run(in_function, theme_of_thread)

    repeats.flush()
    assert outcomes() == {"succeeded": 1}
    assert [step for step, _, _ in events] == ["enter", "leave"]
    assert f"the propagator '{__name__}.NotLeft' could not be left after a task" in caplog.messages


# The setting.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tests.test_propagators.Theme", "bgtasks.E030"),
        ([5], "bgtasks.E031"),
        (["tests.test_propagators.Missing"], "bgtasks.E031"),
        (["tests.test_propagators.NoPropagator"], "bgtasks.E032"),
        (["tests.test_propagators.Theme"] * 2, "bgtasks.E033"),
    ],
)
def test_mistake_is_an_error_of_the_checks_and_of_the_first_spawn(
    value: Any, expected: str, settings: Settings
) -> None:
    """A task that would miss its tenant is not even accepted."""
    settings.BGTASKS_PROPAGATORS = value
    [message] = [each for each in checks.run_checks() if each.id.startswith("bgtasks.")]

    assert (message.id, message.level) == (expected, checks.ERROR)
    with pytest.raises(InvalidSettings, match=expected):
        bgtasks.spawn("task", print)


# A recipe of the documentation.


def test_recipe_for_a_current_user(settings: Settings, django_user_model: Any, db: None) -> None:
    """The propagator of docs/context.md carries the user of the real django-crum."""
    crum = pytest.importorskip("crum")
    [recipe] = [block for block in blocks(ROOT / "docs" / "context.md") if "crum" in block.text]
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(recipe.text, names)
    propagator = names["CurrentUser"]()
    ada = django_user_model.objects.create_user("ada")
    with crum.impersonate(ada):
        value = propagator.capture()

    assert value == ada.pk
    with propagator.restore(value):
        assert crum.get_current_user() == ada
    assert crum.get_current_user() is None
    assert propagator.capture() is None
    with propagator.restore(None):
        assert crum.get_current_user() is None
