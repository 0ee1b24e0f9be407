"""The tasks of the benchmarks. Django wants those of django.tasks at the top of a module."""

import time

from django.db import connection
from django.tasks import task

HOLD_SECONDS = 0.3
CPU_SECONDS = 0.002


def work(kind: str) -> None:
    """Hold a connection for a while ("hold"), or compute in pure Python for a while ("cpu")."""
    if kind == "hold":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [HOLD_SECONDS])
    else:
        until = time.thread_time() + CPU_SECONDS
        while time.thread_time() < until:
            sum(range(100))


@task
def no_op() -> None:
    """Do nothing."""


@task(backend="local")
def local_task(kind: str) -> None:
    """Run the site's task on django-tasks-local."""
    from benchmarks.site import run

    run(kind)
