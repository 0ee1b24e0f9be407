"""Engines in TASKS, functions that travel to them, and a worker."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.tasks import TaskContext
from django.test import override_settings
from django.utils import timezone, translation
from django.utils.module_loading import import_string

from bgtasks.handoff.engine import Engine
from bgtasks.submission import make_task
from tests import broker
from tests.testapp.engines import make_result
from tests.testapp.models import Enqueued

TASKS: dict[str, dict[str, Any]] = {
    "default": {"BACKEND": "bgtasks.backends.PoolBackend"},
    "table": {"BACKEND": "tests.testapp.engines.TableBackend", "QUEUES": ["default", "email"]},
    "broker": {"BACKEND": "tests.broker.Broker", "QUEUES": []},
    "scheduler": {"BACKEND": "tests.broker.Scheduler", "QUEUES": []},
}
ran: list[Any] = []  # by the functions below, here or on a "worker"


@contextmanager
def empty_engines() -> Iterator[None]:
    """Have the engines in TASKS, and nothing in them."""
    broker.enqueued.clear()  # of what other tests have left there
    with override_settings(TASKS=TASKS):
        yield
    ran.clear()
    broker.enqueued.clear()


def note(*args: Any, **kwargs: Any) -> None:
    ran.append([list(args), kwargs])


async def anote(what: str) -> None:
    ran.append(what)


def note_locale() -> None:
    ran.append([translation.get_language(), timezone.get_current_timezone_name()])


def return_coroutine(what: str) -> Any:
    return anote(what)


def nested(depth: int) -> list[Any]:
    """Return lists in each other, that many in one."""
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


class Awaitable:
    def __init__(self, what: str) -> None:
        self._what = what

    def __await__(self) -> Any:
        return anote(self._what).__await__()


def return_awaitable(what: str) -> Any:
    return Awaitable(what)


def engine_of(alias: str = "table", pool: str = "default") -> Engine:
    """Return an engine for tests that need no pool."""
    return Engine(alias, pool)


def packed(function: Any, *args: Any, alias: str = "table", **kwargs: Any) -> Any:
    """Return what the engine would be asked to enqueue for a spawned task."""
    parcel = engine_of(alias).pack(make_task("name", function, args, kwargs))
    return None if parcel is None else parcel.content


def work() -> None:
    """Run what the engine in the database has, as a worker does: by the path of each task."""
    for row in Enqueued.objects.all():
        arguments = json.loads(row.arguments)
        task = import_string(row.path)
        context = [context_of(task, arguments)] if task.takes_context else []
        task.call(*context, *arguments["args"], **arguments["kwargs"])
        row.delete()


def context_of(task: Any, arguments: Any) -> Any:
    """Return the context that a worker gives to `task`."""
    return TaskContext(
        task_result=make_result(task, "table", arguments["args"], arguments["kwargs"], "on-the-worker")
    )
