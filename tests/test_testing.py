"""The tools for a project's tests: inline, captured, drained, and the MODE "inline"."""

import asyncio
import os
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test import TestCase, override_settings
from django.utils import translation
from pytest_django import Settings

import bgtasks
from bgtasks import hints, signals, testing
from bgtasks.pools import pools
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import own_threads


def create(name: str) -> None:
    User.objects.create(username=name)


async def acreate(name: str) -> None:
    await User.objects.acreate(username=name)


def returns_a_coroutine(name: str) -> Any:
    return acreate(name)


class Awaitable:
    """Can be awaited, and is no coroutine."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __await__(self) -> Any:
        return acreate(self._name).__await__()


def generates() -> Iterator[None]:
    yield


class Boom(Exception):  # noqa: N818
    pass


def fail() -> None:
    raise Boom


async def afail() -> None:
    raise Boom


def names() -> list[str]:
    return list(User.objects.order_by("username").values_list("username", flat=True))


# Inline.


@pytest.mark.django_db
def test_inline_runs_each_kind_of_task_inside_the_transaction() -> None:
    """Whatever is spawned has ended, and is seen, when spawn returns; a rollback takes it back."""
    with testing.inline(), transaction.atomic():
        assert bgtasks.spawn("sync", create, "a")
        assert bgtasks.spawn("async", acreate, "b")
        assert bgtasks.spawn("coroutine", acreate("c"))
        assert bgtasks.spawn("goes on", returns_a_coroutine, "d")
        assert bgtasks.spawn("goes on", Awaitable, "e")
        assert bgtasks.spawn("awaitable", Awaitable("f"))
        assert names() == ["a", "b", "c", "d", "e", "f"]
        transaction.set_rollback(True)

    assert names() == []


@pytest.mark.django_db
def test_inline_runs_each_kind_of_task_from_async_code() -> None:
    """The same holds on a running loop: the task's ORM calls go where those of the caller go."""

    async def view() -> None:
        with testing.inline():
            assert bgtasks.spawn("sync", create, "a")
            assert bgtasks.spawn("async", acreate, "b")
            assert bgtasks.spawn("goes on", returns_a_coroutine, "c")
            assert bgtasks.spawn("goes on", Awaitable, "d")
        assert await User.objects.acount() == 4

    asyncio_thread = async_to_sync(view, force_new_loop=True)
    asyncio_thread()

    assert names() == ["a", "b", "c", "d"]


def test_inline_uses_asgirefs_thread_where_no_sync_code_waits() -> None:
    """In a test that is async from the ground up, ORM calls run on asgiref's own thread: the task's too."""
    threads: list[str] = []

    async def main() -> None:
        with testing.inline():
            bgtasks.spawn("where", lambda: threads.append(threading.current_thread().name))

    asyncio.run(main())

    assert threads[0].startswith("ThreadPoolExecutor")


@pytest.mark.parametrize("task", [fail, afail])
def test_what_an_inline_task_raises_goes_up(task: Any) -> None:
    """A test of the caller sees what its task raises, and it counts as failed."""
    before = bgtasks.stats()["default"].failed
    with testing.inline(), pytest.raises(Boom):
        bgtasks.spawn("fails", task)

    async def main() -> None:
        bgtasks.spawn("fails", task)

    with testing.inline(), pytest.raises(Boom):
        asyncio.run(main())

    assert bgtasks.stats()["default"].failed == before + 2


def test_an_inline_task_runs_while_no_exception_is_handled() -> None:
    """With each task that ends, Django logs the exception that is being handled, if there is one."""
    seen: list[Any] = []

    def look() -> None:
        seen.append(sys.exc_info()[0])

    async def alook() -> None:
        look()

    async def main() -> None:
        bgtasks.spawn("looks", look)
        bgtasks.spawn("looks", alook)

    with testing.inline():
        bgtasks.spawn("looks", look)
        bgtasks.spawn("looks", alook)
        asyncio.run(main())

    assert seen == [None] * 4


def test_an_inline_task_that_runs_nothing_is_refused() -> None:
    """A generator is a mistake here as it is in a pool."""
    with testing.inline(), pytest.raises(TypeError, match="task 'lazy' returned a generator"):
        bgtasks.spawn("lazy", partial(generates))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_inline_tasks_send_the_signals(asynchronous: bool) -> None:
    """Receivers see the life of an inline task as they see any other."""
    seen: list[str] = []

    def receive(signal: Any, name: str, outcome: str = "", **kwargs: Any) -> None:
        seen.append(f"{outcome or 'began'} {name}")

    async def anothing() -> None: ...

    nothing: Any = anothing

    for signal in (signals.task_spawned, signals.task_started, signals.task_finished):
        signal.connect(receive)
    try:
        with testing.inline():
            bgtasks.spawn("works", nothing if asynchronous else nothing.__call__)
            with pytest.raises(Boom):
                bgtasks.spawn("fails", afail if asynchronous else fail)
    finally:
        for signal in (signals.task_spawned, signals.task_started, signals.task_finished):
            signal.disconnect(receive)

    assert seen == ["began works", "began works", "succeeded works", *["began fails"] * 2, "failed fails"]


def test_an_inline_task_sees_the_language_of_its_caller() -> None:
    """The language is that of the caller, also where the task needs a thread of its own; and none leaks."""
    seen: list[str | None] = []

    async def look() -> None:
        seen.append(translation.get_language())

    async def main() -> None:
        bgtasks.spawn("look", look)
        bgtasks.spawn("look", lambda: seen.append(translation.get_language()))

    with testing.inline(), translation.override("fr"):
        bgtasks.spawn("look", look)
        bgtasks.spawn("look", lambda: translation.activate("de"))
        asyncio.run(main())
        assert translation.get_language() == "fr"

    assert seen == ["fr"] * 3


@pytest.mark.django_db
def test_the_mode_inline_is_a_setting_of_each_pool() -> None:
    """A pool of that MODE runs its tasks in the caller, another one does not."""
    with override_settings(BGTASKS={"default": {"MODE": "inline"}, "real": {}}):
        bgtasks.spawn("here", create, "a")

        assert names() == ["a"]
        assert bgtasks.stats()["default"].succeeded == 1
        with Gate() as gate:
            bgtasks.pools["real"].spawn("there", gate)
            gate.wait_entered()
        assert bgtasks.drain(BOUND)


def test_the_tools_hold_whatever_the_mode_is() -> None:
    """The innermost tool says where tasks go, before the setting."""
    ran: list[str] = []
    with override_settings(BGTASKS={"default": {"MODE": "inline"}}):
        with testing.captured() as outer:
            with testing.captured() as inner:
                bgtasks.spawn("inner", ran.append, "inner")
            bgtasks.spawn("outer", ran.append, "outer")
        with testing.drained():
            bgtasks.spawn("thread", lambda: ran.append(threading.current_thread().name))
        bgtasks.spawn("inline", ran.append, "inline")

    assert (inner.names, outer.names) == (["inner"], ["outer"])
    assert ran[0].startswith("bgtasks-default-")
    assert ran[1:] == ["inline"]


def test_an_inline_pool_that_is_shut_down_drops() -> None:
    """Shutdown holds for this mode as well."""
    with override_settings(BGTASKS={"default": {}, "closed": {"MODE": "inline"}}):
        pool = bgtasks.pools["closed"]
        pool.stats()
        pool.shutdown(0)

        assert pool.spawn("late", fail) is False
        assert pool.stats().dropped == 1


# Captured.


def test_captured_records_and_runs_nothing() -> None:
    """Names and calls are those of spawn; a coroutine object that never runs is closed without a warning."""
    ran: list[str] = []
    with testing.captured() as tasks, override_settings(BGTASKS={"email": {}}):
        assert bgtasks.spawn("one", ran.append, "x")
        assert bgtasks.pools["email"].spawn("two", acreate("never"))

    assert tasks.names == ["one", "two"]
    assert repr(tasks) == "<Captured ['one', 'two']>"
    assert tasks.calls[0] == testing.Call("default", "one", ran.append, ("x",), {})
    assert tasks.calls[1].pool == "email"
    assert ran == []
    assert tasks.run_all() == 1  # the function; the coroutine object was closed
    assert ran == ["x"]


def test_assert_spawned_does_not_mind_how_an_argument_is_passed() -> None:
    """By position or by keyword, given or by default: the call is the same."""

    def send(pk: int, language: str = "en") -> None: ...

    with testing.captured() as tasks:
        bgtasks.spawn("send", send, 7)

    tasks.assert_spawned("send", 7)
    tasks.assert_spawned("send", pk=7, language="en")
    with pytest.raises(AssertionError):
        tasks.assert_spawned("send", 7, 8, 9)


def test_assert_spawned_finds_what_has_no_signature() -> None:
    """A callable that raises whatever is asked of it is compared by the arguments as they were passed."""

    class Unready:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError(name)

        def __call__(self, pk: int) -> None: ...

    with testing.captured() as tasks:
        bgtasks.spawn("send", Unready(), 7)

    tasks.assert_spawned("send", 7)
    with pytest.raises(AssertionError):
        tasks.assert_spawned("send", 8)


def test_assert_spawned_that_fails_shows_the_line_of_the_test() -> None:
    """Not that of the kit, which is nobody's to mend."""
    with testing.captured() as tasks, pytest.raises(AssertionError) as caught:
        tasks.assert_spawned("send")

    assert str(caught.traceback.filter(caught)[-1].path) == __file__


def test_assert_spawned_shows_how_the_arguments_differ() -> None:
    """A failure is a diff, to the letter."""
    with testing.captured() as tasks:
        bgtasks.spawn("send", create, "grace")

    with pytest.raises(AssertionError) as caught:
        tasks.assert_spawned("send", "ada")
    assert str(caught.value) == (
        "task 'send' was spawned once, but never with these arguments (-: expected, +: spawned):\n"
        "  (\n"
        "-     'ada',\n"
        "+     'grace',\n"
        "  )"
    )


def test_assert_spawned_says_what_was_spawned_instead() -> None:
    """A wrong name gets the right one as a hint."""
    with testing.captured() as tasks:
        with pytest.raises(AssertionError, match=r"no task 'send' was spawned; spawned were: none$"):
            tasks.assert_spawned("send")
        bgtasks.spawn("send-mail", create, name="ada")
        bgtasks.spawn("send-mail", create, name="grace")

    with pytest.raises(AssertionError) as caught:
        tasks.assert_spawned("sendmail")
    assert str(caught.value) == (
        "no task 'sendmail' was spawned; spawned were: 2 'send-mail'; did you mean 'send-mail'?"
    )
    with pytest.raises(AssertionError, match=r"(?s)spawned 2 times.*\+     name='ada',"):
        tasks.assert_spawned("send-mail")


@pytest.mark.django_db
def test_assert_spawned_says_that_a_task_waits_for_a_commit(
    django_capture_on_commit_callbacks: Callable[..., Any],
) -> None:
    """Only of a task of that name, and only as long as it waits."""
    with testing.captured() as tasks:
        bgtasks.spawn_on_commit("send", create, "ada")
        with pytest.raises(
            AssertionError, match=r"spawned were: none; it waits for a commit, which a TestCase"
        ):
            tasks.assert_spawned("send")
        with pytest.raises(AssertionError, match=r"spawned were: none$"):
            tasks.assert_spawned("another")

        with django_capture_on_commit_callbacks(execute=True):
            bgtasks.spawn_on_commit("commits", create, "ada")
        tasks.assert_spawned("commits", "ada")


@pytest.mark.django_db
def test_run_all_runs_each_task_once_and_those_they_spawn() -> None:
    """Running them is up to the test, and twice is once."""

    def parent() -> None:
        bgtasks.spawn("child", create, "child")

    with testing.captured() as tasks:
        bgtasks.spawn("parent", parent)
        bgtasks.spawn("async", acreate, "async")

        assert tasks.run_all() == 3
        assert tasks.run_all() == 0
    assert tasks.names == ["parent", "async", "child"]
    assert names() == ["async", "child"]


def test_captured_decorates_a_function() -> None:
    """As a decorator it passes what it records."""

    @testing.captured(kwarg_name="tasks")
    def decorated(tasks: testing.Captured) -> list[str]:
        bgtasks.spawn("one", print)
        return tasks.names

    call: Any = decorated  # it is given what it asks for
    assert call() == ["one"]
    assert call() == ["one"]


@testing.captured(kwarg_name="tasks")
def test_captured_decorates_a_test_of_pytest(
    monkeypatch: pytest.MonkeyPatch, tasks: testing.Captured
) -> None:
    """Its argument is no fixture, and beside it a test may have some."""
    monkeypatch.setenv("NAME", "one")
    bgtasks.spawn(os.environ["NAME"], print)

    assert tasks.names == ["one"]


def test_captured_records_the_options(settings: Settings) -> None:
    """Those of `using`, with what the settings of the pool say of the others; none if there are none."""
    with testing.captured() as tasks:
        bgtasks.spawn("plain", print)
        bgtasks.using(expires=60, key="k").spawn("both", print)
        settings.BGTASKS = {"default": {"RETRIES": 2}}
        bgtasks.spawn("by the settings", print)

    plain, both, by_settings = (call.options for call in tasks.calls)
    assert plain == {}
    assert (both["expires"], both["key"], both["retries"]) == (60, "k", 0)
    assert (by_settings["expires"], by_settings["retries"]) == (None, 2)


# With Django's TestCase.


@testing.captured(attr_name="tasks")
class CapturedCase(TestCase):
    """A decorated class records for each of its tests, and on_commit works as Django's own tests do it."""

    tasks: testing.Captured

    def test_on_commit(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            bgtasks.spawn_on_commit("commits", create, "a")
            assert self.tasks.names == []

        self.tasks.assert_spawned("commits", "a")

    def test_every_test_has_a_record_of_its_own(self) -> None:
        assert self.tasks.names == []

    async def test_on_commit_in_async_code(self) -> None:
        await bgtasks.aspawn_on_commit("commits", create, "a")

        assert self.tasks.names == []  # the test's transaction never commits


@testing.inline()
class InlineCase(TestCase):
    """An inline task is part of the transaction that the test rolls back."""

    def test_sync(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            bgtasks.spawn_on_commit("commits", create, "a")

        assert names() == ["a"]

    async def test_async(self) -> None:
        bgtasks.spawn("sync", create, "a")
        bgtasks.spawn("async", acreate, "b")

        assert await User.objects.acount() == 2

    @testing.captured(kwarg_name="tasks")
    async def test_a_decorated_async_test(self, tasks: testing.Captured) -> None:
        bgtasks.spawn("async", acreate, "b")

        assert tasks.run_all() == 1
        assert await User.objects.acount() == 1


def test_only_tests_can_be_decorated() -> None:
    """A class that is none is a mistake."""
    assert issubclass(CapturedCase, unittest.TestCase)
    with pytest.raises(TypeError):
        testing.inline()(dict)


# Drained.


def connected() -> set[int]:
    """Return the processes of the database server that somebody is connected to."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
        return {pid for (pid,) in cursor.fetchall()}


@pytest.mark.django_db(transaction=True)
def test_drained_leaves_no_task_no_thread_and_no_connection() -> None:
    """On exit all has ended, also what tasks have spawned, and the slots have let go of the database."""

    def parent() -> None:
        bgtasks.spawn("child", create, "child")

    before = connected()
    with testing.drained():
        bgtasks.spawn("parent", parent)
        bgtasks.spawn("async", acreate, "async")

    assert names() == ["async", "child"]
    wait_until(lambda: not own_threads())
    assert not pools.built()
    wait_until(lambda: not connected() - before)  # the server needs a moment to see that one has gone


def test_drained_fails_with_what_still_runs_and_where() -> None:
    """The names, the pools, and the line each task stands at."""
    with Gate() as gate, AsyncGate() as async_gate:
        with override_settings(BGTASKS={"default": {"CONN_MAX": 2}}):
            with pytest.raises(AssertionError) as caught:  # noqa: PT012
                with testing.drained(timeout=0.01):
                    bgtasks.spawn("sync", gate)
                    bgtasks.spawn("async", async_gate)
                    gate.wait_entered()
                    async_gate.wait_entered()
                    bgtasks.spawn("waits", gate)
    message = str(caught.value)

    assert message.startswith("after 0.01 s there are still tasks:\n")
    assert "task 'sync' of pool 'default' has been running for" in message
    assert 'gate.py", line' in message  # of both
    assert "task 'async' of pool 'default' has been running for" in message
    assert message.endswith("task 'waits' of pool 'default' waits, once")


@pytest.mark.parametrize("task", [fail, afail])
def test_task_that_fails_fails_the_test_that_drains(task: Callable[[], Any]) -> None:
    """The message has all of them, and the first one's exception is the cause."""
    with pytest.raises(AssertionError) as caught, testing.drained():
        bgtasks.spawn("fails", task)

    assert str(caught.value) == "task 'fails' of pool 'default' failed: Boom()"
    assert isinstance(caught.value.__cause__, Boom)


def test_task_that_is_tried_again_and_succeeds_has_not_failed() -> None:
    """What counts is the outcome, not a try."""
    tries = iter([Boom, None])

    def flaky() -> None:
        if error := next(tries):
            raise error

    with testing.drained() as tasks:
        bgtasks.using(retries=1, retry_delay=0).spawn("flaky", flaky)

    assert tasks.failures == []


def test_failures_may_be_allowed() -> None:
    """By an argument, or in the test; they are listed in either case."""
    with testing.drained(allow_failures=True) as tasks:
        bgtasks.spawn("fails", fail)
    with testing.drained() as others:
        bgtasks.spawn("fails", fail)
        others.allow_failures = True

    assert repr(tasks) == "<Drained 1 failed>"
    [(pool, name, error)] = others.failures
    assert (pool, name, type(error)) == ("default", "fails", Boom)


@pytest.mark.django_db
def test_drained_in_a_transaction_says_that_tasks_do_not_see_it() -> None:
    """Where a task fails, and as a note where the test does."""
    with pytest.raises(AssertionError, match=r"failed: Boom\(\)\nhint: this test runs in a transaction"):
        with testing.drained():
            bgtasks.spawn("fails", fail)
    with pytest.raises(Boom) as caught, testing.drained():
        raise Boom

    assert caught.value.__notes__ == [f"hint: {hints.IN_TRANSACTION}"]


def test_drained_does_not_hide_what_the_test_has_failed_of() -> None:
    """Whoever looks at a failure wants the first one; what still ran is a note on it."""
    with Gate() as gate:
        with pytest.raises(Boom) as caught:  # noqa: PT012
            with testing.drained(timeout=0.01):
                bgtasks.spawn("held", gate)
                gate.wait_entered()
                raise Boom

    assert "task 'held' of pool 'default' has been running for" in caught.value.__notes__[0]


def test_a_task_between_two_states_has_no_stack() -> None:
    """One that nobody runs at the moment it is looked at is named all the same."""
    slots = pools.default.build().slots
    with testing.captured() as tasks:
        bgtasks.spawn("between", print)
        [(_, spawned)] = tasks._waiting

        assert testing._stack(slots, spawned) == "(between two states)\n"


def test_decorator_without_parentheses_is_refused() -> None:
    """Pytest would not collect what it makes of the test, and the test would be gone."""
    test: Any = test_decorator_without_parentheses_is_refused
    with pytest.raises(TypeError, match=r"written with parentheses: @bgtasks\.testing\.drained\(\)"):
        testing.drained(test)
