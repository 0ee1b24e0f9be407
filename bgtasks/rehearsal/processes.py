"""The processes of a rehearsal: those of the command's group, and those that have registered."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
ENDED = frozenset({"Z", "X"})  # states of a process that somebody only has to hear of
SHELLS = frozenset({"ash", "bash", "busybox", "dash", "ksh", "sh", "zsh"})


def is_alive(pid: int) -> bool:
    """Tell whether a process has not ended yet, whoever has to hear of its end."""
    fields = _stat(pid)
    if fields is not None:
        return fields[0] not in ENDED
    return not _has_proc() and _answers(pid)


def members(group: int, variable: str) -> set[int]:
    """Return the processes of a group, and those that have a `variable` with its value in their environment.

    Those have left the group, as daemons do. Without /proc, the group's leader stands for all.
    """
    if not _has_proc():
        return {group} if _answers(-group) else set()
    found: set[int] = set()
    for path in PROC.iterdir():
        fields = _stat(int(path.name)) if path.name.isdigit() else None
        if fields is None or fields[0] in ENDED:
            continue
        if int(fields[2]) == group or _has_variable(path, variable):
            found.add(int(path.name))
    return found


def shell_of(pid: int) -> str | None:
    """Return the name of the shell that a process is, or None."""
    with contextlib.suppress(OSError):
        name = (PROC / str(pid) / "exe").readlink().name
        return name if name in SHELLS else None
    return None


def send(pids: Iterable[int], signum: int) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def kill(group: int, pids: Iterable[int]) -> None:
    """Kill a group, and `pids` that may have left it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    send(pids, signal.SIGKILL)


def _has_proc() -> bool:
    return (PROC / "self" / "stat").exists()


def _has_variable(process: Path, variable: str) -> bool:
    try:
        return variable.encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False  # that of another user, or it has just ended


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> list[str] | None:
    """Return the fields of a process from its state on: state, parent, group; None if there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
