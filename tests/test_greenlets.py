"""gevent and eventlet in place of threads: what runs there, and what is said of what does not."""

import json
from typing import Any

import pytest

from tests.processes import run_python

pytestmark = pytest.mark.servers

SETUP = """
import json, time
import django
django.setup()
import bgtasks, threading
from bgtasks import health
from django.core.checks import run_checks
from django.db import connections

def checks():
    return [[check.id, check.msg] for check in run_checks() if check.id.startswith("bgtasks")]

async def coroutine():
    raise AssertionError("there is no loop")
"""


def run(code: str) -> Any:
    """Run code in a process of its own, and return the JSON that it prints, and what it logs."""
    process = run_python(code, env={"PYTHONWARNINGS": "ignore"})  # eventlet warns of itself
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


GEVENT = f"""
from gevent import monkey
monkey.patch_all()
{SETUP}
inside = peak = 0

def work():
    global inside, peak
    inside += 1
    peak = max(peak, inside)
    time.sleep(0.01)
    inside -= 1

spawned = [bgtasks.spawn("work", work) for _ in range(30)]
connections["sqlite"].ensure_connection()
drained = bgtasks.drain(30)
well = health.problems()
dropped = [bgtasks.spawn("coroutine", coroutine), bgtasks.spawn("object", coroutine())]
bgtasks.spawn("returns one", lambda: coroutine())
bgtasks.drain(30)
stats = bgtasks.stats()["default"]
outcomes = [stats.succeeded, stats.failed, stats.dropped]
print(json.dumps([all(spawned), drained, peak, well, dropped, outcomes, checks()]))
bgtasks.spawn("at exit", lambda: (time.sleep(0.1), bgtasks.core.log.logger.warning("done at exit")))
"""


def test_gevent_runs_plain_functions_bounded_and_drops_asynchronous_ones() -> None:
    """CONN_MAX greenlets run at once, the ORM works beside them, and the exit waits for them."""
    [spawned, drained, peak, problems, dropped, outcomes, checks], log = run(GEVENT)

    assert (spawned, drained, peak, problems) == (True, True, 8, [])
    assert dropped == [False, False]
    assert outcomes == [30, 1, 2]
    why = "gevent has replaced threads, so there is no event loop for asynchronous tasks"
    assert f"task 'coroutine' dropped: {why}" in log
    assert "RuntimeError: task 'returns one' returned a coroutine, and no loop can run it" in log
    assert checks == [["bgtasks.W003", f"{why}: they are dropped."]]
    assert "done at exit" in log
    assert "never awaited" not in log


EVENTLET = f"""
import eventlet
eventlet.monkey_patch()
{SETUP}
before = threading.active_count()
dropped = [bgtasks.spawn("function", print), bgtasks.spawn("coroutine", coroutine)]
connections["sqlite"].ensure_connection()
print(json.dumps([dropped, threading.active_count() - before, checks(), bgtasks.drain(30)]))
"""


def test_eventlet_is_refused() -> None:
    """No greenlet is started, every task is dropped, and the check says why."""
    [dropped, started, checks, drained], log = run(EVENTLET)

    assert (dropped, started, drained) == ([False, False], 0, True)
    why = "eventlet has replaced threads, and bgtasks starts none of its greenlets"
    assert f"task 'function' dropped: {why}" in log
    assert f"task 'coroutine' dropped: {why}" in log
    assert checks == [["bgtasks.E040", f"{why}: every task is dropped."]]


UNPATCHED = f"""
import eventlet, gevent.monkey
{SETUP}
ran = []

async def append():
    ran.append("coroutine")

bgtasks.spawn("function", ran.append, "function")
bgtasks.drain(30)
bgtasks.spawn("coroutine", append)
bgtasks.drain(30)
print(json.dumps([ran, checks()]))
"""


def test_greenlets_that_have_replaced_nothing_change_nothing() -> None:
    """Both libraries are imported, but threads are threads: everything runs."""
    [ran, checks], _ = run(UNPATCHED)

    assert (ran, checks) == (["function", "coroutine"], [])
