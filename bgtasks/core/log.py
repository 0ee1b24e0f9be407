"""What the core says through the logger ``bgtasks``. Nothing here can raise into a slot or a spawner.

Nothing that comes from outside can forge a line. A task's name is always logged as its ``repr``. A traceback,
which may quote what an attacker has sent, has each line indented and its control characters written out: only
a record begins at the margin. A task's arguments are not logged, but what it raises may quote them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

from bgtasks.core.figures import NAMES_MAX

logger = logging.getLogger("bgtasks")

NAME_LENGTH = 100  # characters of a name that are shown among others

# What moves the cursor, ends a line or turns the direction of writing, and halves of characters, which no
# handler could write. Not the tab, nor the line feed that ends a line of a traceback. `re` keeps it compiled.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


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


def indented(text: str) -> str:
    """Return the lines of `text`, none of which begins at the margin, with control characters written out."""
    return "\n".join(f"  {escaped(line)}" for line in text.rstrip("\n").split("\n"))


def escaped(text: str) -> str:
    """Return `text` as one line, with control characters written as Python writes them in a literal."""
    return re.sub(_CONTROL, lambda match: ascii(match[0])[1:-1], text.replace("\n", "\\n"))


def encodable(text: str) -> str:
    """Return `text` with halves of characters, which UTF-8 cannot encode, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def counts_of(names: Iterable[str]) -> str:
    """Return how many there are of which of `names`, the most frequent first, as text of bounded length."""
    counts = Counter(name[:NAME_LENGTH] for name in names)
    told = counts.most_common(NAMES_MAX)
    untold = counts.total() - sum(count for _, count in told)
    shown = [f"{count} {name!r}" for name, count in told]
    return ", ".join([*shown, f"{untold} of other names"] if untold else shown)
