"""The handoff: what can travel and in which form, and what the engine's database has after each failure."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from datetime import timezone as fixed
from functools import partial
from typing import Any, cast
from zoneinfo import ZoneInfo

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from asgiref.sync import sync_to_async
from django.core import signing
from django.core.checks import run_checks
from django.db import OperationalError, connection, connections
from django.tasks import TaskContext, TaskResultStatus
from django.tasks.exceptions import InvalidTask
from django.tasks.signals import task_enqueued
from django.test import override_settings
from django.utils import timezone, translation
from django.utils.module_loading import import_string

import bgtasks
from bgtasks import conf, handoff
from bgtasks.exceptions import PayloadError
from bgtasks.handoff import Handoff
from bgtasks.mover import Fate
from bgtasks.pools import Pool, _make_task, pools
from bgtasks.queue import Outcome
from bgtasks.shell import Shell
from tests import broker
from tests.core import Logs
from tests.engines import Ends
from tests.gate import BOUND, Gate
from tests.testapp import tasks
from tests.testapp.models import Enqueued, Note

TASKS: dict[str, dict[str, Any]] = {
    "default": {"BACKEND": "bgtasks.backends.PoolBackend"},
    "table": {"BACKEND": "tests.testapp.engines.TableBackend", "QUEUES": ["default", "email"]},
    "broker": {"BACKEND": "tests.broker.Broker", "QUEUES": []},
}
ran: list[Any] = []  # by the functions below, here or on a "worker"


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    """Have the engines in TASKS, and nothing in them."""
    with override_settings(TASKS=TASKS):
        yield
    ran.clear()
    broker.enqueued.clear()


def note(*args: Any, **kwargs: Any) -> None:
    ran.append([list(args), kwargs])


async def anote(what: str) -> None:
    ran.append(what)


def note_locale() -> None:
    ran.append([translation.get_language(), timezone.get_current_timezone_name()])


def return_coroutine(what: str) -> Any:
    return anote(what)


def handoff_to(alias: str = "table", pool: str = "default") -> Handoff:
    """Return the shell's half of a handoff, for tests that need no pool."""
    return Handoff(alias, pool, Shell(None))


def packed(function: Any, *args: Any, alias: str = "table", **kwargs: Any) -> Any:
    """Return what the engine would be asked to enqueue for a spawned task."""
    parcel = handoff_to(alias).pack(_make_task("name", function, args, kwargs))
    return None if parcel is None else parcel.content


def work() -> None:
    """Run what the engine in the database has, as a worker does: by the path of each task."""
    for row in Enqueued.objects.all():
        arguments = json.loads(row.arguments)
        task = import_string(row.path)
        context: list[Any] = (
            [TaskContext(task_result=make_context(task, arguments))] if task.takes_context else []
        )
        task.call(*context, *arguments["args"], **arguments["kwargs"])
        row.delete()


def make_context(task: Any, arguments: Any) -> Any:
    from tests.testapp.engines import make_result

    return make_result(task, "table", arguments["args"], arguments["kwargs"], "on-the-worker")


# What can travel.


def test_a_function_travels_in_a_signed_payload() -> None:
    """The engine is given one generic task, and a text that names the function and its arguments."""
    content = packed(note, 1, [None, True, {"key": 1.5}], text="ä")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert content.task.backend == "table"
    [text] = content.args
    assert handoff.unsign(text) == {
        "f": "tests.test_handoff.note",
        "a": [1, [None, True, {"key": 1.5}]],
        "k": {"text": "ä"},
        "l": None,
        "z": None,
    }


@pytest.mark.parametrize("task", [tasks.answer, tasks.context_id, tasks.aanswer])
def test_a_django_task_travels_as_itself(task: Any) -> None:
    """The engine's own pages and figures call it by its name. Spawned or enqueued, it is the same."""
    content = packed(task, 7)

    assert content.task == task.using(backend="table")
    assert content.args == [7]


def test_an_async_task_travels_to_an_engine_that_takes_none() -> None:
    """Inside the generic task, which is a plain function."""
    content = packed(tasks.aanswer, alias="broker")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert handoff.unsign(content.args[0])["f"] == "tests.testapp.tasks.aanswer"


def test_an_engine_whose_workers_have_to_know_a_task_is_given_the_one_they_know() -> None:
    """Celery's workers throw away a task that was not registered with them: the generic one always is."""
    content = packed(tasks.answer, alias="broker")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert handoff.run(None, content.args[0]) == 42


def local_function() -> Any:
    def local() -> None: ...

    return local


async def coroutine() -> None: ...


class CallableObject:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


def renamed() -> None: ...


hidden, renamed = renamed, print


@pytest.mark.parametrize(
    ("task", "args", "reason"),
    [
        (lambda: None, (), "it is a lambda"),
        (local_function(), (), "it is defined inside another function"),
        (partial(note, 1), (), "it is a partial, not a function of a module"),
        (CallableObject(), (), "it is a CallableObject, not a function of a module"),
        (CallableObject().method, (), "it is a method, not a function of a module"),
        ([].append, (1,), "it is not what its module has under its name"),
        (hidden, (), "it is not what its module has under its name"),
        (note, (1, (2, 3)), "its arguments hold a tuple, which does not come out of JSON as it went in"),
        (note, ({"a": [{1: 2}]},), "a dictionary in its arguments has a key of the type int, not a str"),
        (note, ([Note(text="x")],), "its arguments hold a model instance, a Note; pass its primary key"),
        (note, (timedelta(1),), "its arguments hold a timedelta, which does not come out of JSON"),
        (note, (translation.gettext_lazy("x"),), "its arguments hold a __proxy__, which does not come out"),
        (tasks.answer.using(queue_name="default"), ((1,),), "its arguments hold a tuple, which does not"),
    ],
)
def test_what_cannot_travel_says_why_once_for_each_name(task: Any, args: Any, reason: Any) -> None:
    """It runs here. The reason is logged the first time, and names no argument."""
    with Logs() as logs:
        engine = handoff_to()
        for _ in range(3):
            assert engine.pack(_make_task("name", task, args, {})) is None

    [line] = logs.of("cannot be handed off")
    assert line.startswith(
        "task 'name' of pool 'default' cannot be handed off to the engine 'table', and runs here: " + reason
    )


def test_a_coroutine_object_cannot_travel() -> None:
    """It has begun in this process, in a way."""
    with Logs() as logs:
        task = _make_task("name", coroutine(), (), {})
        assert handoff_to().pack(task) is None
        task.discard()

    assert logs.of("it is a coroutine object; pass the function and its arguments")


def test_a_function_of_the_main_script_cannot_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's main script is another one."""
    monkeypatch.setattr(note, "__module__", "__main__")
    with Logs() as logs:
        assert packed(note) is None

    assert logs.of("it is defined in the script that was started")


def test_the_names_that_are_told_apart_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names made of data do not fill the memory of the process."""
    monkeypatch.setattr(handoff, "NAMES", 1)
    engine = handoff_to()
    with Logs() as logs:
        for name in "ab":
            engine.pack(_make_task(name, lambda: None, (), {}))

    assert len(logs.of("cannot be handed off")) == 1


def test_numbers_that_json_does_not_know_travel() -> None:
    """They are text inside the payload, which every engine can keep."""
    [text] = packed(note, math.inf, "\x00").args

    assert handoff.unsign(text)["a"] == [math.inf, "\x00"]


def test_functions_go_to_the_queue_of_their_pools_name() -> None:
    """Or to the default queue, or to the engine's first one if it has no default."""
    task = _make_task("name", note, (), {})

    def queue_of(pool: Any, queues: Any) -> Any:
        with override_settings(TASKS={**TASKS, "table": {**TASKS["table"], "QUEUES": queues}}):
            parcel: Any = handoff_to(pool=pool).pack(task)
            return parcel.content.task.queue_name

    assert queue_of("email", ["default", "email"]) == "email"
    assert queue_of("other", ["default", "email"]) == "default"
    assert queue_of("email", ["b", "a"]) == "a"
    assert queue_of("email", []) == "default"


def test_a_task_whose_queue_the_engine_does_not_have_stays() -> None:
    """The engine's own words are logged."""
    with override_settings(TASKS={**TASKS, "default": {**TASKS["default"], "QUEUES": []}}):
        with Logs() as logs:
            assert packed(tasks.answer.using(queue_name="other").func) is not None
            function = partial(import_string("bgtasks.pools._call_with_context"), tasks.context_id)
            assert handoff._known_task(function) is tasks.context_id
            job_task = tasks.answer.using(queue_name="other")
            with pytest.raises(handoff.CannotTravelError, match="Queue 'other' is not valid"):
                handoff._using(job_task, "table", "other")
        assert logs.lines == []


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
    handoff.run(None, content.args[0])

    assert ran == [["fr", name]]
    assert translation.get_language() == "en"


def test_no_language_at_all_travels_too() -> None:
    """Deactivated translations are another thing than the default language."""
    with translation.override(None):
        content = packed(note_locale)
    handoff.run(None, content.args[0])

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
    assert handoff.run(None, locale.args[0]) == ["fr", "UTC"]
    arguments = {"args": context_id.args, "kwargs": {}}
    context: Any = TaskContext(task_result=make_context(context_id.task, arguments))
    assert context_id.task.call(context, *context_id.args) == "on-the-worker"


# Signed payloads.


def test_a_payload_runs_its_function() -> None:
    """Plain, async, and one that returns a coroutine. What they return is nobody's."""
    for function, args in ((note, [1]), (anote, [2]), (return_coroutine, [3])):
        assert handoff.run(None, packed(function, *args).args[0]) is None

    assert ran == [[[1], {}], 2, 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tests.test_handoff.note",
        signing.dumps({"f": "tests.test_handoff.note", "a": [], "k": {}, "l": None, "z": None}, salt="other"),
        signing.dumps(
            {"f": "tests.test_handoff.note", "a": [], "k": {}, "l": None, "z": None},
            key="another key",
            salt=handoff.SALT,
        ),
        None,
    ],
)
def test_a_forged_payload_runs_nothing(text: str) -> None:
    """Not signed at all, for another purpose, or with another key."""
    with pytest.raises(PayloadError, match=r"was not signed by this project, or with another SECRET_KEY"):
        handoff.run(None, text)

    assert ran == []


def test_an_altered_payload_runs_nothing() -> None:
    """One character makes it a forged one."""
    [text] = packed(note, 1).args

    with pytest.raises(PayloadError, match="nothing was run"):
        handoff.run(None, text[:-1] + ("A" if text[-1] != "A" else "B"))


def test_an_old_payload_is_not_run_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody has recorded cannot be played back for ever."""
    [text] = packed(note, 1).args
    later = time.time() + handoff.MAX_AGE.total_seconds() + 60
    monkeypatch.setattr(time, "time", lambda: later)

    with pytest.raises(PayloadError, match="more than 7 days ago"):
        handoff.run(None, text)

    assert ran == []


@pytest.mark.parametrize("path", ["tests.test_handoff.gone", "tests.gone.note"])
def test_a_function_that_is_not_there_is_named(path: Any) -> None:
    """A worker that runs other code than the site says which function it does not have."""
    text = handoff.sign({"f": path, "a": [], "k": {}, "l": None, "z": None})

    with pytest.raises(PayloadError, match=rf"the function '{path}' cannot be imported here"):
        handoff.run(None, text)


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


# What an engine's database has after a failure.


def parcels_of(engine: Any, *texts: Any) -> list[Any]:
    return [engine.pack(_make_task(text, note, (text,), {})) for text in texts]


@pytest.mark.django_db(transaction=True)
def test_a_batch_is_one_transaction() -> None:
    """All of it or nothing: an error of the database in the middle leaves no row behind."""
    engine = handoff_to()
    parcels = parcels_of(engine, "a", "b", "c")
    calls: list[Any] = []

    def broken(**kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OperationalError("the connection is lost")

    task_enqueued.connect(broken)
    try:
        with pytest.raises(OperationalError):
            engine.send(parcels)
    finally:
        task_enqueued.disconnect(broken)

    assert {parcel.fate for parcel in parcels} == {Fate.HERE}
    assert not Enqueued.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_row_whose_enqueue_raised_is_not_committed() -> None:
    """The interleaving is forced.

    1. The engine has written its row.
    2. A receiver of Django's signal raises, so enqueue does.
    3. The task will be run here: the row must not be committed. The others are sent again, without it.
    """
    engine = handoff_to()
    parcels = parcels_of(engine, "a", "b", "c")
    bad = parcels[1].content.args

    def broken(task_result: Any, **kwargs: Any) -> None:
        if task_result.args == bad:
            raise RuntimeError("a receiver is broken")

    task_enqueued.connect(broken)
    try:
        with Logs() as logs:
            engine.send(parcels)
            assert [parcel.fate for parcel in parcels] == [Fate.HERE, Fate.REFUSED, Fate.HERE]
            assert engine.pack(parcels[1].task) is None
            engine.send([parcels[0], parcels[2]])
    finally:
        task_enqueued.disconnect(broken)

    assert logs.of("task 'b' of pool 'default' cannot be handed off")
    assert logs.of("the engine refuses it with RuntimeError")
    assert [parcel.fate for parcel in parcels] == [Fate.TAKEN, Fate.REFUSED, Fate.TAKEN]
    work()
    assert sorted(args[0] for args, _ in ran) == ["a", "c"]


@pytest.mark.django_db(transaction=True)
def test_a_task_that_the_engine_refuses_before_it_writes_holds_nobody_up() -> None:
    """The rest of its batch is committed."""
    engine = handoff_to()
    parcels = parcels_of(engine, "a", "b")
    bad = tasks.noop.using(queue_name="default")
    object.__setattr__(bad, "queue_name", "gone since it was packed")
    parcels[0].content = parcels[0].content._replace(task=bad)

    engine.send(parcels)

    assert [parcel.fate for parcel in parcels] == [Fate.REFUSED, Fate.TAKEN]
    assert Enqueued.objects.count() == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_that_raised_is_asked_about(committed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interleaving is forced.

    1. COMMIT was sent, and the connection is lost: nobody knows whether it was carried out.
    2. PostgreSQL is asked for the very transaction, and says so.
    """
    engine = handoff_to()
    parcels = parcels_of(engine, "a", "b")

    def lose_the_answer(self: Any) -> None:
        if committed:
            self.connection.commit()
        self.connection.close()
        raise OperationalError("the connection is lost")

    with monkeypatch.context() as patch:
        patch.setattr(type(connections["default"]), "_commit", lose_the_answer)
        with pytest.raises(OperationalError):
            engine.send(parcels)
    assert {parcel.fate for parcel in parcels} == {Fate.UNSURE}

    engine.confirm(parcels)

    assert {parcel.fate for parcel in parcels} == {Fate.TAKEN if committed else Fate.HERE}
    assert Enqueued.objects.count() == (2 if committed else 0)


@pytest.mark.django_db(transaction=True)
def test_a_transaction_under_way_is_not_decided() -> None:
    """The interleaving is forced.

    1. The connection is lost, and the server has not noticed: its transaction is still open.
    2. PostgreSQL says that it is in progress, so nobody may run the tasks yet.
    """
    engine = handoff_to()
    parcels = parcels_of(engine, "a")
    other = connection.copy()
    other.set_autocommit(False)
    number = handoff._transaction_number(other)
    parcels[0].fate = Fate.UNSURE
    parcels[0].receipt = handoff.Receipt("id", number, time.monotonic())

    engine.confirm(parcels)

    assert parcels[0].fate is Fate.UNSURE
    other.commit()
    other.close()
    engine.confirm(parcels)
    assert parcels[0].fate is Fate.TAKEN


@pytest.mark.django_db(transaction=True)
def test_a_database_that_tells_no_transactions_is_asked_for_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that is there was committed. One that is not may still come, for a while."""
    monkeypatch.setattr(handoff, "COMMIT_GRACE", BOUND)
    engine = handoff_to()
    [there, late, gone] = parcels_of(engine, "a", "b", "c")
    engine.send([there])
    [row] = Enqueued.objects.all()
    missing = "00000000-0000-0000-0000-000000000000"
    there.receipt = handoff.Receipt(str(row.id), None, time.monotonic())
    late.receipt = handoff.Receipt(missing, None, time.monotonic())
    gone.receipt = handoff.Receipt(missing, None, time.monotonic() - handoff.COMMIT_GRACE - 1)
    for parcel in (there, late, gone):
        parcel.fate = Fate.UNSURE

    engine.confirm([there, late, gone])

    assert [parcel.fate for parcel in (there, late, gone)] == [Fate.TAKEN, Fate.UNSURE, Fate.HERE]
    assert handoff._status_by_result(handoff._backend("table"), late.receipt, "sqlite") == "aborted"


def test_only_postgresql_numbers_its_transactions() -> None:
    """Of other databases the engine is asked for its result."""

    class Other:
        vendor = "sqlite"

    assert handoff._transaction_number(Other()) is None


@pytest.mark.django_db(transaction=True)
def test_a_broker_that_fails_in_the_middle_keeps_what_it_has() -> None:
    """It knows no transactions: those before are taken, those after are not."""

    def fail(count: int) -> None:
        if count == 1:
            raise ConnectionError("the broker is down")

    with override_settings(TASKS={**TASKS, "broker": {**TASKS["broker"], "OPTIONS": {"fail": fail}}}):
        engine = handoff_to("broker")
        parcels = parcels_of(engine, "a", "b", "c")
        with pytest.raises(ConnectionError):
            engine.send(parcels)

    assert [parcel.fate for parcel in parcels] == [Fate.TAKEN, Fate.HERE, Fate.HERE]


def test_a_broker_has_a_task_whatever_a_receiver_raises(caplog: pytest.LogCaptureFixture) -> None:
    """The interleaving is forced.

    1. The broker has taken the task.
    2. A receiver of Django's signal raises, which looks like a refusal, or like a broker that fails.
    3. The task must not be run here as well. Django logs what was raised. Elsewhere it is raised as ever.
    """
    engine = handoff_to("broker")
    parcels = parcels_of(engine, "a", "b", "c")
    errors = iter([ValueError("a receiver is broken"), RuntimeError("broken"), None, KeyError("elsewhere")])

    def broken(**kwargs: Any) -> None:
        if (error := next(errors)) is not None:
            raise error

    task_enqueued.connect(broken)
    try:
        engine.send(parcels)
        with pytest.raises(KeyError, match="elsewhere"):
            handoff._backend("broker").enqueue(parcels[0].content.task, ["a"], {})
    finally:
        task_enqueued.disconnect(broken)

    assert [parcel.fate for parcel in parcels] == [Fate.TAKEN] * 3
    assert len(broker.enqueued) == 3 + 1
    assert "a receiver is broken" in caplog.text


def test_a_broker_that_refuses_a_task_takes_the_others() -> None:
    """InvalidTask, TypeError and ValueError are about the task, not about the broker."""

    def fail(count: int) -> None:
        if not refused:
            refused.append(count)
            raise InvalidTask("not this one")

    refused: list[Any] = []
    with override_settings(TASKS={**TASKS, "broker": {**TASKS["broker"], "OPTIONS": {"fail": fail}}}):
        engine = handoff_to("broker")
        parcels = parcels_of(engine, "a", "b")
        engine.send(parcels)

    assert [parcel.fate for parcel in parcels] == [Fate.REFUSED, Fate.TAKEN]


@pytest.mark.django_db(transaction=True)
def test_an_app_with_models_need_not_be_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that writes nothing where it was expected has the task as soon as it says so."""
    monkeypatch.setattr(handoff, "_database_of", lambda engine: "default")
    engine = handoff_to("broker")
    parcels = parcels_of(engine, "a", "b")

    with pytest.raises(OperationalError):
        with connection.execute_wrapper(fail_at_the_end):
            engine.send(parcels)

    assert {parcel.fate for parcel in parcels} == {Fate.TAKEN}


def fail_at_the_end(execute: Any, sql: str, params: Any, many: Any, context: Any) -> None:
    raise OperationalError("the connection is lost")


def test_the_database_of_an_engine_is_that_of_its_models() -> None:
    """An engine whose app has no models has none; a project's own subclass has that of its base."""
    own = type("Own", (type(handoff._backend("table")),), {"__module__": "tests.broker"})

    assert handoff._database_of(handoff._backend("table")) == "default"
    assert handoff._database_of(own("own", {})) == "default"
    assert handoff._database_of(handoff._backend("broker")) is None


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
    assert isinstance(pools["default"], Pool)
    pools["default"].stats()
    assert pools["default"]._slots.look is None
