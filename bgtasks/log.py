"""What the core says through the logger ``bgtasks``. Nothing here can raise into a slot or a spawner.

Nothing that comes from outside can forge a line. A task's name is always logged as its ``repr``. A traceback,
which may quote what an attacker has sent, has each line indented and its control characters written out: only
a record begins at the margin. A task's arguments are never logged: they hold personal data.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic, time
from typing import Any

from bgtasks.figures import Failure, traceback_text
from bgtasks.queue import DropReason, Outcome, Recorded, Tally, Task, TaskQueue

logger = logging.getLogger("bgtasks")

# What moves the cursor, ends a line or turns the direction of writing, and halves of characters, which no
# handler could write. Not the tab, nor the line feed that ends a line of a traceback. `re` keeps it compiled.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"

DROP_INTERVAL = 60.0  # seconds between two warnings about drops of tasks of one name
DROP_NAMES = 1000  # names whose drops are told apart; those of all further names share one warning


def log(
    level: int,
    message: str,
    *args: object,
    error: BaseException | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Log `message`, with the traceback of `error`, whatever the project's handlers and filters do.

    For the threads of bgtasks: it swallows even a SystemExit that a handler raises.
    """
    try:
        if not logger.isEnabledFor(level):
            return
        path, line, function, _ = logger.findCaller(stacklevel=2)
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        record = logger.makeRecord(logger.name, level, path, line, message, args, exc_info, function, extra)
        if error is not None:
            record.exc_text = _traceback_of(error)  # a Formatter takes it, where it would make its own
        logger.handle(record)
    except BaseException:
        _log_bare(level, message, args)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback of `error`, in which no line looks like a record, whatever it says."""
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as other:
        text = f"{type(error).__name__} (its traceback raised {type(other).__name__})"
    return indented(text)


def indented(text: str) -> str:
    """Return the lines of `text`, none of which begins at the margin, with control characters written out."""
    return "\n".join(f"  {escaped(line)}" for line in text.rstrip("\n").split("\n"))


def escaped(text: str) -> str:
    """Return `text` as one line, with control characters written as Python writes them in a literal."""
    return re.sub(_CONTROL, lambda match: ascii(match[0])[1:-1], text.replace("\n", "\\n"))


def _log_bare(level: int, message: str, args: tuple[object, ...]) -> None:
    """Say through a bare handler on standard error what the project's logging would not take."""
    # Not by logger.makeRecord: the project's record factory may be what has raised.
    record = logging.LogRecord(logger.name, level, __file__, 0, message, args, None)
    with contextlib.suppress(BaseException):
        if logging.lastResort is not None:
            logging.lastResort.handle(record)


def log_end(queue: TaskQueue, task: Task, outcome: Outcome, error: BaseException | None) -> None:
    """Log how `task` ended: at DEBUG, or at ERROR with the traceback of what it raised."""
    if error is not None:
        keep_failure(queue, task, outcome, error)
    level = logging.DEBUG if error is None or isinstance(task.function, Recorded) else logging.ERROR
    if not logger.isEnabledFor(level):
        return
    extra = {
        "task": escaped(task.name),
        "pool": queue.pool,
        "outcome": outcome.label,
        "wait_s": task.started_at - task.spawned_at,
        "run_s": monotonic() - task.started_at,
        "queue_length": len(queue.waiting),
    }
    how = outcome.label.replace("_", " ")
    if error is None:
        log(level, "task %r of pool %r %s", task.name, queue.pool, how, extra=extra)
    else:
        kind = escaped(type(error).__name__) + _hint(error)
        log(level, "task %r of pool %r %s: %s", task.name, queue.pool, how, kind, error=error, extra=extra)


def _hint(error: BaseException) -> str:
    """Return what the likeliest mistake behind `error` is, or ""."""
    # Not imported: the core knows no Django. Where it is not imported, nobody has raised it.
    django: Any = sys.modules.get("django.core.exceptions")
    if django is not None and issubclass(type(error), django.ObjectDoesNotExist):
        return (
            " (a task does not see what a transaction has not committed yet; "
            "inside a transaction, use spawn_on_commit)"
        )
    return ""


def keep_failure(queue: TaskQueue, task: Task, outcome: Outcome, error: BaseException) -> None:
    """Keep what `task` raised, as text, among the last failures of its pool."""
    queue.failures.append(
        Failure(
            time(),
            task.name,
            outcome.label,
            type(error).__name__,
            traceback_text(error),
            task.started_at - task.spawned_at,
            monotonic() - task.started_at,
        )
    )


class DropLog:
    """Warn of drops at once, then at most once every DROP_INTERVAL for each name, with the number left out.

    A full queue would otherwise log once a request. It takes no lock, since spawners call it: whoever pops
    a name's token writes its line, and everybody else only counts.
    """

    def __init__(self, queue: TaskQueue, later: Callable[[float, Callable[[], object]], object]) -> None:
        self._queue = queue
        self._later = later  # calls back after so many seconds, on another thread, or never
        self._names: dict[str, _Drops] = {}

    def note(self, name: str, reason: DropReason) -> None:
        """Count a drop of a task called `name`, and warn of it if nobody has for a while."""
        drops = self._names.get(name)
        if drops is None:
            if len(self._names) < DROP_NAMES:
                drops = self._names.setdefault(name, _Drops(name))
            else:
                drops = self._names.setdefault("", _Drops("(of many names)"))
        drops.count.add()
        drops.reason = reason
        if monotonic() >= drops.quiet_until:
            self._warn(drops, reason)

    def flush(self) -> None:
        """Write now of all drops that were only counted so far: the process ends."""
        for drops in list(self._names.values()):
            drops.quiet_until = 0.0
            self._warn(drops, drops.reason)

    def _warn(self, drops: _Drops, reason: DropReason) -> None:
        now = monotonic()
        if now < drops.quiet_until:
            return
        try:
            drops.token.pop()
        except IndexError:
            return  # another thread is writing this very line
        try:
            total = drops.count.value
            unsaid, drops.said = total - drops.said, total
            if unsaid:
                # Before the line is written: a handler that spawns, and is dropped, must not come back here.
                drops.quiet_until = now + DROP_INTERVAL
                self._write(drops.name, reason, unsaid)
                self._later(DROP_INTERVAL, partial(self._warn, drops, reason))
        finally:
            drops.token.append(None)
        # A drop may have been counted since we read the total, and its thread, finding no token, have left.
        if drops.count.value != drops.said:
            self._warn(drops, reason)

    def _write(self, name: str, reason: DropReason, count: int) -> None:
        queue = self._queue
        why = {
            DropReason.FULL: f"pool {queue.pool!r} is full (capacity {queue.capacity})",
            DropReason.SHUTDOWN: f"pool {queue.pool!r} is shut down",
            DropReason.NO_THREAD: f"pool {queue.pool!r} cannot start a thread",
        }[reason]
        args: tuple[object, ...] = (name, why) if count == 1 else (name, count, why)
        message = "task %r dropped: %s" if count == 1 else "task %r dropped %d times more: %s"
        extra = {
            "task": escaped(name),
            "pool": queue.pool,
            "reason": reason.value,
            "queue_length": len(queue.waiting),
        }
        try:
            logger.warning(message, *args, extra=extra)
        except Exception:
            _log_bare(logging.WARNING, message, args)


class _Drops:
    """The drops of tasks of one name."""

    __slots__ = ("count", "name", "quiet_until", "reason", "said", "token")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = Tally()
        self.reason = DropReason.FULL  # of the last drop; written by whoever drops
        self.token: deque[None] = deque([None])
        self.said = 0  # drops that were written of; written by the holder of the token
        self.quiet_until = 0.0  # monotonic seconds; written by the holder of the token
