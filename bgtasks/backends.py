"""A backend for Django's own tasks (Django 6.0) that runs them on the pools of this process.

::

    TASKS = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}

``task.enqueue()`` then is what ``bgtasks.spawn`` is: it never blocks, never raises under load, and what it
enqueues runs in a slot. The call sites are Django's, so the day a project needs a durable engine it names one
here, and no call site changes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from contextvars import copy_context
from traceback import format_exception
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

import django
from asgiref.sync import sync_to_async
from django.apps import apps
from django.core import checks

from bgtasks import conf
from bgtasks import context as task_context
from bgtasks.core.figures import Outcome
from bgtasks.core.log import log
from bgtasks.core.places import State
from bgtasks.core.task import Task as QueuedTask
from bgtasks.core.task import as_coroutine, current_task
from bgtasks.exceptions import TaskDropped
from bgtasks.hooks import Recorded
from bgtasks.pool import Pool
from bgtasks.pools import pools

if django.VERSION < (6, 0):
    raise ImportError(
        "bgtasks.backends needs django.tasks, which Django has from 6.0 on, and this is Django "
        f"{django.get_version()}; use bgtasks.spawn(), which needs no backend, or upgrade Django"
    )

from django.dispatch import Signal
from django.tasks import task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import Task, TaskContext, TaskError, TaskResult, TaskResultStatus
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils.json import normalize_json

from bgtasks.results import AnyResult, AnyTask, Record, Sent, new_result, refresh, results_of, snapshot

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_RESULTS = 1000  # finished results kept for get_result


class PoolBackend(BaseTaskBackend):
    """Runs tasks on the pools of this process.

    A task goes to the pool that is called like its queue, or else to the pool that the option ``POOL`` names.
    A task that finds its pool full is dropped: its result says FAILED, and ``bgtasks.exceptions.TaskDropped``
    is the error. Results can be read back in the process that enqueued the task, and only there, so
    ``supports_get_result``, which means anywhere, is False.

    >>> result = send_welcome.enqueue(user.pk)
    >>> result.refresh()
    """

    supports_async_task = True

    OPTIONS: ClassVar = {"POOL", "RESULTS"}

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self._results = results_of(alias)

    def enqueue(self, task: Task[P, R], args: Any, kwargs: Any) -> TaskResult[P, R]:
        """Have a slot run `task`, and return at once.

        Raises:
            InvalidTask: The task is not one for this backend.
            TypeError: An argument has no form in JSON.
        """
        job = self._new_job(task, args, kwargs)
        _send(task_enqueued, job)
        return cast("TaskResult[P, R]", self._submit(job))

    async def aenqueue(self, task: Task[P, R], args: Any, kwargs: Any) -> TaskResult[P, R]:
        """Do as ``enqueue`` does, on the event loop itself: nothing in it waits."""
        job = self._new_job(task, args, kwargs)
        await _asend(task_enqueued, job)
        return cast("TaskResult[P, R]", self._submit(job))

    def get_result(self, result_id: str) -> AnyResult:
        """Return the result of a task that this process enqueued. If it was handed off, the engine is asked.

        Raises:
            TaskResultDoesNotExist: It was enqueued elsewhere, or so many have finished since that it was
                forgotten.
        """
        result, sent = self._results.get(result_id)
        if sent is not None:
            with contextlib.suppress(NotImplementedError):
                refresh(result, task_backends[sent.alias].get_result(sent.result_id))
        return result

    async def aget_result(self, result_id: str) -> AnyResult:
        """Do as ``get_result`` does."""
        result, sent = self._results.get(result_id)
        if sent is not None:
            with contextlib.suppress(NotImplementedError):
                refresh(result, await task_backends[sent.alias].aget_result(sent.result_id))
        return result

    def check(self, **_kwargs: Any) -> list[checks.CheckMessage]:
        """Report mistakes in this backend's entry in TASKS (bgtasks.E010 to E013)."""
        where = f"TASKS[{self.alias!r}]"
        found: list[checks.CheckMessage] = [
            checks.Error(
                f'{where}["OPTIONS"][{key!r}] is not an option of bgtasks.backends.PoolBackend.',
                hint=f"The options are {', '.join(map(repr, sorted(self.OPTIONS)))}.",
                id="bgtasks.E010",
            )
            for key in self.options
            if key not in self.OPTIONS
        ]
        kept = self._kept()
        if not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
            found.append(
                checks.Error(
                    f'{where}["OPTIONS"]["RESULTS"] is {kept!r}, which is not a whole number of results.',
                    hint=f"RESULTS is how many finished results are kept: {DEFAULT_RESULTS} by default.",
                    id="bgtasks.E013",
                )
            )
        if not apps.is_installed("bgtasks"):
            found.append(
                checks.Error(
                    f"{where} runs tasks on pools that nobody starts and nobody shuts down.",
                    hint='Add "bgtasks" to INSTALLED_APPS.',
                    id="bgtasks.E012",
                )
            )
        if not any(conf.problems(conf.configured())) and self._fallback() not in conf.pool_names():
            found.append(
                checks.Error(
                    f'{where}["OPTIONS"]["POOL"] is {self._fallback()!r}, which is not a pool.',
                    hint=f"BGTASKS defines: {', '.join(map(repr, conf.pool_names()))}.",
                    id="bgtasks.E011",
                )
            )
        return found

    def _kept(self) -> Any:
        return self.options.get("RESULTS", DEFAULT_RESULTS)

    def _fallback(self) -> Any:
        return self.options.get("POOL", conf.DEFAULT_POOL)

    def _pool_for(self, queue_name: str) -> Pool:
        # The name of the queue of tasks that have chosen none is also that of a pool, which always exists.
        if queue_name != conf.DEFAULT_POOL and queue_name in pools:
            return pools[queue_name]
        return pools[self._fallback()]

    def _new_job(self, task: AnyTask, args: Any, kwargs: Any) -> Job:
        self.validate_task(task)
        pool = self._pool_for(task.queue_name)
        record = self._results.add(new_result(task, self.alias, args, kwargs), self._kept())
        return Job(record, pool, type(self))

    def _submit(self, job: Job) -> AnyResult:
        """Give `job` to its pool, and return a copy of its result as it is now."""
        task = job.result.task
        queued = QueuedTask(
            task.module_path,
            job,
            (),
            {},
            inspect.iscoroutinefunction(task.func),
            copy_context(),
            task_context.capture(),
        )
        # Before a slot begins it: the caller gets READY, however fast they are.
        enqueued = snapshot(job.result)
        accepted = job.pool.submit(queued)
        if not accepted:
            job.drop()
        # Dropped, or diverted, as by MODE "inline", which has run it by now.
        return enqueued if accepted and not job.pool.is_diverted else snapshot(job.result)


class Job(Recorded):
    """One enqueued task: what its pool runs, and the one who writes its result."""

    def __init__(self, record: Record, pool: Pool, sender: type[PoolBackend]) -> None:
        self.record = record
        self.result = record.result
        self.pool = pool
        self.sender = sender  # of the signals
        self._sent: Sent | None = None  # written by the thread that hands tasks off

    def __call__(self) -> Any:
        """Run the task on the calling thread; for an asynchronous one, return its coroutine."""
        if inspect.iscoroutinefunction(self.result.task.func):
            return self._run()
        try:
            self._start()
            _send(task_started, self)
            value = self._call()
            if (coroutine := as_coroutine(value)) is not None:
                coroutine.close()  # no engine would await it either, and JSON has no form for it
            value = normalize_json(value)
        except BaseException as error:
            if self._fail(error):
                _send(task_finished, self)
            raise
        if self._succeed(value):
            _send(task_finished, self)
        return None

    async def _run(self) -> None:
        try:
            self._start()
            await _send_from_loop(task_started, self)
            value = normalize_json(await self._call())
        except BaseException as error:
            own = current_task()
            timed_out = own is not None and own.stop_reason is Outcome.TIMED_OUT
            if self._fail(TimeoutError("the task was cancelled after TASK_TIMEOUT") if timed_out else error):
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

    def _fail(self, error: BaseException) -> bool:
        kind = type(error)
        described = TaskError(
            exception_class_path=f"{kind.__module__}.{kind.__qualname__}",
            traceback="".join(format_exception(error)),
        )
        return self.record.end(TaskResultStatus.FAILED, errors=[*self.result.errors, described])

    def drop(self) -> None:
        """End a task that its pool has not accepted, or has given up before it was run."""
        slots = self.pool.slots
        pool = self.pool.name
        if slots is not None and slots.queue.state is State.OPEN:
            why = f"pool {pool!r} is full (capacity {slots.queue.capacity})"
        else:
            why = f"pool {pool!r} is shut down"
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        if self._fail(TaskDropped(f"task {self.result.task.module_path!r} dropped: {why}")):
            _send(task_finished, self)

    def finished(self, outcome: Outcome) -> None:
        """Hear from the pool that the task has ended without being run to its end."""
        if outcome is Outcome.CANCELLED:
            self.drop()
        elif outcome is Outcome.SHED:
            self._give_up("it was too old to run, or a full pool gave way to newer ones")
        else:
            self.record.hand_off(self._sent)

    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task and its arguments, which are JSON already."""
        return self.result.task, self.result.args, self.result.kwargs

    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""
        self._sent = Sent(alias, result_id)


def _send(signal: Signal, job: Job) -> None:
    """Call the receivers of one of Django's signals. None of them can fail an enqueue or a task."""
    try:
        signal.send_robust(sender=job.sender, task_result=job.result)
    except BaseException as error:
        log(logging.ERROR, "a receiver could not be called", error=error)


async def _asend(signal: Signal, job: Job) -> None:
    """Do the same where an enqueuer's event loop runs.

    On the loop's own thread: the signal's ``asend_robust`` would go to another one even for receivers that
    only log, as Django's does. It is left for asynchronous receivers, which cannot be called otherwise.
    """
    if any(is_async for *_, is_async in signal.receivers):
        await signal.asend_robust(sender=job.sender, task_result=job.result)
    else:
        _send(signal, job)


async def _send_from_loop(signal: Signal, job: Job) -> None:
    """Do the same on the drainer's loop: any receiver beside Django's, which logs, has the slot's thread."""
    if len(signal.receivers) > 1:
        await sync_to_async(_send)(signal, job)
    else:
        _send(signal, job)
