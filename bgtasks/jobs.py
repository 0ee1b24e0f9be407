"""One enqueued task of ``django.tasks``: what its pool runs, its result, and Django's signals of it."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from traceback import format_exception
from typing import Any

from asgiref.sync import sync_to_async
from django.dispatch import Signal
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskContext, TaskError, TaskResultStatus
from django.tasks.signals import task_finished, task_started
from django.utils.json import normalize_json

from bgtasks.core.figures import Outcome, ShedReason
from bgtasks.core.task import Task, as_coroutine, current_task
from bgtasks.exceptions import TaskDropped
from bgtasks.hooks import Recorded
from bgtasks.pool import Pool
from bgtasks.repeats import report
from bgtasks.results import AnyResult, AnyTask, Record, Sent

MARK = "bgtasks_policy"  # the attribute of a function that says its policy


class Job(Recorded):
    """One enqueued task: what its pool runs, and the one who writes its result."""

    def __init__(
        self, record: Record, pool: Pool, sender: type[BaseTaskBackend], options: dict[str, Any]
    ) -> None:
        self.record = record
        self.result = record.result
        self.pool = pool
        self.sender = sender  # of the signals
        self.options = options  # of the mark on its function; see bgtasks.backends.policy
        # Gives the task to the engine, if that has to keep it until its ``run_after``.
        self.pass_on: Callable[[Task], None] | None = None
        self._sent: Sent | None = None  # written by the thread that hands tasks off

    def __call__(self) -> Any:
        """Run the task on the calling thread; for an asynchronous one, return its coroutine."""
        if inspect.iscoroutinefunction(self.result.task.func):
            return self._run()
        try:
            self._start()
            send(task_started, self)
            value = self._call()
            if (coroutine := as_coroutine(value)) is not None:
                coroutine.close()  # no engine would await it either, and JSON has no form for it
            value = normalize_json(value)
        except BaseException as error:
            if self._end_try(error, Outcome.FAILED):
                send(task_finished, self)
            raise
        if self._succeed(value):
            send(task_finished, self)
        return None

    async def _run(self) -> None:
        if self.record.has_ended:
            return  # a receiver of its end has taken so long that the task has timed out, and is tried again
        try:
            self._start()
            await _send_from_loop(task_started, self)
            value = normalize_json(await self._call())
        except BaseException as error:
            own = current_task()
            outcome = (own and own.stop_reason) or Outcome.FAILED
            timeout = TimeoutError("the task was cancelled after TASK_TIMEOUT")
            if self._end_try(timeout if outcome is Outcome.TIMED_OUT else error, outcome):
                await _send_from_loop(task_finished, self)
            raise
        if self._succeed(value):
            await _send_from_loop(task_finished, self)

    def _call(self) -> Any:
        result = self.result
        args: list[Any] = [TaskContext(task_result=result)] if result.task.takes_context else []
        return result.task.func(*args, *result.args, **result.kwargs)

    def _start(self) -> None:
        self.record.begin(f"bgtasks-{self.pool.name}-{os.getpid()}")

    def _succeed(self, value: Any) -> bool:
        return self.record.end(TaskResultStatus.SUCCESSFUL, _return_value=value)

    def _end_try(self, error: BaseException, outcome: Outcome) -> bool:
        """Write that a try has failed; True if that is the end of the task, and was not written before."""
        own = current_task()
        if own is not None and own.policy.allows_retry(outcome, error):
            self.record.end_try(_described(error))
            return False
        return self._fail(error)

    def _fail(self, error: BaseException) -> bool:
        errors = [*self.result.errors, _described(error)]
        return self.record.end(TaskResultStatus.FAILED, errors=errors)

    def failed(self, error: BaseException) -> None:
        """Hear that the task has failed for good. It has recorded that, unless it was to be tried again."""
        is_written = 0 < self.result.attempts == len(self.result.errors)  # with the last try
        if not (self.record.end(TaskResultStatus.FAILED) if is_written else self._fail(error)):
            return
        try:
            raise error  # Django logs the exception that is being handled
        except BaseException:
            send(task_finished, self)

    def dropped(self, why: str) -> None:
        """Hear that the task was not accepted, or was given up before it has ended, and `why`."""
        if self._fail(TaskDropped(f"task {self.result.task.module_path!r} dropped: {why}")):
            send(task_finished, self)

    def finished(self, outcome: Outcome, why: str) -> None:
        """Hear from the pool that the task has ended without being run to its end."""
        if outcome is Outcome.CANCELLED:
            self.dropped(f"pool {self.pool.name!r} is shut down")
        elif outcome is Outcome.SHED:
            expired = why == ShedReason.EXPIRED.value
            self.dropped("it was too old to run" if expired else "a full pool gave way to newer ones")
        else:
            self.record.hand_off(self._sent)

    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task and its arguments, which are JSON already."""
        return self.result.task, self.result.args, self.result.kwargs

    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""
        self._sent = Sent(alias, result_id)


def options_of(task: AnyTask, result: AnyResult) -> dict[str, Any]:
    """Return the options that the function of `task` is marked with, with its key for these arguments."""
    options: dict[str, Any] = getattr(task.func, MARK, {})
    make_key = options.get("key")
    if not callable(make_key):
        return options
    key = make_key(*result.args, **result.kwargs)
    if not isinstance(key, str):
        raise TypeError(f"the key of task {task.module_path!r} must be a str, not {key!r}")
    return {**options, "key": str.__str__(key)}


def _described(error: BaseException) -> TaskError:
    kind = type(error)
    return TaskError(
        exception_class_path=f"{kind.__module__}.{kind.__qualname__}",
        traceback="".join(format_exception(error)),
    )


def send(signal: Signal, job: Job) -> None:
    """Call the receivers of one of Django's signals. None of them can fail an enqueue or a task."""
    try:
        signal.send_robust(sender=job.sender, task_result=job.result)
    except BaseException as error:
        report(
            logging.ERROR, "a receiver could not be called for task %r", job.result.task.module_path, error
        )


async def asend(signal: Signal, job: Job) -> None:
    """Do the same where an enqueuer's event loop runs.

    On the loop's own thread: the signal's ``asend_robust`` would go to another one even for receivers that
    only log, as Django's does. It is left for asynchronous receivers, which cannot be called otherwise.
    """
    if any(is_async for *_, is_async in signal.receivers):
        await signal.asend_robust(sender=job.sender, task_result=job.result)
    else:
        send(signal, job)


async def _send_from_loop(signal: Signal, job: Job) -> None:
    """Do the same on the drainer's loop: any receiver beside Django's, which logs, has the slot's thread."""
    if len(signal.receivers) > 1:
        await sync_to_async(send)(signal, job)
    else:
        send(signal, job)
