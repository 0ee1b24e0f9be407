"""Database connections and forks: a child uses none of its parent's, and takes none from it.

Each `script_...` runs in an interpreter of its own, since pytest's process must not be forked.
"""

import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from django.db import connections

import bgtasks
from tests.core.test_fork import BUSY, fork
from tests.gate import BOUND
from tests.processes import Server, free_port
from tests.scripts import run_function

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "pooled"])


def backend_of(alias: str) -> Any:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


def in_tasks(probe: Callable[[], Any], number: int) -> list[Any]:
    """Run `probe` in so many tasks, and return what they returned."""
    answers: list[Any] = []
    for _ in range(number):
        assert bgtasks.spawn("probe", lambda: answers.append(probe()))
    assert bgtasks.drain(BOUND)
    return answers


def script_pool() -> Any:
    def probe() -> Any:
        return backend_of("pooled")

    own = probe()  # this thread keeps it
    before = in_tasks(probe, 20)
    child = fork(lambda: [probe(), *in_tasks(probe, 20)])
    return {"parent": [own, *before], "child": child, "after": [probe(), *in_tasks(probe, 20)]}


def test_child_has_a_connection_pool_of_its_own() -> None:
    """A child's tasks, and its main thread, are served by other backends; the parent keeps its own."""
    result, errors = run_function(script_pool, env=BUSY)  # psycopg's pool has threads

    assert not {*result["child"]} & {*result["parent"], *result["after"]}
    assert result["after"][0] == result["parent"][0]
    assert errors == ""


def script_task() -> Any:
    def probe() -> Any:
        own = backend_of("default")
        return own, fork(lambda: backend_of("default")), backend_of("default")

    [answer] = in_tasks(probe, 1)
    return answer


def test_child_of_a_task_does_not_use_its_connection() -> None:
    """A task that forks goes on with its connection, and the child makes a new one."""
    (before, child, after), _ = run_function(script_task, env=BUSY)

    assert child != before
    assert after == before


def test_preloaded_workers_have_pools_of_their_own() -> None:
    """A task that uses the database while gunicorn loads the site: no two processes share a backend."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--preload"]
    with Server([*command, "--no-control-socket", "tests.preload:application"], port=port) as server:
        answers: list[Any] = []
        while len({process for process, _, _ in answers}) < 2 or len(answers) < 20:
            answers.append(httpx.get(server.url, timeout=BOUND).json())
        server.stop()

    at_load = {backend for _, _, backend in answers}
    workers = [
        {backend for process, backend, _ in answers if process == each}
        for each in {process for process, _, _ in answers}
    ]
    assert len(at_load) == 1
    assert all(map(at_load.isdisjoint, workers))
    assert workers[0].isdisjoint(workers[1])
