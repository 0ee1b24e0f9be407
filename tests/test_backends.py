"""PoolBackend: what Django's own test suite asks of ImmediateBackend, and what a pool adds to it."""

import asyncio
import copy
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pytest_django import Settings

from bgtasks import signals
from bgtasks.core.figures import Outcome

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.core.checks import run_checks
from django.tasks import TaskResultStatus, default_task_backend, task_backends
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist, TaskResultMismatch
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import override_settings
from django.utils import timezone, translation

import bgtasks
from bgtasks.backends import DEFAULT_RESULTS, PoolBackend
from bgtasks.exceptions import InvalidSettings, TaskDropped
from bgtasks.propagators import Propagator
from bgtasks.repeats import repeats
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.processes import run_python
from tests.snippets import snippet
from tests.testapp import tasks


def tasks_setting(*, queues: Any = (), **options: Any) -> Any:
    """Return TASKS with a PoolBackend as the default one."""
    return {
        "default": {
            "BACKEND": "bgtasks.backends.PoolBackend",
            "QUEUES": list(queues),
            "OPTIONS": options,
        }
    }


@pytest.fixture(autouse=True)
def pool_backend() -> Iterator[None]:
    """Run every task of these tests on a pool."""
    with override_settings(TASKS=tasks_setting()):
        yield


@contextmanager
def receiving(signal: Any, receiver: Callable[..., Any], **kwargs: Any) -> Iterator[None]:
    """Have `receiver` connected to one of Django's signals."""
    signal.connect(receiver, **kwargs)
    try:
        yield
    finally:
        signal.disconnect(receiver)


@contextmanager
def held(make: Callable[..., Any] = Gate) -> Iterator[Any]:
    """Give a gate to the tasks that are held by name."""
    with make() as gate:
        tasks.gates["gate"] = gate
        yield gate
    assert bgtasks.drain(BOUND)


def finished(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Enqueue a task, wait for its end, and return its refreshed result."""
    result = task.enqueue(*args, **kwargs)
    assert bgtasks.drain(BOUND)
    result.refresh()
    return result


async def afinished(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Do the same in async code."""
    result = await task.aenqueue(*args, **kwargs)
    assert await bgtasks.adrain(BOUND)
    await result.arefresh()
    return result


# What Django asks of a backend.


def test_the_backend_is_the_one_of_the_settings() -> None:
    """TASKS names the backend, and its options reach it."""
    with override_settings(TASKS=tasks_setting(RESULTS=7)):
        assert default_task_backend == task_backends["default"]
        assert isinstance(task_backends["default"], PoolBackend)
        assert default_task_backend.alias == "default"
        assert default_task_backend.options == {"RESULTS": 7}


@pytest.mark.parametrize("task", [tasks.noop, tasks.anoop])
def test_enqueue_has_the_task_run(task: Any) -> None:
    """The result of an enqueued task, sync or async, tells its arguments, its times and its end."""
    result = finished(task, 1, two=3)

    assert result.status == TaskResultStatus.SUCCESSFUL
    assert result.is_finished
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.last_attempted_at == result.started_at
    assert result.return_value is None
    assert result.task == task
    assert (result.args, result.kwargs) == ([1], {"two": 3})
    assert result.attempts == 1


@pytest.mark.parametrize("task", [tasks.noop, tasks.anoop])
def test_aenqueue_has_the_task_run(task: Any) -> None:
    """The same holds for aenqueue."""
    result = asyncio.run(afinished(task))

    assert result.status == TaskResultStatus.SUCCESSFUL
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.return_value is None
    assert result.task == task
    assert (result.args, result.kwargs) == ([], {})
    assert result.attempts == 1


@pytest.mark.parametrize("task", [tasks.answer, tasks.aanswer])
def test_the_return_value_can_be_read_back(task: Any) -> None:
    """What the function returned is in the result, once it has returned."""
    assert finished(task).return_value == 42
    assert asyncio.run(afinished(task)).return_value == 42


@pytest.mark.parametrize(
    ("task", "exception", "message"),
    [
        (tasks.fail, ValueError, "this task failed"),
        (tasks.afail, ValueError, "this task failed"),
        (tasks.exit_, SystemExit, "this task wants to exit"),
        (tasks.interrupt, KeyboardInterrupt, "this task was interrupted"),
    ],
)
def test_an_exception_fails_the_task_and_nothing_else(
    task: Any, exception: Any, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a task raises is in its result, is logged once, by Django, and is counted as failed.

    ImmediateBackend lets a KeyboardInterrupt pass, since it would end the very caller. Here there is none.
    """
    before = bgtasks.stats()["default"].failed

    result = finished(task)

    assert result.status == TaskResultStatus.FAILED
    assert result.is_finished
    assert result.enqueued_at <= result.started_at <= result.finished_at
    with pytest.raises(ValueError, match="Task failed"):
        _ = result.return_value
    [error] = result.errors
    assert error.exception_class is exception
    assert error.traceback.endswith(f"{exception.__name__}: {message}\n")
    assert bgtasks.stats()["default"].failed == before + 1
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "django.tasks"
    assert message in str((record.exc_info or (None, None))[1])


def test_an_exception_with_odd_arguments_is_recorded() -> None:
    """A traceback is kept as text, whatever the exception holds."""
    result = finished(tasks.fail_oddly)

    assert result.errors[0].exception_class is ValueError
    assert 'ValueError(ValueError("this task failed"))' in result.errors[0].traceback


@pytest.mark.parametrize("task", [tasks.return_object, tasks.return_coroutine])
def test_a_return_value_without_a_form_in_json_fails_the_task(task: Any) -> None:
    """A function returned what no engine could keep: the task fails here as it would there."""
    result = finished(task)

    assert result.status == TaskResultStatus.FAILED
    assert result.errors[0].exception_class is TypeError
    assert "Unsupported type" in result.errors[0].traceback


def test_an_argument_without_a_form_in_json_raises_at_once() -> None:
    """A mistake in the calling code is the caller's, and nothing is enqueued."""
    before = bgtasks.stats()["default"].spawned

    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.noop.enqueue(timezone.now())
    with pytest.raises(TypeError, match="Unsupported type"):
        asyncio.run(tasks.noop.aenqueue(timezone.now()))

    assert bgtasks.stats()["default"].spawned == before


def test_a_priority_is_refused() -> None:
    """A pool runs in the order of enqueueing, and says so instead of ignoring a priority."""
    with pytest.raises(InvalidTask, match="does not support setting priority"):
        tasks.noop.using(priority=10)


@pytest.mark.parametrize(
    ("priority", "pool"),
    [
        (100, "now"),
        (50, "now"),
        (49, "soon"),
        (10, "soon"),
        (9, "rest"),
        (0, "rest"),
        (-9, "rest"),
        (-10, "bulk"),
        (-50, "never"),
    ],
)
def test_a_priority_is_mapped_to_a_pool(priority: int, pool: str) -> None:
    """A key of PRIORITIES is for tasks as far from 0 as it is, or farther; between them the queue decides."""
    priorities = {10: "soon", 50: "now", -10: "bulk", -50: "never"}
    with override_settings(BGTASKS={name: {} for name in ("now", "soon", "rest", "bulk", "never")}):
        with override_settings(TASKS=tasks_setting(POOL="rest", PRIORITIES=priorities)):
            result = finished(tasks.thread_name.using(priority=priority))

    assert result.return_value.startswith(f"bgtasks-{pool}-")


def test_a_priority_counts_more_than_a_queue() -> None:
    """The queue of a task decides only where PRIORITIES says nothing; the default pool can be named too."""
    with override_settings(BGTASKS={"email": {}, "rest": {}}):
        with override_settings(TASKS=tasks_setting(POOL="rest", PRIORITIES={10: "default"})):
            email = tasks.thread_name.using(queue_name="email")
            urgent = finished(email.using(priority=10))
            other = finished(email.using(priority=9))

    assert urgent.return_value.startswith("bgtasks-default-")
    assert other.return_value.startswith("bgtasks-email-")


def test_priorities_can_be_ignored() -> None:
    """A project whose tasks have priorities runs them all in the pools of their queues, on request."""
    with override_settings(TASKS=tasks_setting(PRIORITIES="ignore")):
        result = finished(tasks.thread_name.using(priority=10))

    assert result.return_value.startswith("bgtasks-default-")


def test_the_task_is_validated_when_it_is_enqueued() -> None:
    """A queue that the settings no longer know is refused by enqueue and aenqueue."""
    task = tasks.noop.using(queue_name="unknown")

    with override_settings(TASKS=tasks_setting(queues=["known"])):
        with pytest.raises(InvalidTask, match="Queue 'unknown' is not valid for backend"):
            task.enqueue()
        with pytest.raises(InvalidTask, match="Queue 'unknown' is not valid for backend"):
            asyncio.run(task.aenqueue())


def test_takes_context() -> None:
    """A task that asks for its context finds its own result in it, running."""
    result = finished(tasks.context_id)

    assert result.return_value == result.id
    assert finished(tasks.acontext_status, 1).return_value == TaskResultStatus.RUNNING


def test_django_logs_the_life_of_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """The records of django.tasks are those that ImmediateBackend causes, in the same order."""
    caplog.set_level("DEBUG", "django.tasks")

    result = finished(tasks.noop)
    failed = finished(tasks.afail)

    messages = [record.getMessage() for record in caplog.records if record.name == "django.tasks"]
    path = "path=tests.testapp.tasks"
    assert messages == [
        f"Task id={result.id} {path}.noop enqueued backend=default",
        f"Task id={result.id} {path}.noop state=RUNNING",
        f"Task id={result.id} {path}.noop state=SUCCESSFUL",
        f"Task id={failed.id} {path}.afail enqueued backend=default",
        f"Task id={failed.id} {path}.afail state=RUNNING",
        f"Task id={failed.id} {path}.afail state=FAILED",
    ]
    assert "NoneType" not in caplog.text


# Results.


def test_an_unfinished_result_says_so() -> None:
    """Enqueue returns at once: its result is READY, and RUNNING after a refresh while the task runs."""
    with held() as gate:
        result = tasks.held.enqueue("gate")
        assert result.status == TaskResultStatus.READY
        assert result.started_at is None

        gate.wait_entered()
        result.refresh()
        assert result.status == TaskResultStatus.RUNNING
        with pytest.raises(ValueError, match="Task has not finished yet"):
            _ = result.return_value


def test_a_result_is_ready_even_if_its_task_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enqueue returns does not depend on how fast a slot is.

    1. the caller: has given the task to the pool
    2. a slot: begins it
    3. the caller: returns the result
    """
    pool = bgtasks.pools["default"]
    submit = pool.submit

    def submit_and_wait(task: Any) -> bool:
        accepted = submit(task)
        gate.wait_entered()
        return accepted

    with held() as gate:
        monkeypatch.setattr(pool, "submit", submit_and_wait)
        result = tasks.held.enqueue("gate")

        assert (result.status, result.started_at) == (TaskResultStatus.READY, None)


def test_a_result_is_not_written_to_behind_its_readers_back() -> None:
    """What was read stays as it was until it is refreshed."""
    with held() as gate:
        result = tasks.held.enqueue("gate")
        gate.wait_entered()
        before = copy.copy(result)

    assert vars_of(result) == vars_of(before)
    result.refresh()
    assert result.is_finished


def vars_of(result: Any) -> list[Any]:
    return [getattr(result, name) for name in ("status", "started_at", "finished_at", "errors", "worker_ids")]


def test_a_result_can_be_got_from_any_thread() -> None:
    """Django makes a backend for each thread; what the pools know is one for the process."""
    result = finished(tasks.answer)
    got = []

    thread = threading.Thread(
        target=lambda: got.append((task_backends["default"], tasks.answer.get_result(result.id)))
    )
    thread.start()
    thread.join(BOUND)

    [(backend, seen)] = got
    assert backend is not task_backends["default"]
    assert seen.return_value == 42
    assert asyncio.run(tasks.answer.aget_result(result.id)).return_value == 42


def test_an_unknown_result_does_not_exist() -> None:
    """Of another process or of none, an id that is not known raises what Django says it raises."""
    with pytest.raises(TaskResultDoesNotExist):
        tasks.noop.get_result("123")
    with pytest.raises(TaskResultDoesNotExist):
        asyncio.run(tasks.noop.aget_result("123"))


def test_the_result_of_another_task_is_refused() -> None:
    """Django compares the task of a result with the one that asks."""
    result = finished(tasks.answer)

    with pytest.raises(TaskResultMismatch):
        tasks.noop.get_result(result.id)


def test_results_are_forgotten_oldest_first() -> None:
    """Of finished results only as many are kept as the option RESULTS says."""
    with override_settings(TASKS=tasks_setting(RESULTS=2)):
        results = [finished(tasks.noop) for _ in range(3)]

        with pytest.raises(TaskResultDoesNotExist):
            results[0].refresh()
        results[1].refresh()
        results[2].refresh()


def test_no_result_is_kept_of_a_task_that_is_gone() -> None:
    """A result lives as long as its task, and then among the last ones: nothing else holds it."""
    with override_settings(TASKS=tasks_setting(RESULTS=0)):
        result = tasks.noop.enqueue()
        assert bgtasks.drain(BOUND)
        wait_until(lambda: is_forgotten(result))  # the slot may hold the task for a moment


def is_forgotten(result: Any) -> bool:
    gc.collect()
    try:
        result.refresh()
    except TaskResultDoesNotExist:
        return True
    return False  # pragma: no cover


FORKED = """
import os
import django
from django.conf import settings

django.setup()
settings.TASKS = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}
import bgtasks
from django.tasks.exceptions import TaskResultDoesNotExist
from tests.testapp import tasks

result = tasks.answer.enqueue()
assert bgtasks.drain(30)
result.refresh()
child = os.fork()
try:
    result.refresh()
except TaskResultDoesNotExist:
    assert child == 0
    print("the child does not know it")
else:
    assert child != 0
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_knows_nothing_of_its_parents_results() -> None:
    """The child runs none of its parent's tasks, so it would wait for their results for ever."""
    process = run_python(FORKED)

    assert (process.stdout, process.stderr) == ("the child does not know it\n", "")
    assert process.returncode == 0


FORKED_IDS = """
import os
import django
from django.conf import settings

django.setup()
settings.TASKS = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}
import bgtasks
from tests.testapp import tasks

tasks.answer.enqueue()  # so that there are ids to inherit
assert bgtasks.drain(60)  # a fork beside a running task is warned of
child = os.fork()
ids = {tasks.answer.enqueue().id for _ in range(10)}
if child:
    os.waitpid(child, 0)
print(*ids, flush=True)
"""


def test_a_forked_child_gives_ids_of_its_own() -> None:
    """What is random in a process is copied by a fork, and two tasks would have one id."""
    process = run_python(FORKED_IDS)

    ids = process.stdout.split()
    assert process.returncode == 0, process.stderr
    assert len(ids) == len(set(ids)) == 20
    assert {len(each) for each in ids} == {32}


# Pools.


def test_a_queue_goes_to_the_pool_of_its_name_and_others_to_the_option_pool() -> None:
    """QUEUES map to pools of the same name, all others to the pool that OPTIONS names."""
    with override_settings(BGTASKS={"email": {}, "rest": {}}):
        with override_settings(TASKS=tasks_setting(POOL="rest")):
            email = finished(tasks.thread_name.using(queue_name="email"))
            other = finished(tasks.thread_name.using(queue_name="other"))
            default = finished(tasks.thread_name)

        assert email.return_value.startswith("bgtasks-email-")
        assert other.return_value.startswith("bgtasks-rest-")
        assert default.return_value.startswith("bgtasks-rest-")
        assert finished(tasks.thread_name).return_value.startswith("bgtasks-default-")


@pytest.mark.parametrize("capacity", [1])
def test_a_dropped_task_is_a_failed_result(capacity: int, caplog: pytest.LogCaptureFixture) -> None:
    """A full pool raises nothing: the result says FAILED, with TaskDropped, and Django's signals go out."""
    ends = []

    def on_finished(task_result: Any, **kwargs: Any) -> None:
        ends.append(task_result.id)

    with override_settings(BGTASKS={"default": {"CAPACITY": capacity, "CONN_MAX": 1}}):
        with held() as gate, receiving(task_finished, on_finished):
            tasks.held.enqueue("gate")
            gate.wait_entered()
            tasks.noop.enqueue()

            result = tasks.noop.enqueue()

            assert result.status == TaskResultStatus.FAILED
            [error] = result.errors
            assert error.exception_class is TaskDropped
            assert error.traceback.endswith("dropped: pool 'default' is full (capacity 1)\n")
            assert (result.started_at, result.attempts) == (None, 0)
            assert result.finished_at is not None
            assert tasks.noop.get_result(result.id).errors == [error]
            assert ends == [result.id]
            assert bgtasks.stats()["default"].dropped == 1


def test_a_task_that_no_propagator_can_capture_for_is_a_failed_result(settings: Settings) -> None:
    """The result says so: its pool is not full."""
    settings.BGTASKS_PROPAGATORS = ["tests.test_propagators.NotCaptured"]
    result = tasks.noop.enqueue()

    [error] = result.errors
    assert (result.status, error.exception_class) == (TaskResultStatus.FAILED, TaskDropped)
    assert error.traceback.endswith("dropped: a propagator could not capture its value\n")
    assert bgtasks.stats()["default"].dropped == 1


def test_a_task_that_is_shed_is_a_failed_result() -> None:
    """It waited for nothing: a full pool gave it up for a newer one."""
    options = {"CAPACITY": 1, "CONN_MAX": 1, "ON_FULL": "drop_oldest"}
    with override_settings(BGTASKS={"default": options}), held() as gate:
        tasks.held.enqueue("gate")
        gate.wait_entered()
        older = tasks.noop.enqueue()
        tasks.noop.enqueue()

        [error] = tasks.noop.get_result(older.id).errors
        assert error.exception_class is TaskDropped
        assert "a full pool gave way to newer ones" in error.traceback


@pytest.mark.parametrize("task", [tasks.fail, tasks.afail, tasks.exit_])
def test_an_inline_task_that_fails_is_a_failed_result(task: Any) -> None:
    """As with Django's ImmediateBackend: the result says FAILED, and the caller goes on."""
    with override_settings(BGTASKS={"default": {"MODE": "inline"}}):
        results = [task.enqueue(), asyncio.run(task.aenqueue())]

        assert [result.status for result in results] == [TaskResultStatus.FAILED] * 2
        assert [result.attempts for result in results] == [1, 1]
        assert all(result.errors[0].exception_class in {ValueError, SystemExit} for result in results)
        assert bgtasks.stats()["default"].failed == 2


def test_ctrl_c_in_an_inline_task_is_the_callers() -> None:
    """Whoever wants to end the program does so, as with Django's ImmediateBackend."""
    with override_settings(BGTASKS={"default": {"MODE": "inline"}}), pytest.raises(KeyboardInterrupt):
        tasks.interrupt.enqueue()


def test_an_inline_task_that_no_pool_takes_raises() -> None:
    """What is no failure of the task is not kept from the caller."""
    with override_settings(BGTASKS={"default": {"MODE": "inline", "CAPACITY": 0}}):
        with pytest.raises(InvalidSettings):
            tasks.noop.enqueue()


def test_a_task_enqueued_after_the_shutdown_is_a_failed_result() -> None:
    """A closed pool raises nothing either."""
    with override_settings(BGTASKS={"email": {}}):
        bgtasks.pools["email"].stats()  # or there would be nothing to shut down
        bgtasks.pools["email"].shutdown(BOUND)

        result = tasks.noop.using(queue_name="email").enqueue()

        assert result.status == TaskResultStatus.FAILED
        assert "pool 'email' is shut down" in result.errors[0].traceback


def test_tasks_that_a_shutdown_gives_up_have_failed() -> None:
    """Waiting or running, plain or not: the result of what a shutdown cancels does not stay READY."""
    with override_settings(BGTASKS={"email": {"CONN_MAX": 1}}):
        with held() as gate:
            task = tasks.held.using(queue_name="email")
            running = task.enqueue("gate")
            gate.wait_entered()
            waiting = task.enqueue("gate")

            assert not bgtasks.pools["email"].shutdown(0)

            for result in (running, waiting):
                result.refresh()
                assert result.status == TaskResultStatus.FAILED
                assert result.errors[0].exception_class is TaskDropped
        gate.wait_left()

    running.refresh()
    assert [error.exception_class for error in running.errors] == [TaskDropped]


def test_an_asynchronous_task_that_a_shutdown_cancels_has_failed() -> None:
    """It hears of its cancellation itself, and its result says so."""
    with override_settings(BGTASKS={"email": {"CONN_MAX": 1}}):
        with held(AsyncGate) as gate:
            result = tasks.aheld.using(queue_name="email").enqueue("gate")
            gate.wait_entered()

            assert not bgtasks.pools["email"].shutdown(0)

            result.refresh()
            assert result.errors[0].exception_class is asyncio.CancelledError


class Held(Propagator):
    """Has a task begin only once a gate lets it."""

    def capture(self) -> None: ...

    @contextmanager
    def restore(self, value: Any) -> Iterator[None]:
        tasks.gates["begin"]()
        yield


def test_an_asynchronous_task_that_a_shutdown_cancels_as_it_begins_has_failed() -> None:
    """Nobody listens to our signals, and its result says so all the same.

    1. a slot's thread: begins the task, whose propagator takes its time
    2. the shutdown: has the loop cancel the task
    3. the thread: lends the task to the loop
    """
    with override_settings(BGTASKS={"email": {}}, BGTASKS_PROPAGATORS=["tests.test_backends.Held"]):
        pool = bgtasks.pools["email"]
        with held(AsyncGate), Gate() as begin:
            tasks.gates["begin"] = begin
            result = tasks.aheld.using(queue_name="email").enqueue("gate")
            begin.wait_entered()
            [running] = pool.build().slots.queue.running()
            ending = threading.Thread(target=pool.shutdown, args=(0,))
            ending.start()
            wait_until(lambda: running.stop_reason is Outcome.CANCELLED)
            begin.open()
            ending.join(BOUND)

            result.refresh()
            assert (running.watched, running.outcome) == (False, Outcome.CANCELLED)
            assert result.errors[0].exception_class is asyncio.CancelledError


def test_a_plain_function_that_fails_after_it_was_given_up_is_not_recorded_twice() -> None:
    """What a shutdown has written into a result stays."""
    with override_settings(BGTASKS={"email": {"CONN_MAX": 1}}):
        with Gate() as gate:
            tasks.gates["gate"] = gate
            result = tasks.held_and_fail.using(queue_name="email").enqueue("gate")
            gate.wait_entered()
            assert not bgtasks.pools["email"].shutdown(0)
        gate.wait_left()

    result.refresh()
    assert [error.exception_class for error in result.errors] == [TaskDropped]


@pytest.mark.parametrize("fails", [False, True])
def test_an_asynchronous_task_that_outlives_a_shutdown_is_not_recorded_twice(fails: Any) -> None:
    """It does not give in to its cancellation, is given up, and ends all the same: its result stays."""
    with override_settings(BGTASKS={"email": {"CONN_MAX": 1}}):
        with Gate() as gate, Gate() as end:
            tasks.gates.update(gate=gate, end=end)
            result = tasks.stubborn.using(queue_name="email").enqueue("gate", fails, "end")
            gate.wait_entered()
            ended = threading.Thread(target=bgtasks.pools["email"].shutdown, args=(0,))
            ended.start()
            ended.join(BOUND)
            assert tasks.stubborn.get_result(result.id).errors[0].exception_class is TaskDropped
        end.wait_left()

    result.refresh()
    assert [error.exception_class for error in result.errors] == [TaskDropped]


def test_a_timeout_is_recorded_as_one() -> None:
    """An asynchronous task past TASK_TIMEOUT has failed with TimeoutError, and is counted as timed out."""
    with override_settings(BGTASKS={"default": {"TASK_TIMEOUT": 1}}):
        with held(AsyncGate):
            result = tasks.aheld.enqueue("gate")
            assert bgtasks.drain(BOUND)

        result.refresh()
        assert result.errors[0].exception_class is TimeoutError
        assert bgtasks.stats()["default"].timed_out == 1


def test_a_timeout_while_its_start_is_told_is_recorded() -> None:
    """A receiver of `task_started` that takes too long costs the task its time, and the result says so."""
    with override_settings(BGTASKS={"default": {"TASK_TIMEOUT": 1}}), Gate() as gate:
        with receiving(task_started, gate):
            result = tasks.aheld.enqueue("gate")
            gate.wait_entered()
            [running] = bgtasks.pools.built()[0].queue.running()
            wait_until(lambda: running.overran)
            gate.open()
            assert bgtasks.drain(BOUND)

        result.refresh()
        assert (result.status, result.errors[0].exception_class) == (TaskResultStatus.FAILED, TimeoutError)


def test_a_task_has_the_language_and_time_zone_of_its_enqueuer() -> None:
    """What spawn passes on, enqueue passes on."""
    with translation.override("fr"), timezone.override("Europe/Paris"):
        result = finished(tasks.locale)

    assert result.return_value == ["fr", "Europe/Paris"]


def test_the_name_of_a_task_is_its_path() -> None:
    """In bgtasks' own signals, logs and figures a task is called as Django calls it."""
    names = []

    def on_finished(name: str, **kwargs: Any) -> None:
        names.append(name)

    with receiving(signals.task_finished, on_finished):
        finished(tasks.noop)

    assert names == ["tests.testapp.tasks.noop"]


def test_aenqueue_stays_on_its_thread() -> None:
    """What waits for no commit waits for nothing: the loop needs no thread, not even for the receivers."""
    threads = []

    def on_enqueued(**kwargs: Any) -> None:
        threads.append(threading.current_thread())

    with override_settings(TASKS=tasks_setting(ON_COMMIT=False)), receiving(task_enqueued, on_enqueued):
        asyncio.run(afinished(tasks.noop))

    assert threads == [threading.current_thread()]


def test_aenqueue_calls_asynchronous_receivers() -> None:
    """They are awaited on the loop, and the others are called too."""
    called = []

    async def on_enqueued(task_result: Any, **kwargs: Any) -> None:
        called.append(task_result.id)

    with receiving(task_enqueued, on_enqueued):
        result = asyncio.run(afinished(tasks.noop))

    assert called == [result.id]


@pytest.mark.parametrize("task", [tasks.answer, tasks.aanswer])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_broken_receiver_fails_nothing(task: Any, error: Any) -> None:
    """Neither the caller nor the task sees what a receiver of Django's signals raises."""

    def broken(**kwargs: Any) -> None:
        raise error

    with receiving(task_enqueued, broken), receiving(task_started, broken), receiving(task_finished, broken):
        assert finished(task).return_value == 42
        assert asyncio.run(afinished(task)).return_value == 42


@pytest.mark.parametrize("task", [tasks.noop, tasks.anoop])
def test_receivers_are_called_on_the_slots_thread(task: Any) -> None:
    """A receiver may use the ORM: its connection is the slot's, also for an asynchronous task."""
    threads = []

    def on_signal(**kwargs: Any) -> None:
        threads.append(threading.current_thread().name)

    with receiving(task_started, on_signal), receiving(task_finished, on_signal):
        finished(task)

    assert len(threads) == 2
    assert all(name.startswith("bgtasks-default-") for name in threads)


def test_the_end_of_a_task_that_cannot_be_recorded_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shutdown goes on, whatever goes wrong with the record of a task that it cancels."""

    def broken(self: Any, outcome: Outcome, why: str) -> None:
        raise SystemExit

    monkeypatch.setattr("bgtasks.backends.Job.finished", broken)
    with override_settings(BGTASKS={"email": {"CONN_MAX": 1}}):
        with held() as gate:
            tasks.held.using(queue_name="email").enqueue("gate")
            gate.wait_entered()
            tasks.noop.using(queue_name="email").enqueue()

            assert not bgtasks.pools["email"].shutdown(0)

    repeats.flush()
    assert "the end of task 'tests.testapp.tasks.noop' could not be recorded" in caplog.text


def test_many_threads_and_loops_enqueue_at_once() -> None:
    """Every result of a stress run is found, and says what its own task returned."""
    with override_settings(TASKS=tasks_setting(RESULTS=5000)):
        results: list[Any] = []

        def sync() -> None:
            results.extend(tasks.answer.enqueue() for _ in range(50))

        async def asynchronous() -> None:
            results.extend([await tasks.aanswer.aenqueue() for _ in range(50)])

        threads = [threading.Thread(target=sync) for _ in range(4)]
        threads += [threading.Thread(target=lambda: asyncio.run(asynchronous())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
        assert bgtasks.drain(BOUND)

        for result in results:
            result.refresh()
        assert len({result.id for result in results}) == 400
        assert {result.return_value for result in results} == {42}


# Checks.


def problems(**overridden: Any) -> dict[str, str]:
    """Return the messages of the system checks of these settings, by id."""
    with override_settings(**overridden):
        return {str(message.id): message.msg for message in run_checks()}


def test_a_right_configuration_has_no_problem() -> None:
    """What the documentation shows passes the checks."""
    assert not problems(TASKS=tasks_setting(queues=["default"], POOL="default", RESULTS=0))
    assert not problems(TASKS=tasks_setting(ON_COMMIT=False, DATABASE="pooled"))


def test_the_page_shows_a_right_configuration() -> None:
    """The TASKS of the page can be copied as they are, and the numbers in them are the defaults."""
    names: dict[str, dict[str, Any]] = {}
    exec(snippet("docs/django-tasks.md", "RESULTS"), names)

    assert not problems(TASKS=names["TASKS"])
    assert names["TASKS"]["default"]["OPTIONS"] == {"POOL": "default", "RESULTS": DEFAULT_RESULTS}


def test_a_wrong_option_is_reported() -> None:
    """An option that does not exist is an error with its name in it."""
    assert "'POOLS'" in problems(TASKS=tasks_setting(POOLS="email"))["bgtasks.E010"]


@pytest.mark.parametrize("kept", [-1, "many", True])
def test_a_wrong_number_of_results_is_reported(kept: Any) -> None:
    """RESULTS is a number of results."""
    assert repr(kept) in problems(TASKS=tasks_setting(RESULTS=kept))["bgtasks.E013"]


@pytest.mark.parametrize("options", [{"ON_COMMIT": "yes"}, {"ON_COMMIT": []}, {"DATABASE": "replica"}])
def test_a_wrong_option_of_transactions_is_reported(options: Any) -> None:
    """ON_COMMIT is a bool, and DATABASE an alias in DATABASES."""
    [value] = options.values()
    [problem] = problems(TASKS=tasks_setting(**options)).items()
    assert problem[0] == ("bgtasks.E019" if "ON_COMMIT" in options else "bgtasks.E029")
    assert repr(value) in problem[1]


@pytest.mark.parametrize(
    "priorities",
    ["ignored", None, ["urgent"], {0: "default"}, {True: "default"}, {101: "default"}, {1.5: "default"}],
)
def test_wrong_priorities_are_reported(priorities: Any) -> None:
    """PRIORITIES is a dictionary from priorities that tasks can have, or "ignore"."""
    assert repr(priorities) in problems(TASKS=tasks_setting(PRIORITIES=priorities))["bgtasks.E017"]


def test_an_unknown_pool_of_a_priority_is_reported() -> None:
    """PRIORITIES names pools that BGTASKS defines; right ones have no problem."""
    setting = tasks_setting(PRIORITIES={10: "urgent", -10: "default"})
    assert "PRIORITIES\"][10] is 'urgent'" in problems(TASKS=setting)["bgtasks.E018"]
    assert not problems(TASKS=setting, BGTASKS={"urgent": {}})
    assert not problems(TASKS=tasks_setting(PRIORITIES="ignore"))


def test_an_unknown_pool_is_reported() -> None:
    """OPTIONS names a pool that BGTASKS defines."""
    assert "'email'" in problems(TASKS=tasks_setting(POOL="email"))["bgtasks.E011"]
    assert not problems(TASKS=tasks_setting(POOL="email"), BGTASKS={"email": {}})


def test_a_mistake_in_bgtasks_is_reported_once() -> None:
    """The backend leaves it to the app's own check."""
    setting = tasks_setting(POOL="email", PRIORITIES={10: "email"})
    with override_settings(BGTASKS={"default": {"CAPACITY": 0}}, TASKS=setting):
        assert default_task_backend.check() == []


def test_the_app_has_to_be_installed(settings: Settings) -> None:
    """Without the app nobody shuts the pools down, and tasks would be lost at each deploy."""
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "bgtasks"]

    assert [message.id for message in default_task_backend.check()] == ["bgtasks.E012"]
