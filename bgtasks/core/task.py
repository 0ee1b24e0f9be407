"""A task, its life, and what the core asks of the application around it."""

from __future__ import annotations

import asyncio
import enum
import inspect
import weakref
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar
from inspect import CO_ITERABLE_COROUTINE
from types import AsyncGeneratorType, GeneratorType
from typing import Any, cast

from bgtasks.clock import monotonic
from bgtasks.core.figures import BOUNDS, RUNNING, UNFINISHED, NameFigures, Outcome
from bgtasks.core.policy import NO_POLICY


class Life(enum.Enum):
    """The life of a task, in one direction. Every change is a step under the pool's lock."""

    WAITING = "waiting"  # in the queue, or checked out of it
    RUNNING = "running"  # in a slot
    ENDED = "ended"  # counted; its function may still be running if a shutdown has given it up


class Task:
    """One named unit of work, from ``spawn`` to its outcome."""

    __slots__ = (
        "__weakref__", "args", "asynchronous", "captured", "context", "figures", "function", "kwargs",
        "life", "name", "outcome", "overran", "policy", "runner", "spawned_at", "started_at",
        "stop_reason", "verdict", "watched",
    )  # fmt: skip

    figures: NameFigures  # of its name; written as it is put, under the pool's lock
    started_at: float  # monotonic seconds; under the pool's lock
    # Written by whoever runs the task, its slot's thread or the loop:
    verdict: Outcome | None  # how its function ended, until that is counted
    watched: bool  # the listeners know that it has started
    runner: asyncio.Task[None] | None  # while it waits on the loop
    stop_reason: Outcome | None  # TIMED_OUT or CANCELLED, once it was asked to stop; written on the loop
    overran: bool  # past TASK_TIMEOUT and still running; written by whoever sees it first

    def __init__(  # noqa: PLR0917  # keywords would cost every spawn 0.1 µs
        self,
        name: str,
        function: Callable[..., Any] | Coroutine[Any, Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        asynchronous: bool,
        context: Context,
        captured: object,
    ) -> None:
        self.name = name
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.asynchronous = asynchronous  # may become True once: a plain function can return a coroutine
        self.context = context
        self.captured = captured  # what the hooks captured beside the context
        self.policy = NO_POLICY  # another one if it has options; written before it is put
        self.spawned_at = monotonic()  # or, after a try, when it is due again
        # Written under the pool's lock:
        self.life = Life.WAITING
        self.outcome: Outcome | None = None  # written once, as the task is counted

    def end(self, outcome: Outcome, now: float) -> bool:
        """Count the running task as ended at `now`, and its times; False if it was before. Part of a step."""
        figures, counts = self.figures, self.figures.counts
        waited, ran = self.started_at - self.spawned_at, now - self.started_at
        wait, run = bisect_left(BOUNDS, waited), bisect_left(BOUNDS, ran)
        if self.life is Life.ENDED:  # atomic from here on
            return False
        self.life, self.outcome = Life.ENDED, outcome
        counts[RUNNING] -= 1
        counts[UNFINISHED] -= 1
        figures.ended[outcome] += 1
        figures.waits[wait] += 1
        figures.runs[run] += 1
        figures.wait_seconds += waited
        figures.run_seconds += ran
        figures.wait_max = waited if waited > figures.wait_max else figures.wait_max
        figures.run_max = ran if ran > figures.run_max else figures.run_max
        return True

    def call(self) -> Any:
        """Call the function with its arguments; for a coroutine object, return it."""
        function = self.function
        return function(*self.args, **self.kwargs) if callable(function) else function

    def discard(self) -> None:
        """Close the coroutine object of a task that will not run, so that Python does not warn of it."""
        function = self.function
        begun = inspect.iscoroutine(function) and inspect.getcoroutinestate(function) != inspect.CORO_CREATED
        if not callable(function) and not begun:
            function.close()


GENERATORS = {GeneratorType, AsyncGeneratorType}  # their bodies have not run, and nobody will run them


def as_coroutine(result: object) -> Coroutine[Any, Any, Any] | None:
    """Return what to await of a function's `result`; None if it is not awaitable."""
    kind = cast(Any, type(result))  # isinstance would evaluate a lazy object
    if not hasattr(kind, "__await__"):
        old = kind is GeneratorType and cast(Any, result).gi_code.co_flags & CO_ITERABLE_COROUTINE
        return _wait_for(cast(Any, result)) if old else None
    if issubclass(kind, Coroutine) and not callable(result):  # or `Task.call` would call it
        return cast(Coroutine[Any, Any, Any], result)
    return _wait_for(cast(Any, result))


async def _wait_for(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


# The task in which the current code runs. Weak, since it lies in the context that the task itself holds.
current: ContextVar[weakref.ref[Task]] = ContextVar("bgtasks.current")


def current_task() -> Task | None:
    """Return the task that the caller is a part of, on any thread or coroutine that has its context."""
    reference = current.get(None)
    return reference() if reference is not None else None


class Hooks:
    """What the core asks of the application around it. No hook may raise, but for ``enter``."""

    def enter(self, context: Context, captured: object) -> None:  # noqa: ARG002
        """Make the current context, a new one, the task's. If it raises, the task has failed, and not run."""
        for variable, value in context.items():
            variable.set(value)

    def leave(self) -> None:
        """Let go of what the task's context holds. Called inside it, on the thread of ``enter``."""

    def needs_thread(self, task: Task) -> bool:  # noqa: ARG002
        """Tell whether ``enter`` and ``leave`` of a coroutine have to be called on the slot's thread."""
        return self.watched()

    def attach(self, captured: object) -> None:
        """Go on in the task's context on this thread."""

    def detach(self) -> None:
        """Go on in the task's context on another thread."""

    def slot_context(self, slot: Executor) -> Callable[[], AbstractContextManager[None]]:  # noqa: ARG002
        """Return what makes the context, one a task, in which `slot` has the thread-sensitive calls."""
        return nullcontext

    def clean(self) -> None:
        """Close or return this thread's database connections as Django does after a request."""

    def close(self) -> None:
        """Close all that this thread holds: it ends."""

    def watched(self) -> bool:
        """Tell whether anybody listens to ``started`` and ``finished``."""
        return False

    def started(self, task: Task) -> None:
        """Tell the listeners that `task` starts. Called on its slot's thread, in its context."""

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Tell the listeners that `task` has ended. If it has run, on its slot's thread, in its context."""

    def tried(self, task: Task, error: BaseException | None) -> None:
        """Tell the listeners that a try of `task` has failed, before it waits again. As ``finished``."""

    def ended(self, task: Task, outcome: Outcome, error: BaseException | None, waiting: int) -> None:
        """Log how `task` ended, while so many are `waiting`. Called in its context, before ``finished``."""

    def retried(  # noqa: PLR0917
        self, task: Task, tries: int, error: BaseException | None, delay: float, refusal: str | None
    ) -> None:
        """Log that `task` has failed `tries` times and waits for `delay` seconds; or why not, after all."""
