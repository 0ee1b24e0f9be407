"""The file in which a process counts its unfinished tasks by name, and which others read once it is dead.

::

    header   magic, version, rows, process id, host, checksum
    row      unfinished and running tasks, as two 64-bit numbers; pool and name of the task, their checksum
    ...

The process writes the numbers into memory that it shares with the file. If it is killed, the system keeps
what it has written. A lock on the file tells others that the process lives: the system ends it with the
process, so nobody has to ask what a process id or a host name stands for. It is a lock of ``lockf``, which a
forked child does not have. The process loses it if it closes any file descriptor of the file, so it never
opens its own file again.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple
from zlib import crc32

from bgtasks.core.figures import NAMES_MAX, Counts, new_counts
from bgtasks.text import NAME_LENGTH

HAS_LOCKS = find_spec("fcntl") is not None  # not on Windows

PREFIX, SUFFIX = "bgtasks-1-", ".journal"  # with the version: another one leaves our files alone
NEW, DAMAGED = ".new", ".damaged"  # a file that is being made, and one that says nothing

MAGIC, TOLD = b"bgtasks journal\n", b"bgtasks told\n   "  # of one that could not be removed
HEADER = struct.Struct("=16sIq100sI")  # magic, rows, process id, host, checksum of these
ROW = struct.Struct("=qqI60s168s")  # unfinished, running, checksum of what follows, pool, name
HEADER_SIZE = ROW_SIZE = 256
POOL_ROWS = NAMES_MAX + 1  # a pool counts the tasks of all further names under one
SIZE_MAX = 1 << 26  # bytes; no file of ours is as large


class LostTasks(NamedTuple):
    """The tasks of one name that a killed process has not finished."""

    pool: str
    name: str
    number: int
    running: int  # of these; the others waited


class Loss(NamedTuple):
    """What a killed process has left."""

    host: str
    pid: int
    tasks: list[LostTasks]

    @property
    def total(self) -> int:
        """How many tasks it has lost."""
        return sum(each.number for each in self.tasks)


def described(tasks: Iterable[LostTasks]) -> str:
    """Return which tasks were lost, the most frequent first, as text of bounded length."""
    ordered = sorted(tasks, key=attrgetter("number"), reverse=True)
    shown = [
        f"{each.number} {each.name[:NAME_LENGTH]!r}" + (f" ({each.running} running)" if each.running else "")
        for each in ordered[:NAMES_MAX]
    ]
    others = sum(each.number for each in ordered[NAMES_MAX:])
    return ", ".join([*shown, f"{others} of other names"] if others else shown)


def is_journal(name: str) -> bool:
    """Tell whether the file of this name is one of ours."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


class JournalFile:
    """The file of this process, from its first task to its end.

    Raises:
        OSError: The folder is missing, full or read-only, or its file system has no locks.
    """

    def __init__(self, folder: Path, *, pools: int, host: str, pid: int) -> None:
        rows = pools * POOL_ROWS
        self._free = iter(range(rows))  # rows that no name has; taken by `rows_for`
        self.path = folder / f"{PREFIX}{token_hex(8)}{SUFFIX}"
        new = self.path.with_suffix(NEW)
        # Others do not look at it before it is complete and locked.
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _lock(self._descriptor)
            # All of it is written: to store into memory whose file finds no room on its disk is a SIGBUS.
            _write(self._descriptor, _header(rows, pid, host) + bytes(rows * ROW_SIZE))
            self._memory = mmap.mmap(self._descriptor, HEADER_SIZE + rows * ROW_SIZE)
            new.rename(self.path)
        except BaseException:
            os.close(self._descriptor)
            new.unlink(missing_ok=True)
            raise
        self._numbers = memoryview(self._memory).cast("q")

    def rows_for(self, pool: str) -> Callable[[str], Counts]:
        """Return what gives each name of a pool its row. Called once a pool."""
        rows = [row for row, _ in zip(self._free, range(POOL_ROWS), strict=False)]
        return partial(self._row, _bytes(pool, 60), iter(rows))

    def _row(self, pool: bytes, rows: Iterator[int], name: str) -> Counts:
        row = next(rows, None)
        if row is None:  # pools were built anew, and the names of the old ones have all rows
            return new_counts(name)
        at = HEADER_SIZE + row * ROW_SIZE
        names = pool.ljust(60, b"\0") + _bytes(name, 168).ljust(168, b"\0")
        self._memory[at : at + ROW.size] = ROW.pack(0, 0, crc32(names), names[:60], names[60:])
        return self._numbers[at // 8 : at // 8 + 2]

    def remove(self) -> None:
        """Remove the file: the process has lost nothing."""
        with contextlib.suppress(OSError):  # without unfinished tasks in it, whoever finds it says nothing
            self.path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Leave the file to its process, of which this is a child; or to nobody, if it is gone."""
        os.close(self._descriptor)


def _header(rows: int, pid: int, host: str) -> bytes:
    values = MAGIC, rows, pid, _bytes(host, 100)
    checksum = _header_checksum(HEADER.pack(*values, 0))
    return HEADER.pack(*values, checksum).ljust(HEADER_SIZE, b"\0")


def _header_checksum(content: bytes) -> int:
    return crc32(content[: HEADER.size - 4])


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _bytes(text: str, length: int) -> bytes:
    return text.encode(errors="replace")[:length]


def _text(content: bytes) -> str:
    return content.rstrip(b"\0").decode(errors="ignore")  # the last character may have been cut


# What others do with the file.


@contextlib.contextmanager
def claimed(path: Path) -> Generator[int | None]:
    """Give a descriptor of the file if its process is dead, and lock it; None if somebody else has it.

    Raises:
        OSError: It cannot be opened, or not be locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield None  # somebody has just told of it
        return
    try:
        yield descriptor if _lock(descriptor) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return False
        raise
    # Between our open and our lock, another process may have told of it, and removed it.
    return os.fstat(descriptor).st_nlink > 0


def read(descriptor: int) -> Loss | None:
    """Return what the dead process has left; None if that was told already.

    Raises:
        ValueError: The file is damaged, or none of ours. The message says which.
    """
    size = os.fstat(descriptor).st_size
    content = os.pread(descriptor, size, 0) if HEADER_SIZE <= size <= SIZE_MAX else b""
    if content.startswith(TOLD):
        return None
    if not content.startswith(MAGIC):
        raise ValueError("it is no journal")
    _, rows, pid, host, checksum = HEADER.unpack_from(content)
    if _header_checksum(content) != checksum or len(content) != HEADER_SIZE + rows * ROW_SIZE:
        raise ValueError("its header is damaged")
    tasks = [_lost_tasks(content, HEADER_SIZE + row * ROW_SIZE) for row in range(rows)]
    return Loss(_text(host), pid, [each for each in tasks if each is not None])


def _lost_tasks(content: bytes, at: int) -> LostTasks | None:
    unfinished, running, checksum, pool, name = ROW.unpack_from(content, at)
    if not unfinished:
        return None
    if unfinished < 0 or crc32(pool + name) != checksum:
        raise ValueError("its numbers are damaged")
    return LostTasks(_text(pool), _text(name), unfinished, min(max(running, 0), unfinished))


def mark_told(path: Path, descriptor: int) -> None:
    """Have nobody tell of a file again: remove it, or write that into it.

    Raises:
        OSError: Neither is possible.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that may not be written
        os.pwrite(descriptor, TOLD, 0)


def set_aside(path: Path) -> None:
    """Give a file that says nothing another name, under which nobody looks at it.

    Raises:
        OSError: The folder may not be written.
    """
    path.rename(path.with_suffix(DAMAGED))
