"""Tools for a project's tests: run spawned tasks at once, record them, or wait for all of them.

Each is a context manager, a decorator for test functions, sync or async, and a decorator for classes derived
from ``unittest.TestCase``. The pytest fixtures ``bgtasks_inline``, ``bgtasks_captured`` and
``bgtasks_drained`` are the same.

While one of them is active, it applies to all pools and all threads of the process, whatever the MODE of the
pools. If they are nested, the innermost one applies.
"""

from __future__ import annotations

import difflib
import inspect
import pprint
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

from django.test.utils import TestContextDecorator

from bgtasks import hints
from bgtasks.clock import monotonic
from bgtasks.core.policy import NO_POLICY
from bgtasks.core.queue import TaskQueue
from bgtasks.core.slots import Slots
from bgtasks.core.task import Task
from bgtasks.hooks import Recorded
from bgtasks.monitoring.snapshot import stack_of
from bgtasks.pool import Diverted, Pool, run_inline
from bgtasks.pools import pools
from bgtasks.signals import task_finished
from bgtasks.text import counts_of

__all__ = ["Call", "Captured", "Drained", "FailedTask", "captured", "drained", "inline"]

Test = TypeVar("Test", bound=Callable[..., Any])

DRAIN_TIMEOUT = 10.0  # seconds


class _Tool(TestContextDecorator):
    """What the three have in common: something that says where tasks go, from entry to exit."""

    def __init__(self, *, attr_name: str | None = None, kwarg_name: str | None = None) -> None:
        super().__init__(attr_name=attr_name, kwarg_name=kwarg_name)
        self._before: list[Diverted | None] = []  # a stack: a decorated test may call itself, or another

    def decorate_callable(self, func: Test) -> Test:
        """Decorate a test function. pytest would take an argument that it is passed here for a fixture."""
        decorated: Any = super().decorate_callable(func)
        if self.kwarg_name:
            signature = inspect.signature(func)
            others = [each for each in signature.parameters.values() if each.name != self.kwarg_name]
            decorated.__signature__ = signature.replace(parameters=others)
        return cast(Test, decorated)

    def _divert(self, take: Callable[[Pool, Task], bool] | None) -> None:
        self._before.append(pools.divert(Diverted(take)))

    def disable(self) -> None:
        """Undo what ``enable`` did."""
        pools.divert(self._before.pop())


class inline(_Tool):  # noqa: N801  # used as a function, like Django's override_settings
    """Run every task at once in the code that spawns it, asynchronous ones too.

    A task runs on the thread of the ORM calls of the code that spawns it, so inside the transaction of a
    ``TestCase``. Its exceptions are raised in that code. TASK_TIMEOUT and CONN_MAX do not apply.

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
        task: What was spawned: a function or a coroutine object. Of a task of ``django.tasks``, its function.
        args: The positional arguments.
        kwargs: The keyword arguments.
        options: The options of ``using`` that apply, also those of the pool's settings; {} if there are none.
    """

    pool: str
    name: str
    task: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

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
            AssertionError: No such task was spawned. The message shows what was, and how arguments differ.
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
        if hints.is_uncommitted(name):
            hint = f"; {hints.UNCOMMITTED}"
        raise AssertionError(f"no task {name!r} was spawned; spawned were: {spawned or 'none'}{hint}")

    def run_all(self) -> int:
        """Run the recorded tasks one after the other, as ``inline`` does, and those that they spawn.

        Each runs once, even if this is called again. An exception of a task is raised here, and the tasks
        after it do not run.

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
        what, args, kwargs = task.function, task.args, task.kwargs
        if isinstance(what, Recorded):
            enqueued, values, kwargs = what.description()
            what, args = enqueued.func, tuple(values)
        options = {} if task.policy is NO_POLICY else task.policy.options._asdict()
        self.calls.append(Call(pool.name, task.name, what, args, kwargs, options))
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


class FailedTask(NamedTuple):
    """A task that has failed or timed out while ``drained`` was active.

    Attributes:
        pool: The name of the pool.
        name: The name of the task.
        error: What it raised.
    """

    pool: str
    name: str
    error: BaseException | None


class Drained:
    """The results of the tasks that ran while ``drained`` was active.

    Attributes:
        failures: The tasks that have failed or timed out, in the order of their ends.
        allow_failures: Whether the test passes despite failures. It can be set at any time.
    """

    def __init__(self, *, allow_failures: bool = False) -> None:
        self.failures: list[FailedTask] = []  # appended to by the slots' threads
        self.allow_failures = allow_failures

    def __repr__(self) -> str:
        return f"<Drained {len(self.failures)} failed>"

    def hear(self, sender: Pool, name: str, outcome: str, error: BaseException | None, **_: object) -> None:
        """Receive ``task_finished``."""
        if outcome in {"failed", "timed_out"}:
            self.failures.append(FailedTask(sender.name, name, error))

    def complaints(self) -> list[str]:
        """Return a line for each failure that fails the test."""
        failures = [] if self.allow_failures else self.failures
        return [f"task {each.name!r} of pool {each.pool!r} failed: {each.error!r}" for each in failures]


class drained(_Tool):  # noqa: N801
    """Run tasks in the real pools, and wait for them on exit. A task that failed fails the test.

    If tasks still run after the time-out, the test fails too, with their names and stacks. No thread and no
    connection of the pools is left. Tasks run on their own connections. If they need rows that the test has
    written, use ``TransactionTestCase``, or ``@pytest.mark.django_db(transaction=True)``.

    >>> with bgtasks.testing.drained():
    ...     bgtasks.spawn("send-welcome", send_welcome, user.pk)
    True

    As a decorator, it passes a ``Drained`` to the test as ``captured`` does.

    Args:
        timeout: Seconds that the tasks have at exit.
        allow_failures: Let the test pass even if tasks fail; they are listed in ``Drained.failures``.
    """

    def __init__(
        self,
        timeout: float = DRAIN_TIMEOUT,
        *,
        allow_failures: bool = False,
        attr_name: str | None = None,
        kwarg_name: str | None = None,
    ) -> None:
        super().__init__(attr_name=attr_name, kwarg_name=kwarg_name)
        if callable(timeout):
            raise TypeError("this decorator is written with parentheses: @bgtasks.testing.drained()")
        self._timeout = timeout
        self._allow_failures = allow_failures
        self._records: list[Drained] = []

    def enable(self) -> Drained:
        """Begin to send tasks to the real pools."""
        record = Drained(allow_failures=self._allow_failures)
        self._records.append(record)
        task_finished.connect(record.hear)
        self._divert(None)
        return record

    def disable(self) -> None:
        """Wait until all tasks have ended.

        Raises:
            AssertionError: They have not, or some have failed.
        """
        record = self._records.pop()
        try:
            left = _drain(self._timeout)
        finally:
            super().disable()
            task_finished.disconnect(record.hear)
        # No thread of ours may live on, nor a connection; what still runs is given up after a moment.
        if left is not None:
            pools.shutdown(0)
        pools.restart()
        complaints = record.complaints()
        cause = record.failures[0].error if complaints else None
        if left is not None:
            complaints.append(f"after {self._timeout:g} s there are still tasks:\n{left}")
        if complaints:
            raise AssertionError("\n".join([*complaints, *_hints(cause)])) from cause

    def __enter__(self) -> Drained:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # the stubs know of Django's own only
        return self.enable()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.disable()
        except AssertionError as complaint:
            if error is None:
                raise
            error.add_note(str(complaint))  # the test has failed before, and that is what it failed of
        else:
            if error is not None:
                for hint in _hints(error):
                    error.add_note(hint)


def _hints(error: BaseException | None) -> list[str]:
    return [f"hint: {hint}" for hint in hints.for_failure(error)]


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
        what, seconds = f"task {task.name!r} of pool {queue.pool!r}", monotonic() - task.started_at
        lines.append(f"{what} has been running for {seconds:.1f} s, at:\n{_stack(slots, task)}")
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
    """Return the arguments as a call would have them, one on each line."""
    lines = [pprint.pformat(argument) for argument in args]
    lines += [f"{name}={pprint.pformat(argument)}" for name, argument in sorted(kwargs.items())]
    return ["(", *(f"    {line}," for text in lines for line in text.splitlines()), ")"]
