"""What the core says through the logger ``bgtasks``. Nothing here can raise into a slot or a spawner.

Nothing that comes from outside can forge a line. A task's name is always logged as its ``repr``. A traceback,
which may quote what an attacker has sent, has each line indented and its control characters written out: only
a record begins at the margin. A task's arguments are not logged, but what it raises may quote them.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import Any

from bgtasks.text import escaped, indented

logger = logging.getLogger("bgtasks")


def enabled(level: int) -> bool:
    """Tell whether the project's LOGGING lets records of `level` pass.

    It disables the loggers that exist before it, unless told not to. Whether ours does depends on imports.
    """
    logger.disabled = False
    return logger.isEnabledFor(level)


def log(
    level: int,
    message: str,
    *args: object,
    error: BaseException | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Log `message`, with the traceback of `error`, whatever the project's handlers and filters do.

    It swallows even a SystemExit that a handler raises. A bare handler writes the message then.
    """
    try:
        logger.disabled = False  # as in `enabled`
        if not logger.isEnabledFor(level):
            return
        path, line, function, _ = logger.findCaller(stacklevel=2)
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        record = logger.makeRecord(logger.name, level, path, line, message, args, exc_info, function)
        # Not by makeRecord, which fails if the project's record factory has set one of these attributes.
        if extra is not None:
            for name, value in extra.items():
                vars(record)[name] = escaped(value) if type(value) is str else value
        if error is not None:
            record.exc_text = _traceback_of(error)  # a Formatter takes it, where it would make its own
        logger.handle(record)
    except BaseException:
        # Not by logger.makeRecord: the project's record factory may be what has raised.
        bare = logging.LogRecord(logger.name, level, __file__, 0, message, args, None)
        with contextlib.suppress(BaseException):
            if logging.lastResort is not None:
                logging.lastResort.handle(bare)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback of `error`, in which no line looks like a record, whatever it says."""
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as other:
        text = f"{type(error).__name__} (its traceback raised {type(other).__name__})"
    return indented(text)
