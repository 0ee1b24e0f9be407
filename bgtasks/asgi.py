"""The ASGI lifespan: on uvicorn it is the only way a process learns that it is shutting down."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bgtasks.core.log import log
from bgtasks.pools import pools
from bgtasks.process import lifespan as state

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Every library has its own types for the three arguments of an ASGI application.
Application = Callable[[Any, Any, Any], Awaitable[None]]

STARTUP = "lifespan.startup"
STARTUP_COMPLETE = "lifespan.startup.complete"
SHUTDOWN_COMPLETE = "lifespan.shutdown.complete"

NOT_STARTED = (
    "the application failed at startup (%s): a server that continues anyway, as uvicorn does, "
    "will not announce its shutdown, and its tasks will be lost"
)

# Those between startup and shutdown. Without the GIL granian's workers are threads of one process, and
# each of them has one. A loop adds and removes its own only.
_started: set[_Lifespan] = set()


def lifespan(application: Application) -> Application:
    """Wrap an ASGI `application` so that the server's shutdown waits for background tasks.

    A startup opens the pools again if there was a shutdown before. If the application supports
    the lifespan protocol (Starlette), it still receives it, and its answers and exceptions are passed on to
    the server. If it does not, as Django up to 6.1, the wrapper answers.

    >>> application = bgtasks.asgi.lifespan(get_asgi_application())
    """

    async def wrapped(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            state.settled = True
            run = _Lifespan(receive, send)
            try:
                await run.run(application, scope)
            finally:
                _started.discard(run)
        else:
            await application(scope, receive, send)

    setattr(wrapped, "bgtasks_lifespan", True)  # noqa: B010  # for the check of ASGI_APPLICATION
    return wrapped


class _Lifespan:
    """One run of the lifespan protocol between a server and an application that may not answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._asked = ""  # the type of the server's last message
        self._answers: list[str] = []  # the types of the answers so far

    async def run(self, application: Application, scope: MutableMapping[str, Any]) -> None:
        """Let `application` speak with the server, and go on for it if it ends early."""
        ended_by: Exception | None = None
        try:
            await application(scope, self.receive, self.send)
        except Exception as error:
            if isinstance(error, ValueError) and not self._asked:
                # So Django and Channels refuse a scope that they do not know. A failure comes later.
                log(logging.INFO, "bgtasks answers the server's lifespan for the application: %r", error)
            elif self._asked == STARTUP and self._answers == [STARTUP_COMPLETE]:
                # To raise it now would end the protocol, and the server would not announce its shutdown.
                log(logging.ERROR, "the application has ended between startup and shutdown", error=error)
                ended_by = error
            else:
                if not self._answers:
                    log(logging.WARNING, NOT_STARTED, type(error).__name__)
                raise
        await self._go_on()
        if ended_by is not None:
            raise ended_by
        if self._answers == [STARTUP_COMPLETE]:
            await self.send({"type": SHUTDOWN_COMPLETE})

    async def receive(self) -> Message:
        """Return the server's next message, once the pools are open for a startup, or shut down."""
        message = await self._receive()
        self._asked = message["type"]
        if self._asked == STARTUP:
            _started.add(self)
            await pools.aopen()
        else:
            _started.discard(self)
            if not _started:
                # Before the application hears of it, and closes what tasks may use.
                await pools.ashutdown()
        return message

    async def send(self, message: Message) -> None:
        """Pass an answer on to the server."""
        self._answers.append(message["type"])
        await self._send(message)

    async def _go_on(self) -> None:
        """Answer the startup, and wait for the shutdown, if the application has done neither."""
        if not self._asked:
            await self.receive()
        if not self._answers:
            await self.send({"type": STARTUP_COMPLETE})
        if self._asked == STARTUP and self._answers[0] == STARTUP_COMPLETE:
            await self.receive()
