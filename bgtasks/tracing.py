"""Who follows each task from its spawn to its end: OpenTelemetry, Sentry, or both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from bgtasks.core.figures import Outcome
from bgtasks.core.task import Task
from bgtasks.repeats import report

P = ParamSpec("P")
T = TypeVar("T")


class Tracer(Protocol):
    """Who follows each task from its spawn to its end. It may raise: that is logged."""

    def spawn(self, pool: str, task: Task) -> Callable[[bool], object]:
        """Hear that `task` is about to be submitted. Its context may be written to.

        Returns:
            What to call after that, with whether it was accepted.
        """
        ...

    def refused(self, pool: str, name: str) -> None:
        """Hear that a task called `name` was not even made: the pool is full."""
        ...

    def started(self, pool: str, task: Task) -> None:
        """Hear that `task` starts. Called in the task's context."""
        ...

    def retried(self, task: Task, error: BaseException | None) -> None:
        """Hear that a try of `task` has failed, before it waits to be tried again. Called in its context."""
        ...

    def shed(self, pool: str, task: Task) -> None:
        """Hear that `task` was given up while it waited, and has never run."""
        ...

    def finished(self, task: Task, outcome: Outcome, error: BaseException | None) -> None:
        """Hear that `task` has ended. Called in the task's context if it has run to its end."""
        ...


tracers: tuple[Tracer, ...] = ()  # of all pools


def add(tracer: Tracer) -> None:
    """Have `tracer` follow each task, in place of another one of its class."""
    global tracers
    remove(type(tracer))
    tracers = (*tracers, tracer)


def remove(kind: type) -> None:
    """Have no tracer of this class any more."""
    global tracers
    tracers = tuple(tracer for tracer in tracers if type(tracer) is not kind)


# In the spawner's thread.


def spawning(pool: str, task: Task) -> list[Callable[[bool], object]]:
    """Tell the tracers that `task` is about to be submitted. Return what ``submitted`` needs."""
    ends = [_in_spawn(tracer.spawn, pool, task) for tracer in tracers]
    return [end for end in ends if end is not None]


def submitted(ends: list[Callable[[bool], object]], accepted: bool) -> None:
    """Tell the tracers whether the task was accepted."""
    for end in ends:
        _in_spawn(end, accepted)


def refused(pool: str, name: str) -> None:
    """Tell the tracers of a task that was not even made."""
    for tracer in tracers:
        _in_spawn(tracer.refused, pool, name)


def _in_spawn(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    try:
        return step(*args, **kwargs)
    except Exception as error:  # not a KeyboardInterrupt, which is meant for the spawner
        report(logging.ERROR, "a spawn could not be traced: %r has raised", _name_of(step), error)
        return None


# In the slot's thread.


def started(pool: str, task: Task) -> None:
    """Tell the tracers that `task` starts."""
    for tracer in tracers:
        _in_slot(tracer.started, pool, task)


def retried(task: Task, error: BaseException | None) -> None:
    """Tell the tracers that a try of `task` has failed, before another one can begin."""
    for tracer in tracers:
        _in_slot(tracer.retried, task, error)


def shed(pool: str, task: Task) -> None:
    """Tell the tracers that `task` was given up while it waited."""
    for tracer in tracers:
        _in_slot(tracer.shed, pool, task)


def finished(task: Task, outcome: Outcome, error: BaseException | None) -> None:
    """Tell the tracers that `task` has ended."""
    for tracer in tracers:
        _in_slot(tracer.finished, task, outcome, error)


def _in_slot(step: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    try:
        step(*args, **kwargs)
    except BaseException as error:
        report(logging.ERROR, "a task could not be traced: %r has raised", _name_of(step), error)


def _name_of(step: Callable[..., object]) -> str:
    return getattr(step, "__qualname__", type(step).__name__)
