"""A backend for Django's own tasks (Django 6.0) that runs them on the pools of this process.

::

    TASKS = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}

``task.enqueue()`` then works like ``bgtasks.spawn``: it never blocks, never raises under load, and the task
runs in a slot. The code that enqueues tasks uses Django's interface, so a project can switch to a durable
engine here without changing that code.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

import django
from asgiref.sync import sync_to_async
from django.apps import apps
from django.core import checks
from django.db import DEFAULT_DB_ALIAS, connections, transaction

from bgtasks import conf
from bgtasks import context as task_context
from bgtasks.core.figures import Outcome
from bgtasks.core.policy import Options
from bgtasks.core.task import Task as QueuedTask
from bgtasks.django_tasks import seconds_until
from bgtasks.pool import Pool
from bgtasks.pools import pools
from bgtasks.spawning import check_options
from bgtasks.submission import OnCommit
from bgtasks.text import encodable

if django.VERSION < (6, 0):
    raise ImportError(
        "bgtasks.backends needs django.tasks, which came with Django 6.0, and this is Django "
        f"{django.get_version()}; use bgtasks.spawn(), which needs no backend, or upgrade Django"
    )

from django.tasks import task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TASK_MAX_PRIORITY, TASK_MIN_PRIORITY, Task, TaskResult
from django.tasks.signals import task_enqueued

from bgtasks import defer
from bgtasks.jobs import MARK, Job, asend, options_of, send
from bgtasks.results import AnyResult, AnyTask, new_result, refresh, results_of, snapshot, write

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_RESULTS = 1000  # finished results kept for get_result
IGNORE = "ignore"  # PRIORITIES


def policy(
    *,
    expires: float | None = None,
    key: str | Callable[..., str] | None = None,
    retries: int | None = None,
    retry_delay: float | None = None,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] | None = None,
) -> Callable[[F], F]:
    """Set the policy of a task's function for a ``PoolBackend``. Other backends ignore it.

    It goes below ``@task``. For options that are left out, the pool's settings apply.

    >>> @task
    ... @policy(expires=60, retries=3, retry_on=OSError)
    ... def send_welcome(user_pk): ...

    Args:
        expires: Seconds that the task may wait. If it waits longer, its result has the status FAILED.
        key: If a task of this function with this key waits, the new one takes its place in the queue, and
            both results are that of the new one. A string, or a function of the arguments that returns one.
        retries: How often the task is tried again if it fails.
        retry_delay: Seconds before that, doubled with each try, up to 60.
        retry_on: Exception classes after which the task is tried again: ``Exception`` by default. A time-out
            counts as TimeoutError.

    Raises:
        TypeError: An option has a wrong type, or it stands above ``@task``.
        ValueError: An option is out of range.
    """
    given: dict[str, Any] = {
        "expires": expires,
        "key": None if callable(key) else key,
        "retries": retries,
        "retry_delay": retry_delay,
        "retry_on": retry_on,
        "database": None,
    }
    checked = {name: value for name, value in check_options(given).items() if value is not None}
    options = {**checked, "key": key} if callable(key) else checked

    def mark(function: F) -> F:
        if isinstance(function, Task):
            raise TypeError(f"write @policy(...) beneath @task, not above it: {function.module_path!r}")
        setattr(function, MARK, options)
        return function

    return mark


class PoolBackend(BaseTaskBackend):
    """Runs tasks on the pools of this process.

    A task goes to the pool with the name of its queue, or else to the pool that the option ``POOL`` names.
    A task with ``run_after`` waits there, if that is at most ``DEFER_MAX`` seconds in the future.
    The option ``PRIORITIES`` sends tasks with a priority to other pools: ``{10: "urgent", -10: "bulk"}``.
    If the pool is full, the task is dropped: its result has the status FAILED and the error
    ``bgtasks.exceptions.TaskDropped``. Only the process that enqueued a task can read its result, so
    ``supports_get_result``, which means in any process, is False.

    >>> result = send_welcome.enqueue(user.pk)
    >>> result.refresh()

    For retries, expiry and keys, see ``policy``.
    """

    supports_async_task = True
    supports_defer = True

    OPTIONS: ClassVar = {"DATABASE", "DEFER_MAX", "ON_COMMIT", "POOL", "PRIORITIES", "RESULTS"}

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self._results = results_of(alias)
        self.supports_priority = "PRIORITIES" in self.options

    def validate_task(self, task: AnyTask) -> None:
        """Do as Django does, and see whether somebody can keep the task until its ``run_after``.

        Raises:
            InvalidTask: The task is not one for this backend.
        """
        super().validate_task(task)
        if task.run_after is not None:
            defer.engine_for(task, self._pool_for(task), self._defer_max())

    def enqueue(self, task: Task[P, R], args: Any, kwargs: Any) -> TaskResult[P, R]:
        """Have a slot run `task`, and return at once.

        In a transaction, the task goes to its pool after the commit; after a rollback, it is discarded. Async
        code has no transaction of its own: on a running event loop, the task goes to its pool at once.

        Raises:
            InvalidTask: The task is not one for this backend.
            TypeError: An argument has no form in JSON.
        """
        queued, job = self._new_job(task, args, kwargs)
        if not _on_loop() and self._waits_for_commit(queued, job):
            return cast("TaskResult[P, R]", snapshot(job.result))
        send(task_enqueued, job)
        return cast("TaskResult[P, R]", self._submit(queued, job))

    async def aenqueue(self, task: Task[P, R], args: Any, kwargs: Any) -> TaskResult[P, R]:
        """Do as ``enqueue`` does. The transaction is that of the thread on which the caller's ORM calls run.

        With ``ON_COMMIT`` False it stays on the event loop: nothing in it waits.
        """
        queued, job = self._new_job(task, args, kwargs)
        if self._on_commit() and await sync_to_async(self._waits_for_commit)(queued, job):
            return cast("TaskResult[P, R]", snapshot(job.result))
        await asend(task_enqueued, job)
        if job.pass_on is not None:
            return cast("TaskResult[P, R]", await sync_to_async(self._submit)(queued, job))
        return cast("TaskResult[P, R]", self._submit(queued, job))

    def get_result(self, result_id: str) -> AnyResult:
        """Return the result of a task that this process enqueued. If it was handed off, the engine is asked.

        Raises:
            TaskResultDoesNotExist: It was enqueued in another process, or more than ``RESULTS`` tasks have
                finished since.
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
        """Report mistakes in its entry in TASKS (bgtasks.E010 to E013, E017 to E019, E028, E029)."""
        where = f"TASKS[{self.alias!r}]"
        found = [
            _error(
                "bgtasks.E010",
                f'{where}["OPTIONS"][{key!r}] is not an option of bgtasks.backends.PoolBackend.',
                f"The options are {', '.join(map(repr, sorted(self.OPTIONS)))}.",
            )
            for key in self.options
            if key not in self.OPTIONS
        ]
        kept = self._kept()
        if not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
            found.append(
                _error(
                    "bgtasks.E013",
                    f'{where}["OPTIONS"]["RESULTS"] is {kept!r}, which is not a whole number of results.',
                    f"RESULTS is how many finished results are kept: {DEFAULT_RESULTS} by default.",
                )
            )
        if not apps.is_installed("bgtasks"):
            found.append(
                _error(
                    "bgtasks.E012",
                    f"{where} runs tasks on pools that nobody starts and nobody shuts down.",
                    'Add "bgtasks" to INSTALLED_APPS.',
                )
            )
        if not any(conf.problems(conf.configured())) and self._fallback() not in conf.pool_names():
            found.append(
                _error(
                    "bgtasks.E011",
                    f'{where}["OPTIONS"]["POOL"] is {self._fallback()!r}, which is not a pool.',
                    f"BGTASKS defines: {', '.join(map(repr, conf.pool_names()))}.",
                )
            )
        where += '["OPTIONS"]'
        return [*found, *self._check_commit(where), *self._check_priorities(f'{where}["PRIORITIES"]')]

    def _check_commit(self, where: str) -> Iterator[checks.Error]:
        if not isinstance(self._on_commit(), bool):
            yield _error(
                "bgtasks.E019",
                f'{where}["ON_COMMIT"] is {self._on_commit()!r}, which is neither True nor False.',
                "ON_COMMIT says whether a task waits for the transaction that enqueues it: True by default.",
            )
        if self._database() not in list(connections):
            yield _error(
                "bgtasks.E029",
                f'{where}["DATABASE"] is {self._database()!r}, which is not an alias in DATABASES.',
                f"DATABASES defines: {', '.join(map(repr, connections))}.",
            )

        if not _is_duration(self._defer_max()):
            yield _error(
                "bgtasks.E028",
                f'{where}["DEFER_MAX"] is {self._defer_max()!r}, which is no number of seconds up to a day.',
                f"DEFER_MAX is how far ahead run_after may be: {defer.DEFER_MAX:g} by default. "
                "For more than a day, use an engine that stores its tasks.",
            )

    def _check_priorities(self, where: str) -> Iterator[checks.Error]:
        if self._priorities() == IGNORE:
            return
        priorities: dict[Any, Any] = self._priorities()
        if not isinstance(cast(object, priorities), dict) or not all(map(_is_priority, priorities)):
            yield _error(
                "bgtasks.E017",
                f"{where} is {priorities!r}, which is neither a dictionary from priorities to pools nor "
                f"{IGNORE!r}.",
                'Write {10: "urgent", -10: "bulk"} for priorities of 10 or more, and of -10 or less. '
                "Priorities are whole numbers from -100 to 100; one of 0 says nothing.",
            )
        elif not any(conf.problems(conf.configured())):
            for priority, pool in priorities.items():
                if pool not in conf.pool_names():
                    yield _error(
                        "bgtasks.E018",
                        f"{where}[{priority!r}] is {pool!r}, which is not a pool.",
                        f"BGTASKS defines: {', '.join(map(repr, conf.pool_names()))}.",
                    )

    def _priorities(self) -> Any:
        return self.options.get("PRIORITIES", {})

    def _on_commit(self) -> Any:
        return self.options.get("ON_COMMIT", True)

    def _defer_max(self) -> Any:
        return self.options.get("DEFER_MAX", defer.DEFER_MAX)

    def _database(self) -> Any:
        return self.options.get("DATABASE", DEFAULT_DB_ALIAS)

    def _kept(self) -> Any:
        return self.options.get("RESULTS", DEFAULT_RESULTS)

    def _fallback(self) -> Any:
        return self.options.get("POOL", conf.DEFAULT_POOL)

    def _pool_for(self, task: AnyTask) -> Pool:
        name = self._pool_of_priority(task.priority) or task.queue_name
        # The name of the queue of tasks that have chosen none is also that of a pool, which always exists.
        if name == task.queue_name and (name == conf.DEFAULT_POOL or name not in pools):
            name = self._fallback()
        return pools[name]

    def _pool_of_priority(self, priority: int) -> str | None:
        """Return the pool of tasks with this `priority`; None if their queue decides."""
        priorities = self._priorities()
        if priorities == IGNORE or not priority:
            return None
        # As far from 0 as it goes, but no farther than the task's own, and on the same side.
        reached = [key for key in priorities if key * priority > 0 and abs(key) <= abs(priority)]
        return priorities[max(reached, key=abs)] if reached else None

    def _new_job(self, task: AnyTask, args: Any, kwargs: Any) -> tuple[QueuedTask, Job]:
        """Return what the pool of `task` is to run, in the caller's context, and the job in it."""
        self.validate_task(task)
        pool = self._pool_for(task)
        record = self._results.add(new_result(task, self.alias, args, kwargs), self._kept())
        job = Job(record, pool, type(self), options_of(task, record.result))
        asynchronous = inspect.iscoroutinefunction(task.func)
        context, captured = copy_context(), task_context.capture()
        name = encodable(task.module_path)
        queued = QueuedTask(name, job, (), {}, asynchronous, context, captured)
        engine = None if task.run_after is None else defer.engine_for(task, pool, self._defer_max())
        if engine is not None:
            defer.set_policy(queued, self._options(job), 0.0)
            job.pass_on = None if pool.is_diverted else defer.passing_on(queued, pool, engine)
        return queued, job

    def _options(self, job: Job) -> Options:
        """Return the options of a job, those of its mark before those of its pool, which is built for it."""
        return job.pool.default_options()._replace(**job.options)

    def _waits_for_commit(self, queued: QueuedTask, job: Job) -> bool:
        """Have a task enqueued once the transaction of this thread commits; False if there is none."""
        if not self._on_commit() or not connections[self._database()].in_atomic_block:
            return False
        write(job.result, enqueued_at=None)  # nobody else knows of it yet
        # Only the connection holds the job: after a rollback it is gone, and so is its result.
        commit = OnCommit(partial(self._enqueue_after_commit, job), queued)
        transaction.on_commit(commit, using=self._database())
        return True

    def _enqueue_after_commit(self, job: Job, queued: QueuedTask) -> None:
        job.record.enqueue()
        send(task_enqueued, job)
        self._submit(queued, job)

    def _submit(self, queued: QueuedTask, job: Job) -> AnyResult:
        """Give a task to its pool, and return a copy of its result as it is now."""
        # Before a slot begins it: the caller gets READY, however fast they are.
        enqueued = snapshot(job.result)
        if job.pass_on is not None:
            job.pass_on(queued)
            job.finished(Outcome.HANDED_OFF, "")
            return enqueued
        run_after = job.result.task.run_after
        if job.options or run_after is not None:
            options = self._options(job)
            # Diverted, as by MODE "inline", it runs at once.
            defer.set_policy(queued, options, 0.0 if job.pool.is_diverted else seconds_until(run_after))
        try:
            accepted = job.pool.submit(queued)
        except BaseException as error:
            # Inline it has run here, and failed. As with Django's ImmediateBackend, its result says so.
            if isinstance(error, KeyboardInterrupt) or not job.result.attempts:
                raise
            job.failed(error)
            accepted = True
        if queued.outcome is Outcome.COALESCED and isinstance(queued.function, Job):
            queued.function.record.follow(job.record)  # it has changed places with the older one
        # Dropped, or diverted, as by MODE "inline", which has run it by now.
        return enqueued if accepted and not job.pool.is_diverted else snapshot(job.result)


def _on_loop() -> bool:
    """Tell whether an event loop runs on this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_priority(value: Any) -> bool:
    """Tell whether `value` is a priority that a task can have chosen."""
    return type(value) is int and value != 0 and TASK_MIN_PRIORITY <= value <= TASK_MAX_PRIORITY


def _is_duration(value: Any) -> bool:
    """Tell whether `value` is a number of seconds for which a pool may keep a task."""
    return type(value) in {int, float} and 0 <= value <= defer.LONGEST


def _error(check: str, message: str, hint: str) -> checks.Error:
    return checks.Error(message, hint=hint, id=check)
