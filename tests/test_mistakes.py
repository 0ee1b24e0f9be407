"""The likeliest mistakes, and what a newcomer is told about each, word for word."""

import asyncio
import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core import checks
from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError, transaction
from django.test import modify_settings, override_settings

import bgtasks
from bgtasks import submission
from bgtasks.checks import check_database_pools, check_lifespan, check_settings
from bgtasks.core.slots import Slots
from bgtasks.exceptions import InvalidSettings, PoolDoesNotExist
from bgtasks.pools import pools
from bgtasks.process import lifespan
from tests.processes import run_python


def send() -> None: ...


def lazy() -> Iterator[None]:
    yield


def told(error: type[Exception], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        bgtasks.spawn(*args, **kwargs)
    return str(caught.value)


def test_the_result_of_a_call_in_place_of_the_function() -> None:
    """Spawning f() instead of f."""
    assert told(TypeError, "send", send()) == (
        "task 'send' is None, which cannot be called; "
        "pass the function itself and its arguments, not the result of calling it"
    )


def test_no_name() -> None:
    """The name left out."""
    message = told(TypeError, send, 7)
    assert message.startswith("the name of a task must be a str, not <function send at")
    assert message.endswith("; write spawn('send', send, ...)")
    assert told(TypeError, 7, send) == "the name of a task must be a str, not 7"


def test_wrong_arguments() -> None:
    """A TypeError in the caller, in tests and under DEBUG; one in the log of a site."""
    assert told(TypeError, "send", greet) == (
        "task 'send' cannot be called with these arguments: missing a required argument: 'user'"
    )
    assert bgtasks.spawn("send", print, end="")
    assert bgtasks.spawn("send", wrapped)
    assert bgtasks.drain(30)


def test_option_among_the_arguments(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Options are given before the call. That is said where the mistake is made, and in the log of a site."""
    where = "; an option is given by bgtasks.using(expires=...).spawn(...)"

    message = told(TypeError, "send", takes_key, "k", expires=3)
    assert message.endswith(f"got an unexpected keyword argument 'expires'{where}")
    monkeypatch.setattr(submission, "_MAIL", {})
    spawn: Any = bgtasks.spawn  # a type checker would say so first
    spawn("send", takes_key, "k", expires=3)
    assert bgtasks.drain(30)
    assert caplog.messages[0].endswith(f"takes_key cannot be called with the arguments of the spawn{where})")


def takes_key(key: str) -> None: ...


@functools.wraps(lambda user: None)
def wrapped() -> None: ...


async def greet_later(user: User) -> None: ...


@pytest.mark.parametrize("function", ["greet", "greet_later"])
def test_wrong_arguments_in_production(
    function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback has only frames of ours, so the message names the function."""
    monkeypatch.setattr(submission, "_MAIL", {})
    monkeypatch.setattr(submission.Development, "debug", False)
    bgtasks.spawn("send", globals()[function])
    assert bgtasks.drain(30)

    [message] = caplog.messages
    assert message == (
        "task 'send' of pool 'default' failed: TypeError "
        f"(tests.test_mistakes.{function} cannot be called with the arguments of the spawn)"
    )


def test_half_a_character_in_a_name() -> None:
    """It becomes text that every exporter can write, in a dropped task's name as well."""
    bgtasks.spawn("half \ud800", send)
    assert bgtasks.drain(30)

    assert "half \\ud800" in pools.default.slots.queue.account


def test_a_pool_as_an_attribute() -> None:
    """pools.email in place of pools["email"]."""
    with override_settings(BGTASKS={"email": {}}):
        with pytest.raises(AttributeError) as caught:
            getattr(bgtasks.pools, "email")  # noqa: B009  # a type checker would not let it pass
        with pytest.raises(AttributeError) as unknown:
            getattr(bgtasks.pools, "mial")  # noqa: B009

    assert str(caught.value) == "'Pools' object has no attribute 'email'; write pools['email']"
    assert str(unknown.value) == "'Pools' object has no attribute 'mial'"


def test_a_spawn_that_is_awaited() -> None:
    """It answers at once, with a bool, which Python says; type checkers do too."""

    async def view() -> None:
        await bgtasks.spawn("send", send)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]

    with pytest.raises(TypeError, match="bool"):
        asyncio.run(view())


def test_a_generator_function() -> None:
    """A function that would run nothing."""
    assert told(TypeError, "lazy", lazy) == (
        "task 'lazy' is a generator function; calling it only creates a generator, "
        "and its body would never run"
    )


async def nothing() -> None: ...


def test_arguments_for_a_coroutine_object() -> None:
    """Arguments given twice."""
    assert (
        told(TypeError, "ping", nothing(), 1) == "task 'ping' is a coroutine object, which takes no arguments"
    )


def test_a_wrong_pool_name() -> None:
    """A misspelt pool."""
    with override_settings(BGTASKS={"email": {}}), pytest.raises(PoolDoesNotExist) as caught:
        bgtasks.pools["mial"]

    assert str(caught.value) == "no pool named 'mial'; BGTASKS defines: 'default', 'email'"


def test_a_misspelt_option() -> None:
    """A wrong key in the settings, at check and at the first use."""
    with override_settings(BGTASKS={"default": {"CONMAX": 8}}):
        [error] = check_settings()
        message = told(InvalidSettings, "send", send)

    assert error == checks.Error(
        "BGTASKS['default']['CONMAX'] is not an option of a pool.",
        hint="Did you mean 'CONN_MAX'?",
        id="bgtasks.E004",
    )
    assert message == f"{error.msg} {error.hint} (bgtasks.E004)"


def test_an_option_outside_of_a_pool() -> None:
    """The level of the pools left out."""
    with override_settings(BGTASKS={"CAPACITY": 100}):
        [error] = check_settings()

    assert error == checks.Error(
        "BGTASKS['CAPACITY'] is 100, not a dictionary of options.",
        hint="Options belong to a pool: write BGTASKS = {'default': {'CAPACITY': 100}}.",
        id="bgtasks.E003",
    )


def test_a_model_instance_under_handoff(caplog: pytest.LogCaptureFixture) -> None:
    """A row that may have changed until a worker has it, and that JSON cannot carry."""
    pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")
    engine = {"engine": {"BACKEND": "tests.broker.Broker", "QUEUES": []}}
    always = {"default": {"HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}}
    with override_settings(TASKS=engine, BGTASKS=always):
        bgtasks.spawn("send-welcome", greet, User(username="ada"))
        assert bgtasks.drain(30)

    [message] = caplog.messages
    assert message == (
        "task 'send-welcome' of pool 'default' cannot be handed off to the engine 'engine', and runs here: "
        "its arguments hold an instance of the model User; pass its primary key"
    )


def greet(user: User) -> None: ...


@pytest.mark.django_db(transaction=True)
def test_spawn_inside_a_transaction(caplog: pytest.LogCaptureFixture) -> None:
    """The task looks for a row that is not there yet for its connection."""
    with transaction.atomic():
        ada = User.objects.create_user("ada")
        bgtasks.spawn("send-welcome", welcome, ada.pk)
        assert bgtasks.drain(30)
        bgtasks.spawn_on_commit("send-welcome", welcome, ada.pk)
    assert bgtasks.drain(30)

    [message] = caplog.messages
    assert message == (
        "task 'send-welcome' of pool 'default' failed: DoesNotExist (a task does not see what a transaction "
        "has not committed yet; inside a transaction, use spawn_on_commit, and in a TestCase "
        "bgtasks.testing.inline)"
    )


def test_task_that_meets_a_locked_database(caplog: pytest.LogCaptureFixture) -> None:
    """SQLite, in a TestCase or beside another writer."""
    bgtasks.spawn("send-welcome", meet_a_lock)
    assert bgtasks.drain(30)

    [message] = caplog.messages
    assert message == (
        "task 'send-welcome' of pool 'default' failed: OperationalError (SQLite has one writer at a time: "
        "set the database's OPTIONS to {'transaction_mode': 'IMMEDIATE', 'timeout': 20}; "
        "in a TestCase, use bgtasks.testing.inline)"
    )


def meet_a_lock() -> None:
    raise OperationalError("database table is locked: auth_user")


def welcome(user_pk: int) -> None:
    User.objects.get(pk=user_pk)


@pytest.mark.django_db
def test_spawn_on_commit_in_async_code() -> None:
    """The sync one of the two, in an async view."""
    with pytest.raises(SynchronousOnlyOperation) as caught:
        asyncio.run(on_commit_in_async_code())

    assert str(caught.value) == (
        "spawn_on_commit('send', ...) was called in async code, which has no transaction of its own; "
        "use 'await bgtasks.aspawn_on_commit(...)'"
    )


async def on_commit_in_async_code() -> None:
    bgtasks.spawn_on_commit("send", send)


def test_the_app_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    """Not in INSTALLED_APPS: then no hook runs when the process ends."""
    pools.restart()
    with modify_settings(INSTALLED_APPS={"remove": "bgtasks"}):
        bgtasks.spawn("send", send)
        assert bgtasks.drain(30)

    assert caplog.messages[0] == (
        "'bgtasks' is not in INSTALLED_APPS: its settings are not checked, and what is queued when the "
        "process ends is lost"
    )


def test_drain_inside_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """A task that waits for itself."""
    bgtasks.spawn("waits", bgtasks.drain)

    with caplog.at_level(logging.ERROR, "bgtasks"):
        assert bgtasks.drain(30)
    assert "task 'waits' would wait for itself in drain()" in caplog.text


def test_an_application_without_lifespan() -> None:
    """ASGI_APPLICATION not wrapped."""
    with override_settings(ASGI_APPLICATION="tests.test_mistakes.send"):
        [warning] = check_lifespan()

    assert warning.msg == (
        "ASGI_APPLICATION ('tests.test_mistakes.send') is not wrapped in bgtasks.asgi.lifespan: under "
        "uvicorn, the tasks that are queued or running when a process ends would be lost."
    )
    assert warning.hint == (
        "Write application = bgtasks.asgi.lifespan(get_asgi_application()) in asgi.py. "
        "If the site is served by WSGI only, remove the file, or silence this check."
    )


def test_an_async_view_without_lifespan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first spawn under uvicorn, since the check runs only with --deploy."""
    pytest.importorskip("uvicorn.server")
    monkeypatch.setattr(lifespan, "settled", False)
    monkeypatch.setattr(lifespan, "look_at", 0.0)

    asyncio.run(spawn_in_async_code())
    assert bgtasks.drain(30)

    [message] = caplog.messages
    assert message == (
        "tasks are spawned on an event loop, and the server has not announced its lifespan: "
        "under uvicorn they would be lost at shutdown; write in asgi.py: "
        "application = bgtasks.asgi.lifespan(get_asgi_application())"
    )


async def spawn_in_async_code() -> None:
    bgtasks.spawn("send", send)


def test_conn_max_above_the_pool() -> None:
    """More slots than connections."""
    with override_settings(BGTASKS={"default": {"CONN_MAX": 25}}):
        [warning] = check_database_pools()

    assert warning.msg == (
        "Background tasks can hold 25 connections of the database 'pooled' at once, and its pool has 25: "
        "nothing is left for requests."
    )


def test_script_does_not_set_django_up() -> None:
    """Then no hook runs when it ends either, and nothing would tell of the task that is lost."""
    done = run_python("import bgtasks; bgtasks.spawn('send', print)")

    assert done.stderr.startswith("a task is spawned before Django is set up")
    assert "django.setup()" in done.stderr


def test_pools_are_built_anew_while_one_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has built one from the old settings does not go on with it: that one is closed."""
    pools.restart()
    add = pools.drainer.add

    def add_and_forget(slots: Slots) -> None:
        add(slots)
        pools.default.forget()

    monkeypatch.setattr(pools.drainer, "add", add_and_forget)
    pools.default.build()

    assert pools.default.slots is None
    assert not pools.drainer.pools
