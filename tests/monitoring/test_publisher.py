"""Snapshots: what a process publishes of itself, when it does so, and what the others make of them."""

import _thread
import json
import os
import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from django.core.cache import BaseCache, caches
from django.core.cache.backends.locmem import LocMemCache
from pytest_django import Settings

import bgtasks
from bgtasks.core.figures import BOUNDS, OTHERS
from bgtasks.handoff.slots import HandoffSlots
from bgtasks.monitoring import control, overview, publisher, snapshot
from bgtasks.monitoring.cache import pause_key, place_keys, snapshot_key
from bgtasks.monitoring.history import History, shifted
from bgtasks.monitoring.publisher import Publisher, encode
from bgtasks.pools import pools
from tests.engines import FakeEngine
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, Logs, after_call

pytestmark = pytest.mark.usefixtures("patient")


class BrokenCache(LocMemCache):
    """A cache whose server does not answer."""

    def _broken(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no route to the cache")

    get = get_many = set = set_many = add = delete = _broken


class FullCache(LocMemCache):
    """A cache that keeps nothing new, as Memcached does with what is too large."""

    def set_many(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return list(data)


def locmem(name: str, backend: type = LocMemCache) -> dict[str, str]:
    return {"BACKEND": f"{backend.__module__}.{backend.__qualname__}", "LOCATION": name}


@pytest.fixture
def cache(settings: Settings, request: pytest.FixtureRequest) -> Any:
    """A cache of the test's own, in which snapshots are published ten times a second."""
    settings.CACHES = {"default": locmem(request.node.name), "other": locmem("other")}
    settings.BGTASKS_SNAPSHOT = {"INTERVAL": 0.1}
    caches["default"].clear()
    return caches["default"]


def published(cache: BaseCache) -> list[dict[str, Any]]:
    places = cache.get_many(place_keys())
    found = cache.get_many([snapshot_key(process) for process in places.values()])  # one may leave meanwhile
    return [json.loads(content) for content in found.values()]


class Observed(Core):
    """A pool with a publisher of its own. That of the process's own pools is quiet meanwhile."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.publisher = Publisher(self.drainer, lambda: [self.slots])
        self.publisher.configure()
        self.drainer.background = [self.publisher]

    def __enter__(self) -> "Observed":
        for thread in pools.publisher.stop():  # or the beat it is in would be one in this test's cache
            thread.join(BOUND)
        self._config, pools.publisher.config = pools.publisher.config, None
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            super().__exit__(*exc_info)
        finally:
            pools.publisher.config = self._config

    def wait_idle(self) -> None:
        """Wait until all tasks have ended and the publisher has nothing more to say."""
        self.drain()
        wait_until(lambda: not self.publisher._awake)

    def published(self, cache: BaseCache) -> Any:
        mine = [content for content in published(cache) if content["id"] == self.publisher.identity.id]
        return mine[0] if mine else None


def test_process_publishes_while_tasks_run_and_once_after(cache: BaseCache) -> None:
    """The last snapshot says that all has ended; then nothing is left that could wake the process up."""
    with Observed() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        wait_until(lambda: (seen := core.published(cache)) and seen["pools"][0]["stats"]["running"])
        first = core.published(cache)
        gate.open()
        core.wait_idle()
        last = core.published(cache)
        wait_until(lambda: "bgtasks-publisher" not in {thread.name for thread in core.threads()})

    assert first["idle"] is False
    assert (last["idle"], last["pools"][0]["stats"]["succeeded"]) == (True, 1)


def test_snapshot_tells_what_runs_waits_and_failed(cache: BaseCache) -> None:
    """A snapshot has the running tasks, the names, the failures and the drops, as plain JSON."""
    with Observed(conn_max=1, capacity=1) as core, Gate() as gate:
        core.spawn("bad", int, "x")
        core.drain()
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        core.spawn("late", print, end="")

        [pool] = json.loads(json.dumps(core.publisher.snapshot()))["pools"]

    assert pool["name"] == "core"
    assert [task["name"] for task in pool["running"]] == ["held"]
    assert pool["running"][0]["slot"] == "bgtasks-core-1"
    assert {row["name"] for row in pool["names"]} == {"bad", "held", "waits", "late"}
    assert pool["oldest"] > 0
    assert pool["failures"][0]["traceback"].startswith("Traceback")
    assert [(drop["name"], drop["reason"]) for drop in pool["drops"]] == [("late", "full")]


def test_snapshot_tells_how_many_slots_run_tasks() -> None:
    """Of a pool that hands off one fewer than CONN_MAX, so that "all are busy" can be told."""
    with Observed(conn_max=3, slots=partial(HandoffSlots, engine=FakeEngine(), always=False)) as core:
        stats = core.publisher.snapshot()["pools"][0]["stats"]

    assert (stats["conn_max"], stats["runners"]) == (3, 2)


@pytest.mark.parametrize("gate_type", [Gate, AsyncGate])
def test_snapshot_has_the_stack_of_a_task_that_runs_for_long(
    gate_type: Any, monkeypatch: pytest.MonkeyPatch, cache: BaseCache
) -> None:
    """Of a task that has run for STACK_AFTER seconds, or is stuck, one can see where it is."""
    monkeypatch.setattr(snapshot, "STACK_AFTER", 0)
    with Observed() as core, gate_type() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        wait_until(lambda: core.publisher.snapshot()["pools"][0]["running"][0]["stack"] is not None)
        [task] = core.publisher.snapshot()["pools"][0]["running"]

    assert "tests/gate.py" in task["stack"]
    assert task["asynchronous"] is (gate_type is AsyncGate)


def test_stack_of_a_task_between_two_places_is_none(cache: BaseCache) -> None:
    """A task that its slot has just taken, or that is on its way to the loop, is nowhere to be found."""
    with Observed() as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        [task] = core.queue.running()

        assert snapshot.stack_of(None, task) is None


def test_snapshot_too_large_for_a_cache_leaves_the_longest_parts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published has an upper bound."""
    monkeypatch.setattr(publisher, "SIZE_MAX", 10)
    pool = {
        "running": [{"name": "a", "stack": "long"}],
        "failures": [{"name": "b", "traceback": "long"}],
    }

    [left] = json.loads(encode({"pools": [pool]}))["pools"]

    assert (left["running"][0]["stack"], left["failures"][0]["traceback"]) == (None, None)


@pytest.mark.parametrize(
    ("moments", "queued", "running"),
    [
        ([], [], []),
        ([(100.0, 0, 0)], [], []),
        ([(100.0, 0, 0), (103.0, 5, 1)], [5], [1]),
        ([(100.0, 2, 1), (100.1, 7, 3), (100.2, 0, 0)], [7], [3]),  # a burst within one point is seen
        ([(100.0, 2, 1), (109.0, 0, 0)], [2, 2, 2, 0], [1, 1, 1, 0]),
        ([(100.0, 2, 1), (40.0, 3, 3)], [3], [3]),  # a clock that jumps back
        ([(3.0 * number, number, 1) for number in range(1000)], list(range(900, 1000)), [1] * 100),
        ([(100.0, 2, 1), (1e9, 0, 0)], [*[2] * 99, 0], [*[1] * 99, 0]),
    ],
)
def test_history_keeps_the_largest_figure_of_each_point(moments: Any, queued: Any, running: Any) -> None:
    """It has an end, whatever the clock does, and no zeros at the beginning."""
    history = History()
    for moment in moments:
        history.add(*moment)

    assert history.read() == {"queued": queued, "running": running}


def test_clock_that_jumps_back_makes_no_snapshot_grow(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history does not look at the time of day."""
    with Observed() as core:
        core.publisher.config = None
        for hour in range(200):
            monkeypatch.setattr(snapshot, "time", lambda hour=hour: 1e9 - 3600 * hour)
            core.publisher._beat(stopping=False)
        content = core.publisher.snapshot()

    assert content["pools"][0]["history"] == {"queued": [], "running": []}


def test_process_that_ends_takes_its_snapshot_back(cache: BaseCache) -> None:
    """A process that was shut down is not shown any more."""
    with Observed() as core:
        core.spawn("task", print, end="")
        core.wait_idle()
        assert core.published(cache) is not None
        core.publisher.leave()

        assert core.published(cache) is None


def test_process_that_ends_leaves_the_place_of_another_alone(cache: BaseCache) -> None:
    """If the cache was cleared, and the place given to another process, it stays there."""
    with Observed() as core:
        core.spawn("task", print, end="")
        core.wait_idle()
        place = core.publisher.place
        assert place is not None
        cache.set(place, "another")
        core.publisher.leave()

        assert cache.get(place) == "another"


def test_process_that_published_nothing_has_nothing_to_take_back(cache: BaseCache) -> None:
    """Then the end of a process does not even look at the cache."""
    with Observed() as core:
        core.publisher.config = None
        core.publisher.leave()


def test_process_that_cannot_start_a_thread_any_more_goes_on(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the end of the process nor a slot fails because no thread is left."""

    def start(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    def start_new_thread(function: Any, args: Any) -> None:
        raise RuntimeError("can't start new thread")

    with Observed() as core:
        core.spawn("task", print, end="")
        core.wait_idle()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            core.publisher.notify()
            wait_until(lambda: not core.publisher._awake)
            core.publisher.leave()
            patch.setattr(_thread, "start_new_thread", start_new_thread)
            core.publisher.notify()

        assert not core.publisher._awake


def test_interrupted_start_leaves_the_publisher_startable(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception from outside that hits the start does not keep the publisher from starting ever after."""

    def start_new_thread(function: Any, args: Any) -> None:
        raise SystemExit

    with Observed() as core:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", start_new_thread)
            with pytest.raises(SystemExit):
                core.publisher.notify()

        assert not core.publisher._awake


def test_place_that_was_lost_is_claimed_anew(cache: BaseCache) -> None:
    """After the cache was cleared, the next snapshot is there to be found again."""
    with Observed() as core:
        core.spawn("task", print, end="")
        core.wait_idle()
        cache.clear()
        core.spawn("task", print, end="")
        core.wait_idle()

        assert core.published(cache)["pools"][0]["stats"]["succeeded"] == 2


def test_two_processes_have_two_places(cache: BaseCache) -> None:
    """However many publish, none writes over another."""
    with Observed() as one, Observed() as two:
        for core in (one, two):
            core.spawn("task", print, end="")
            core.wait_idle()

        assert one.publisher.place != two.publisher.place
        assert one.published(cache) is not None
        assert two.published(cache) is not None


def test_more_processes_than_places_are_complained_of_once(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that finds no place runs its tasks as ever, and says in the log that it cannot be seen."""
    monkeypatch.setattr("bgtasks.monitoring.cache.PLACES", 1)
    monkeypatch.setattr(publisher, "PLACES", 1)
    cache.set(place_keys()[0], "another")
    with Observed() as core:
        core.spawn("task", print, end="")
        core.drain()
        core.wait_idle()
        core.logs.wait("more than 1 processes publish")

        assert len(core.logs.of("more than 1 processes publish")) == 1


@pytest.mark.parametrize(
    ("backend", "said"),
    [(BrokenCache, "no route to the cache"), (FullCache, "the cache has refused the snapshot")],
)
def test_cache_that_fails_is_complained_of_once(backend: Any, said: Any, settings: Settings) -> None:
    """Whatever the cache does, tasks run; a warning a minute says what is wrong."""
    settings.CACHES = {"default": locmem("broken", backend)}
    settings.BGTASKS_SNAPSHOT = {"INTERVAL": 0.1}
    with Observed() as core:
        for _ in range(2):
            core.spawn("task", print, end="")
            core.drain()
            core.wait_idle()
        core.publisher.place = "a place"
        core.publisher.leave()

        assert core.stats().succeeded == 2
        assert len(core.logs.of(said)) == 1


def test_cache_that_cannot_be_closed_is_complained_of(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it matter what a cache does when it is closed."""

    def close(cache: BaseCache, **kwargs: Any) -> None:
        raise OSError("cannot close")

    with Observed() as core, monkeypatch.context() as patch:
        patch.setattr(LocMemCache, "close", close)
        core.spawn("task", int)
        core.wait_idle()

        assert core.logs.wait("cannot close")


def test_publisher_that_is_interrupted_says_so(cache: BaseCache) -> None:
    """An exception from outside ends the thread, and the next task starts it again."""
    with Observed() as core:

        def listener() -> None:
            core.publisher.listeners.clear()
            raise SystemExit

        core.publisher.listeners.append(listener)
        core.spawn("task", print, end="")
        core.logs.wait("the publisher was interrupted")
        core.wait_idle()
        core.spawn("task", print, end="")
        core.wait_idle()

        assert core.published(cache)["pools"][0]["stats"]["succeeded"] == 2


def test_listener_that_fails_is_complained_of(cache: BaseCache) -> None:
    """A listener that raises keeps nobody from publishing."""
    with Observed() as core:
        core.publisher.listeners.append(cast("Callable[[], None]", lambda: int("x")))
        core.spawn("task", print, end="")
        core.wait_idle()

        assert core.logs.of("a listener of the publisher has failed")
        assert core.published(cache) is not None


def test_slot_woken_as_the_publisher_ends_is_not_overlooked(cache: BaseCache) -> None:
    """1. publisher: has seen nothing, ends. 2. slot: finds it there. 3. publisher: looks again, starts."""
    with Observed() as core:
        close = core.publisher._close

        def close_late() -> None:
            core.publisher._close = close
            core.spawn("just then", print, end="")
            core.drain()
            close()

        core.publisher._close = close_late
        core.publisher.notify()
        wait_until(lambda: (core.published(cache) or {"pools": [{"names": []}]})["pools"][0]["names"])
        core.wait_idle()

        assert core.published(cache)["pools"][0]["stats"]["succeeded"] == 1


def publishers(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the publishing threads that have been started since `before` was taken."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name == "bgtasks-publisher" and thread not in before
    ]


def test_two_slots_that_begin_at_once_start_one_publisher(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. one slot: finds no thread. 2. another: finds none, has it started. 3. the first: does so as well."""
    settings.BGTASKS_SNAPSHOT = None
    starters: list[threading.Thread] = []

    def start_new_thread(function: Any, args: Any) -> None:
        starters.append(threading.Thread(target=function, args=args))
        starters[-1].start()

    with Observed(start=False) as core, Gate() as gate:
        core.publisher.listeners.append(gate)
        before = set(threading.enumerate())
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", start_new_thread)
            with after_call(core.publisher, "_is_wanted", core.publisher.notify):
                core.publisher.notify()
        for starter in starters:
            starter.join(BOUND)
        gate.wait_entered()

        assert len(starters) == 2
        assert len(publishers(before)) == 1


def test_many_slots_that_begin_at_once_start_one_publisher(settings: Settings) -> None:
    """The same with 16 threads that are let go together, again and again."""
    settings.BGTASKS_SNAPSHOT = None
    with Observed(start=False) as core:
        for _ in range(20):
            with Gate() as gate:
                core.publisher.listeners[:] = [gate]
                before = set(threading.enumerate())
                barrier = threading.Barrier(16)

                def begin(barrier: threading.Barrier = barrier) -> None:
                    barrier.wait(BOUND)
                    core.publisher.notify()

                slots = [threading.Thread(target=begin) for _ in range(16)]
                for slot in slots:
                    slot.start()
                for slot in slots:
                    slot.join(BOUND)
                gate.wait_entered()

                assert len(publishers(before)) == gate.inside == 1
            wait_until(lambda: not core.publisher._awake)


def test_publisher_that_is_stopped_before_it_began_does_not_begin(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. slot: has it started. 2. shutdown: finds no thread to stop. 3. the bare thread: starts none."""
    settings.BGTASKS_SNAPSHOT = None
    later: list[Callable[[], None]] = []
    heard: list[None] = []
    with Observed(start=False) as core:
        core.publisher.listeners.append(lambda: heard.append(None))
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", lambda run, args: later.append(partial(run, *args)))
            core.publisher.notify()
        stopped = core.publisher.stop()
        later[0]()

        assert (stopped, core.publisher.threads(), heard) == ([], [], [])
        core.publisher.notify()
        wait_until(lambda: heard)


def test_nothing_is_published_if_it_is_turned_off(settings: Settings) -> None:
    """BGTASKS_SNAPSHOT = None: no thread, no cache."""
    settings.BGTASKS_SNAPSHOT = None
    with Observed() as core:
        core.spawn("task", print, end="")
        core.drain()

        assert "bgtasks-publisher" not in [thread.name for thread in core.threads()]
        assert overview.overview(pools)["sight"] == "off"


def test_publisher_without_snapshots_serves_its_listeners(settings: Settings) -> None:
    """Figures for somebody else are written even if nothing is published."""
    settings.BGTASKS_SNAPSHOT = None
    heard = threading.Event()
    with Observed() as core:
        core.publisher.listeners.append(heard.set)
        core.spawn("task", print, end="")

        assert heard.wait(BOUND)
        core.drainer.stop()
        heard.clear()
        core.publisher.leave()
        assert heard.is_set()


def test_process_without_pid_namespaces_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process has no such thing, its machine is its place."""

    def readlink(path: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "readlink", readlink)

    assert snapshot.Identity().place.endswith("/")


def test_fork_does_not_happen_while_the_cache_is_used(cache: BaseCache) -> None:
    """A child would inherit a lock of the cache that nobody ever opens."""
    with Observed() as core:
        core.publisher.before_fork()
        held = core.publisher._io.locked()
        core.publisher.after_fork_in_parent()
        core.publisher.after_fork_in_parent()

        assert held
        assert not core.publisher._io.locked()


def test_fork_that_holds_the_locks_of_the_pools_waits_for_no_figures(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever forks holds the locks of all pools as it waits for the cache. The publisher needs none then."""
    monkeypatch.setattr(publisher, "FORK_PATIENCE", BOUND)
    with Gate() as gate:

        class HeldCache(LocMemCache):
            def get(self, *args: Any, **kwargs: Any) -> Any:
                gate()
                return super().get(*args, **kwargs)

        settings.CACHES = {"default": locmem("held")}
        settings.BGTASKS_SNAPSHOT = {"INTERVAL": 0.1}
        caches["default"].clear()
        monkeypatch.setattr(caches, "create_connection", lambda alias: HeldCache("held", {}))
        with Observed() as core, Gate() as running:
            core.publisher.place = "a place"  # so that it asks whether that is still its own
            core.spawn("held", running)
            gate.wait_entered()
            with core.queue.lock:
                gate.open()
                core.publisher.before_fork()
                held = core.publisher._forking
            core.publisher.after_fork_in_parent()

    assert held


def test_child_publishes_under_a_name_of_its_own(cache: BaseCache) -> None:
    """A forked child does not write over its parent's snapshot."""
    with Observed() as core:
        before = core.publisher.identity.id
        core.publisher.forget()

        assert core.publisher.identity.id != before


# Pausing.


def test_pause_in_the_cache_is_obeyed_and_lifted(cache: BaseCache) -> None:
    """A pool is paused by a key in the cache, and resumed when it is gone."""
    with Observed(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        cache.set(pause_key("core"), {}, None)
        core.logs.wait("pool 'core' is paused")
        gate.open()
        core.spawn("waits", print, end="")
        gate.wait_left()
        wait_until(lambda: core.stats().running == 0)
        assert core.stats().queued == 1

        cache.delete(pause_key("core"))
        core.logs.wait("pool 'core' is resumed")
        core.drain()
        assert core.stats().succeeded == 2


def test_set_paused_acts_at_once_on_the_own_process(cache: BaseCache) -> None:
    """Who pauses a pool sees it paused, and who resumes it sees it resumed."""
    control.set_paused(pools, "default", True, by="ada")
    [pool] = [pool for pool in overview.overview(pools)["pools"] if pool["name"] == "default"]
    assert pool["paused"]
    assert bgtasks.spawn("waits", print, end="")

    control.set_paused(pools, "default", False, by="ada")
    assert bgtasks.drain(BOUND)
    [pool] = [pool for pool in overview.overview(pools)["pools"] if pool["name"] == "default"]
    assert not pool["paused"]


def test_set_paused_of_a_pool_elsewhere_is_written_down(cache: BaseCache) -> None:
    """A pool that only other processes have is paused through the cache."""
    control.set_paused(pools, "theirs", True, by="ada")

    assert cache.get(pause_key("theirs"))["by"] == "ada"


def test_nothing_can_be_paused_if_nothing_is_published(settings: Settings) -> None:
    """Nobody would hear of it."""
    settings.BGTASKS_SNAPSHOT = None
    with pytest.raises(control.NotOrdered, match="BGTASKS_SNAPSHOT"):
        control.set_paused(pools, "default", True, by="ada")


# The overview.


def other(**changes: Any) -> dict[str, Any]:
    """Return the snapshot of another process, which is this one's with changes."""
    return {
        **json.loads(json.dumps(pools.publisher.snapshot())),
        "id": "other:1:abc",
        "host": "other",
        "place": "other/1",
        "pid": 1,
        **changes,
    }


def publish(cache: BaseCache, content: dict[str, Any], number: int = 0) -> None:
    cache.set_many({place_keys()[number]: content["id"], snapshot_key(content["id"]): json.dumps(content)})


def states(seen: dict[str, Any]) -> list[tuple[str, str]]:
    return [(process["host"], process["state"]) for process in seen["processes"]]


def test_overview_of_this_process_alone(cache: BaseCache) -> None:
    """This process is there even if it has published nothing, and the note tells that the cache is local.

    So are its pools, even if it has used none yet, as after a fork.
    """
    pools.restart()
    seen = overview.overview(pools)

    assert seen["sight"] == "local"
    assert [process["here"] for process in seen["processes"]] == [True]
    assert [pool["name"] for pool in seen["pools"]] == ["default"]


def test_overview_adds_the_processes_up(cache: BaseCache) -> None:
    """The figures of a pool are those of all processes together."""
    bgtasks.spawn("task", int)
    assert bgtasks.drain(BOUND)
    publish(cache, other())

    [alone] = [pool for pool in overview.snapshots(pools)[0][0]["pools"] if pool["name"] == "default"]
    seen = overview.overview(pools)
    [pool] = [pool for pool in seen["pools"] if pool["name"] == "default"]

    assert len(seen["processes"]) == 2
    assert pool["stats"]["conn_max"] == 2 * alone["stats"]["conn_max"]
    [row] = [row for row in pool["names"] if row["name"] == "task"]
    assert row["succeeded"] >= 2
    assert row["run_p50"] <= row["run_p95"]


def test_overview_has_the_percentiles_of_all_processes(cache: BaseCache) -> None:
    """The buckets are added up, and no percentile is more than the longest time in any process."""
    with Observed() as core:
        core.publisher.config = None
        core.spawn("task", int)
        core.drain()
        content = json.loads(json.dumps(core.publisher.snapshot()))["pools"]
    one, two = (json.loads(json.dumps(content)) for _ in range(2))
    fast, slow = str(bisect_left(BOUNDS, 0.01)), str(bisect_left(BOUNDS, 61.0))
    one[0]["names"][0]["runs"] = {"counts": {fast: 3}, "seconds": 0.03, "longest": 0.01}
    two[0]["names"][0]["runs"] = {"counts": {fast: 1, slow: 2}, "seconds": 122.01, "longest": 61.0}
    publish(cache, other(id="one", pools=one), number=1)
    publish(cache, other(id="two", pools=two), number=2)

    [pool] = [pool for pool in overview.overview(pools)["pools"] if pool["name"] == "core"]
    [row] = pool["names"]
    assert (row["spawned"], row["succeeded"]) == (2, 2)
    assert (row["run_p50"], row["run_p95"]) == (0.0097, 61.0)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"idle": True, "at": 0}, "idle"),
        ({"idle": False}, "idle"),
        ({"idle": False, "at": 0}, "silent"),
        ({"drainer": "dead"}, "dead"),
    ],
)
def test_overview_tells_how_a_process_is(changes: Any, state: Any, cache: BaseCache) -> None:
    """An active process that says nothing any more is silent; an idle one has nothing to say."""
    assert bgtasks.drain(BOUND)  # what an earlier test has left
    publish(cache, other(**changes))

    assert ("other", state) in states(overview.overview(pools))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, False),
        ({"drainer": "blocked"}, False),  # it was killed since it was blocked
        ({"at": 60.0}, True),  # another one, with the same id, that has published since
        ({"pid": 2}, True),
        ({"host": "another"}, True),
        ({"idle": True}, True),  # it may live, and be another one
    ],
)
def test_overview_shows_a_killed_process_only_as_a_loss_once_that_is_told(
    changes: Any, shown: bool, cache: BaseCache
) -> None:
    """What it had waiting is lost: it is not counted any more, and nobody has to look whether it lives."""
    bgtasks.stats()  # has the pools built, if no test before this one has
    loss = {"at": 50.0, "host": "other", "pid": 1, "tasks": 2, "names": "2 'lost'"}
    killed = other(**{"idle": False, "at": 40.0, **changes})
    publish(cache, killed, number=1)
    publish(cache, other(id="teller", host="teller", losses=[loss]), number=2)
    seen = overview.overview(pools)

    assert loss in seen["losses"]  # beside those that this process has reported in earlier tests
    assert ((killed["host"], killed["pid"]) in [(of["host"], of["pid"]) for of in seen["processes"]]) is shown
    [pool] = [pool for pool in seen["pools"] if pool["name"] == "default"]
    assert pool["processes"] == (3 if shown else 2)


def test_overview_tells_a_busy_process(cache: BaseCache) -> None:
    """A process with a task that runs is active."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()

        assert [state for _, state in states(overview.overview(pools))] == ["active"]


def dropping(names: dict[str, int], last: list[tuple[float, str]]) -> list[dict[str, Any]]:
    """Return the pools of a process that has dropped so many tasks of these names, the `last` ones then."""
    with Observed() as core:
        [pool] = json.loads(json.dumps(core.publisher.snapshot()))["pools"]
    none = {"counts": {}, "seconds": 0.0, "longest": 0.0}
    nothing = {
        **dict.fromkeys(("queued", "running", "retried", "delayed"), 0),
        "oldest": None,
        "due": None,
        "ended": {},
        "waits": none,
        "runs": none,
    }
    pool["names"] = [
        {"name": name, "spawned": count, "dropped": {"full": count}, **nothing}
        for name, count in names.items()
    ]
    pool["drops"] = [{"at": at, "name": name, "reason": "full"} for at, name in last]
    return [pool]


def drops(cache: BaseCache, **changes: Any) -> list[tuple[Any, ...]]:
    publish(cache, other(**changes))
    [pool] = [pool for pool in overview.overview(pools)["pools"] if pool["name"] == "core"]
    return [(drop["name"], drop["reason"], drop["count"], drop["at"], drop["host"]) for drop in pool["drops"]]


def test_overview_tells_how_many_were_dropped(cache: BaseCache) -> None:
    """Not how many of the few that are kept, but all since the process started."""
    with Observed(conn_max=1, capacity=1) as core, Gate() as gate:
        core.publisher.config = None
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        for _ in range(172):
            core.spawn("late", print, end="")
        content = json.loads(json.dumps(core.publisher.snapshot()))["pools"]

    assert len(content[0]["drops"]) == 20
    assert drops(cache, pools=content) == [("late", "full", 172, content[0]["drops"][-1]["at"], "other")]


def test_overview_tells_what_was_dropped_last_first(cache: BaseCache) -> None:
    """Of what was dropped so long ago that its time is not kept, the number is still there, at the end."""
    content = dropping({"a": 3, "b": 500, "c": 7}, [(1.0, "a"), (2.0, "c"), (3.0, "a")])

    assert drops(cache, pools=content) == [
        ("a", "full", 3, 3.0, "other"),
        ("c", "full", 7, 2.0, "other"),
        ("b", "full", 500, None, "other"),
    ]


def test_overview_tells_of_dropped_tasks_under_the_name_they_are_counted_by(cache: BaseCache) -> None:
    """Names past NAMES_MAX are counted together; the last one of them is the time of all."""
    content = dropping({"a": 1, OTHERS: 9}, [(1.0, "a"), (2.0, "x"), (3.0, "y")])

    assert drops(cache, pools=content) == [
        (OTHERS, "full", 9, 3.0, "other"),
        ("a", "full", 1, 1.0, "other"),
    ]


def test_overview_has_no_number_for_a_name_that_was_left_out(cache: BaseCache) -> None:
    """A snapshot too large for the cache has less names: what is not known is not made up."""
    assert drops(cache, pools=dropping({}, [(1.0, "z")])) == [("z", "full", None, 1.0, "other")]


@pytest.mark.parametrize(("error", "number"), [(ProcessLookupError, 1), (PermissionError, 2), (None, 2)])
def test_overview_leaves_out_a_process_that_is_gone(
    error: Any, number: int, cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process on this machine one can tell that it was killed."""
    publish(cache, other(place=pools.publisher.identity.place))

    def kill(pid: int, signum: int) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)

    assert len(overview.overview(pools)["processes"]) == number


def test_overview_sends_no_signal_where_that_is_no_question(
    cache: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, os.kill would send Ctrl-C to the process. It is shown as silent instead."""
    publish(cache, other(place=pools.publisher.identity.place))
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append(pid))
    monkeypatch.setattr(overview, "CAN_PROBE", False)

    assert len(overview.overview(pools)["processes"]) == 2
    assert killed == []


def test_overview_does_not_read_snapshots_of_another_version(cache: BaseCache) -> None:
    """During a deployment, old and new processes do not confuse each other."""
    publish(cache, other(version=0))

    assert len(overview.overview(pools)["processes"]) == 1


def test_overview_without_a_cache_shows_this_process(settings: Settings) -> None:
    """If the cache does not answer, the page says so and shows what it can."""
    settings.CACHES = {"default": locmem("broken", BrokenCache)}
    with Logs() as logs:
        seen = overview.overview(pools)

    assert (seen["sight"], len(seen["processes"])) == ("broken", 1)
    assert logs.of("the snapshots could not be read")


@pytest.mark.parametrize(
    ("points", "age", "goes_on", "last"),
    [
        ([], 0.0, True, [0, 0, 0]),
        ([4], 1.0, True, [0, 0, 4]),
        ([4], 6.0, True, [4, 4, 4]),
        ([4], 6.0, False, [4, 0, 0]),
        ([4], 1e9, False, [0, 0, 0]),
        ([4], -1e9, False, [0, 0, 4]),  # its clock is ahead
    ],
)
def test_points_are_shifted_to_now(points: Any, age: Any, goes_on: Any, last: Any) -> None:
    """Of a process that has fallen silent nothing is assumed, and one at work goes on."""
    shown = shifted(points, age, goes_on=goes_on)

    assert (len(shown), shown[-3:]) == (100, last)
