"""Pools with HANDOFF_TO: what becomes of their tasks, and mistakes in the settings."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from asgiref.sync import sync_to_async
from django.core.checks import run_checks
from django.db import connections
from django.tasks import TaskResultStatus
from django.test import override_settings

import bgtasks
from bgtasks import conf
from bgtasks.core.figures import Outcome
from bgtasks.core.task import Task
from bgtasks.handoff.engine import Engine
from bgtasks.pools import pools
from tests import broker
from tests.engines import Ends
from tests.gate import BOUND, Gate
from tests.handoff.worker import TASKS, empty_engines, nested, note, ran, work
from tests.pool import Logs
from tests.testapp import tasks
from tests.testapp.models import Enqueued


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    with empty_engines():
        yield


# On the pool.

HANDOFF = {"CAPACITY": 8, "CONN_MAX": 2, "HANDOFF_TO": "table"}


@pytest.mark.django_db(transaction=True)
def test_a_pool_that_overflows_hands_functions_to_the_engine() -> None:
    """Six wait of eight that may: the newest two become rows, and a worker runs them."""
    with override_settings(BGTASKS={"default": HANDOFF}), Ends() as ends, Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        for number in range(6):
            bgtasks.spawn("note", note, number)
        ends.wait(Outcome.HANDED_OFF, 2)
        assert ran == []
        gate.open()
        assert bgtasks.drain(BOUND)

        assert [args[0] for args, _ in ran] == [0, 1, 2, 3]
        assert bgtasks.stats()["default"].handed_off == Enqueued.objects.count() == 2
        work()
        assert sorted(args[0] for args, _ in ran) == [0, 1, 2, 3, 4, 5]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("alias", ["table", "broker"])
def test_always_makes_the_pool_the_outbox_of_the_engine(alias: str) -> None:
    """No call site changes: what was run here is the engine's now, except what cannot travel."""
    with override_settings(BGTASKS={"default": {"HANDOFF_TO": alias, "HANDOFF_WHEN": "always"}}):
        for number in range(5):
            bgtasks.spawn("note", note, number)
        bgtasks.spawn("stays", lambda: ran.append("here"))
        assert bgtasks.drain(BOUND)

        assert ran == ["here"]
        assert bgtasks.stats()["default"].handed_off == 5
        assert Enqueued.objects.count() + len(broker.enqueued) == 5


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("alias", ["table", "broker"])
@pytest.mark.parametrize(
    "argument", [10**5000, nested(3000), [[None] * 100_000, object()]], ids=["long", "deep", "large"]
)
def test_what_cannot_be_packed_is_packed_once_and_holds_nobody_up(
    argument: Any, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mover looks at each such task once, says so once for their name, and goes on with the others."""
    monkeypatch.setattr("bgtasks.handoff.mover.PAUSE", 0.0)  # it looks again whenever it is asked to
    packed: list[Task] = []
    pack = Engine.pack

    def pack_and_note(engine: Engine, task: Task) -> Any:
        packed.append(task)
        return pack(engine, task)

    monkeypatch.setattr(Engine, "pack", pack_and_note)
    options = {"CAPACITY": 8, "CONN_MAX": 2, "HANDOFF_TO": alias}
    with override_settings(BGTASKS={"default": options}), Ends() as ends, Gate() as gate, Logs() as logs:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        for _ in range(6):
            bgtasks.spawn("odd", note, argument)
        for number in range(10):
            bgtasks.spawn("note", note, number)
            ends.wait(Outcome.HANDED_OFF, number + 1)
        gate.open()
        assert bgtasks.drain(BOUND)

        assert Counter(task.name for task in packed) == {"odd": 6, "note": 10}
        assert ran == [[[argument], {}]] * 6
        assert len(logs.of("task 'odd'")) == 1


@pytest.mark.django_db(transaction=True)
def test_an_enqueued_task_with_arguments_nested_too_deep_stays() -> None:
    """They are JSON, but what an engine and its worker make of them is left to nobody's recursion limit."""
    with override_settings(BGTASKS={"default": {"HANDOFF_TO": "broker", "HANDOFF_WHEN": "always"}}):
        tasks.noop.enqueue(nested(200))
        bgtasks.spawn("note", note, 1)
        assert bgtasks.drain(BOUND)

        stats = bgtasks.stats()["default"]
        assert (stats.handed_off, stats.succeeded, stats.handoff_failures) == (1, 1, 0)


@pytest.mark.django_db(transaction=True)
def test_an_enqueued_task_that_expires_stays() -> None:
    """A worker of the engine would run it however old it is."""
    options = {"HANDOFF_TO": "broker", "HANDOFF_WHEN": "always", "EXPIRES": 60}
    with Logs() as logs, override_settings(BGTASKS={"default": options}):
        assert tasks.noop.enqueue().status == TaskResultStatus.READY
        assert bgtasks.drain(BOUND)

        assert (bgtasks.stats()["default"].handed_off, bgtasks.stats()["default"].succeeded) == (0, 1)
        assert len(logs.of("it expires, and a worker would run it however old it is")) == 1


@pytest.mark.django_db(transaction=True)
def test_a_handed_off_result_is_the_engines() -> None:
    """The result of an enqueued task goes on being found, and says what the engine says."""
    with override_settings(BGTASKS={"default": {"HANDOFF_TO": "table", "HANDOFF_WHEN": "always"}}):
        result = tasks.answer.enqueue()
        assert bgtasks.drain(BOUND)

        result.refresh()
        assert result.status == TaskResultStatus.RUNNING
        assert asyncio.run(astatus(result)) == TaskResultStatus.RUNNING


@pytest.mark.django_db(transaction=True)
def test_the_result_of_an_engine_that_keeps_none_stays_as_it_was() -> None:
    """The broker cannot be asked, so the result says what is known here: enqueued."""
    with override_settings(BGTASKS={"default": {"HANDOFF_TO": "broker", "HANDOFF_WHEN": "always"}}):
        result = tasks.answer.enqueue()
        assert bgtasks.drain(BOUND)

        result.refresh()
        assert result.status == TaskResultStatus.READY
        assert asyncio.run(astatus(result)) == TaskResultStatus.READY


async def astatus(result: Any) -> Any:
    """Refresh a result in async code, and close the connection of asgiref's thread."""
    await result.arefresh()
    await sync_to_async(connections.close_all)()
    return result.status


# Settings.


def problems(**overridden: Any) -> dict[str, str]:
    with override_settings(**overridden):
        return {
            str(message.id): message.msg for message in run_checks() if str(message.id).startswith("bgtasks")
        }


def test_a_right_engine_is_no_problem() -> None:
    """The aliases of the engines here pass the checks."""
    assert not problems(BGTASKS={"default": {"HANDOFF_TO": "table", "HANDOFF_WHEN": "always"}})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"HANDOFF_TO": "missing"}, "bgtasks.E015"),
        ({"HANDOFF_TO": "default"}, "bgtasks.E016"),
        ({"HANDOFF_TO": 7}, "bgtasks.E005"),
        ({"HANDOFF_TO": "table", "HANDOFF_WHEN": "never"}, "bgtasks.E007"),
        ({"HANDOFF_TO": "table", "CONN_MAX": 1}, "bgtasks.E008"),
        ({"HANDOFF_WHEN": "always"}, "bgtasks.W010"),
    ],
)
def test_a_wrong_engine_is_reported(options: Any, expected: Any) -> None:
    """Each mistake has an id of its own."""
    assert list(problems(BGTASKS={"default": options})) == [expected]


@pytest.mark.parametrize("kind", ["immediate.ImmediateBackend", "dummy.DummyBackend"])
def test_djangos_own_backends_are_no_engines(kind: str) -> None:
    """Tasks would run in the mover, or never."""
    own = {**TASKS, "own": {"BACKEND": f"django.tasks.backends.{kind}"}}

    assert kind in problems(TASKS=own, BGTASKS={"default": {"HANDOFF_TO": "own"}})["bgtasks.E016"]


def test_an_old_django_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """HANDOFF_TO is an alias in a setting that Django 5.2 does not have."""
    monkeypatch.setattr("django.VERSION", (5, 2, 0, "final", 0))

    assert "bgtasks.E014" in problems(BGTASKS={"default": {"HANDOFF_TO": "table"}})


def test_the_aliases_of_engines_are_read_without_raising() -> None:
    """bgtasks.tasks asks for them where the settings may be wrong."""
    assert conf.handoff_aliases() == []
    with override_settings(BGTASKS={"default": {"HANDOFF_TO": "table"}, "email": 7}):
        assert conf.handoff_aliases() == ["table"]
    with override_settings(BGTASKS=7):
        assert conf.handoff_aliases() == []


def test_a_pool_without_an_engine_pays_nothing() -> None:
    """The hot path has one attribute to test."""
    assert pools["default"].build().slots.look is None
