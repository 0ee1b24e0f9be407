"""Health: what makes the background tasks of a process unwell."""

import asyncio
import re
import threading
from functools import partial

import pytest
from pytest_django import Settings

import bgtasks
from bgtasks import health
from bgtasks.handoff.slots import HandoffSlots
from bgtasks.monitoring.health import problems
from bgtasks.pools import pools
from tests.engines import FakeEngine
from tests.gate import BOUND, Gate
from tests.pool import Core, held, make_task


@pytest.fixture(autouse=True)
def own_pools(settings: Settings) -> None:
    settings.BGTASKS = {"default": {"CAPACITY": 5, "CONN_MAX": 1}}
    bgtasks.spawn("task", int)
    assert bgtasks.drain(BOUND)


def test_idle_process_is_well() -> None:
    """Nothing to do is no problem."""
    assert health.problems() == []


def test_busy_process_is_well() -> None:
    """Nor is work."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", int)

        assert health.problems() == []
        assert bgtasks.stats()["default"].queued == 1
        assert health.problems(wait_max=None) == []
        gate.open()
        assert bgtasks.drain(BOUND)


def test_task_that_waits_for_too_long_is_a_problem() -> None:
    """The oldest waiting task tells that nothing moves; in a paused pool that is meant."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        bgtasks.spawn("waits", int)
        [slots] = pools.built()

        [problem] = health.problems(wait_max=0)
        slots.queue.pause()
        paused = health.problems(wait_max=0)
        slots.queue.resume()

    assert re.match(r"a task of pool 'default' has waited for \d+ s \(limit 0 s\)", problem)
    assert paused == []


def test_every_slot_stuck_is_a_problem() -> None:
    """If nothing can run any more, the process is unwell."""
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        [task] = pools.built()[0].queue.running()
        task.overran = True

        assert health.problems() == ["all 1 slots of pool 'default' are stuck"]


def test_every_slot_stuck_but_the_one_that_hands_off_is_a_problem() -> None:
    """The slot that is kept for the engine runs no task, and so is never stuck."""
    slots = partial(HandoffSlots, engine=FakeEngine(), always=False)
    with Core(conn_max=2, slots=slots) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        [task] = core.queue.running()
        task.overran = True

        assert problems(core.drainer, [core.slots], None) == ["all 1 slots of pool 'core' are stuck"]


def test_task_that_waits_for_the_engine_waits() -> None:
    """A pool that hands everything off is unwell if the engine keeps a task waiting."""
    with Core(start=False) as core:
        core.queue.check_out_new = True
        core.queue.put(make_task("waits"))
        [problem] = problems(core.drainer, [core.slots], 0)
        core.queue.put_back(held(core.queue))

    assert problem.startswith("a task of pool 'core' has waited")


def test_dead_drainer_and_dead_slots_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that have ended unasked are seen."""
    dead = threading.Thread()
    [slots] = pools.built()
    with monkeypatch.context() as patch:
        patch.setattr(pools.drainer.loop, "thread", dead)
        patch.setattr(slots.all[0], "thread", dead)

        assert health.problems() == ["the drainer is dead", "all slots of pool 'default' are dead"]


def test_pool_without_a_task_so_far_is_well(settings: Settings) -> None:
    """It has no thread yet, and needs none."""
    settings.BGTASKS = {"default": {}}
    assert bgtasks.stats()["default"].spawned == 0
    [slots] = pools.built()

    assert slots.all == []
    assert health.problems() == []


def test_pool_that_is_shut_down_is_a_problem(settings: Settings) -> None:
    """A process that accepts nothing more should get no more requests."""
    bgtasks.shutdown()
    found = health.problems()
    settings.BGTASKS = {}

    assert found == ["pool 'default' is shut down"]


def test_check_for_django_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """django-health-check gets the same, as the error of a check."""
    pytest.importorskip("health_check")
    from bgtasks.contrib.health import BackgroundTasks

    well = asyncio.run(BackgroundTasks().get_result())
    monkeypatch.setattr(health, "problems", lambda wait_max: [f"waited more than {wait_max:g} s", "dead"])
    unwell = asyncio.run(BackgroundTasks(wait_max=5).get_result())

    assert well.error is None
    assert "waited more than 5 s; dead" in str(unwell.error)
