"""The ASGI lifespan: on uvicorn it is the only word of a shutdown that a process gets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bgtasks.pools import pools
from bgtasks.process import lifespan as state

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Every library has its own types for the three arguments of an ASGI application.
Application = Callable[[Any, Any, Any], Awaitable[None]]


def lifespan(application: Application) -> Application:
    """Wrap an ASGI `application` so that the server's shutdown waits for background tasks.

    An application that knows the lifespan protocol (Starlette) goes on getting it. For one that does not,
    as Django up to 6.1, the wrapper answers.

    >>> application = bgtasks.asgi.lifespan(get_asgi_application())
    """

    async def wrapped(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            state.settled = True
            await _Lifespan(application, scope, receive, send).run()
        else:
            await application(scope, receive, send)

    setattr(wrapped, "bgtasks_lifespan", True)  # noqa: B010  # for the check of ASGI_APPLICATION
    return wrapped


class _Lifespan:
    """One run of the lifespan protocol between a server and an application that may not answer."""

    def __init__(
        self, application: Application, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        self._application = application
        self._scope = scope
        self._receive = receive
        self._send = send
        self._messages: asyncio.Queue[Message] = asyncio.Queue()  # for the application
        self._answers: asyncio.Queue[Message] = asyncio.Queue()  # from the application

    async def run(self) -> None:
        """Pass the server's two messages on, and shut the pools down before the second one."""
        inner = asyncio.create_task(self._run_application())
        try:
            answer = await self._ask(inner, await self._receive())
            await self._send(answer or {"type": "lifespan.startup.complete"})
            if answer is not None and answer["type"] == "lifespan.startup.failed":
                return
            message = await self._receive()
            # Before the application hears of it, and closes what tasks may use.
            await pools.ashutdown()
            await self._send(await self._ask(inner, message) or {"type": "lifespan.shutdown.complete"})
        finally:
            inner.cancel()
            await asyncio.gather(inner, return_exceptions=True)

    async def _run_application(self) -> None:
        await self._application(self._scope, self._messages.get, self._answers.put)

    async def _ask(self, inner: asyncio.Task[None], message: Message) -> Message | None:
        """Return the application's answer to `message`, or None if it has ended without one."""
        await self._messages.put(message)
        answer = asyncio.create_task(self._answers.get())
        await asyncio.wait({inner, answer}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        answer.cancel()
        return None
