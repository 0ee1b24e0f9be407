"""Four means to start a task from a view, side by side, and the last of them with and without an expiry.

Each returns True if the task was accepted. The dashboard shows their docstrings and their code.
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
executor_8 = ThreadPoolExecutor(8)
logger = logging.getLogger(__name__)
FRESH_SECONDS = 10  # how long a mail may wait before nobody wants it any more


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


def a_small_executor(task: Task, pk: int) -> bool:
    """8 at once. The queue has no limit, and uvicorn loses it at a deploy."""
    executor_8.submit(give_back, task, pk)
    return True


def with_bgtasks(task: Task, pk: int) -> bool:
    """A few at once. The queue has a limit, and a deploy waits for it."""
    return bgtasks.spawn("welcome", task, pk)


def fresh(task: Task, pk: int) -> bool:
    """A mail that has waited for too long is not sent."""
    return bgtasks.using(
        expires=FRESH_SECONDS,
    ).spawn("welcome", task, pk)


def stale(task: Task, pk: int) -> bool:
    """All mails are sent, however long they have waited."""
    return bgtasks.spawn("welcome", task, pk)


def give_back(task: Task, pk: int) -> None:
    """Run a task as a careful author of the first three would: log an error, free the connection.

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
    Member.How.EXECUTOR_8: a_small_executor,
    Member.How.BGTASKS: with_bgtasks,
}
POLICIES: dict[Member.How, Callable[[Task, int], bool]] = {
    Member.How.FRESH: fresh,
    Member.How.STALE: stale,
}
