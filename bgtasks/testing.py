"""Tools for a project's tests: run spawned tasks at once, record them, or wait for all of them.

Each is a context manager, a decorator for test functions, sync or async, and a decorator for classes derived
from ``unittest.TestCase``. The pytest fixtures ``bgtasks_inline``, ``bgtasks_captured`` and
``bgtasks_drained`` are the same.

While one of them is active it holds for all pools and all threads of the process, whatever their MODE; the
innermost one counts.
"""

from __future__ import annotations

import difflib
import inspect
import pprint
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any

from django.test.utils import TestContextDecorator

from bgtasks.core.log import counts_of
from bgtasks.core.queue import TaskQueue
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.monitoring.snapshot import stack_of
from bgtasks.pool import Diverted, Pool, run_inline
from bgtasks.pools import pools

__all__ = ["Call", "Captured", "captured", "drained", "inline"]

DRAIN_TIMEOUT = 10.0  # seconds


class _Tool(TestContextDecorator):
    """What the three have in common: something that says where tasks go, from entry to exit."""

    def __init__(self, *, attr_name: str | None = None, kwarg_name: str | None = None) -> None:
        super().__init__(attr_name=attr_name, kwarg_name=kwarg_name)
        self._before: list[Diverted | None] = []  # a stack: a decorated test may call itself, or another

    def _divert(self, take: Callable[[Pool, Task], bool] | None) -> None:
        self._before.append(pools.divert(Diverted(take)))

    def disable(self) -> None:
        """Undo what ``enable`` did."""
        pools.divert(self._before.pop())


class inline(_Tool):  # noqa: N801  # used as a function, like Django's override_settings
    """Run every task at once in the code that spawns it, asynchronous ones too.

    A task runs where its spawner's ORM calls run, so inside the transaction of a ``TestCase``. What it raises
    goes up into the code that spawned it. TASK_TIMEOUT and CONN_MAX mean nothing here.

    >>> with bgtasks.testing.inline():
    ...     bgtasks.spawn("send-welcome", send_welcome, user.pk)
    True
    """

    def enable(self) -> None:
        """Begin to run tasks at once."""
        self._divert(run_inline)

    def __enter__(self) -> None:
        self.enable()


@dataclass(frozen=True)
class Call:
    """One call of ``spawn`` that was recorded.

    Attributes:
        pool: The name of the pool.
        name: The name of the task.
        task: What was spawned: a function or a coroutine object.
        args: The positional arguments.
        kwargs: The keyword arguments.
    """

    pool: str
    name: str
    task: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def has(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Tell whether these are its arguments, by position or by keyword."""
        if (self.args, dict(self.kwargs)) == (args, dict(kwargs)):
            return True
        try:
            signature = inspect.signature(self.task)
            mine, theirs = signature.bind(*self.args, **self.kwargs), signature.bind(*args, **kwargs)
        except Exception:
            return False  # what was spawned has no signature, or raises when it is asked for one
        mine.apply_defaults()
        theirs.apply_defaults()
        return mine == theirs


class Captured:
    """The tasks that were spawned while ``captured`` was active, in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # appended to by spawners
        self._waiting: list[tuple[Pool, Task]] = []  # not yet run; appended to by spawners

    def __repr__(self) -> str:
        return f"<Captured {self.names!r}>"

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [call.name for call in self.calls]

    def assert_spawned(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        """Assert that a task called `name` was spawned with exactly these arguments.

        Whether one was passed by position or by keyword does not matter.

        Raises:
            AssertionError: None was. It shows what was spawned, and how the arguments differ.
        """
        __tracebackhide__ = True  # pytest shows the line of the test instead
        named = [call for call in self.calls if call.name == name]
        if any(call.has(args, kwargs) for call in named):
            return
        if named:
            raise AssertionError(
                f"task {name!r} was spawned {_times(len(named))}, but never with these arguments "
                f"(-: expected, +: spawned):\n"
                + "\n".join(_difference((args, kwargs), (call.args, call.kwargs)) for call in named)
            )
        spawned = counts_of(self.names)
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AssertionError(f"no task {name!r} was spawned; spawned were: {spawned or 'none'}{hint}")

    def run_all(self) -> int:
        """Run the recorded tasks one after the other, as ``inline`` does, and those that they spawn.

        Each runs once, however often this is called. What a task raises is raised here; those after it have
        not run then.

        Returns:
            The number of tasks that ran.
        """
        number = 0
        while self._waiting:
            pool, task = self._waiting.pop(0)
            number += 1
            run_inline(pool, task)
        return number

    def take(self, pool: Pool, task: Task) -> bool:
        """Record `task`, in place of the pool's queue."""
        self.calls.append(Call(pool.name, task.name, task.function, task.args, task.kwargs))
        self._waiting.append((pool, task))
        return True

    def discard(self) -> None:
        """Close the coroutine objects that have not run, of which Python would warn; the rest may run yet."""
        for _, task in self._waiting:
            task.discard()
        self._waiting = [(pool, task) for pool, task in self._waiting if callable(task.function)]


class captured(_Tool):  # noqa: N801
    """Record the tasks that are spawned, and run none of them.

    >>> with bgtasks.testing.captured() as tasks:
    ...     bgtasks.spawn("send-welcome", send_welcome, user.pk)
    True
    >>> tasks.names
    ['send-welcome']
    >>> tasks.assert_spawned("send-welcome", user.pk)

    As a decorator, it passes them to the test as a keyword argument called `kwarg_name`, or sets them as the
    attribute `attr_name` of the instance of a decorated class.
    """

    def __init__(self, *, attr_name: str | None = None, kwarg_name: str | None = None) -> None:
        super().__init__(attr_name=attr_name, kwarg_name=kwarg_name)
        self._records: list[Captured] = []

    def enable(self) -> Captured:
        """Begin to record."""
        record = Captured()
        self._records.append(record)
        self._divert(record.take)
        return record

    def disable(self) -> None:
        """Stop recording."""
        super().disable()
        self._records.pop().discard()

    def __enter__(self) -> Captured:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # the stubs know of Django's own only
        return self.enable()


class drained(_Tool):  # noqa: N801
    """Run tasks in the real pools. On exit all have ended, or the test fails with what still runs and where.

    No thread and no connection of the pools is left after it. Tasks run on connections of their own: a test
    that shows them what it has written needs ``TransactionTestCase``, or
    ``@pytest.mark.django_db(transaction=True)``.

    Args:
        timeout: Seconds that the tasks have to end at exit.
    """

    def __init__(
        self,
        timeout: float = DRAIN_TIMEOUT,
        *,
        attr_name: str | None = None,
        kwarg_name: str | None = None,
    ) -> None:
        super().__init__(attr_name=attr_name, kwarg_name=kwarg_name)
        self._timeout = timeout

    def enable(self) -> None:
        """Begin to send tasks to the real pools."""
        self._divert(None)

    def disable(self) -> None:
        """Wait until all tasks have ended.

        Raises:
            AssertionError: They have not.
        """
        try:
            left = _drain(self._timeout)
        finally:
            super().disable()
        # No thread of ours may live on, nor a connection; what still runs is given up after a moment.
        if left is not None:
            pools.shutdown(0)
        pools.restart()
        if left is not None:
            raise AssertionError(f"after {self._timeout:g} s there are still tasks:\n{left}")

    def __enter__(self) -> None:
        self.enable()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.disable()
        except AssertionError as left:
            if error is None:
                raise
            error.add_note(str(left))  # the test has failed before, and that is what it failed of


def _drain(timeout: float) -> str | None:
    """Wait until nothing waits or runs in any pool; after `timeout` seconds, return what does."""
    deadline = monotonic() + timeout
    while True:
        done = pools.drain(max(0.0, deadline - monotonic()))
        # A task may have spawned another one, after this drain began and before it ended.
        busy = [slots for slots in pools.built() if slots.queue.read(TaskQueue.tasks)]
        if not busy:
            return None
        if not done or monotonic() >= deadline:
            return "\n".join(map(_describe, busy))


def _describe(slots: Slots) -> str:
    queue = slots.queue
    lines: list[str] = []
    for task in queue.running():
        seconds = monotonic() - task.started_at
        lines.append(
            f"task {task.name!r} of pool {queue.pool!r} runs for {seconds:.1f} s, at:\n{_stack(slots, task)}"
        )
    for name, number in Counter(task.name for task in queue.held()).items():
        lines.append(f"task {name!r} of pool {queue.pool!r} waits, {_times(number)}")
    return "\n".join(lines)


def _stack(slots: Slots, task: Task) -> str:
    slot = next((slot for slot in slots.all if slot.task is task), None)
    return (stack_of(slot, task) or "(between two states)") + "\n"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _difference(expected: tuple[Any, Any], spawned: tuple[Any, Any]) -> str:
    return "\n".join(difflib.ndiff(_lines(*expected), _lines(*spawned)))


def _lines(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the arguments as a person writes them, one a line."""
    lines = [pprint.pformat(argument) for argument in args]
    lines += [f"{name}={pprint.pformat(argument)}" for name, argument in sorted(kwargs.items())]
    return ["(", *(f"    {line}," for text in lines for line in text.splitlines()), ")"]
