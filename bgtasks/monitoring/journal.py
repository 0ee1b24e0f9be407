"""What a killed process has lost, told by another one: the setting BGTASKS_JOURNAL.

Each process counts its unfinished tasks by name in a file: see ``bgtasks.monitoring.journal_file``. A thread
looks for files of dead processes once a second while tasks run, and once after the start of a server.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from django.conf import settings

from bgtasks import conf
from bgtasks.core.drainer import STOP_PATIENCE
from bgtasks.core.figures import OTHERS, RUNNING, UNFINISHED, new_counts
from bgtasks.core.log import log
from bgtasks.core.queue import TaskQueue
from bgtasks.core.slots import Slots
from bgtasks.monitoring import journal_file
from bgtasks.monitoring.journal_file import JournalFile, Loss, described
from bgtasks.monitoring.thread import MonitorThread
from bgtasks.text import escaped

LOOK_INTERVAL = 1.0  # seconds between two looks
COUNTED_MAX = 1000  # names of lost tasks that are counted separately; others count as OTHERS

LOST = "process %d of %s was killed with %d tasks: %s"
OFF = (
    "the journal is off, so nobody will tell what this process loses if it is killed: %s. Tasks run. Have "
    'BGTASKS_JOURNAL["DIR"] name a folder with room in it that this process may write'
)
GONE = (
    "the journal of this process was removed from %r, and is written anew; keep other programs out of there"
)
UNREADABLE = "the journal %r of another process cannot be read, so its lost tasks are not reported: %s"
NOTHING_SAID = "the journal %r says nothing: %s. What its process has lost is not known"


class Journal(MonitorThread):
    """The thread that keeps the file of this process and looks at those of others."""

    role = "journal"

    def __init__(self, built: Callable[[], Iterable[Slots]], on_loss: Callable[[Loss], object]) -> None:
        self._built = built  # what runs the tasks of each pool
        self._on_loss = on_loss
        self.folder: Path | None = None  # written by configure
        self._file: JournalFile | None = None  # under _using, as is the next one
        self._queues: list[TaskQueue] = []  # whose tasks are counted in the file
        super().__init__()

    def configure(self) -> None:
        """Read the setting BGTASKS_JOURNAL."""
        value: Any = getattr(settings, "BGTASKS_JOURNAL", None)
        is_on = journal_file.HAS_LOCKS and not any(problems(value))
        self.folder = Path(value["DIR"]) if value is not None and is_on else None

    def forget(self) -> None:
        """Be another process, which has no file and has told nothing: this is a forked child."""
        super().forget()
        self._using = threading.Lock()  # held while files are used
        for queue in self._queues:
            _count_in_memory(queue)  # no step: that would wake the parent's loop
        if self._file is not None:
            self._file.let_go()
        self._file, self._queues = None, []
        self._left: set[str] = set()  # names of files that cannot be read
        self._complained = False  # that the journal is off
        self.lost: Counter[tuple[str, str]] = Counter()  # tasks by pool and name; written by the thread

    def close(self) -> None:
        """Remove the file: all pools were shut down, and have reported what they have not finished."""
        # The thread may be held up by a disk that does not answer.
        if not self._using.acquire(timeout=STOP_PATIENCE):
            return
        try:
            if (file := self._detach()) is not None:
                file.remove()
        finally:
            self._using.release()

    # The thread.

    def _is_wanted(self) -> bool:
        return self.folder is not None

    def _is_needed(self) -> bool:
        return any(slots.queue.queued or slots.queue.running() for slots in self._built())

    def _run(self, stop: threading.Event) -> None:
        while self._keep(stop) and not stop.wait(LOOK_INTERVAL):
            self._look()
            if not self._is_needed():
                return

    def _keep(self, stop: threading.Event) -> bool:
        """Have the tasks of all pools counted in the file; False if the thread was told to end."""
        with self._using:
            if stop.is_set() or self.folder is None:
                return False
            if self._file is None:
                try:
                    pools, host = len(conf.pool_names()), socket.gethostname()
                    self._file = JournalFile(self.folder, pools=pools, host=host, pid=os.getpid())
                    self._complained = False
                except OSError as error:
                    if not self._complained:
                        self._complained = True
                        log(logging.WARNING, OFF, error)
                    return True
            for slots in self._built():
                if slots.queue not in self._queues:
                    self._queues.append(slots.queue)
                    slots.queue.read(partial(_count_in_file, self._file))
        return True

    def _look(self) -> None:
        """Tell of every process that has died, and see that the file of this one is still there."""
        with self._using:
            folder, file = self.folder, self._file
            if folder is None:
                return
            try:
                names = {path.name for path in folder.iterdir() if journal_file.is_journal(path.name)}
            except OSError:
                names = set[str]()  # which is said of our own file, or was said as it could not be made
            if file is not None and file.path.name not in names:
                log(logging.WARNING, GONE, str(folder))
                self._detach()
                file.let_go()
            # Never our own: to close it would be to unlock it.
            own: set[str] = set() if file is None else {file.path.name}
            for name in sorted(names - own - self._left):
                self._examine(folder / name)

    def _examine(self, path: Path) -> None:
        """Tell of what the process has lost whose file this is, if it is dead and nobody has told yet."""
        try:
            with journal_file.claimed(path) as descriptor:
                if descriptor is None:
                    return
                try:
                    loss = journal_file.read(descriptor)
                except ValueError as error:
                    self._left.add(path.name)
                    log(logging.WARNING, NOTHING_SAID, str(path), error)
                    journal_file.set_aside(path)
                    return
                if loss is not None and loss.tasks:
                    self._tell(loss)
                journal_file.mark_told(path, descriptor)
        except OSError as error:
            if path.name not in self._left:
                self._left.add(path.name)
                log(logging.WARNING, UNREADABLE, str(path), error)

    def _tell(self, loss: Loss) -> None:
        log(logging.WARNING, LOST, loss.pid, escaped(loss.host), loss.total, described(loss.tasks))
        for each in loss.tasks:
            key = each.pool, each.name
            if key not in self.lost and len(self.lost) >= COUNTED_MAX:
                key = each.pool, OTHERS
            self.lost[key] += each.number
        self._on_loss(loss)

    def _detach(self) -> JournalFile | None:
        """Have nothing counted in the file any more, and return it if there is one."""
        for queue in self._queues:
            queue.read(_count_in_memory)
        file, self._file, self._queues = self._file, None, []
        return file


def problems(value: Any) -> Iterator[conf.Problem]:
    """Yield every mistake in `value`, the setting BGTASKS_JOURNAL."""
    write = 'Write BGTASKS_JOURNAL = {"DIR": "/run/mysite"}, or None for no journal.'
    if value is None:
        return
    whole: object = value
    if not isinstance(whole, Mapping):
        what = f"BGTASKS_JOURNAL is {value!r}, not a dictionary of options."
        yield conf.Problem("bgtasks.E070", what, write)
        return
    for key in value:
        if key != "DIR":
            what = f"BGTASKS_JOURNAL[{key!r}] is not an option of the journal."
            yield conf.Problem("bgtasks.E071", what, "The only option is 'DIR'.")
    folder: Any = value.get("DIR")
    if not isinstance(folder, str | Path) or not str(folder):
        what = f'BGTASKS_JOURNAL["DIR"] is {folder!r}, which is not the path of a folder.'
        yield conf.Problem("bgtasks.E072", what, write)


def _count_in_file(file: JournalFile, queue: TaskQueue) -> None:
    """Have the unfinished tasks of a pool counted in the file from now on. Part of a step."""
    account = queue.account
    account.new_counts = file.rows_for(queue.pool)
    for figures in list(account.values()):
        if isinstance(figures.counts, list):  # or a signal handler has *just* spawned its first task
            row = account.new_counts(figures.name)
            # Atomic: a signal handler that spawns does not come in the middle of it.
            figures.counts, (row[UNFINISHED], row[RUNNING]) = row, figures.counts


def _count_in_memory(queue: TaskQueue) -> None:
    """Have the unfinished tasks of a pool counted in lists. Part of a step."""
    account = queue.account
    account.new_counts = new_counts
    for figures in list(account.values()):
        figures.counts = [*figures.counts]
