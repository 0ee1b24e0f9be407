"""PoolBackend and transactions: a task is enqueued when the transaction around it commits, and else never."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.db import IntegrityError, connections, transaction
from django.tasks import TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.test import TestCase, override_settings
from django.utils import translation

import bgtasks
from bgtasks import testing
from tests.gate import BOUND
from tests.test_backends import receiving, tasks_setting
from tests.testapp import tasks
from tests.testapp.models import Note

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "pooled"])


@pytest.fixture(autouse=True)
def pool_backend() -> Iterator[None]:
    """Run every task of these tests on a pool."""
    with override_settings(TASKS=tasks_setting(), BGTASKS={"default": {}}):
        yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result(BOUND)


@contextmanager
def enqueued_ids() -> Iterator[list[str]]:
    """Record of which tasks Django's ``task_enqueued`` was sent."""
    ids: list[str] = []

    def on_enqueued(task_result: Any, **kwargs: Any) -> None:
        ids.append(task_result.id)

    with receiving(task_enqueued, on_enqueued):
        yield ids


def spawned() -> int:
    return bgtasks.stats()["default"].spawned


def test_a_task_starts_after_the_commit() -> None:
    """It sees the row that the transaction has written; until the commit it is READY, and not enqueued."""
    with enqueued_ids() as ids:
        with transaction.atomic():
            note = Note.objects.create(text="written")
            result: Any = tasks.note_text.enqueue(note.pk)
            assert (result.status, result.enqueued_at) == (TaskResultStatus.READY, None)
            assert tasks.note_text.get_result(result.id).status == TaskResultStatus.READY
            assert (ids, spawned()) == ([], 0)

        assert (ids, spawned()) == ([result.id], 1)
        assert bgtasks.drain(BOUND)
        result.refresh()
        assert result.return_value == "written"
        assert result.enqueued_at <= result.started_at


@pytest.mark.parametrize("error", [ValueError, IntegrityError])
def test_a_task_of_a_rolled_back_transaction_never_was(error: type[Exception]) -> None:
    """Nothing is enqueued, and its result does not exist."""
    results: list[Any] = []

    @transaction.atomic
    def enqueue_and_fail() -> None:
        results.append(tasks.noop.enqueue())
        raise error

    with enqueued_ids() as ids, pytest.raises(error):
        enqueue_and_fail()

    assert (ids, spawned()) == ([], 0)
    with pytest.raises(TaskResultDoesNotExist):
        tasks.noop.get_result(results[0].id)


def test_a_savepoint_takes_its_tasks_with_it() -> None:
    """What an inner block has enqueued goes with it; what the outer block has, is enqueued in order."""
    with enqueued_ids() as ids:
        with transaction.atomic():
            first = tasks.noop.enqueue()
            with transaction.atomic():
                lost = tasks.noop.enqueue()
                transaction.set_rollback(True)
            with transaction.atomic():
                second = tasks.noop.enqueue()
            assert ids == []

        assert ids == [first.id, second.id]
    with pytest.raises(TaskResultDoesNotExist):
        tasks.noop.get_result(lost.id)


def test_a_task_in_no_transaction_starts_at_once() -> None:
    """There is nothing to wait for."""
    with enqueued_ids() as ids:
        result = tasks.noop.enqueue()

        assert ids == [result.id]
        assert result.enqueued_at is not None


def test_on_commit_can_be_turned_off() -> None:
    """With ON_COMMIT False a task starts at once, as with Django's own backends."""
    with override_settings(TASKS=tasks_setting(ON_COMMIT=False)), transaction.atomic():
        result = tasks.answer.enqueue()
        assert bgtasks.drain(BOUND)
        result.refresh()

        assert result.return_value == 42


def test_the_database_can_be_chosen() -> None:
    """DATABASE names the one whose transaction counts."""
    with override_settings(TASKS=tasks_setting(DATABASE="pooled")), enqueued_ids() as ids:
        with transaction.atomic(using="pooled"):
            tasks.noop.enqueue()
            assert ids == []
        assert len(ids) == 1
        with transaction.atomic():
            tasks.noop.enqueue()
            assert len(ids) == 2


@pytest.mark.parametrize("rolls_back", [False, True])
def test_aenqueue_asks_the_thread_of_the_orm(rolls_back: bool) -> None:
    """There the transaction is that a coroutine of sync code runs in."""

    @async_to_sync
    async def aenqueue() -> Any:
        return await tasks.noop.aenqueue()

    with enqueued_ids() as ids:
        with transaction.atomic():
            result = aenqueue()
            assert ids == []
            transaction.set_rollback(rolls_back)

        assert ids == ([] if rolls_back else [result.id])


def test_aenqueue_in_no_transaction_enqueues_at_once() -> None:
    """Async code has no transaction of its own."""

    async def enqueue() -> None:
        result = await tasks.noop.aenqueue()
        assert ids == [result.id]

    with enqueued_ids() as ids:
        asyncio.run(enqueue())


def test_enqueue_on_an_event_loop_does_not_wait() -> None:
    """It has no transaction, whatever the code around it has begun, and no connection is made to ask it."""

    async def enqueue() -> None:
        result = tasks.noop.enqueue()
        assert ids == [result.id]
        assert connections.all(initialized_only=True) == []

    with enqueued_ids() as ids, transaction.atomic():
        asyncio.run(enqueue())


def test_sync_code_of_an_async_view_waits_for_its_transaction() -> None:
    """A transaction in ``sync_to_async`` is one like any other."""

    @transaction.atomic
    def in_a_transaction() -> str:
        result = tasks.noop.enqueue()
        assert ids == []
        return result.id

    with enqueued_ids() as ids:
        enqueued = asyncio.run(sync_to_async(in_a_transaction)())

        assert ids == [enqueued]


def test_the_context_is_that_of_the_enqueue() -> None:
    """What changes until the commit does not reach the task."""
    with transaction.atomic():
        with translation.override("fr"):
            result = tasks.locale.enqueue()
    assert bgtasks.drain(BOUND)

    result.refresh()
    assert result.return_value[0] == "fr"


def test_an_inline_task_runs_after_the_commit() -> None:
    """What a task raises then does not reach the code that has committed: the result says FAILED."""
    with testing.inline():
        with transaction.atomic():
            result = tasks.fail.enqueue()
            assert result.status == TaskResultStatus.READY

        result.refresh()
        assert result.status == TaskResultStatus.FAILED


class InATestCase(TestCase):
    """A TestCase never commits: its own tools, or ON_COMMIT, say what becomes of tasks."""

    def test_callbacks_of_the_commit_enqueue(self) -> None:
        """``captureOnCommitCallbacks(execute=True)`` does what the commit would do."""
        with testing.captured() as captured, override_settings(TASKS=tasks_setting()):
            with self.captureOnCommitCallbacks(execute=True):
                tasks.noop.enqueue()
                assert captured.names == []

            assert captured.names == ["tests.testapp.tasks.noop"]

    def test_what_was_enqueued_has_its_arguments(self) -> None:
        """``assert_spawned`` compares them as it does those of ``spawn``, and the call has the function."""
        with testing.captured() as captured, override_settings(TASKS=tasks_setting()):
            with self.captureOnCommitCallbacks(execute=True):
                tasks.held.enqueue("gate")
                tasks.noop.enqueue(1, word="x")

            captured.assert_spawned("tests.testapp.tasks.held", name="gate")
            captured.assert_spawned("tests.testapp.tasks.noop", 1, word="x")
            with pytest.raises(AssertionError, match="never with these arguments"):
                captured.assert_spawned("tests.testapp.tasks.noop")
            assert captured.calls[0].task is tasks.held.func

    def test_without_on_commit_tasks_are_enqueued_at_once(self) -> None:
        """``ON_COMMIT`` False in the settings of the tests needs no tool."""
        with testing.captured() as captured, override_settings(TASKS=tasks_setting(ON_COMMIT=False)):
            tasks.noop.enqueue()

            assert captured.names == ["tests.testapp.tasks.noop"]
