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
from collections import Counter
from collections.abc import Iterable
from time import monotonic
from typing import Any

from bgtasks.core.figures import NAMES_MAX, Outcome
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import Hooks, Task

logger = logging.getLogger("bgtasks")

NAME_LENGTH = 100  # characters of a name that are shown among others

# What moves the cursor, ends a line or turns the direction of writing, and halves of characters, which no
# handler could write. Not the tab, nor the line feed that ends a line of a traceback. `re` keeps it compiled.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


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
        log_bare(level, message, args)


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


def counts_of(names: Iterable[str]) -> str:
    """Return how many there are of which of `names`, the most frequent first, as text of bounded length."""
    counts = Counter(name[:NAME_LENGTH] for name in names)
    told = counts.most_common(NAMES_MAX)
    untold = counts.total() - sum(count for _, count in told)
    shown = [f"{count} {name!r}" for name, count in told]
    return ", ".join([*shown, f"{untold} of other names"] if untold else shown)


def log_bare(level: int, message: str, args: tuple[object, ...]) -> None:
    """Say through a bare handler on standard error what the project's logging would not take."""
    # Not by logger.makeRecord: the project's record factory may be what has raised.
    record = logging.LogRecord(logger.name, level, __file__, 0, message, args, None)
    with contextlib.suppress(BaseException):
        if logging.lastResort is not None:
            logging.lastResort.handle(record)


def log_end(
    queue: TaskQueue, hooks: Hooks, task: Task, outcome: Outcome, error: BaseException | None
) -> None:
    """Log how `task` ended: at DEBUG, or at ERROR with the traceback of what it raised."""
    logged = error is None or hooks.failed(task, outcome, error)
    level = logging.DEBUG if logged else logging.ERROR
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
