"""The threads of the pools: none begins with what the code has that happens to start it."""

import asyncio
import contextvars
import threading
from functools import partial
from typing import Any

import django
import pytest
from django.test import override_settings

import bgtasks
from bgtasks.core.lock import has_gil
from bgtasks.monitoring.pace import CAN_MEASURE
from tests.gate import BOUND, wait_until

ENGINE = {"BACKEND": "tests.testapp.engines.TableBackend"}
HANDOFF: dict[str, Any] = {"HANDOFF_TO": "table"} if django.VERSION >= (6, 0) else {}  # since it has tasks
MOVER = {"default-mover"} if HANDOFF else set()
SWITCH = {"switch-watch"} if CAN_MEASURE and has_gil() else set()
WATCHES = {"loop-watch", "publisher", "watchdog"} | SWITCH
NAMES = {"default-1", "default-2", "drainer", "helper_0"} | WATCHES | MOVER

LIVE_WITH_TASKS = {f"bgtasks-{name}" for name in WATCHES | {"switch-watch"}}

request_id = contextvars.ContextVar("request_id", default="none")


def test_threads_do_not_begin_in_the_context_of_whoever_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A free-threaded Python lets a thread inherit the context variables of its starter."""
    seen: dict[str, set[str]] = {}
    start = threading.Thread.start

    def noted_start(thread: threading.Thread) -> None:
        if thread.name.startswith("bgtasks-"):
            seen.setdefault(thread.name.removeprefix("bgtasks-"), set()).add(request_id.get())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted_start)

    def use() -> None:
        request_id.set("of a request")
        bgtasks.spawn("function", request_id.get)
        bgtasks.spawn("coroutine", asyncio.to_thread, request_id.get)
        assert bgtasks.drain(BOUND)
        wait_until(lambda: {*seen} >= NAMES)
        bgtasks.shutdown()

    default = {"CONN_MAX": 2 + len(MOVER), "TASK_TIMEOUT": BOUND, **HANDOFF}
    with override_settings(BGTASKS={"default": default}, TASKS={"table": ENGINE}):
        contextvars.copy_context().run(use)

    assert seen == {name: {"none"} for name in seen}


def test_helper_threads_show_no_task_the_variables_of_another() -> None:
    """A call by ``run_in_executor`` has no context of its own. It sees that of its thread, which is empty."""

    async def ask() -> None:
        seen.append(await asyncio.get_running_loop().run_in_executor(None, request_id.get))

    seen: list[str] = []
    with override_settings(BGTASKS={"default": {"CONN_MAX": 1}}):
        for number in range(3):
            context = contextvars.copy_context()
            context.run(request_id.set, f"of task {number}")
            context.run(partial(bgtasks.spawn, "asks", ask))
            assert bgtasks.drain(BOUND)

    assert seen == ["none"] * 3


def test_the_threads_beside_the_drainer_end_with_the_tasks() -> None:
    """An idle process has none that wakes up. The coroutine lasts until the loop's watch has looked at it."""
    bgtasks.spawn("plain", int)
    bgtasks.spawn("coroutine", asyncio.sleep, 0.7)
    assert bgtasks.drain(BOUND)

    wait_until(lambda: not {thread.name for thread in threading.enumerate()} & LIVE_WITH_TASKS)
