"""An application for gunicorn --preload: a task uses the database while the server loads it.

Each request has a task ask the database, and answers with the process and the backend that answered.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import django

django.setup()

from django.db import connections  # noqa: E402  # after the setup

import bgtasks  # noqa: E402


def backend() -> int:
    with connections["pooled"].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        [pid] = cursor.fetchone()
        return int(pid)


def in_task() -> int:
    """Ask in a task, and return which backend answered."""
    answers: list[int] = []
    bgtasks.spawn("ask", lambda: answers.append(backend()))
    assert bgtasks.drain(30)
    return answers[0]


at_load = in_task()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with the process, the backend of a task, and that of the task at load time."""
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([os.getpid(), in_task(), at_load]).encode()]
