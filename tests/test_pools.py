"""The public names: spawning from everywhere, pools by name, settings and figures."""

import asyncio
import dataclasses
import gc
import inspect
import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.core.checks.registry import registry
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import transaction
from django.db.models.signals import post_save
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, Client, override_settings

import bgtasks
from bgtasks import conf, pools
from bgtasks.checks import check_database_pools, check_lifespan, check_settings
from bgtasks.core.drainer import START_SLOTS_AT_ONCE
from bgtasks.exceptions import InvalidSettings, PoolDoesNotExist
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import balance, exit_, own_threads
from tests.public import (
    SMALL,
    connected,
    full,
    function,
    is_closed,
    never,
    refuse_threads,
    shutting_down,
    site,
)
from tests.testapp.models import Note

LARGE = {"default": {"CAPACITY": 100_000, "CONN_MAX": 4}}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


@pytest.fixture
def large(small: None) -> Iterator[None]:
    """Give a test that spawns a lot a pool that takes it all."""
    with override_settings(BGTASKS=LARGE):
        yield


def test_public_names() -> None:
    """The package's functions are those of the default pool, or of all pools together."""
    assert bgtasks.spawn == pools["default"].spawn
    assert bgtasks.spawn_on_commit == pools["default"].spawn_on_commit
    assert bgtasks.aspawn_on_commit == pools["default"].aspawn_on_commit
    assert [bgtasks.stats, bgtasks.drain, bgtasks.adrain] == [pools.stats, pools.drain, pools.adrain]
    assert [bgtasks.shutdown, bgtasks.ashutdown] == [pools.shutdown, pools.ashutdown]
    assert sorted(bgtasks.__all__) == bgtasks.__all__
    assert all(hasattr(bgtasks, name) for name in bgtasks.__all__)


# Where spawn may be called.


def test_spawn_from_a_thread() -> None:
    """Any thread may spawn."""
    ran: list[Any] = []

    with ThreadPoolExecutor(1) as executor:
        accepted = executor.submit(bgtasks.spawn, "task", ran.append, 7).result(BOUND)
    bgtasks.drain(BOUND)

    assert accepted
    assert ran == [7]


def test_spawn_from_a_sync_view() -> None:
    """A task outlives the request that spawned it."""

    def view(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"accepted": bgtasks.spawn("task", gate)})

    with Gate() as gate, site(view):
        response = Client().get("/")
        gate.wait_entered()

    assert response.json() == {"accepted": True}
    assert bgtasks.drain(BOUND)
    assert bgtasks.stats()["default"].succeeded == 1


@pytest.mark.parametrize("client", [AsyncClient, Client])
def test_spawn_from_an_async_view(client: type[Client | AsyncClient]) -> None:
    """A task goes on when the loop of the view that spawned it is gone (trap 3)."""

    async def view(request: HttpRequest) -> JsonResponse:
        return JsonResponse({"accepted": [bgtasks.spawn("a", gate), bgtasks.spawn("b", gate())]})

    with AsyncGate() as gate, site(view):
        get: Callable[..., Any] = client().get
        response = async_to_sync(get)("/") if client is AsyncClient else get("/")
        gate.wait_entered(2)

    assert response.json() == {"accepted": [True, True]}
    assert bgtasks.drain(BOUND)
    assert bgtasks.stats()["default"].succeeded == 2


@pytest.mark.django_db(transaction=True)
def test_spawn_from_a_signal_receiver() -> None:
    """A receiver of post_save may spawn, and the task sees the row once it is committed."""
    seen = []

    def receiver(*, instance: Any, **kwargs: Any) -> None:
        bgtasks.spawn_on_commit("look", lambda: seen.append(Note.objects.get(pk=instance.pk).text))

    with connected(receiver, post_save), transaction.atomic():
        Note.objects.create(text="saved")
    bgtasks.drain(BOUND)

    assert seen == ["saved"]


def test_spawn_from_a_task() -> None:
    """A task may spawn further ones."""
    ran: list[Any] = []

    bgtasks.spawn("outer", bgtasks.spawn, "inner", ran.append, 7)
    bgtasks.drain(BOUND)
    bgtasks.drain(BOUND)

    assert ran == [7]


def test_spawn_from_a_signal_handler(large: None) -> None:
    """A signal handler that interrupts its thread inside spawn may spawn, and all tasks are accounted for."""
    sent: list[Any] = []
    handled = []
    ran: list[Any] = []
    main = threading.get_ident()
    spawned = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        handled.append(bgtasks.spawn("handler", ran.append, 1))

    def hammer() -> None:
        while not spawned.is_set():
            sent.append(signal.pthread_kill(main, signal.SIGUSR1))
            # One at a time: signals that come faster than they are handled are merged into one.
            wait_until(lambda: len(handled) == len(sent))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with ThreadPoolExecutor(1) as executor:
            hammering = executor.submit(hammer)
            own = 0
            while len(handled) < 100:
                assert bgtasks.spawn("main", ran.append, 0)
                own += 1
            spawned.set()
            hammering.result(BOUND)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bgtasks.drain(BOUND)

    assert all(handled)
    assert (ran.count(0), ran.count(1)) == (own, len(handled))
    assert bgtasks.stats()["default"].spawned == own + len(handled)


def interrupt(function: Callable[..., Any], at: Any, handler: Any, *, core: bool = True) -> Any:
    """Call `function` on a thread, and `handler` there before the line number `at` it runs of the package.

    Without the `core`, only lines around it count. What a handler raises does not come before each line of
    the core, but after calls: see tests/core.

    The trace function stands for a signal handler: it forces each interleaving instead of hoping for it. It
    takes the place of coverage's, so what runs here does not count as covered.
    """

    def trace(frame: Any, event: str, arg: Any) -> Any:  # pragma: no cover
        if "/bgtasks/" not in frame.f_code.co_filename:
            return None
        if not core and "/bgtasks/core/" in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == at:
            sys.settrace(None)
            handler()
        return trace

    def run() -> Any:  # pragma: no cover
        sys.settrace(trace)
        return function()

    lines = itertools.count()
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result(BOUND)


@pytest.mark.parametrize("started", [True, False])
def test_spawn_may_be_interrupted_by_spawn_at_every_line(started: Any) -> None:
    """Wherever a handler that spawns interrupts spawn, also where it builds its pool, nothing is lost."""
    ran: list[Any] = []
    handled: list[Any] = []
    lines = 0

    while len(handled) == lines:
        pools.restart()
        if started:
            pools.start()
        accepted = interrupt(
            partial(bgtasks.spawn, "main", ran.append, 0),
            lines,
            lambda: handled.append(bgtasks.spawn("handler", ran.append, 1)),
        )
        bgtasks.drain(BOUND)
        lines += 1

        assert accepted
        assert bgtasks.stats()["default"].spawned == 1 + (len(handled) == lines)

    assert all(handled)
    assert (ran.count(0), ran.count(1)) == (lines, lines - 1)
    assert lines > 20


def test_first_spawn_may_be_interrupted_by_an_exception_at_every_line() -> None:
    """Wherever a handler raises in the spawn that builds a pool, the next task runs."""
    ran: list[Any] = []
    first = partial(bgtasks.spawn, "first", ran.append, 0)
    interrupted = [True]
    while interrupted[-1]:
        pools.restart()
        try:
            interrupt(first, len(interrupted) - 1, exit_, core=False)
            interrupted.append(False)
        except SystemExit:
            interrupted.append(True)

        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(bgtasks.spawn, "next", ran.append, 1).result(BOUND)
        assert bgtasks.drain(BOUND)
        stats = bgtasks.stats()["default"]
        assert stats.spawned == stats.succeeded == balance(stats)

    assert ran.count(1) == len(interrupted) - 1
    assert len(interrupted) > 20


def test_pool_that_was_built_in_the_middle_of_its_building_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a finalizer spawns while spawn builds the pool, both tasks go to the pool that was there first."""
    ran: list[Any] = []
    pool_config = conf.pool_config

    def interrupted_pool_config(name: str) -> Any:
        monkeypatch.undo()
        bgtasks.spawn("finalizer", ran.append, 1)
        return pool_config(name)

    monkeypatch.setattr(conf, "pool_config", interrupted_pool_config)

    bgtasks.spawn("main", ran.append, 0)
    bgtasks.drain(BOUND)

    assert sorted(ran) == [0, 1]
    assert bgtasks.stats()["default"].spawned == 2


def test_task_whose_spawner_was_interrupted_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler raises in spawn just after the task was put, an idle slot is woken all the same."""
    ran: list[Any] = []
    pools.start()
    queue = pools.default.slots.queue
    put = queue.put

    def put_and_be_interrupted(task: Any) -> None:
        put(task)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "put", put_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        bgtasks.spawn("task", ran.append, 7)
    wait_until(lambda: bgtasks.stats()["default"].succeeded == 1)

    assert ran == [7]


def test_start_of_threads_that_was_interrupted_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler raises just as spawn has threads started, the next spawn has them started.

    What the first one was to spawn has not been spawned.
    """
    ran: list[Any] = []
    with monkeypatch.context() as patch:
        refuse_threads(patch, exit_)
        with pytest.raises(SystemExit):
            bgtasks.spawn("first", ran.append, 1)

    bgtasks.spawn("second", ran.append, 2)
    bgtasks.drain(BOUND)

    assert ran == [2]


def test_spawn_from_a_finalizer(large: None) -> None:
    """A `__del__` that the garbage collector calls in the middle of a spawn may spawn."""
    ran: list[Any] = []
    gone: list[Any] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            bgtasks.spawn("finalizer", ran.append, 1)
            gone.append(1)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(500):
            Cycle()
            bgtasks.spawn("main", ran.append, 0)
    finally:
        gc.set_threshold(*threshold)
    deadline = time.monotonic() + BOUND
    while len(gone) < 500 and time.monotonic() < deadline:
        gc.collect()  # does nothing while another thread collects
    bgtasks.drain(BOUND)

    assert (ran.count(0), ran.count(1)) == (500, 500)
    assert bgtasks.stats()["default"].spawned == 1000


# Named pools.


def test_full_pool_leaves_the_others_alone() -> None:
    """A burst in one pool takes neither place nor slot of another."""
    ran: list[Any] = []

    with full(pools.default):
        assert bgtasks.spawn("one too many", print) is False
        assert pools["email"].spawn("mail", ran.append, 7) is True
        assert pools["email"].drain(BOUND)

    assert ran == [7]


def test_unknown_pool_is_an_error_with_the_names_there_are() -> None:
    """A misspelt name is told apart from a KeyError of the project's own, and says what there is."""
    with pytest.raises(PoolDoesNotExist) as raised:
        pools["mial"]

    assert str(raised.value) == "no pool named 'mial'; BGTASKS defines: 'default', 'email'"
    assert isinstance(raised.value, KeyError)


def test_pools_are_a_mapping() -> None:
    """They can be asked for, counted and iterated over as the dictionary in the settings can."""
    assert list(pools) == ["default", "email"]
    assert len(pools) == 2
    assert "email" in pools
    assert "mial" not in pools
    assert pools.get("mial") is None
    assert dict(pools) == {"default": pools["default"], "email": pools["email"]}


@override_settings(BGTASKS={"email": {}})
def test_default_pool_is_always_there() -> None:
    """A project that names other pools only has the default pool too, first."""
    assert list(pools) == ["default", "email"]
    assert bgtasks.stats()["default"].capacity == 1024


def test_pool_is_the_same_object_always() -> None:
    """A handle can be kept in a module, whatever happens to the settings."""
    before = pools["email"]
    with override_settings(BGTASKS={"email": {"CONN_MAX": 3}}):
        during = pools["email"]

    assert before is during is pools["email"]
    assert pools["default"] is pools.default


def test_misspelt_names_leave_nothing_behind() -> None:
    """Names that come from outside cannot fill the memory."""
    before = dict(pools._pools)

    for number in range(10_000):
        assert f"pool-{number}" not in pools

    assert pools._pools == before


def test_repr_of_a_pool_is_a_status_line() -> None:
    """What a pool does is seen in a debugger or a log."""
    assert repr(pools["email"]) == "<Pool 'email' not started>"

    with full(pools["email"]):
        assert repr(pools["email"]) == "<Pool 'email' 1/1 running, 2/2 queued>"


def test_repr_of_pools_names_them() -> None:
    """The mapping shows its keys."""
    assert repr(pools) == "<Pools 'default', 'email'>"


def test_pool_is_built_once() -> None:
    """Threads that use a new pool at the same moment get one queue between them."""
    barrier = threading.Barrier(16)

    def spawn() -> bool:
        barrier.wait(BOUND)
        return bgtasks.spawn("task", function, [], value=7)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as executor:
            for _ in range(20):
                pools.restart()
                results = [executor.submit(spawn) for _ in range(16)]
                for result in results:
                    result.result(BOUND)

                assert bgtasks.stats()["default"].spawned == 16
    finally:
        sys.setswitchinterval(interval)


# Settings.


def test_override_settings_is_in_force_inside() -> None:
    """New options hold inside, and the old ones after."""
    with override_settings(BGTASKS={"default": {"CAPACITY": 7, "CONN_MAX": 3}}):
        inside = bgtasks.stats()["default"]
    after = bgtasks.stats()["default"]

    assert (inside.capacity, inside.conn_max) == (7, 3)
    assert (after.capacity, after.conn_max) == (4, 2)


def test_another_setting_changes_nothing() -> None:
    """Only a change of BGTASKS ends the pools."""
    bgtasks.spawn("task", print, end="")

    with override_settings(USE_THOUSAND_SEPARATOR=True):
        assert bgtasks.stats()["default"].spawned == 1


def test_running_tasks_end_before_new_settings_are_in_force() -> None:
    """A change of the setting waits for the tasks that were accepted under the old one."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        with shutting_down(pools.default, shutdown=pools.restart) as restart:
            bgtasks_stats = bgtasks.stats()["default"]
            assert bgtasks_stats.running == 1
            assert not restart.done()

            gate.open()
            restart.result(BOUND)

    assert gate.entered == 1
    assert bgtasks.stats()["default"].spawned == 0


def test_handle_works_through_a_change_of_settings() -> None:
    """A handle that was taken, and used, before spawns with the new options."""
    handle = pools["email"]
    handle.spawn("task", print, end="")

    with override_settings(BGTASKS={"email": {"CAPACITY": 7}}):
        assert handle.spawn("task", print, end="")
        assert handle.stats().capacity == 7


def test_handle_of_a_removed_pool_says_so() -> None:
    """A handle whose pool is no longer defined raises, and closes a coroutine object."""
    handle = pools["email"]
    coroutine = never()

    with override_settings(BGTASKS={"default": {}}):
        with pytest.raises(PoolDoesNotExist) as raised:
            handle.spawn("task", coroutine)

    assert str(raised.value) == "no pool named 'email'; BGTASKS defines: 'default'"
    assert is_closed(coroutine)


@pytest.mark.parametrize("timeout", ["3", True, (1,)])
@pytest.mark.parametrize("wait", [bgtasks.drain, bgtasks.adrain, bgtasks.shutdown, bgtasks.ashutdown])
def test_time_out_that_is_no_number_is_refused(wait: Any, timeout: Any) -> None:
    """Before anything is waited for, or a pool is closed."""

    def call() -> None:
        answer = wait(timeout)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)

    with pytest.raises(TypeError, match="timeout must be a number of seconds or None, not "):
        call()

    assert bgtasks.spawn("task", int)
    assert bgtasks.drain(BOUND)


@override_settings(BGTASKS={"default": {"CAPACTIY": 7}})
def test_spawn_with_invalid_settings_raises() -> None:
    """The first spawn says what `manage.py check` says: message, hint and id."""
    with pytest.raises(InvalidSettings) as raised:
        bgtasks.spawn("task", print)

    assert str(raised.value) == (
        "BGTASKS['default']['CAPACTIY'] is not an option of a pool. Did you mean 'CAPACITY'? (bgtasks.E004)"
    )
    assert isinstance(raised.value, ImproperlyConfigured)


@override_settings(BGTASKS={"default": {"CAPACITY": 0}})
def test_ready_with_invalid_settings_says_so_and_leaves_them_to_the_checks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The app loads, and `manage.py check` shows the mistake. A server runs no checks, so it is logged."""
    apps.get_app_config("bgtasks").ready()

    [message] = caplog.messages
    assert message == (
        "every spawn raises InvalidSettings until this is fixed: BGTASKS['default']['CAPACITY'] is 0, which "
        "is less than 1. CAPACITY is the number of tasks that may wait: 1 or more, 1024 by default. "
        "(bgtasks.E006)"
    )
    with pytest.raises(SystemCheckError, match=r"bgtasks\.E006"):
        call_command("check")
    assert repr(pools.default) == "<Pool 'default' not started>"


ALL_SLOTS = {"bgtasks-default-1", "bgtasks-default-2", "bgtasks-email-1"}


def test_ready_starts_the_drainer_and_builds_every_pool() -> None:
    """With good settings, the loop's thread is there before the first spawn, and no other one."""
    apps.get_app_config("bgtasks").ready()

    started = {"bgtasks-drainer", *(ALL_SLOTS if START_SLOTS_AT_ONCE else ())}
    wait_until(lambda: own_threads() == started)  # an earlier test's may have to end yet
    assert repr(pools["email"]) == "<Pool 'email' 0/1 running, 0/2 queued>"


def test_first_task_of_a_pool_starts_its_slots() -> None:
    """A pool without tasks has no threads: management commands, most of which spawn nothing, stay light."""
    apps.get_app_config("bgtasks").ready()

    bgtasks.spawn("task", print, end="")
    bgtasks.drain(BOUND)

    others = ALL_SLOTS if START_SLOTS_AT_ONCE else set()
    wait_until(lambda: own_threads() >= {"bgtasks-drainer", "bgtasks-default-1", "bgtasks-default-2"})
    assert own_threads() & ALL_SLOTS == {"bgtasks-default-1", "bgtasks-default-2", *others}


def test_ready_registers_the_checks() -> None:
    """`manage.py check` includes the checks of the app, and with --deploy that of the lifespan too."""
    always, deploy = registry.get_checks(), registry.get_checks(include_deployment_checks=True)

    assert {check_settings, check_database_pools} <= set(always)
    assert check_lifespan not in always
    assert check_lifespan in deploy


# Figures.


def test_stats_has_every_pool() -> None:
    """stats() is a dictionary by name, with pools that were not used yet."""
    stats = bgtasks.stats()

    assert list(stats) == ["default", "email"]
    assert stats["email"] == pools["email"].stats()
    assert (stats["email"].capacity, stats["email"].conn_max, stats["email"].spawned) == (2, 1, 0)


def test_stats_are_frozen() -> None:
    """A snapshot does not change any more."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast(Any, bgtasks.stats()["default"]).spawned = 7


def test_every_figure_is_documented() -> None:
    """The class's docstring explains each field."""
    documented = inspect.getdoc(bgtasks.PoolStats) or ""

    assert [
        f.name for f in dataclasses.fields(bgtasks.PoolStats) if f"\n    {f.name}: " not in documented
    ] == []


def test_stats_agree_with_counts_from_outside_under_load(caplog: pytest.LogCaptureFixture) -> None:
    """Every snapshot adds up while threads spawn, and in the end each figure is as seen from outside."""
    caplog.set_level(logging.CRITICAL, "bgtasks")
    ended: dict[Any, Any] = {"succeeded": [], "failed": []}
    stop = threading.Event()

    def task() -> None:
        ended["succeeded"].append(1)

    async def async_task() -> None:
        ended["succeeded"].append(1)

    def failing_task() -> None:
        ended["failed"].append(1)
        raise ValueError

    def spawner() -> list[Any]:
        return [bgtasks.spawn("task", task) for task in [task, async_task, failing_task] * 300]

    def reader() -> None:
        before = bgtasks.stats()["default"]
        while not stop.is_set():
            stats = bgtasks.stats()["default"]
            assert stats.spawned == balance(stats)
            assert stats.spawned >= before.spawned
            assert 0 <= stats.queued <= stats.capacity
            assert 0 <= stats.running <= stats.conn_max
            before = stats

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as executor:
            reading = executor.submit(reader)
            spawning = [executor.submit(spawner) for _ in range(6)]
            accepted = [answer for future in spawning for answer in future.result(BOUND)]
            bgtasks.drain(BOUND)
            stop.set()
            reading.result(BOUND)
    finally:
        stop.set()
        sys.setswitchinterval(interval)

    stats = bgtasks.stats()["default"]
    assert stats.spawned == len(accepted) == 6 * 900
    assert stats.dropped == accepted.count(False)
    assert stats.succeeded == len(ended["succeeded"])
    assert stats.failed == len(ended["failed"])
    assert stats.queued == stats.running == stats.cancelled == 0
