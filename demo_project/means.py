"""Three means to start a task from a view, side by side. Each returns True if the task was accepted.

The dashboard shows their docstrings and their code.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from django.db import connections

import bgtasks

from .models import Member

Task: TypeAlias = Callable[[int], None]
executor = ThreadPoolExecutor(64)
logger = logging.getLogger(__name__)


def a_thread_each(task: Task, pk: int) -> bool:
    """All at once, each wanting a connection."""
    threading.Thread(
        target=give_back,
        args=(task, pk),
    ).start()
    return True


def an_executor(task: Task, pk: int) -> bool:
    """64 at once, each wanting a connection."""
    executor.submit(give_back, task, pk)
    return True


def with_bgtasks(task: Task, pk: int) -> bool:
    """A few at once, the rest wait without one."""
    return bgtasks.spawn("welcome", task, pk)


def give_back(task: Task, pk: int) -> None:
    """Run a task as a careful author of the first two would: log an error, free the connection.

    The error is one line: hundreds of tracebacks at once stall the server for longer than the burst.
    """
    try:
        task(pk)
    except Exception as error:  # noqa: BLE001 (a thread has nobody to raise it to)
        logger.error("a task failed: %s", error)
    finally:
        connections.close_all()


MEANS: dict[Member.How, Callable[[Task, int], bool]] = {
    Member.How.THREAD: a_thread_each,
    Member.How.EXECUTOR: an_executor,
    Member.How.BGTASKS: with_bgtasks,
}
