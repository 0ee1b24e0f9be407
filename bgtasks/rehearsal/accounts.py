"""The files of a rehearsal, in its folder: who takes part, who is ordered to spawn, and what became of it.

=================  =====================================================================================
file               what it holds
=================  =====================================================================================
``process-PID``    who a process is: written by it when Django is ready there, and after a fork
``order-PID``      how many seconds of work it has to spawn: written by the command
``account-PID``    a line for each event in it, appended in one write, so that a SIGKILL loses none
=================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bgtasks.core.figures import Outcome
from bgtasks.servers import ServerFacts

ACCEPTED = "accepted"
READY = "ready"  # the pools are filled, and probes run
CLOSING = "closing"  # a spawn was refused, since the pools are shutting down
DROPPED = "dropped "  # and a reason: a kind of probe cannot run there
NO_DATABASE = "no database "  # and the type of an exception

# What has run to its end, or was shed as the pool's EXPIRES or ON_FULL say.
FINISHED = (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.SHED)


@dataclass(frozen=True)
class Participant:
    """A process of the server in which Django is ready.

    Attributes:
        pid: Its process id.
        parent: That of its parent.
        server: What it knows of its server.
        shutdown_timeout: The longest SHUTDOWN_TIMEOUT of its pools, in seconds.
        inline: Whether no pool has a queue, since their MODE is "inline".
        handoff: The names of pools that hand off.
    """

    pid: int
    parent: int
    server: ServerFacts
    shutdown_timeout: float = 8
    inline: bool = False
    handoff: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Register in `folder`. A reader sees the whole file or none."""
        _write_at_once(folder / f"process-{self.pid}", json.dumps(asdict(self)))


def read_participants(folder: Path) -> dict[int, Participant]:
    """Return who has registered, by process id."""
    found: dict[int, Participant] = {}
    for path in folder.glob("process-*"):
        content: dict[str, Any] = json.loads(path.read_text())
        content |= {"server": ServerFacts(**content["server"]), "handoff": tuple(content["handoff"])}
        participant = Participant(**content)
        found[participant.pid] = participant
    return found


def write_order(folder: Path, pid: int, seconds: float) -> None:
    """Order a process to keep `seconds` of work queued."""
    _write_at_once(folder / f"order-{pid}", str(seconds))


def read_order(folder: Path, pid: int) -> float | None:
    """Return the seconds of work that are ordered; None if nothing is."""
    with contextlib.suppress(FileNotFoundError):
        return float((folder / f"order-{pid}").read_text())
    return None


def append(folder: Path, pid: int, event: str) -> None:
    """Note one event of a process. If the rehearsal is over, nobody reads it."""
    # Opened each time: a server may close all files when it starts a worker.
    with contextlib.suppress(OSError), (folder / f"account-{pid}").open("ab", buffering=0) as account:
        account.write(f"{event}\n".encode())


@dataclass(frozen=True)
class Account:
    """What became of the probes of one process: how many there were of each event."""

    events: Counter[str] = field(default_factory=Counter[str])

    @classmethod
    def read(cls, folder: Path, pid: int) -> Account:
        """Return the account of a process, which is empty until it has spawned."""
        with contextlib.suppress(FileNotFoundError):
            return cls(Counter((folder / f"account-{pid}").read_text().splitlines()))
        return cls()

    @property
    def ready(self) -> bool:
        """Whether some probes run and some wait."""
        return self.events[READY] > 0

    @property
    def closing(self) -> bool:
        """Whether the process has begun to shut down its pools."""
        return self.events[CLOSING] > 0

    @property
    def accepted(self) -> int:
        """How many probes were accepted."""
        return self.events[ACCEPTED]

    @property
    def finished(self) -> int:
        """How many have run to their end, or were shed."""
        return sum(self.events[outcome.label] for outcome in FINISHED)

    @property
    def cancelled(self) -> int:
        """How many were cancelled at the shutdown, and reported."""
        return self.events[Outcome.CANCELLED.label]

    @property
    def handed_off(self) -> int:
        """How many were handed off to an engine."""
        return self.events[Outcome.HANDED_OFF.label]

    @property
    def lost(self) -> int:
        """How many were accepted and not heard of again."""
        return max(0, self.accepted - self.finished - self.cancelled - self.handed_off)

    def details(self, prefix: str) -> list[str]:
        """Return what follows `prefix` in the events that begin with it."""
        return sorted(event.removeprefix(prefix) for event in self.events if event.startswith(prefix))


def _write_at_once(path: Path, text: str) -> None:
    """Write a file that appears as a whole."""
    new = path.with_name("." + path.name)
    with new.open("x") as file:  # never through a link that somebody has put there
        file.write(text)
    new.replace(path)
