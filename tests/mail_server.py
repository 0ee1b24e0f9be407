"""A real mail server on a thread: what it accepts is kept, and a test says what it refuses."""

import asyncio
import email
import email.message
import email.policy
import threading
import warnings
from collections.abc import Callable
from typing import Any, Self

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    from aiosmtpd.smtp import SMTP  # typing.ByteString, on Python 3.15

from tests.gate import BOUND


class MailServer:
    """Speaks SMTP on a free port of this machine, from entry to exit.

    Attributes:
        port: Where it listens.
        accepted: The mails that it has accepted, parsed.
        recipients: Of each of them, who gets it.
        connections: How many were made, those that it refused too.
        offered: The Message-IDs of the mails it was sent, those that it refused too.
    """

    def __init__(
        self,
        *,
        refuse_every: int = 0,
        answers: dict[str, str] | None = None,
        answer: Callable[["MailServer"], str] = lambda _server: "250 OK",
        quit_line: str = "221 Bye",
    ) -> None:
        self._refuse_every = refuse_every  # connections
        self._answers = answers or {}  # to RCPT, by the local part of the address
        self._answer = answer  # to DATA
        self._quit_line = quit_line
        self.port = 0
        self.accepted: list[email.message.EmailMessage] = []  # this and the following on the server's thread
        self.recipients: list[list[str]] = []
        self.connections = 0
        self.offered: list[str] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="mail-server")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(BOUND)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(BOUND)

    @property
    def subjects(self) -> list[str]:
        return [str(mail["Subject"]) for mail in self.accepted]

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(self._connection, "127.0.0.1", 0, backlog=256)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()

    def _connection(self) -> asyncio.BaseProtocol:
        self.connections += 1
        if self._refuse_every and self.connections % self._refuse_every == 0:
            return Refusal()
        return SMTP(self, hostname="mail.localhost", loop=self._loop)

    # What aiosmtpd calls.

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name, as those that follow
        self, server: Any, session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        answer = self._answers.get(address.partition("@")[0])
        if answer is not None:
            return answer
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        self.offered.append(mail["Message-ID"])
        answer = self._answer(self)
        if answer.startswith("250"):
            self.accepted.append(mail)
            self.recipients.append(list(envelope.rcpt_tos))
        return answer

    async def handle_QUIT(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        return self._quit_line


class Refusal(asyncio.Protocol):
    """A connection that is refused, as by a server that has too many."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"421 4.3.2 Too many connections\r\n")
        transport.close()
