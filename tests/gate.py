"""Tasks that a test holds, so that it decides what runs when."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

BOUND = 30  # seconds; only a failing test waits this long


def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something that only a look can tell."""
    deadline = time.monotonic() + BOUND
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class _Gate:
    """What both gates share: the count of the tasks inside, and the waits of the test.

    Attributes:
        inside: How many tasks are in the gate now.
        entered: How many tasks have entered so far.
        peak: The most tasks that were inside at once.
    """

    def __init__(self, *, bound: float = BOUND) -> None:
        self.inside = 0  # these three are written under _changed
        self.entered = 0
        self.peak = 0
        self._bound = bound
        self._changed = threading.Condition()
        self._is_open = False  # written under _changed, once

    def __repr__(self) -> str:
        state = "open" if self._is_open else "closed"
        return f"<{type(self).__name__} {state}, {self.inside} inside, {self.entered} entered>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.open()

    def open(self) -> None:
        """Let every task go on, those inside and those to come. From any thread; twice is once."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wait_entered(self, n: int = 1) -> None:
        """Wait until at least `n` tasks are inside at once.

        Raises:
            AssertionError: If they are not inside when the bound is over.
        """
        self._wait(lambda: self.inside >= n, f"{n} inside")

    def wait_left(self) -> None:
        """Wait until no task is inside.

        Raises:
            AssertionError: If one still is when the bound is over.
        """
        self._wait(lambda: self.inside == 0, "all to have left")

    def _wait(self, predicate: Callable[[], object], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(predicate, self._bound):
                raise AssertionError(f"waited {self._bound} s for {what}: {self!r}")

    @contextmanager
    def _visit(self) -> Iterator[None]:
        with self._changed:
            self.inside += 1
            self.entered += 1
            self.peak = max(self.peak, self.inside)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.inside -= 1
                self._changed.notify_all()


class Gate(_Gate):
    """A sync task that does not return before the test opens it.

    Example:
        with Gate() as gate:
            pool.spawn("held", gate)
            gate.wait_entered()
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with self._visit():
            self._wait(lambda: self._is_open, "being opened")


class AsyncGate(_Gate):
    """The async twin of Gate: its tasks wait without blocking their loop, on any loop and any thread.

    The waits of the test block its thread as Gate's do, so they are not for the loop that runs the tasks.
    """

    def __init__(self, *, bound: float = BOUND) -> None:
        super().__init__(bound=bound)
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()  # under _changed

    async def __call__(self, *args: Any, **kwargs: Any) -> None:
        waiter = asyncio.get_running_loop(), asyncio.Event()
        await asyncio.sleep(0)  # by the next turn of the loop, the drainer knows that the task waits
        with self._visit():
            with self._changed:
                self._waiting.add(waiter)
                if self._is_open:
                    waiter[1].set()
            try:
                async with asyncio.timeout(self._bound):
                    await waiter[1].wait()
            except TimeoutError:
                raise AssertionError(f"waited {self._bound} s for being opened: {self!r}") from None
            finally:
                with self._changed:
                    self._waiting.remove(waiter)

    def open(self) -> None:
        """Let every task go on, those inside and those to come. From any thread; twice is once."""
        super().open()
        # Under the lock, so that a waiter found here is still being awaited and its loop is not closed.
        with self._changed:
            for loop, event in self._waiting:
                loop.call_soon_threadsafe(event.set)
