"""PoolBackend and policies: the mark on a task's function, and what a policy does to a result."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.tasks import TaskResultStatus, task
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_finished, task_started
from django.test import override_settings

import bgtasks
from bgtasks.backends import policy
from bgtasks.exceptions import TaskDropped
from bgtasks.results import Record, new_result, results_of
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.test_backends import finished, held, receiving, tasks_setting
from tests.testapp import tasks

ONE_SLOT = {"default": {"CONN_MAX": 1}}


@pytest.fixture(autouse=True)
def pool_backend() -> Iterator[None]:
    """Run every task of these tests on a pool."""
    with override_settings(TASKS=tasks_setting(), BGTASKS=ONE_SLOT):
        yield


@contextmanager
def told() -> Iterator[tuple[list[str], list[str]]]:
    """Record which results Django's ``task_started`` and ``task_finished`` are about, and on which thread."""
    started: list[str] = []
    ended: list[str] = []

    def on_started(task_result: Any, **kwargs: Any) -> None:
        started.append(task_result.id)

    def on_finished(task_result: Any, **kwargs: Any) -> None:
        ended.extend([task_result.id, threading.current_thread().name])

    with receiving(task_started, on_started), receiving(task_finished, on_finished):
        yield started, ended


@contextmanager
def ended_on() -> Iterator[list[str]]:
    """Record on which threads ``task_finished`` is sent, while nobody listens to ``task_started``."""
    threads: list[str] = []

    def on_finished(**kwargs: Any) -> None:
        threads.append(threading.current_thread().name)

    with receiving(task_finished, on_finished):
        yield threads


def stats() -> Any:
    return bgtasks.stats()["default"]


# Retries.


@pytest.mark.parametrize("task", [tasks.flaky, tasks.aflaky])
def test_each_try_is_an_attempt_of_one_result(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The result has a worker for each try and the error of each that failed; its end is told once."""
    tasks.tries_left["three"] = 3
    with told() as (started, ended):
        result = finished(task, "three")

    assert (result.status, result.attempts, result.return_value) == (TaskResultStatus.SUCCESSFUL, 3, 3)
    assert [error.exception_class for error in result.errors] == [ValueError, ValueError]
    assert "2 to go" in result.errors[0].traceback
    assert result.started_at < result.last_attempted_at < result.finished_at
    assert started == [result.id] * 3
    assert (ended[0], len(ended)) == (result.id, 2)
    assert (stats().retried, stats().succeeded) == (2, 1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("task", [tasks.flaky, tasks.aflaky])
def test_the_last_try_that_fails_is_the_end(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The result says FAILED with the errors of all tries, and Django logs the last one, once."""
    tasks.tries_left["five"] = 5
    with told() as (started, ended):
        result = finished(task, "five")

    assert (result.status, result.attempts, len(result.errors)) == (TaskResultStatus.FAILED, 4, 4)
    assert started == [result.id] * 4
    assert (ended[0], len(ended)) == (result.id, 2)
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "1 to go" in str((record.exc_info or (None, None))[1])


def test_the_settings_of_the_pool_are_the_default() -> None:
    """RETRIES applies to tasks of django.tasks too."""
    with override_settings(BGTASKS={"default": {"RETRIES": 2, "RETRY_DELAY": 0}}):
        assert finished(tasks.fail).attempts == 3
        assert finished(tasks.afail).attempts == 3


def test_what_is_not_to_be_tried_again_is_not() -> None:
    """The task raises something else than ``retry_on``."""
    assert finished(tasks.fail_for_good).attempts == 1


@pytest.mark.parametrize(("task", "gate"), [(tasks.fail_after, Gate), (tasks.afail_after, AsyncGate)])
def test_between_two_tries_a_task_is_ready(task: Any, gate: Any) -> None:
    """Its result says READY, and why it failed; a shutdown has it make its last try at once."""
    with override_settings(BGTASKS={"email": {}}), told() as (_, ended):
        with gate() as held_by:
            tasks.gates["gate"] = held_by
            result = task.using(queue_name="email").enqueue("gate")
            held_by.wait_entered()
        wait_until(lambda: bgtasks.stats()["email"].retried)

        result.refresh()
        assert (result.status, result.attempts, len(result.errors)) == (TaskResultStatus.READY, 1, 1)
        assert ended == []
        assert bgtasks.pools["email"].shutdown(BOUND)
        result.refresh()
        assert (result.status, result.attempts, len(result.errors)) == (TaskResultStatus.FAILED, 2, 2)


@pytest.mark.parametrize(("task", "gate"), [(tasks.fail_after, Gate), (tasks.afail_after, AsyncGate)])
def test_a_try_that_finds_no_place_is_the_end(task: Any, gate: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The task has failed, its end is told on the slot's thread, and Django logs what it raised."""
    with override_settings(BGTASKS={"default": {"CONN_MAX": 1, "CAPACITY": 1}}), ended_on() as ended:
        with held(gate) as held_by:
            result = task.enqueue("gate")
            held_by.wait_entered()
            assert bgtasks.spawn("waits", print, end="")
        assert bgtasks.drain(BOUND)

        result.refresh()
        assert (result.status, result.attempts, len(result.errors)) == (TaskResultStatus.FAILED, 1, 1)
        assert ended == ["bgtasks-default-1"]
        [record] = [record for record in caplog.records if record.levelname == "ERROR"]
        assert record.name == "django.tasks"
        assert "this task failed" in str((record.exc_info or (None, None))[1])


def test_a_retry_that_gives_way_has_failed() -> None:
    """Its result says what it had raised, and that it was given up."""
    options = {"CONN_MAX": 1, "CAPACITY": 2, "ON_FULL": "drop_oldest", "RETRIES": 1, "RETRY_DELAY": 0}
    with override_settings(BGTASKS={"default": options}), told() as (_, ended):
        with Gate() as first, Gate() as second:
            tasks.gates.update(first=first, second=second)
            result = tasks.held_and_fail.enqueue("first")
            first.wait_entered()
            tasks.held.enqueue("second")
            first.open()
            second.wait_entered()

            assert all(bgtasks.spawn("newer", print, end="") for _ in range(2))

            result.refresh()
            assert (result.status, result.attempts) == (TaskResultStatus.FAILED, 1)
            assert [error.exception_class for error in result.errors] == [ValueError, TaskDropped]
            assert ended[0] == result.id
        assert bgtasks.drain(BOUND)
        assert len(ended) == 4


def test_a_task_that_has_ended_is_not_run_again() -> None:
    """Nor is it if the pool tries again what has timed out.

    1. the task: has succeeded, and its result says so
    2. a receiver of ``task_finished``: takes longer than TASK_TIMEOUT
    3. the pool: tries it again
    """
    tasks.tries_left["one"] = 1
    with override_settings(BGTASKS={"default": {"TASK_TIMEOUT": 1}}), Gate() as gate:
        with receiving(task_finished, gate):
            result = tasks.aflaky.enqueue("one")
            gate.wait_entered()
            [running] = bgtasks.pools.built()[0].queue.running()
            wait_until(lambda: running.overran)
            gate.open()
            assert bgtasks.drain(BOUND)

        result.refresh()
        assert (result.status, result.attempts) == (TaskResultStatus.SUCCESSFUL, 1)
        assert (stats().retried, tasks.tries_left["one"]) == (1, 0)


def test_inline_retries_happen_at_once() -> None:
    """The result that ``enqueue`` returns has them all."""
    with override_settings(BGTASKS={"default": {"MODE": "inline"}}), told() as (_, ended):
        tasks.tries_left.update(three=3, five=5)
        right = tasks.flaky.enqueue("three")
        wrong = tasks.flaky.enqueue("five")

        assert (right.status, right.attempts) == (TaskResultStatus.SUCCESSFUL, 3)
        assert (wrong.status, wrong.attempts) == (TaskResultStatus.FAILED, 4)
        assert len(ended) == 4


# Expiry.


def test_an_expired_task_is_a_failed_result() -> None:
    """It waited longer than its mark says, and has not run."""
    with told() as (started, ended):
        with held() as gate:
            tasks.held.enqueue("gate")
            gate.wait_entered()
            result = tasks.fresh.enqueue()
            [waiting] = bgtasks.pools.built()[0].queue.waiting
            waiting.policy.expires_at = 0.0

        wait_until(lambda: result.id in ended)
        result.refresh()
        assert (result.status, result.attempts) == (TaskResultStatus.FAILED, 0)
        [error] = result.errors
        assert error.exception_class is TaskDropped
        assert "it was too old to run" in error.traceback
        assert result.id not in started
        assert stats().shed == 1


# Keys.


def test_both_results_follow_the_newer_task() -> None:
    """Of two waiting tasks with one key, the newer one runs, and whoever asks for the older hears of that."""
    with held() as gate, told() as (_, ended):
        tasks.held.enqueue("gate")
        gate.wait_entered()
        first, second, third = (tasks.rebuild.enqueue(number) for number in range(3))
        assert tasks.rebuild.get_result(first.id).status == TaskResultStatus.READY
        assert stats().queued == 1
        gate.open()
        assert bgtasks.drain(BOUND)

        for result in (first, second, third):
            got = tasks.rebuild.get_result(result.id)
            assert (got.id, got.return_value, got.args) == (result.id, 2, [2])
            result.refresh()
            assert result.return_value == 2
        assert (first.id in ended, third.id in ended) == (False, True)
        assert (stats().coalesced, stats().succeeded) == (2, 2)


def test_a_key_may_depend_on_the_arguments() -> None:
    """Tasks whose function makes different keys have nothing to do with each other."""
    with held() as gate:
        tasks.held.enqueue("gate")
        gate.wait_entered()
        old = tasks.index.enqueue(1, text="old")
        other = tasks.index.enqueue(2, text="other")
        new = tasks.index.enqueue(1, text="new")
        gate.open()
        assert bgtasks.drain(BOUND)

        for result in (old, other, new):
            result.refresh()
        assert [result.return_value for result in (old, other, new)] == ["new", "other", "new"]


def test_a_key_that_is_no_text_raises_at_the_enqueue() -> None:
    """It is the mistake of the code that enqueues, and nothing is enqueued."""
    with pytest.raises(TypeError, match=r"the key of task 'tests.testapp.tasks.without_a_key' must be a str"):
        tasks.without_a_key.enqueue()

    assert stats().spawned == 0


def records(limit: int, number: int = 3) -> list[Record]:
    results = results_of("records")
    return [results.add(new_result(tasks.noop, "records", [], {}), limit) for _ in range(number)]


def status_of(record: Record) -> TaskResultStatus:
    result, _ = results_of("records").get(record.result.id)
    return result.status


def test_a_result_follows_a_newer_one_that_has_ended() -> None:
    """The one of an older task is looked at late.

    1. the enqueuer of the newer task: has given it to the pool, in the place of the older one
    2. a slot: runs it to its end
    3. the enqueuer: has the older result follow it
    """
    older, newer, _ = records(10)
    newer.end(TaskResultStatus.SUCCESSFUL)

    older.follow(newer)

    assert status_of(older) == TaskResultStatus.SUCCESSFUL


def test_a_result_follows_a_newer_one_that_follows_another() -> None:
    """Whoever comes last finds the newest.

    1. the enqueuers of two newer tasks: have given them to the pool, each in the place of the one before
    2. the later of them: has its older result follow its own
    3. the earlier one: does the same
    """
    older, newer, newest = records(10)

    newer.follow(newest)
    older.follow(newer)
    newest.end(TaskResultStatus.SUCCESSFUL)

    assert status_of(older) == status_of(newer) == TaskResultStatus.SUCCESSFUL


def test_the_oldest_of_many_results_that_follow_are_forgotten() -> None:
    """A task that is replaced without end does not keep the ids of all that it was."""
    older, newer, newest = records(1)

    older.follow(newer)
    newer.follow(newest)

    assert status_of(newer) == TaskResultStatus.READY
    with pytest.raises(TaskResultDoesNotExist):
        status_of(older)


# The mark.


def test_another_backend_ignores_the_mark() -> None:
    """The function is the same as without it."""
    immediate = "django.tasks.backends.immediate.ImmediateBackend"
    with override_settings(TASKS={"default": {"BACKEND": immediate}}):
        assert tasks.rebuild.enqueue(3).return_value == 3
        assert tasks.rebuild.func.__name__ == "rebuild"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"expires": 0}, ValueError, "expires must be a number of seconds, above 0"),
        ({"retries": -1}, ValueError, "retries must be a whole number, at least 0"),
        ({"retry_on": "OSError"}, TypeError, "retry_on must be an exception class"),
        ({"key": 7}, TypeError, "key must be a str"),
    ],
)
def test_a_wrong_mark_raises_at_once(options: Any, error: Any, message: str) -> None:
    """The module of the task cannot be imported; the error is that of ``using``."""
    with pytest.raises(error, match=message):
        policy(**options)


def test_a_mark_above_the_task_raises() -> None:
    """There it would mark the task, and not its function."""
    above: Any = tasks.noop
    with pytest.raises(TypeError, match=r"write @policy\(...\) beneath @task"):
        policy(expires=5)(above)


def test_a_mark_on_a_task_says_nothing_of_others() -> None:
    """Only marked tasks have a policy."""
    assert not hasattr(tasks.noop.func, "bgtasks_policy")
    assert task(tasks.noop.func).func is tasks.noop.func
