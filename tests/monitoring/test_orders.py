"""Orders for all processes: pauses that outlive a cache, and the cancelling of what waits under a name."""

from typing import Any

import pytest
from django.core.cache import BaseCache, caches
from pytest_django import Settings

import bgtasks
from bgtasks.monitoring import control
from bgtasks.monitoring.cache import ORDERS, order_keys, pause_key
from bgtasks.monitoring.orders import Cancellation, Found, Orders, Pause, cancel
from bgtasks.pools import pools
from bgtasks.signals import task_finished
from tests.gate import BOUND, Gate, wait_until
from tests.monitoring.test_publisher import BrokenCache, Observed, cache, locmem
from tests.pool import Core, Logs

__all__ = ["cache"]  # the fixture

pytestmark = pytest.mark.usefixtures("patient")


def order(name: str = "waits", **changes: Any) -> Cancellation:
    return Cancellation.new("core", name, "ada")._replace(**changes)


def test_cancelled_tasks_are_reported_and_counted() -> None:
    """What waits under the name ends as cancelled; listeners hear of it, and one warning has the number."""
    heard: list[Any] = []

    def receiver(name: str, outcome: str, **named: Any) -> None:
        heard.append((name, outcome))

    with Core(conn_max=1) as core, Gate() as gate:
        task_finished.connect(receiver, sender=core.pool)
        core.spawn("held", gate)
        gate.wait_entered()
        for _ in range(2):
            core.spawn("waits", int)
            core.spawn("stays", int)
        number = cancel(core.slots, order())
        gate.open()
        core.drain()
        stats = core.stats()
        task_finished.disconnect(receiver, sender=core.pool)

    assert number == 2
    assert (stats.cancelled, stats.succeeded, stats.spawned) == (2, 3, 5)
    assert heard[:2] == [("waits", "cancelled")] * 2
    assert core.logs.of("pool 'core': 2 waiting tasks called 'waits' were cancelled by 'ada'")


def test_order_reaches_another_process_once(cache: BaseCache) -> None:
    """A process at work cancels at its next beat what waits then, and not what comes later."""
    with Observed(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        wait_until(lambda: core.published(cache))  # so it has looked for old orders
        core.spawn("waits", int)
        control.cancel_waiting(pools, "core", "waits", by="ada")
        core.logs.wait("1 waiting tasks called 'waits' were cancelled by 'ada'")
        core.spawn("waits", int)
        at = core.published(cache)["at"]
        wait_until(lambda: core.published(cache)["at"] > at + 0.2)
        assert core.stats().queued == 1

        gate.open()
        core.wait_idle()
        assert (core.stats().cancelled, core.stats().succeeded) == (1, 2)


def test_order_from_before_there_was_anything_to_do_cancels_nothing(cache: BaseCache) -> None:
    """What an idle process spawns after an order was not meant by it."""
    control.cancel_waiting(pools, "core", "waits", by="ada")
    with Observed(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        core.spawn("waits", int)
        gate.wait_entered()
        wait_until(lambda: (seen := core.published(cache)) and seen["pools"][0]["stats"]["running"])
        assert core.stats().queued == 1

        gate.open()
        core.wait_idle()
        assert core.stats().succeeded == 2


def test_too_many_orders_at_once_are_refused(cache: BaseCache) -> None:
    """Each has a key of its own, and there are so many keys."""
    for _ in range(ORDERS):
        control.cancel_waiting(pools, "elsewhere", "waits", by="ada")

    with pytest.raises(control.NotOrdered, match="too many"):
        control.cancel_waiting(pools, "elsewhere", "waits", by="ada")


@pytest.mark.parametrize("value", [None, 7, [], {}, {"id": 7}, {"id": "a", "pool": "core", "name": None}])
def test_what_is_no_order_is_left_alone(value: Any, cache: BaseCache) -> None:
    """Whatever lies in the cache, a pause is obeyed by its key alone, and nothing is cancelled."""
    cache.set(order_keys()[0], value)
    cache.set(pause_key("core"), value)
    found = Orders().read(cache, ["core"])

    assert found.cancellations == []
    assert set(found.pauses) == {"core"}


def test_pool_is_resumed_while_the_cache_is_down(cache: BaseCache, settings: Settings) -> None:
    """This process goes on at once. Once the cache answers, it ends the pause for all others."""
    control.set_paused(pools, "default", True, by="ada")
    assert bgtasks.spawn("waits", int)
    here = settings.CACHES
    settings.CACHES = {"default": locmem("broken", BrokenCache)}
    with Logs() as logs:
        told = control.set_paused(pools, "default", False, by="ada")
        assert bgtasks.drain(BOUND)
        assert logs.of("pool 'default' was resumed in this process only: the cache does not answer")
    assert told is False

    settings.CACHES = here
    wait_until(lambda: pause_key("default") not in caches["default"])
    assert not pools["default"].build().slots.queue.paused


def test_pool_is_not_paused_while_the_cache_is_down(settings: Settings) -> None:
    """The others would not learn of it. The log says what was not done, and why."""
    settings.CACHES = {"default": locmem("broken", BrokenCache)}

    with Logs() as logs:
        with pytest.raises(control.NotOrdered, match="the cache does not answer"):
            control.set_paused(pools, "default", True, by="ada")
        with pytest.raises(control.NotOrdered, match="the cache does not answer"):
            control.cancel_waiting(pools, "default", "waits", by="ada")

    assert logs.of("pool 'default' could not be paused: the cache does not answer")
    assert logs.of("waiting tasks could not be cancelled: the cache does not answer")


def test_pause_that_was_ended_here_is_not_obeyed_again() -> None:
    """1. publisher: reads the pause. 2. somebody ends it while the cache is down. 3. publisher: obeys."""
    orders, pause = Orders(), Pause.new("ada")
    with Core() as core:
        orders.pause(core.slots, pause)
        orders.resume(core.slots, told=False)
        orders.carry_out(Found({"core": pause}, []), [core.slots])

        assert not core.queue.paused
