"""The tasks of the benchmarks. Django wants those of django.tasks at the top of a module."""

import threading
import time

from django.db import connection, connections
from django.tasks import task

HOLD_SECONDS = 0.3
COMPUTE_SECONDS = {"cpu": 0.002, "long": 3.0}


def work(kind: str) -> None:
    """Hold a connection for a while ("hold"), or compute in pure Python ("cpu", "long")."""
    if kind == "hold":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [HOLD_SECONDS])
    else:
        until = time.thread_time() + COMPUTE_SECONDS[kind]
        while time.thread_time() < until:
            sum(range(100))


class Count:
    """How many tasks have ended, and how many of them well."""

    ended = 0  # these two are written under _lock
    succeeded = 0
    _lock = threading.Lock()

    @classmethod
    def end(cls, succeeded: bool) -> None:
        """Count one."""
        with cls._lock:
            cls.ended += 1
            cls.succeeded += succeeded


def run(kind: str) -> None:
    """Do the work of a task, and give its connection back, as a careful author of threads does."""
    succeeded = False
    try:
        work(kind)
        succeeded = True
    except Exception as error:  # noqa: BLE001  # a thread has nobody to raise it to
        print(f"a task failed: {error}")  # noqa: T201  # into the server's log
    finally:
        connections.close_all()
        Count.end(succeeded)


@task
def no_op() -> None:
    """Do nothing."""


@task(backend="local")
def local_task(kind: str) -> None:
    """Do the same on django-tasks-local."""
    run(kind)
