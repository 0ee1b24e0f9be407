"""The calls that a coroutine makes on its slot's thread, such as those of the ORM."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from functools import partial
from typing import Any

from asgiref.sync import SyncToAsync

from bgtasks.core.loop import Loop


class ThreadCall(Future[Any]):
    """One call, and the future of its result, which is set on the loop.

    Not on the thread: an exception from outside in the middle of that would leave the lock of the future
    held, and the loop would wait for it.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function: Callable[[], Any] | None = function  # None once it has begun, or was cancelled

    def cancel(self) -> bool:
        """Do not make the call if it has not begun."""
        self.function = None
        return super().cancel()

    def answer(self, result: Any, error: BaseException | None) -> None:
        """Set the result or the `error`, unless that was done or it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)


class ThreadCalls(Executor):
    """The calls on one slot's thread. asgiref submits the thread-sensitive calls of the slot's coroutine."""

    def __init__(self, slot: str, loop: Loop, wake: Callable[[], None]) -> None:
        self._slot = slot
        self._loop = loop
        self._wake = wake  # the slot's thread, which then makes the calls
        self._calls: deque[ThreadCall] = deque()  # any thread appends, the slot's thread pops
        self.stopped = False  # written once, by the slot's thread
        self.used = False  # by the task that runs: its thread has to be cleaned

    def __bool__(self) -> bool:
        return bool(self._calls)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` on the slot's thread.

        Raises:
            RuntimeError: The slot's thread has ended.
        """
        call = ThreadCall(partial(fn, *args, **kwargs))
        self._calls.append(call)
        self.used = True
        self._wake()
        if self.stopped:  # after the call is in: the thread ends with a look at what it has left
            raise self._error()
        return call

    def make(self, prepare: Callable[[], None]) -> None:
        """Make all calls that are there, after `prepare`."""
        while self._calls:
            self._make(self._calls[0], prepare)
            self._calls.popleft()

    def _make(self, call: ThreadCall, prepare: Callable[[], None]) -> None:
        function, call.function = call.function, None
        result: Any = None
        error: BaseException | None = None
        try:
            prepare()
            result = function() if function is not None else None
        except BaseException as exception:
            error = exception
        finally:
            self._loop.end_if_forked(error)
            # asgiref has noted here for which loop it was called. The next task on this thread may be a plain
            # function, and what it passes to async_to_sync must not run on the drainer's loop, and block it.
            vars(SyncToAsync.threadlocal).clear()
        self._answer(call, result, error)
        del function, call, error  # the error's traceback refers to this frame, and it to these

    def _answer(self, call: ThreadCall, result: Any, error: BaseException | None) -> None:
        if not self._loop.call_soon(call.answer, result, error):
            call.answer(result, error)

    def recover(self, error: BaseException) -> None:
        """Answer the call, if any, in which the `error` has hit the thread from outside."""
        while self._calls and self._calls[0].function is None:
            self._answer(self._calls[0], None, error)
            self._calls.popleft()

    def stop(self) -> None:
        """Make no more calls: the slot's thread ends."""
        self.stopped = True
        for call in tuple(self._calls):
            self._answer(call, None, self._error())

    def _error(self) -> RuntimeError:
        return RuntimeError(f"slot {self._slot!r} has stopped")
