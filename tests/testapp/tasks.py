"""Tasks of Django's own kind (Django 6.0)."""

import threading
from typing import Any

from django.tasks import TaskContext, task
from django.utils import timezone, translation

from tests.gate import AsyncGate, Gate

gates: dict[str, Gate | AsyncGate] = {}  # by name, for the two tasks that a test holds


@task()
def noop(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


@task()
async def anoop(*args: Any, **kwargs: Any) -> None:
    """Do nothing, on an event loop."""


@task()
def answer() -> int:
    return 42


@task()
async def aanswer() -> int:
    return 42


@task()
def fail() -> None:
    raise ValueError("this task failed")


@task()
async def afail() -> None:
    raise ValueError("this task failed")


@task()
def exit_() -> None:
    raise SystemExit("this task wants to exit")


@task()
def interrupt() -> None:
    raise KeyboardInterrupt("this task was interrupted")


@task()
def fail_oddly() -> None:
    raise ValueError(ValueError("this task failed"))


@task()
def return_object() -> Any:
    return object()


@task()
def return_coroutine() -> Any:
    async def nothing() -> None: ...

    return nothing()


@task(takes_context=True)
def context_id(context: Any) -> Any:
    return context.task_result.id


@task(takes_context=True)
async def acontext_status(context: Any, attempt: Any) -> Any:
    assert isinstance(context, TaskContext)
    assert context.attempt == attempt
    return context.task_result.status


@task()
def held(name: str) -> None:
    gates[name]()


@task()
async def aheld(name: str) -> None:
    gate: Any = gates[name]
    await gate()


@task()
def locale() -> list[Any]:
    return [translation.get_language(), timezone.get_current_timezone_name()]


@task()
def thread_name() -> Any:
    return threading.current_thread().name


@task()
def held_and_fail(name: str) -> None:
    gates[name]()
    raise ValueError("too late")


@task()
async def stubborn(name: str, fails: Any, end: Any) -> None:
    """Block the drainer's loop in `name`, past the shutdown that gives this task up; then end, or fail."""
    gates[name]()
    gates[end]()
    if fails:
        raise ValueError("too late")
