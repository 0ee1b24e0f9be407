"""The probe: visitors who come by the clock, in a process of their own: `python -m demo_project.load URL`.

It is an open loop. Requests are sent when they are due, whether or not earlier ones have been answered, and a
latency counts from the moment the request was due; so a site that stalls cannot slow the probe down and look
better for it. It imports no Django, to leave the processor to the server.

A sample is `[due, latency, success]`: epoch seconds, milliseconds, and whether the answer was 200 in time.
Samples go to standard output, one a line, or with `--report` in batches to the dashboard. The probe ends when
its standard input does.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from urllib.parse import urlsplit


async def end_of_input() -> None:
    """Wait until standard input ends, which it does when the parent process closes it or dies."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read, daemon=True).start()
    await ended.wait()


async def exchange(url: str, body: bytes | None = None, headers: tuple[str, ...] = ()) -> int:
    """Make one HTTP request on a connection of its own and return the status.

    Args:
        url: an http:// address.
        body: what to POST; without it the request is a GET.
        headers: further header lines.

    Raises:
        OSError: if the server cannot be reached or hangs up.
        asyncio.IncompleteReadError: if it hangs up before the status line.
    """
    address = urlsplit(url)
    lines = [
        f"{'GET' if body is None else 'POST'} {address.path or '/'} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: close",
        f"Content-Length: {len(body or b'')}",
        *headers,
    ]
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        status = await reader.readuntil(b"\r\n")
        await reader.read()
        return int(status.split()[1])
    finally:
        writer.close()


class Probe:
    """Asks for one page again and again, and remembers who still waits."""

    def __init__(self, url: str, rate: float, timeout: float) -> None:
        self.url = url
        self.rate = rate
        self.timeout = timeout
        self.samples: list[tuple[float, float, bool]] = []  # ended, not yet collected
        self._waiting: dict[asyncio.Task[None], float] = {}  # in the order they were due, with that time

    async def run(self) -> None:
        """Send requests until cancelled."""
        loop = asyncio.get_running_loop()
        start, sent = loop.time(), 0
        while True:
            due = start + sent / self.rate
            await asyncio.sleep(due - loop.time())
            task = loop.create_task(self._visit(due))
            self._waiting[task] = due
            task.add_done_callback(self._waiting.pop)
            sent += 1

    async def _visit(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        ok = False
        try:
            async with asyncio.timeout_at(due + self.timeout):
                ok = await exchange(self.url) == 200
        except (OSError, asyncio.IncompleteReadError, ValueError):  # TimeoutError is an OSError
            pass
        now = loop.time()
        self.samples.append((time.time() - now + due, (now - due) * 1000, ok))

    async def finish(self) -> None:
        """Wait for the requests that have no answer yet; each takes `timeout` seconds at most."""
        if self._waiting:
            await asyncio.wait(self._waiting)

    def collect(self) -> tuple[list[tuple[float, float, bool]], int, float]:
        """Return the samples since the last call, how many requests wait, and the age of the oldest in ms."""
        samples, self.samples = self.samples, []
        oldest = next(iter(self._waiting.values()), None)
        age = 0.0 if oldest is None else (asyncio.get_running_loop().time() - oldest) * 1000
        return samples, len(self._waiting), age


async def main(options: argparse.Namespace) -> None:
    """Probe until standard input ends, reporting four times a second."""
    probe = Probe(options.url, options.rate, options.timeout)

    async def report() -> None:
        samples, waiting, oldest_ms = probe.collect()
        if not options.report:
            sys.stdout.writelines(json.dumps(sample) + "\n" for sample in samples)
            sys.stdout.flush()
            return
        body = json.dumps({"samples": samples, "waiting": waiting, "oldest_ms": oldest_ms}).encode()
        try:
            async with asyncio.timeout(options.timeout):
                await exchange(
                    options.report, body, (f"X-Probe-Token: {os.environ.get('DEMO_PROBE_TOKEN', '')}",)
                )
        except (OSError, asyncio.IncompleteReadError, ValueError):
            probe.samples = samples + probe.samples  # with the next report

    async def report_for_ever() -> None:
        while True:
            await asyncio.sleep(0.25)
            await report()

    workers = [asyncio.create_task(probe.run()), asyncio.create_task(report_for_ever())]
    await end_of_input()
    for worker in workers:
        worker.cancel()
    if not options.report:
        await probe.finish()
        await report()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask for a page by the clock and report how long it took.")
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=60, help="requests a second")
    parser.add_argument("--timeout", type=float, default=10, help="seconds until a request counts as failed")
    parser.add_argument("--report", help="the address to send the samples to, instead of standard output")
    asyncio.run(main(parser.parse_args()))
