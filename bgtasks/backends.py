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
import weakref
from collections import deque
from contextvars import copy_context
from dataclasses import fields
from traceback import format_exception
from typing import Any, ClassVar, ParamSpec, TypeAlias, TypeVar, cast

import django
from asgiref.sync import sync_to_async
from django.apps import apps
from django.core import checks
from django.utils import timezone

from bgtasks import conf
from bgtasks.exceptions import TaskDropped
from bgtasks.log import log
from bgtasks.pools import Pool, pools
from bgtasks.queue import Outcome, Recorded, State
from bgtasks.queue import Task as QueuedTask
from bgtasks.shell import capture
from bgtasks.slots import current_task

if django.VERSION < (6, 0):
    raise ImportError(
        "bgtasks.backends needs django.tasks, which Django has from 6.0 on, and this is Django "
        f"{django.get_version()}; use bgtasks.spawn(), which needs no backend, or upgrade Django"
    )

from django.dispatch import Signal
from django.tasks import task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TASK_REFRESH_ATTRS, Task, TaskContext, TaskError, TaskResult, TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils.json import normalize_json

P = ParamSpec("P")
R = TypeVar("R")
AnyTask: TypeAlias = "Task[..., Any]"  # generic to type checkers only
AnyResult: TypeAlias = "TaskResult[..., Any]"

Sent: TypeAlias = tuple[str, str]  # the alias of the engine, and the id of its result

DEFAULT_RESULTS = 1000  # finished results kept for get_result
IDS = 256  # made at a time

_set = object.__setattr__  # results are frozen for everybody but their backend


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
        # Django makes a backend for each thread. What they have in common is kept beside them.
        self._results = _results.setdefault(alias, Results())

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
            alias, engine_id = sent
            with contextlib.suppress(NotImplementedError):
                _refresh(result, task_backends[alias].get_result(engine_id))
        return result

    async def aget_result(self, result_id: str) -> AnyResult:
        """Do as ``get_result`` does."""
        result, sent = self._results.get(result_id)
        if sent is not None:
            alias, engine_id = sent
            with contextlib.suppress(NotImplementedError):
                _refresh(result, await task_backends[alias].aget_result(engine_id))
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
        result = new_result(task, self.alias, args, kwargs)
        return Job(result, pool, type(self), self._results, self._kept())

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
            capture(),
        )
        self._results.live[job.result.id] = job
        # Before a slot begins it: the caller gets READY, however fast they are.
        enqueued = snapshot(job.result)
        accepted = job.pool._submit(queued)
        if not accepted:
            job.drop()
        # Dropped, or diverted, as by MODE "inline", which has run it by now.
        return enqueued if accepted and job.pool._divert is None else snapshot(job.result)


class Job(Recorded):
    """One enqueued task: what its pool runs, and the one who writes its result."""

    def __init__(
        self, result: AnyResult, pool: Pool, sender: type[PoolBackend], results: Results, kept: int
    ) -> None:
        self.result = result  # what get_result copies; written by whoever runs the task
        self.pool = pool
        self.sender = sender  # of the signals
        self._results = results
        self._kept = kept
        # Whoever pops this ends the job. A plain function that a shutdown has given up still comes to its
        # end one day, and its result says by then that it was cancelled.
        self._token: deque[None] = deque([None])
        self._sent: Sent | None = None  # written by the mover

    def __call__(self) -> Any:
        """Run the task on the calling thread; for an asynchronous one, return its coroutine."""
        if inspect.iscoroutinefunction(self.result.task.func):
            return self._run()
        try:
            self._start()
            _send(task_started, self)
            value = self._call()
            if inspect.iscoroutine(value):
                value.close()
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
            timed_out = own is not None and own.overran
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
        begin(self.result, f"bgtasks-{self.pool.name}-{os.getpid()}")

    def _succeed(self, value: Any) -> bool:
        return self._end(TaskResultStatus.SUCCESSFUL, _return_value=value)

    def _fail(self, error: BaseException) -> bool:
        kind = type(error)
        described = TaskError(
            exception_class_path=f"{kind.__module__}.{kind.__qualname__}",
            traceback="".join(format_exception(error)),
        )
        return self._end(TaskResultStatus.FAILED, errors=[*self.result.errors, described])

    def _end(self, status: TaskResultStatus, **attributes: Any) -> bool:
        """Write how the task ended; False if that was written before."""
        try:
            self._token.pop()
        except IndexError:
            return False
        _write(self.result, finished_at=timezone.now(), **attributes)
        _write(self.result, status=status)  # last: whoever reads it as finished finds all the rest
        self._results.keep(self.result, self._kept)
        return True

    def drop(self) -> None:
        """End a task that its pool has not accepted, or has given up before it was run."""
        slots = self.pool._slots
        name, pool = self.result.task.module_path, self.pool.name
        if slots is not None and slots.queue.state is State.OPEN:
            why = f"pool {pool!r} is full (capacity {slots.queue.capacity})"
        else:
            why = f"pool {pool!r} is shut down"
        if self._fail(TaskDropped(f"task {name!r} dropped: {why}")):
            _send(task_finished, self)

    def finished(self, outcome: Outcome) -> None:
        """Hear from the pool that the task has ended without being run to its end."""
        if outcome is Outcome.CANCELLED:
            self.drop()
        else:
            self._results.keep(self.result, self._kept, self._sent)

    def description(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the task and its arguments, which are JSON already."""
        return self.result.task, self.result.args, self.result.kwargs

    def sent(self, alias: str, result_id: str) -> None:
        """Hear under what id the engine knows the task, if it is handed off."""
        self._sent = alias, result_id


class Results:
    """The results of one alias in this process: of tasks on their way, and of the last ones to finish.

    Every step is one atomic operation on a dictionary or a deque, so no lock is needed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all results."""
        self.live: weakref.WeakValueDictionary[str, Job] = weakref.WeakValueDictionary()  # kept by the pool
        self._finished: dict[str, tuple[AnyResult, Sent | None]] = {}
        self._order: deque[str] = deque()  # the ids of finished results, oldest first

    def keep(self, result: AnyResult, limit: int, sent: Sent | None = None) -> None:
        """Keep a `result` that is finished or was `sent` away, and forget the oldest past the `limit`."""
        self._finished[result.id] = result, sent
        self._order.append(result.id)
        while len(self._order) > limit:
            try:
                self._finished.pop(self._order.popleft(), None)
            except IndexError:
                return  # another thread has forgotten the last one

    def get(self, result_id: str) -> tuple[AnyResult, Sent | None]:
        """Return a copy of a result, and where the task has been handed off to.

        Raises:
            TaskResultDoesNotExist: There is none of that id.
        """
        job = self.live.get(result_id)
        # Before the live ones are believed: one that was handed off may not be gone from them yet.
        result, sent = self._finished.get(result_id) or (job.result if job is not None else None, None)
        if result is None:
            raise TaskResultDoesNotExist(result_id)
        return snapshot(result), sent


_results: dict[str, Results] = {}  # by alias
_ids: list[str] = []  # to be used; a step on it is atomic
# Those of a new result. It has its return value once it has succeeded.
_RESULT_FIELDS = [field.name for field in fields(TaskResult) if field.name != "_return_value"]


def _forget() -> None:
    """Forget what is the parent's: its results, of tasks that nobody runs here, and the ids it will use."""
    for results in _results.values():
        results.reset()
    _ids.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)


def _new_id() -> str:
    """Return 32 random characters, as many as those of Django's own backends.

    For each call of ``os.urandom`` a thread gives the GIL away: a quarter of what an enqueue costs.
    """
    while True:
        try:
            return _ids.pop()
        except IndexError:
            digits = os.urandom(IDS * 16).hex()
            _ids.extend(digits[at : at + 32] for at in range(0, len(digits), 32))


def new_result(task: AnyTask, alias: str, args: list[Any], kwargs: dict[str, Any]) -> AnyResult:
    """Return the result of a `task` that is being enqueued."""
    return TaskResult(
        task=task,
        id=_new_id(),
        status=TaskResultStatus.READY,
        enqueued_at=timezone.now(),
        started_at=None,
        last_attempted_at=None,
        finished_at=None,
        args=args,
        kwargs=kwargs,
        backend=alias,
        errors=[],
        worker_ids=[],
    )


def begin(result: AnyResult, worker_id: str) -> None:
    """Write that an attempt at the task begins."""
    now = timezone.now()
    result.worker_ids.append(worker_id)
    _write(result, status=TaskResultStatus.RUNNING, started_at=now, last_attempted_at=now)


def snapshot(result: AnyResult) -> AnyResult:
    """Return a copy of `result` that nobody goes on writing to."""
    # By hand: copy.copy() of a frozen dataclass with slots takes ten times as long.
    copied = object.__new__(type(result))
    for name in _RESULT_FIELDS:
        _set(copied, name, getattr(result, name))
    value = getattr(result, "_return_value", result)
    if value is not result:  # a sentinel
        _set(copied, "_return_value", value)
    _set(copied, "errors", list(result.errors))
    _set(copied, "worker_ids", list(result.worker_ids))
    return copied


def _refresh(result: AnyResult, other: AnyResult) -> None:
    """Write into `result` what the engine knows of the task."""
    _write(result, **{name: getattr(other, name) for name in TASK_REFRESH_ATTRS})


def _write(result: AnyResult, **attributes: Any) -> None:
    for name, value in attributes.items():
        _set(result, name, value)


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
