"""The engine: which form a task travels in, and what the engine's database has after each failure."""

import math
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.db import OperationalError, connection, connections
from django.tasks.exceptions import InvalidTask
from django.tasks.signals import task_enqueued
from django.test import override_settings
from django.utils import translation

from bgtasks.django_tasks import call_with_context
from bgtasks.handoff import engine as module
from bgtasks.handoff import payload
from bgtasks.handoff.engine import Fate, Receipt, backend, database_of, status_by_result, transaction_number
from bgtasks.submission import make_task
from tests import broker
from tests.gate import BOUND
from tests.handoff.worker import TASKS, empty_engines, engine_of, nested, note, packed, ran, work
from tests.pool import Logs
from tests.testapp import tasks
from tests.testapp.models import Enqueued, Note


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    with empty_engines():
        yield


# What can travel.


def test_a_function_travels_in_a_signed_payload() -> None:
    """The engine is given one generic task, and a text that names the function and its arguments."""
    content = packed(note, 1, [None, True, {"key": 1.5}], text="ä")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert content.task.backend == "table"
    [text] = content.args
    assert payload.unsign(text) == {
        "f": "tests.handoff.worker.note",
        "a": [1, [None, True, {"key": 1.5}]],
        "k": {"text": "ä"},
        "l": None,
        "z": None,
    }


@pytest.mark.parametrize(("task", "args"), [(tasks.noop, [7]), (tasks.context_id, []), (tasks.anoop, [7])])
def test_a_django_task_travels_as_itself(task: Any, args: Any) -> None:
    """The engine's own pages and figures call it by its name. Spawned or enqueued, it is the same."""
    content = packed(task, *args)

    assert content.task == task.using(backend="table")
    assert content.args == args


def test_an_async_task_travels_to_an_engine_that_takes_none() -> None:
    """Inside the generic task, which is a plain function."""
    content = packed(tasks.aanswer, alias="broker")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert payload.unsign(content.args[0])["f"] == "tests.testapp.tasks.aanswer"


def test_an_engine_whose_workers_have_to_know_a_task_is_given_the_one_they_know() -> None:
    """Celery's workers throw away a task that was not registered with them: the generic one always is."""
    content = packed(tasks.answer, alias="broker")

    assert content.task.module_path == "bgtasks.tasks.run_function"
    assert payload.run(None, content.args[0]) == 42


def local_function() -> Any:
    def local() -> None: ...

    return local


async def coroutine() -> None: ...


def endless() -> list[Any]:
    inner: list[Any] = []
    inner += [inner, inner]
    return inner


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
        (note, ([Note(text="x")],), "its arguments hold an instance of the model Note; pass its primary key"),
        (note, (timedelta(1),), "its arguments hold a timedelta, which does not come out of JSON"),
        (note, (translation.gettext_lazy("x"),), "its arguments hold a __proxy__, which does not come out"),
        (note, ([10**4300],), "its arguments hold an int of more than 4300 digits; pass it as text"),
        (note, (nested(3000),), "its arguments are nested more than 100 levels deep"),
        (note, (endless(),), "its arguments are nested more than 100 levels deep"),
        (tasks.noop.using(queue_name="default"), ((1,),), "its arguments hold a tuple, which does not"),
    ],
)
def test_what_cannot_travel_says_why_once_for_each_name(task: Any, args: Any, reason: Any) -> None:
    """It runs here. The reason is logged the first time, and names no argument."""
    with Logs() as logs:
        engine = engine_of()
        for _ in range(3):
            assert engine.pack(make_task("name", task, args, {})) is None

    [line] = logs.of("cannot be handed off")
    assert line.startswith(
        "task 'name' of pool 'default' cannot be handed off to the engine 'table', and runs here: " + reason
    )


def test_a_coroutine_object_cannot_travel() -> None:
    """It has begun in this process, in a way."""
    with Logs() as logs:
        task = make_task("name", coroutine(), (), {})
        assert engine_of().pack(task) is None
        task.discard()

    assert logs.of("it is a coroutine object; pass the function and its arguments")


def test_a_function_of_the_main_script_cannot_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's main script is another one."""
    monkeypatch.setattr(note, "__module__", "__main__")
    with Logs() as logs:
        assert packed(note) is None

    assert logs.of("it is defined in the script that was started")


def test_an_error_of_ours_while_packing_keeps_the_task_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever packing raises is logged with its traceback, once for each name, and a slot runs the task."""

    def broken(*args: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(payload, "surroundings_of", broken)
    with Logs() as logs:
        engine = engine_of()
        for _ in range(3):
            assert engine.pack(make_task("name", note, (), {})) is None

    [line] = logs.of("task 'name' of pool 'default' could not be packed, and runs here")
    assert "RuntimeError: ours" in line


def test_the_names_that_are_told_apart_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names made of data do not fill the memory of the process."""
    monkeypatch.setattr(module, "NAMES", 1)
    engine = engine_of()
    with Logs() as logs:
        for name in "ab":
            engine.pack(make_task(name, lambda: None, (), {}))

    assert len(logs.of("cannot be handed off")) == 1


def test_the_longest_int_and_the_deepest_list_travel() -> None:
    """Up to there Python reads what it has written: the worker gets them as they were."""
    [text] = packed(note, -(10**4299), nested(98)).args

    assert payload.unsign(text)["a"] == [-(10**4299), nested(98)]


def test_numbers_that_json_does_not_know_travel() -> None:
    """They are text inside the payload, which every engine can keep."""
    [text] = packed(note, math.inf, "\x00").args

    assert payload.unsign(text)["a"] == [math.inf, "\x00"]


def test_functions_go_to_the_queue_of_their_pools_name() -> None:
    """Or to the default queue, or to the engine's first one if it has no default."""
    task = make_task("name", note, (), {})

    def queue_of(pool: Any, queues: Any) -> Any:
        with override_settings(TASKS={**TASKS, "table": {**TASKS["table"], "QUEUES": queues}}):
            parcel: Any = engine_of(pool=pool).pack(task)
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
            function = partial(call_with_context, tasks.context_id)
            assert payload.known_task(function) is tasks.context_id
            job_task = tasks.answer.using(queue_name="other")
            with pytest.raises(payload.CannotTravelError, match="Queue 'other' is not valid"):
                module._using(job_task, "table", "other", job_task)
        assert logs.lines == []


# What an engine's database has after a failure.


def parcels_of(engine: Any, *texts: Any) -> list[Any]:
    return [engine.pack(make_task(text, note, (text,), {})) for text in texts]


@pytest.mark.django_db(transaction=True)
def test_a_batch_is_one_transaction() -> None:
    """All of it or nothing: an error of the database in the middle leaves no row behind."""
    engine = engine_of()
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
    engine = engine_of()
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
    engine = engine_of()
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
    engine = engine_of()
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
    engine = engine_of()
    parcels = parcels_of(engine, "a")
    other = connection.copy()
    other.set_autocommit(False)
    number = transaction_number(other)
    parcels[0].fate = Fate.UNSURE
    parcels[0].receipt = Receipt("id", number, time.monotonic())

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
    monkeypatch.setattr(module, "COMMIT_GRACE", BOUND)
    engine = engine_of()
    [there, late, gone] = parcels_of(engine, "a", "b", "c")
    engine.send([there])
    [row] = Enqueued.objects.all()
    missing = "00000000-0000-0000-0000-000000000000"
    there.receipt = Receipt(str(row.id), None, time.monotonic())
    late.receipt = Receipt(missing, None, time.monotonic())
    gone.receipt = Receipt(missing, None, time.monotonic() - module.COMMIT_GRACE - 1)
    for parcel in (there, late, gone):
        parcel.fate = Fate.UNSURE

    engine.confirm([there, late, gone])

    assert [parcel.fate for parcel in (there, late, gone)] == [Fate.TAKEN, Fate.UNSURE, Fate.HERE]
    assert status_by_result(backend("table"), late.receipt, "sqlite") == "aborted"


def test_only_postgresql_numbers_its_transactions() -> None:
    """Of other databases the engine is asked for its result."""

    class Other:
        vendor = "sqlite"

    assert transaction_number(Other()) is None


@pytest.mark.django_db(transaction=True)
def test_a_broker_that_fails_in_the_middle_keeps_what_it_has() -> None:
    """It knows no transactions: those before are taken, those after are not."""

    def fail(count: int) -> None:
        if count == 1:
            raise ConnectionError("the broker is down")

    with override_settings(TASKS={**TASKS, "broker": {**TASKS["broker"], "OPTIONS": {"fail": fail}}}):
        engine = engine_of("broker")
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
    engine = engine_of("broker")
    parcels = parcels_of(engine, "a", "b", "c")
    errors = iter([ValueError("a receiver is broken"), RuntimeError("broken"), None, KeyError("elsewhere")])

    def broken(**kwargs: Any) -> None:
        if (error := next(errors)) is not None:
            raise error

    task_enqueued.connect(broken)
    try:
        engine.send(parcels)
        with pytest.raises(KeyError, match="elsewhere"):
            backend("broker").enqueue(parcels[0].content.task, ["a"], {})
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
        engine = engine_of("broker")
        parcels = parcels_of(engine, "a", "b")
        engine.send(parcels)

    assert [parcel.fate for parcel in parcels] == [Fate.REFUSED, Fate.TAKEN]


@pytest.mark.django_db(transaction=True)
def test_an_app_with_models_need_not_be_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that writes nothing where it was expected has the task as soon as it says so."""
    monkeypatch.setattr(module, "database_of", lambda engine: "default")
    engine = engine_of("broker")
    parcels = parcels_of(engine, "a", "b")

    with pytest.raises(OperationalError):
        with connection.execute_wrapper(fail_at_the_end):
            engine.send(parcels)

    assert {parcel.fate for parcel in parcels} == {Fate.TAKEN}


def fail_at_the_end(execute: Any, sql: str, params: Any, many: Any, context: Any) -> None:
    raise OperationalError("the connection is lost")


def test_the_database_of_an_engine_is_that_of_its_models() -> None:
    """An engine whose app has no models has none; a project's own subclass has that of its base."""
    own = type("Own", (type(backend("table")),), {"__module__": "tests.broker"})

    assert database_of(backend("table")) == "default"
    assert database_of(own("own", {})) == "default"
    assert database_of(backend("broker")) is None
