"""Background tasks whose result the test gets to see: where they are spawned, and where their code runs."""

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.utils import timezone, translation

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


# Where the code of a task may run. Each is a task that returns what its argument returns there.


def in_function(probe: Callable[..., Any]) -> Any:
    return probe()


async def in_coroutine(probe: Callable[..., Any]) -> Any:
    return probe()


async def in_orm_call(probe: Callable[..., Any]) -> Any:
    return await sync_to_async(probe)()


def in_async_to_sync(probe: Callable[..., Any]) -> Any:
    async def inner() -> Any:
        return probe()

    return async_to_sync(inner)()


def in_orm_call_in_async_to_sync(probe: Callable[..., Any]) -> Any:
    async def inner() -> Any:
        return await sync_to_async(probe)()

    return async_to_sync(inner)()


everywhere = pytest.mark.parametrize(
    "place", [in_function, in_coroutine, in_orm_call, in_async_to_sync, in_orm_call_in_async_to_sync]
)


# Where tasks are spawned. Each calls its argument there, and returns what it returns.


def by_thread(act: Callable[..., Any]) -> Any:
    return act()


def by_loop(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        return act()

    return asyncio.run(main())


def by_async_view(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        async with ThreadSensitiveContext():
            await sync_to_async(lambda: None)()  # the request has a thread by now
            return act()

    return asyncio.run(main())


def by_sync_view(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        async with ThreadSensitiveContext():
            return await sync_to_async(act)()

    return asyncio.run(main())


def by_sync_code_of_loop(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        return await sync_to_async(act)()

    return asyncio.run(main())


def by_async_to_sync(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        return act()

    return async_to_sync(main)()


def by_orm_call_in_async_to_sync(act: Callable[..., Any]) -> Any:
    async def main() -> Any:
        return await sync_to_async(act)()

    return async_to_sync(main)()


by_anyone = pytest.mark.parametrize(
    "spawner",
    [
        by_thread,
        by_loop,
        by_async_view,
        by_sync_view,
        by_sync_code_of_loop,
        by_async_to_sync,
        by_orm_call_in_async_to_sync,
    ],
)


# What depends on the language and the time zone.


def january() -> Any:
    return translation.gettext("January")


def hour() -> Any:
    return timezone.localtime(datetime(2024, 1, 1, 12, tzinfo=UTC)).hour
