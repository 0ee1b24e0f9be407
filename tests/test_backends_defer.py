"""PoolBackend and ``run_after``: a task waits in its pool, or goes to the engine, and never runs early."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.db import connections, transaction
from django.tasks import TaskResultStatus
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.test import override_settings
from django.utils import timezone

import bgtasks
from bgtasks.exceptions import TaskDropped
from tests import broker
from tests.gate import BOUND, wait_until
from tests.handoff.worker import TASKS
from tests.pool import Logs
from tests.snippets import snippet
from tests.test_backends import finished, problems, tasks_setting
from tests.testapp import tasks


@pytest.fixture(autouse=True)
def pool_backend() -> Iterator[None]:
    """Run every task of these tests on pools, or give them to an engine that keeps them."""
    broker.enqueued.clear()  # of what other tests have left there
    with override_settings(TASKS={**TASKS, **tasks_setting()}, BGTASKS={"default": {}, "email": {}}):
        yield
    broker.enqueued.clear()
    SyncToAsync.single_thread_executor.submit(connections.close_all).result(BOUND)


def handing_off(alias: str = "scheduler", **options: Any) -> Any:
    """Have the pool "email" hand off to an engine."""
    return override_settings(BGTASKS={"email": {"HANDOFF_TO": alias, **options}})


def after(seconds: float) -> datetime:
    return timezone.now() + timedelta(seconds=seconds)


def deferred(task: Any, seconds: float) -> Any:
    """Return the task of the pool "email" that runs after so many seconds."""
    return task.using(queue_name="email", run_after=after(seconds))


def stats(pool: str = "email") -> Any:
    return bgtasks.stats()[pool]


# In the pool.


@pytest.mark.parametrize("task", [tasks.answer, tasks.aanswer])
def test_a_task_waits_for_its_run_after(task: Any) -> None:
    """It is READY and counted as waiting until then, and does not run early."""
    run_after = after(0.2)
    result = task.using(run_after=run_after).enqueue()
    assert (result.status, stats("default").queued) == (TaskResultStatus.READY, 1)
    assert bgtasks.drain(BOUND)

    result.refresh()
    assert (result.return_value, result.started_at >= run_after) == (42, True)


def test_a_task_whose_run_after_has_passed_runs_at_once() -> None:
    """Nothing is left to wait for."""
    assert finished(tasks.answer.using(run_after=after(-5))).return_value == 42


def test_age_and_figures_count_from_run_after() -> None:
    """The time for which a task was not to run is no waiting, and does not make it old."""
    with override_settings(BGTASKS={"default": {"EXPIRES": 30}}):
        run_after = after(50)
        tasks.noop.using(run_after=run_after).enqueue()
        [task] = bgtasks.pools.built()[0].queue.delayed

        assert task.policy.due_at == task.spawned_at
        assert task.policy.expires_at == task.spawned_at + 30


def test_a_task_with_a_run_after_ignores_its_key() -> None:
    """It does not take the place of one that may run now, nor one of these its place."""
    for run_after in (after(0.2), None, after(0.2)):
        (tasks.rebuild.using(run_after=run_after) if run_after else tasks.rebuild).enqueue(1)
    assert bgtasks.drain(BOUND)

    assert (stats("default").coalesced, stats("default").succeeded) == (0, 3)


@pytest.mark.parametrize(("longest", "seconds"), [(None, 65), (5, 6), (0, 1)])
def test_a_later_run_after_is_refused(longest: float | None, seconds: float) -> None:
    """It raises where the task is made, and the error names the options that would change it."""
    options = {} if longest is None else {"DEFER_MAX": longest}
    with override_settings(TASKS=tasks_setting(**options)):
        with pytest.raises(InvalidTask, match=r"s ahead \(DEFER_MAX\), and pool 'default' has no engine"):
            tasks.noop.using(run_after=after(seconds))


def test_a_longer_defer_max_is_kept() -> None:
    """DEFER_MAX may be longer than a minute."""
    with override_settings(TASKS=tasks_setting(DEFER_MAX=300)):
        tasks.noop.using(run_after=after(299)).enqueue()

        assert stats("default").queued == 1


def test_a_run_after_without_a_time_zone_is_refused() -> None:
    """As Django demands it."""
    with pytest.raises(InvalidTask, match="run_after must be an aware datetime"):
        tasks.noop.using(run_after=datetime.now())  # noqa: DTZ005  # that is the point


def test_inline_a_task_does_not_wait() -> None:
    """Whoever runs tasks at once wants to see what they do."""
    with override_settings(BGTASKS={"default": {"MODE": "inline"}}):
        result = tasks.answer.using(run_after=after(50)).enqueue()

        assert (result.return_value, stats("default").succeeded) == (42, 1)
        [pool] = bgtasks.pools.built()
        assert pool.queue.account.of(tasks.answer.module_path).wait_seconds >= 0


def test_a_shutdown_gives_up_what_is_due_later() -> None:
    """It does not wait for it: the result says FAILED, and the log names the task."""
    result = deferred(tasks.noop, 50).enqueue()
    with Logs() as logs:
        assert bgtasks.pools["email"].shutdown(BOUND) is False

        result.refresh()
        [error] = result.errors
        assert (result.status, error.exception_class) == (TaskResultStatus.FAILED, TaskDropped)
        assert len(logs.above(logging.WARNING)) == 1
        assert "with 1 tasks cancelled" in logs.above(logging.WARNING)[0]


def test_a_shutdown_waits_for_what_is_due_before_its_end() -> None:
    """It runs, and not early."""
    run_after = after(0.2)
    result: Any = tasks.answer.using(queue_name="email", run_after=run_after).enqueue()

    assert bgtasks.pools["email"].shutdown(BOUND) is True
    result.refresh()
    assert (result.return_value, result.started_at >= run_after) == (42, True)


@pytest.mark.django_db(transaction=True)
def test_a_task_that_waits_for_its_commit_too() -> None:
    """Its time counts from now, not from the commit: one whose time has come by then runs at once."""
    with transaction.atomic():
        soon: Any = tasks.answer.using(run_after=after(0.001)).enqueue()
        later = tasks.answer.using(run_after=after(50)).enqueue()
        wait_until(lambda: after(0) > soon.task.run_after)

    wait_until(lambda: stats("default").succeeded == 1)
    soon.refresh()
    later.refresh()
    assert (soon.return_value, later.status) == (42, TaskResultStatus.READY)


@pytest.mark.parametrize("longest", ["60", True, -1, 86401, float("nan"), None])
def test_a_wrong_defer_max_is_reported(longest: Any) -> None:
    """It is a number of seconds, up to a day."""
    assert repr(longest) in problems(TASKS=tasks_setting(DEFER_MAX=longest))["bgtasks.E028"]


# With an engine.


@pytest.mark.parametrize("task", [tasks.answer, tasks.aanswer])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_later_task_goes_to_the_engine_at_once(task: Any, asynchronous: bool) -> None:
    """In the code that enqueues it, with its time. The pool never sees it."""
    with handing_off():
        late = deferred(task, 3600)
        result = async_to_sync(late.aenqueue)() if asynchronous else late.enqueue()

        [sent] = broker.enqueued
        assert (sent.task.run_after, sent.task.backend) == (late.run_after, "scheduler")
        assert (stats().spawned, result.status) == (0, TaskResultStatus.READY)
        assert task.get_result(result.id).id == result.id


def test_inline_a_later_task_does_not_go_to_the_engine() -> None:
    """It runs at once, as everything does."""
    with handing_off(MODE="inline"):
        assert deferred(tasks.answer, 3600).enqueue().return_value == 42
        assert broker.enqueued == []


def test_a_later_task_is_refused_if_the_engine_does_not_take_it() -> None:
    """Since it supports no run_after, or since the task cannot travel."""
    with handing_off("broker"), pytest.raises(InvalidTask, match="'broker' of pool 'email' does not support"):
        deferred(tasks.noop, 3600)
    with handing_off(EXPIRES=5):
        late = deferred(tasks.noop, 3600)
        with pytest.raises(InvalidTask, match="cannot be handed off to the engine 'scheduler': it expires"):
            late.enqueue()


@pytest.mark.django_db(transaction=True)
def test_a_later_task_goes_to_the_engine_after_the_commit() -> None:
    """After a rollback it does not exist."""
    with handing_off():
        with transaction.atomic():
            deferred(tasks.noop, 3600).enqueue()
            assert broker.enqueued == []
        assert len(broker.enqueued) == 1
        with transaction.atomic():
            lost = deferred(tasks.noop, 3600).enqueue()
            transaction.set_rollback(True)
        assert len(broker.enqueued) == 1
        with pytest.raises(TaskResultDoesNotExist):
            tasks.noop.get_result(lost.id)


def test_a_shutdown_hands_off_what_waits_for_its_time() -> None:
    """With that time."""
    with handing_off():
        late = deferred(tasks.noop, 50)
        late.enqueue()

        assert bgtasks.pools["email"].shutdown(BOUND) is True
        [sent] = broker.enqueued
        assert (sent.task.run_after, stats().handed_off) == (late.run_after, 1)


def test_a_shutdown_hands_off_nothing_that_would_run_early() -> None:
    """An engine without run_after gets nothing: what is due in time runs here, the rest is given up."""
    with handing_off("broker"):
        soon = deferred(tasks.answer, 0.2).enqueue()
        late = deferred(tasks.noop, 50).enqueue()

        assert bgtasks.pools["email"].shutdown(1) is False
        soon.refresh()
        late.refresh()
        assert (soon.return_value, soon.started_at >= soon.task.run_after) == (42, True)
        assert (late.status, broker.enqueued) == (TaskResultStatus.FAILED, [])


@pytest.mark.parametrize("alias", ["scheduler", "broker"])
def test_an_outbox_hands_tasks_off_with_their_time(alias: str) -> None:
    """At once, if the engine supports run_after; or else they run here, and not early."""
    with handing_off(alias, HANDOFF_WHEN="always"):
        result = deferred(tasks.answer, 0.2).enqueue()
        assert bgtasks.drain(BOUND)
        result.refresh()

        handed_off = alias == "scheduler"
        assert (stats().handed_off, stats().succeeded) == (int(handed_off), int(not handed_off))
        assert handed_off or result.started_at >= result.task.run_after
        assert [sent.task.run_after for sent in broker.enqueued] == [result.task.run_after] * handed_off


def test_a_time_that_has_passed_holds_no_handoff_up() -> None:
    """An engine that supports no run_after takes what is due."""
    with handing_off("broker", HANDOFF_WHEN="always"):
        deferred(tasks.noop, -5).enqueue()
        assert bgtasks.drain(BOUND)

        assert stats().handed_off == 1


@pytest.mark.parametrize(("alias", "priority"), [("scheduler", 10), ("broker", 0), ("table", 0)])
@pytest.mark.django_db(transaction=True)
def test_a_priority_is_handed_off_to_an_engine_that_knows_it(alias: str, priority: int) -> None:
    """An engine that supports none takes the task without it."""
    setting = {**TASKS, **tasks_setting(PRIORITIES="ignore")}
    with override_settings(TASKS=setting), handing_off(alias, HANDOFF_WHEN="always"):
        tasks.noop.using(queue_name="email", priority=10).enqueue()
        assert bgtasks.drain(BOUND)

        assert stats().handed_off == 1
        assert [sent.task.priority for sent in broker.enqueued] == [priority] * (alias != "table")


def test_an_async_enqueue_of_a_deferred_task() -> None:
    """It waits in the pool like any other."""
    result = asyncio.run(tasks.answer.using(run_after=after(50)).aenqueue())

    assert (result.status, stats("default").queued) == (TaskResultStatus.READY, 1)


def test_the_documentation_defers_a_task() -> None:
    """Its example does what it says."""
    names: dict[str, Any] = {"ask_partner": tasks.noop, "partner": SimpleNamespace(pk=1)}

    exec(snippet("docs/django-tasks.md", "run_after=soon"), names)

    [task] = bgtasks.pools.built()[0].queue.delayed
    assert stats("default").queued == 1
    assert 0 < task.spawned_at - monotonic() <= 30
