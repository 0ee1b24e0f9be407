"""A slow mail server, in a process of its own: `python -m demo_project.mail_server SECONDS`.

It speaks SMTP on a free port of this machine, prints the port, takes SECONDS on average to accept each mail,
throws it away, and ends when its standard input does, so that it cannot outlive the command that started it.
"""

import asyncio
import random
import sys
import warnings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    from aiosmtpd.smtp import SMTP, Envelope, Session  # typing.ByteString, on Python 3.15

from .load import end_of_input


class Slow:
    """An aiosmtpd handler that takes its time, and not always the same time, as a real mail server does.

    If every mail took the same time, tasks that start together would end together, over and over, and their
    work on the processor would come in bursts that no real site sees.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def handle_DATA(  # noqa: N802 (the name aiosmtpd looks for)
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Accept a mail, later."""
        await asyncio.sleep(random.uniform(0.5, 1.5) * self.seconds)
        return "250 OK"


async def main(seconds: float) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    handler = Slow(seconds)
    server = await loop.create_server(
        lambda: SMTP(handler, hostname="mail.localhost", loop=loop), "127.0.0.1", 0, backlog=2048
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await end_of_input()
    server.close()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
