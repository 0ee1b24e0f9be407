"""The side of the command: it starts the server, orders probes, sends the signal, and sees to the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from bgtasks.rehearsal import ENVIRONMENT
from bgtasks.rehearsal.accounts import DROPPED, Account, Participant, read_participants, write_order
from bgtasks.rehearsal.processes import is_alive, kill, members, shell_of
from bgtasks.rehearsal.results import GROUP, Ended, NotRehearsed, Plan, ProcessResult, Result

POLL = 0.05  # seconds
SETTLE = 2.0  # seconds without another process that registers, until the server counts as started
START_LIMIT = 60.0  # seconds for the server to start, and for a worker to be replaced
PROBE_LIMIT = 10.0  # seconds for a process to run its first probes
ARRIVAL = 0.3  # seconds for a request to reach a worker
ORPHANS = 0.5  # seconds that others may live on after the command's own process
KILL_LIMIT = 5.0  # seconds for the system to end what was killed
LAST_LINES = 20  # of the server's output that are shown if it does not start
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

ENABLE_THREADS = "start uwsgi with --enable-threads: without it no thread of bgtasks gets its turn"
NOBODY = (
    "see that 'bgtasks' is in INSTALLED_APPS of the settings that the server uses; if it starts in another "
    "container or environment (docker run, sudo, env -i), rehearse inside of that"
)
BACKGROUND = "start the server in the foreground, without --daemon or the like, as a container does"
PORT = "give the server's command another port, such as -b 127.0.0.1:8001: this one is in use"


class Rehearsal:
    """One run of a plan. Whatever happens, no process and no file of it is left."""

    def __init__(self, plan: Plan, progress: Callable[[str], None] = lambda _: None) -> None:
        self._plan = plan
        self._progress = progress
        self._folder = Path()
        self._serving: dict[int, Participant] = {}  # those that were ordered to spawn
        self._ended: dict[int, Ended] = {}  # of those, by process id
        self._signalled_at = 0.0  # monotonic seconds
        self._main_ended_at: float | None = None  # monotonic seconds
        self._main_first = False
        self._shell: str | None = None

    def run(self) -> Result:
        """Rehearse.

        Raises:
            NotRehearsed: The server did not start, or ran no probe.
            KeyboardInterrupt: The command was told to end.
        """
        with (
            _interruptible(),
            tempfile.TemporaryDirectory(prefix="bgtasks-rehearsal-", ignore_cleanup_errors=True) as folder,
        ):
            self._folder = Path(folder)
            if os.geteuid() == 0:
                self._folder.chmod(0o1777)  # the server may go on as another user
            with (self._folder / "output").open("wb") as output:
                self._main = self._start(sys.stderr if self._plan.show_output else output)
            try:
                self._wait_started()
                self._wait_probes()
                self._visit()
                self._rehearse_end()
                return self._result()
            finally:
                _ignore_interrupts()
                self._kill_all()

    # The start.

    def _start(self, output: IO[Any]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._plan.command,
                env={**os.environ, ENVIRONMENT: str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for this command, which then ends the server
            )
        except OSError as error:
            raise NotRehearsed(f"the command {self._plan.command[0]!r} cannot be started: {error}") from None

    def _wait_started(self) -> None:
        """Wait until the URL answers, and for SETTLE seconds no further process has registered."""
        deadline = monotonic() + START_LIMIT
        seen: set[int] = set()
        since = monotonic()
        answered = self._plan.url is None
        while not (seen and answered and monotonic() - since >= SETTLE):
            self._refuse_if_ended()
            now = set(self._candidates())
            if now != seen:
                seen, since = now, monotonic()
            self._progress(f"waiting for the server to start; processes with bgtasks so far: {len(seen)}")
            if monotonic() >= deadline:
                self._fail_to_start(answered)
            if not answered and (answered := self._request()):
                since = monotonic()
            sleep(POLL)

    def _fail_to_start(self, answered: bool) -> None:
        if not answered:
            raise self._not(f"{self._plan.url} did not answer within {START_LIMIT:g} s")
        raise self._not(f"no process with bgtasks has started within {START_LIMIT:g} s", NOBODY)

    def _candidates(self) -> dict[int, Participant]:
        """Return the processes that serve: those that live, and have no child that has registered."""
        registered = read_participants(self._folder)
        parents = {each.parent for each in registered.values()}
        return {pid: each for pid, each in registered.items() if pid not in parents and is_alive(pid)}

    def _refuse_if_ended(self) -> None:
        status = self._main.poll()
        if status is None:
            return
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        if self._running():
            raise self._not(f"the command ended by itself ({how}), and its server runs on", BACKGROUND)
        raise self._not(f"the command ended by itself ({how}) before the signal was sent")

    def _request(self, timeout: float = 5.0) -> bool:
        """Visit the URL, and tell whether anything answers. Proxies are for other hosts."""
        try:
            build_opener(ProxyHandler({})).open(str(self._plan.url), timeout=timeout).close()
        except HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return False
        except Exception:  # an answer that is no HTTP
            return False
        return True

    # The probes.

    def _wait_probes(self) -> None:
        """Order probes from all processes that serve, and wait until some run and some wait in each."""
        deadline = monotonic() + PROBE_LIMIT
        while True:
            candidates = self._order()
            unready = [each for pid, each in candidates.items() if not self._account(pid).ready]
            if candidates and not unready:
                break
            self._refuse_if_ended()
            self._progress("waiting for the probes to run")
            if monotonic() >= deadline:
                raise self._no_probes(unready[0]) if unready else self._not("no process serves any more")
            sleep(POLL)

    def _order(self) -> dict[int, Participant]:
        """Give orders to processes that are new, and return all those that serve."""
        self._note_ends()
        candidates = self._candidates()
        for pid, participant in candidates.items():
            if participant.inline:
                raise self._not("MODE is 'inline' in BGTASKS, so every task ends where it is spawned")
            if pid not in self._serving:
                # Half as much for every second one: hypercorn ends the others with the first that is done.
                seconds = self._plan.seconds / (1 + len(self._serving) % 2)
                self._serving[pid] = participant
                write_order(self._folder, pid, seconds)
        return candidates

    def _no_probes(self, participant: Participant) -> NotRehearsed:
        account = self._account(participant.pid)
        why = f"process {participant.pid} ({participant.server.name}) runs no task"
        if not participant.server.enable_threads:
            return self._not(why, ENABLE_THREADS)
        dropped = account.details(DROPPED)
        return self._not(why + (f": {', '.join(dropped)}" if dropped else ""))

    def _visit(self) -> None:
        """Visit the URL as often as asked for, and wait for the end of workers that are replaced by that."""
        if not self._plan.requests:
            return
        for number in range(self._plan.requests):
            self._progress(f"request {number + 1} of {self._plan.requests}")
            self._request(START_LIMIT)
        sleep(SETTLE)
        deadline = monotonic() + START_LIMIT
        while any(pid not in self._ended and self._account(pid).closing for pid in self._serving):
            self._progress("waiting for a worker that is replaced")
            self._note_ends()
            if monotonic() >= deadline:
                break
            sleep(POLL)
        self._wait_probes()

    # The end.

    def _rehearse_end(self) -> None:
        plan = self._plan
        self._shell = shell_of(self._main.pid)
        if plan.url is not None:
            # One that is being answered when the signal comes. It ends with the server.
            threading.Thread(target=self._request, args=(plan.kill_after,), daemon=True).start()
            sleep(ARRIVAL)
        self._note_ends()
        self._signalled_at = monotonic()
        with contextlib.suppress(ProcessLookupError):
            if plan.target == GROUP:
                os.killpg(self._main.pid, plan.signum)
            else:
                self._main.send_signal(plan.signum)
        while self._is_running():
            passed = monotonic() - self._signalled_at
            self._progress(f"{passed:.0f} s after {plan.signum.name}: waiting for the last process to end")
            if passed >= plan.kill_after or self._has_orphans():
                self._kill_all()
                break
            sleep(POLL)

    def _is_running(self) -> bool:
        """Tell whether anything runs, and note what does not any more."""
        if self._main.poll() is not None and self._main_ended_at is None:
            self._main_ended_at = monotonic()
        self._order()  # a server that takes the signal for a reload starts new processes
        return self._main_ended_at is None or bool(self._running())

    def _has_orphans(self) -> bool:
        """Tell whether the signal has ended the command alone. Containers and systemd kill the others then.

        A signal to the whole group is what service managers send that wait for the others.
        """
        self._main_first = (
            self._plan.target != GROUP
            and self._main_ended_at is not None
            and monotonic() - self._main_ended_at >= ORPHANS
        )
        return self._main_first

    def _running(self) -> set[int]:
        registered = {pid for pid in read_participants(self._folder) if is_alive(pid)}
        return members(self._main.pid, f"{ENVIRONMENT}={self._folder}") | registered

    def _note_ends(self, killed: frozenset[int] = frozenset()) -> None:
        after = monotonic() - self._signalled_at if self._signalled_at else -1.0
        for pid in self._serving:
            if pid not in self._ended and not is_alive(pid):
                self._ended[pid] = Ended(after, pid in killed)

    def _kill_all(self) -> None:
        """Kill what is left, and wait for its end."""
        killed = frozenset(pid for pid in self._serving if is_alive(pid))
        deadline = monotonic() + KILL_LIMIT
        while (left := self._running()) or self._main.poll() is None:
            kill(self._main.pid, left)
            if monotonic() >= deadline:
                break
            sleep(POLL / 5)
        self._note_ends(killed)

    # The result.

    def _account(self, pid: int) -> Account:
        return Account.read(self._folder, pid)

    def _result(self) -> Result:
        unknown = Ended(self._plan.kill_after, killed=True)  # not even a SIGKILL has ended it
        processes = [
            ProcessResult(
                pid,
                each.server,
                each.shutdown_timeout,
                self._account(pid),
                self._ended.get(pid, unknown),
                each.handoff,
            )
            for pid, each in sorted(self._serving.items())
        ]
        return Result(
            self._plan,
            [process for process in processes if process.account.accepted],
            monotonic() - self._signalled_at,
            self._main_first,
            self._shell,
        )

    def _not(self, why: str, change: str = "") -> NotRehearsed:
        text = (self._folder / "output").read_text(errors="replace")
        if not change and "address already in use" in text.lower():
            change = PORT
        return NotRehearsed(why, change, text.splitlines()[-LAST_LINES:])


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    """Raise KeyboardInterrupt at the first signal that ends a command, so that it can clean up."""

    def interrupt(_signum: int, _frame: object) -> None:
        _ignore_interrupts()
        raise KeyboardInterrupt

    if not _is_main():
        yield
        return
    before = {each: signal.getsignal(each) for each in INTERRUPTS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _ignore_interrupts() -> None:
    """Let nothing come into the way of the cleaning up."""
    if _is_main():
        for each in INTERRUPTS:
            signal.signal(each, signal.SIG_IGN)


def _is_main() -> bool:
    """Tell whether this thread may have signal handlers: not if a script rehearses on another one."""
    return threading.current_thread() is threading.main_thread()
