"""The signals of a task's life: when they are sent, where, and what a receiver can do wrong."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.utils import translation
from pytest_django import Settings

import bgtasks
from bgtasks.repeats import repeats
from bgtasks.signals import task_dropped, task_finished, task_spawned, task_started
from tests.gate import BOUND, AsyncGate, Gate
from tests.testapp.models import Note

REQUEST_ID: ContextVar[Any] = ContextVar("request_id", default=None)
SIGNALS = {
    "spawned": task_spawned,
    "started": task_started,
    "finished": task_finished,
    "dropped": task_dropped,
}


@pytest.fixture(autouse=True)
def pool(settings: Settings) -> Iterator[Any]:
    """A pool with one slot and one place in its queue."""
    settings.BGTASKS = {"default": {"CAPACITY": 1, "CONN_MAX": 1}}
    yield bgtasks.pools["default"]

    assert bgtasks.drain(BOUND)
    REQUEST_ID.set(None)


@contextmanager
def received(**receivers: Any) -> Iterator[None]:
    """Connect receivers by the names of their signals."""
    with ExitStack() as stack:
        for name, receiver in receivers.items():
            SIGNALS[name].connect(receiver, weak=False)
            stack.callback(SIGNALS[name].disconnect, receiver)
        yield


@contextmanager
def recorded(*names: Any) -> Iterator[Any]:
    """Yield the list of what is sent: names of signals and their arguments."""
    sent = []

    def recorder(name: str) -> Any:
        return lambda signal, **named: sent.append((name, named))

    with received(**{name: recorder(name) for name in names or SIGNALS}):
        yield sent


# Both kinds of tasks. Each does what its argument does on the thread of the task's ORM calls.


def in_function(act: Callable[..., Any]) -> None:
    act()


async def in_coroutine(act: Callable[..., Any]) -> None:
    await sync_to_async(act)()


both = pytest.mark.parametrize("kind", [in_function, in_coroutine])


def nothing() -> None:
    """Succeed."""


ERROR = LookupError("on purpose")


def fail() -> None:
    raise ERROR


@both
def test_signals_of_a_task_that_succeeds(kind: Callable[..., Any], pool: Any) -> None:
    """A task is spawned, starts and is finished: each signal comes once, in this order, from its pool."""
    with recorded() as sent:
        bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    assert sent == [
        ("spawned", {"sender": pool, "name": "work"}),
        ("started", {"sender": pool, "name": "work"}),
        ("finished", {"sender": pool, "name": "work", "outcome": "succeeded", "error": None}),
    ]


@both
def test_signal_of_a_task_that_fails_has_the_error(kind: Callable[..., Any], pool: Any) -> None:
    """A receiver gets the very exception that the task has raised."""
    with recorded("finished") as sent:
        bgtasks.spawn("work", kind, fail)
        bgtasks.drain(BOUND)

    assert sent == [("finished", {"sender": pool, "name": "work", "outcome": "failed", "error": ERROR})]


@pytest.mark.parametrize("gate_type", [Gate, AsyncGate])
def test_signals_of_a_task_that_is_dropped(gate_type: Any, pool: Any) -> None:
    """A task that finds the queue full is spawned and dropped, and neither starts nor is finished."""
    with gate_type() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", gate)
        with recorded() as sent:
            bgtasks.spawn("one too many", nothing)

    assert sent == [
        ("spawned", {"sender": pool, "name": "one too many"}),
        ("dropped", {"sender": pool, "name": "one too many", "reason": "full"}),
    ]


def test_signal_of_a_drop_after_shutdown_has_the_reason(pool: Any) -> None:
    """A task that comes after the shutdown is dropped for that reason."""
    bgtasks.shutdown()
    with recorded("dropped") as sent:
        bgtasks.spawn("too late", nothing)

    assert sent == [("dropped", {"sender": pool, "name": "too late", "reason": "shutdown"})]


def test_signal_of_a_cancelled_task_says_so(pool: Any) -> None:
    """An async task that a shutdown gives up is finished as cancelled, without an error."""
    with recorded("finished") as sent, AsyncGate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.shutdown(timeout=0)

    assert sent == [("finished", {"sender": pool, "name": "held", "outcome": "cancelled", "error": None})]


def test_signal_of_a_task_that_timed_out_says_so(settings: Settings) -> None:
    """An async task that is past its TASK_TIMEOUT is finished as timed out."""
    settings.BGTASKS = {"default": {"TASK_TIMEOUT": 1}}
    with recorded("finished") as sent, AsyncGate() as gate:
        bgtasks.spawn("held", gate)
        bgtasks.drain(BOUND)

    ((_, named),) = sent
    assert named["outcome"] == "timed_out"
    assert isinstance(named["error"], asyncio.CancelledError)


def test_function_that_returns_a_coroutine_starts_once() -> None:
    """A plain function that returns a coroutine is one task, with one start and one end."""

    async def coroutine() -> None:
        """Succeed."""

    def function() -> Any:
        return coroutine()

    with recorded("started", "finished") as sent:
        bgtasks.spawn("work", function)
        bgtasks.drain(BOUND)

    assert [name for name, _ in sent] == ["started", "finished"]


def test_task_of_another_pool_has_that_pool_as_sender(settings: Settings) -> None:
    """A receiver may be connected to one pool."""
    settings.BGTASKS = {"email": {}}
    sent = []
    receiver = lambda signal, name, **named: sent.append(name)  # noqa: E731
    task_spawned.connect(receiver, sender=bgtasks.pools["email"])
    bgtasks.spawn("other", nothing)
    bgtasks.pools["email"].spawn("mail", nothing)
    task_spawned.disconnect(receiver, sender=bgtasks.pools["email"])
    bgtasks.drain(BOUND)

    assert sent == ["mail"]


# Where receivers run.


@both
def test_receivers_run_in_the_task(kind: Callable[..., Any]) -> None:
    """What a task starts and ends with is told on its slot's thread, in its context and its language."""

    def receiver(**named: Any) -> None:
        seen.append((threading.current_thread().name, REQUEST_ID.get(), translation.get_language()))

    seen: list[Any] = []
    REQUEST_ID.set("42")
    with received(started=receiver, finished=receiver):
        with translation.override("fr"):
            bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    assert seen == [("bgtasks-default-1", "42", "fr")] * 2


@both
def test_task_sees_what_a_receiver_of_its_start_sets(kind: Callable[..., Any]) -> None:
    """Tracing can open a span when a task starts, and finds it again at the task's end."""
    seen: list[Any] = []
    with received(
        started=lambda **named: REQUEST_ID.set("of the receiver"),
        finished=lambda **named: seen.append(REQUEST_ID.get()),
    ):
        bgtasks.spawn("work", kind, lambda: seen.append(REQUEST_ID.get()))
        bgtasks.drain(BOUND)

    assert seen == ["of the receiver"] * 2


@pytest.mark.django_db(transaction=True)
@both
def test_receivers_may_use_the_orm(kind: Callable[..., Any]) -> None:
    """Rows that receivers write are there, and their connection is cleaned up after the task's end."""
    with received(
        started=lambda name, **named: Note.objects.create(text=f"{name} started"),
        finished=lambda name, **named: Note.objects.create(text=f"{name} finished"),
    ):
        bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    assert sorted(str(note) for note in Note.objects.all()) == ["work finished", "work started"]


@both
def test_task_runs_until_its_receivers_have_returned(kind: Callable[..., Any]) -> None:
    """A drain waits for what the end of a task sets off."""
    with Gate() as gate, received(finished=gate):
        bgtasks.spawn("work", kind, nothing)
        gate.wait_entered()
        running = bgtasks.stats()["default"].running
        early = bgtasks.drain(0)

    assert running == 1
    assert early is False


def test_spawner_runs_the_receivers_of_its_spawn() -> None:
    """task_spawned and task_dropped are sent where the task is spawned, before spawn returns."""
    threads = []
    bgtasks.shutdown()
    with received(
        spawned=lambda **named: threads.append(threading.current_thread()),
        dropped=lambda **named: threads.append(threading.current_thread()),
    ):
        bgtasks.spawn("too late", nothing)

    assert threads == [threading.current_thread()] * 2


@both
def test_signals_without_receivers_are_not_sent(
    kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not listen does not pay: no signal is called for a task, nor for a drop."""
    sent: list[Any] = []
    for signal in SIGNALS.values():
        monkeypatch.setattr(signal, "send_robust", lambda *args, **named: sent.append(named))

    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", kind, nothing)
        bgtasks.spawn("one too many", nothing)
    bgtasks.drain(BOUND)

    assert sent == []


# Receivers that go wrong.


@both
@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("name", ["spawned", "started", "finished"])
def test_receiver_that_raises_harms_no_task(
    name: str, error: Any, kind: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a receiver raises is logged: the spawner does not see it, and the task succeeds."""

    def receiver(**named: Any) -> None:
        raise error("on purpose")

    before = bgtasks.stats()["default"].succeeded
    with received(**{name: receiver}):
        accepted = bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    repeats.flush()
    assert accepted
    assert bgtasks.stats()["default"].succeeded == before + 1
    assert error.__name__ in caplog.text
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


@both
@pytest.mark.parametrize("name", ["spawned", "started", "finished"])
def test_receiver_that_raises_does_not_hide_the_signal_from_others(
    name: str, kind: Callable[..., Any]
) -> None:
    """The receivers after one that raises hear of the task all the same."""

    def receiver(**named: Any) -> None:
        raise LookupError("on purpose")

    with received(**{name: receiver}), recorded(name) as sent:
        bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    assert [named["name"] for _, named in sent] == ["work"]


def test_receiver_of_drops_that_raises_does_not_reach_the_spawner(caplog: pytest.LogCaptureFixture) -> None:
    """A spawn never raises because of load, whatever the receivers of the drop do."""

    def receiver(**named: Any) -> None:
        raise SystemExit("on purpose")

    bgtasks.shutdown()
    with received(dropped=receiver):
        accepted = bgtasks.spawn("too late", nothing)

    repeats.flush()
    assert accepted is False
    assert "a receiver could not be called for task 'too late'" in caplog.messages


@both
@pytest.mark.parametrize("name", ["spawned", "started", "finished"])
def test_async_receiver_is_awaited(name: str, kind: Callable[..., Any]) -> None:
    """A receiver may be async, if its signal is not sent on an event loop."""

    async def receiver(**named: Any) -> None:
        await asyncio.sleep(0)
        seen.append(named["name"])

    seen: list[Any] = []
    with received(**{name: receiver}):
        bgtasks.spawn("work", kind, nothing)
        bgtasks.drain(BOUND)

    assert seen == ["work"]


def test_async_receiver_of_a_spawn_on_a_loop_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A spawn cannot await a receiver on a running loop. It says so, and spawns the task all the same."""

    async def receiver(**named: Any) -> None:
        """Never run."""

    async def main() -> bool:
        return bgtasks.spawn("work", nothing)

    before = bgtasks.stats()["default"].succeeded
    with received(spawned=receiver):
        accepted = asyncio.run(main())
        bgtasks.drain(BOUND)

    repeats.flush()
    assert accepted
    assert "a receiver could not be called for task 'work'" in caplog.messages
    assert bgtasks.stats()["default"].succeeded == before + 1
