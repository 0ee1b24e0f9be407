"""What a rehearsal was asked for, and what came out of it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bgtasks.rehearsal.accounts import Account
from bgtasks.servers import ServerFacts

MAIN, GROUP = "main", "group"  # who is sent the signal


@dataclass(frozen=True)
class Plan:
    """What a rehearsal is asked for.

    Attributes:
        command: The server's command.
        seconds: Of work that is kept queued in each process.
        signum: The signal that a deploy sends.
        target: Who is sent it: the command's process, or its whole group.
        url: What to visit: until it answers, and while the signal is sent.
        requests: How often to visit it in between.
        kill_after: Seconds after the signal at which every process is killed.
        strict: Whether cancelled tasks count as lost in the exit status.
        show_output: Whether the server's output is shown, and not kept for the case that it does not start.
    """

    command: list[str]
    seconds: float = 5.0
    signum: signal.Signals = signal.SIGTERM
    target: str = MAIN
    url: str | None = None
    requests: int = 0
    kill_after: float = 10.0
    strict: bool = False
    show_output: bool = False


class Ended(NamedTuple):
    """The end of a process.

    Attributes:
        after: Seconds after the signal; less than 0 if it came before.
        killed: Whether the rehearsal had to kill it.
    """

    after: float
    killed: bool


@dataclass(frozen=True)
class ProcessResult:
    """What became of the probes of one process."""

    pid: int
    server: ServerFacts
    shutdown_timeout: float  # the longest one of its pools
    account: Account
    ended: Ended
    handoff: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came out of a rehearsal.

    Attributes:
        plan: What it was asked for.
        processes: Those that have spawned probes.
        ended_after: Seconds from the signal until the last process had ended.
        main_first: Whether the command ended and left others behind, which were killed then.
        shell: The name of the shell that the command is, or None.
    """

    plan: Plan
    processes: list[ProcessResult]
    ended_after: float
    main_first: bool = False
    shell: str | None = None

    @property
    def accepted(self) -> int:
        """How many probes were accepted, in all."""
        return sum(process.account.accepted for process in self.processes)

    @property
    def cancelled(self) -> int:
        """How many were reported as cancelled."""
        return sum(process.account.cancelled for process in self.processes)

    @property
    def lost(self) -> int:
        """How many were lost."""
        return sum(process.account.lost for process in self.processes)


class NotRehearsed(Exception):  # noqa: N818  # it is a result, with a status of its own
    """It could not be rehearsed.

    Attributes:
        why: In one sentence.
        change: What to do about it, or "".
        output: The last lines of the server.
    """

    def __init__(self, why: str, change: str = "", output: Sequence[str] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.change = change
        self.output = output
