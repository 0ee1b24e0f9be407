"""Tasks of Django's own kind (Django 6.0)."""

import threading
from typing import Any

from django.tasks import TaskContext, task
from django.utils import timezone, translation

from bgtasks.backends import policy
from tests.gate import AsyncGate, Gate
from tests.testapp.models import Note

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


tries_left: dict[str, int] = {}  # by name, of the two tasks that fail for a while


def _fail_for_a_while(name: str) -> None:
    tries_left[name] -= 1
    if tries_left[name]:
        raise ValueError(f"{tries_left[name]} to go")


@task(takes_context=True)
@policy(retries=3, retry_delay=0)
def flaky(context: Any, name: str) -> Any:
    _fail_for_a_while(name)
    return context.attempt


@task(takes_context=True)
@policy(retries=3, retry_delay=0)
async def aflaky(context: Any, name: str) -> Any:
    _fail_for_a_while(name)
    return context.attempt


@task
@policy(retries=3, retry_on=OSError)
def fail_for_good() -> None:
    raise ValueError("this task failed")


@task
@policy(retries=1, retry_delay=50)
def fail_after(name: str) -> None:
    gates[name]()
    raise ValueError("this task failed")


@task
@policy(retries=1, retry_delay=50)
async def afail_after(name: str) -> None:
    gate: Any = gates[name]
    await gate()
    raise ValueError("this task failed")


@task
@policy(expires=0.001)
def fresh() -> None:
    """Do nothing, but soon."""


@task
@policy(key="all")
def rebuild(number: int) -> int:
    return number


@task
@policy(key=lambda pk, *, text: f"{pk}")
def index(pk: int, *, text: str) -> str:
    return text


@task
@policy(key=lambda: None)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]  # it is wrong
def without_a_key() -> None:
    """Never run: what makes its key returns no text."""


@task()
def note_text(pk: int) -> str:
    text: str = Note.objects.get(pk=pk).text
    return text


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
