"""Background tasks whose result the test gets to see."""

import inspect
from concurrent.futures import Future
from typing import Any

import bgtasks
from tests.gate import BOUND


def spawn(task: Any, *args: Any) -> Future[Any]:
    """Spawn `task` in the default pool, and return the future of what it returns or raises."""
    future: Future[Any] = Future()

    def function() -> None:
        try:
            future.set_result(task(*args))
        except BaseException as error:
            future.set_exception(error)
            raise

    async def coroutine() -> None:
        try:
            future.set_result(await task(*args))
        except BaseException as error:
            future.set_exception(error)
            raise

    assert bgtasks.spawn("result", coroutine if inspect.iscoroutinefunction(task) else function)
    return future


def run(task: Any, *args: Any) -> Any:
    """Spawn `task`, wait until all tasks have ended, and return what it returned or raise what it raised."""
    future = spawn(task, *args)
    assert bgtasks.drain(BOUND)
    return future.result(0)
