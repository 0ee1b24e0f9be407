"""The results of ``django.tasks`` in this process: of tasks on their way, and of the last ones to finish.

One lock guards all of them. Every change of a result that others can read is one step under it, so a copy is
of one moment. Nothing of the user's is called under the lock. A signal handler may enqueue in the middle of a
step, so the lock is re-entrant. A forked child starts with no results, and with a lock of its own.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

from django.tasks.base import TASK_REFRESH_ATTRS, Task, TaskError, TaskResult, TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.utils import timezone

from bgtasks.core.lock import acquire, free, new_lock

P = ParamSpec("P")
R = TypeVar("R")
AnyTask: TypeAlias = "Task[..., Any]"  # generic to type checkers only
AnyResult: TypeAlias = "TaskResult[..., Any]"

IDS = 256  # made at a time

_set = object.__setattr__  # results are frozen for everybody but their backend

_lock = new_lock()
# Written under the lock:
_by_alias: dict[str, Results] = {}
_ids: list[str] = []  # to be used


def _step(function: Callable[P, R]) -> Callable[P, R]:
    """Have `function` run under the lock. An exception of a signal handler, at any point, leaves it free."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        lock = _lock
        try:
            if not lock.acquire(False):
                acquire(lock)
            try:
                return function(*args, **kwargs)
            finally:
                lock.release()
        except BaseException:
            free(lock)
            raise

    return run


class Sent(NamedTuple):
    """Where a task was handed off to."""

    alias: str  # of the engine
    result_id: str  # the engine's


class Record:
    """The result of one task, for whoever runs the task to write. Its end is written once.

    A plain function that a shutdown has given up may still finish one day. Its result says by then that it
    was cancelled, and stays as it is.
    """

    def __init__(self, results: Results, result: AnyResult, limit: int) -> None:
        self.result = result  # read by anybody through a copy; written under the lock
        self._limit = limit  # of finished results that are kept
        # All that follows is written under the lock.
        self._ids = [(results, result.id)]  # its own, and then those of results that follow it
        self._newer: Record | None = None  # what this one follows
        self._ended = False
        self._kept = False  # it has ended, or was handed off
        self._sent: Sent | None = None  # where to

    @property
    def has_ended(self) -> bool:
        """Whether the end of the task is written."""
        return self._ended

    @_step
    def enqueue(self) -> None:
        """Write that the task, which has waited for a commit, is enqueued now."""
        write(self.result, enqueued_at=timezone.now())

    @_step
    def begin(self, worker_id: str) -> None:
        """Write that an attempt at the task begins, unless a shutdown has just given it up."""
        if not self._ended:
            begin(self.result, worker_id)

    @_step
    def end_try(self, error: TaskError) -> None:
        """Write that an attempt has failed, and that the task waits for another one."""
        if not self._ended:
            write(self.result, errors=[*self.result.errors, error], status=TaskResultStatus.READY)

    @_step
    def end(self, status: TaskResultStatus, **attributes: Any) -> bool:
        """Write how the task has ended; False if that was written before."""
        if self._ended:
            return False
        self._ended = True
        write(self.result, finished_at=timezone.now(), **attributes)
        # Last: a receiver of a signal holds the result itself, and if it is finished, finds all the rest.
        write(self.result, status=status)
        self._keep()
        return True

    @_step
    def hand_off(self, sent: Sent | None) -> None:
        """Keep the result, of which only the engine knows more from now on."""
        self._sent = sent
        self._keep()

    @_step
    def follow(self, newer: Record) -> None:
        """Have whoever asks for this result get that of the `newer` task, which has taken its place."""
        while newer._newer is not None:  # another one has taken its place *just* before
            newer = newer._newer
        self._newer = newer
        for results, result_id in self._ids:
            results.live[result_id] = newer
            if newer._kept:
                results.keep(result_id, newer.result, newer._sent, newer._limit)
        ids = [*newer._ids, *self._ids]
        newer._ids, forgotten = ids[: newer._limit + 1], ids[newer._limit + 1 :]
        for results, result_id in forgotten:
            results.live.pop(result_id, None)

    def _keep(self) -> None:
        self._kept = True
        for results, result_id in self._ids:
            results.keep(result_id, self.result, self._sent, self._limit)


class Results:
    """The results of one alias in TASKS."""

    def __init__(self) -> None:
        # Written under the lock. A task on its way is held by its pool.
        self.live: weakref.WeakValueDictionary[str, Record] = weakref.WeakValueDictionary()
        self._kept: dict[str, tuple[AnyResult, Sent | None]] = {}  # finished, or handed off
        self._order: deque[str] = deque()  # the ids of these, oldest first

    @_step
    def add(self, result: AnyResult, limit: int) -> Record:
        """Return the record of a task on its way. Once it has ended, at most `limit` results are kept."""
        record = self.live[result.id] = Record(self, result, limit)
        return record

    def keep(self, result_id: str, result: AnyResult, sent: Sent | None, limit: int) -> None:
        """Keep a `result`, and forget the oldest ones past the `limit`. Called under the lock."""
        self._kept[result_id] = result, sent
        self._order.append(result_id)
        while len(self._order) > limit:
            self._kept.pop(self._order.popleft(), None)

    def get(self, result_id: str) -> tuple[AnyResult, Sent | None]:
        """Return a copy of a result, and where its task was handed off to.

        Raises:
            TaskResultDoesNotExist: There is none of that id.
        """
        found = self._find(result_id)
        if found is None:
            raise TaskResultDoesNotExist(result_id)
        return found

    @_step
    def _find(self, result_id: str) -> tuple[AnyResult, Sent | None] | None:
        # The kept ones first: what was handed off may still be among the live ones.
        if result_id in self._kept:
            result, sent = self._kept[result_id]
        elif (record := self.live.get(result_id)) is not None:
            result, sent = record.result, None
        else:
            return None
        copied = snapshot(result)
        if result.id != result_id:  # it is that of a newer task
            write(copied, id=result_id)
        return copied, sent


@_step
def results_of(alias: str) -> Results:
    """Return the results of an `alias` in TASKS. Django makes a backend for each thread; they share these."""
    return _by_alias.setdefault(alias, Results())


def _forget() -> None:
    """Forget what belongs to the parent: the results of its tasks, the ids that it will use, its lock."""
    global _lock
    _lock = new_lock()
    for results in _by_alias.values():
        Results.__init__(results)
    _ids.clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)


@_step
def _new_id() -> str:
    """Return 32 random characters, as many as those of Django's own backends.

    For each call of ``os.urandom`` a thread gives the GIL away: a quarter of what an enqueue costs.
    """
    if not _ids:
        digits = os.urandom(IDS * 16).hex()
        _ids.extend(digits[at : at + 32] for at in range(0, len(digits), 32))
    return _ids.pop()


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
    started_at = result.started_at or now
    write(result, status=TaskResultStatus.RUNNING, started_at=started_at, last_attempted_at=now)


# The fields of a new result. It has its return value once it has succeeded.
_RESULT_FIELDS = [field.name for field in fields(TaskResult) if field.name != "_return_value"]


def snapshot(result: AnyResult) -> AnyResult:
    """Return a copy of `result` that nobody else writes to."""
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


def refresh(result: AnyResult, other: AnyResult) -> None:
    """Write into `result`, a copy, what the engine knows of the task."""
    write(result, **{name: getattr(other, name) for name in TASK_REFRESH_ATTRS})


def write(result: AnyResult, **attributes: Any) -> None:
    """Set attributes of a frozen `result`."""
    for name, value in attributes.items():
        _set(result, name, value)
