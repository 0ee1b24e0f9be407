"""The end of a process that a task has forked."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import NoReturn


def end_child(error: BaseException | None) -> NoReturn:
    """End this process, which a task has forked, as multiprocessing ends its children: without exit hooks.

    Args:
        error: What the code has raised that has forked. Its status is that of an interpreter that ends so.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        error = None if isinstance(error.code, int) or error.code is None else error
    elif error is not None:
        status = 1
    with contextlib.suppress(BaseException):
        if error is not None:
            traceback.print_exception(error)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    os._exit(status)
