"""The watch on the drainer's loop: a coroutine that blocks it is reported by another thread."""

import asyncio
import os
import selectors
import socket
import threading
from time import sleep
from typing import Any, Self

import pytest

import bgtasks
from bgtasks.core import places
from bgtasks.monitoring import health, loop_watch
from bgtasks.monitoring.figures import read_stats
from bgtasks.monitoring.loop_watch import LoopWatch
from bgtasks.monitoring.snapshot import drainer_state
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, assert_whole
from tests.scripts import run_function

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look all the time, and report at once."""
    monkeypatch.setattr(loop_watch, "LOOK_INTERVAL", 0.001)
    monkeypatch.setattr(loop_watch, "PATIENCE", 0.02)


class Watched(Core):
    """A pool with a watch of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drainer.background = [LoopWatch(self.drainer, lambda: [self.slots])]

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def is_watched(self) -> bool:
        return any(thread.name == "bgtasks-loop-watch" for thread in self.threads())


@pytest.mark.parametrize("timeout", [None, 0.01])
def test_coroutine_that_blocks_the_loop_is_reported_once_with_its_stack(timeout: float | None) -> None:
    """Its name and where it is are logged, the process is not well, and plain functions run meanwhile."""
    with Watched(conn_max=3, task_timeout=timeout) as core, Gate() as gate:

        async def block() -> None:
            gate()

        core.spawn("blocks", block)
        [line] = core.logs.wait("has not answered")
        core.spawn("plain", int)
        wait_until(lambda: core.stats().succeeded == 1)

        assert "task 'blocks' blocks it" in line
        assert "gate.py" in line
        assert "in block" in line
        assert drainer_state(core.drainer) == "blocked"
        assert health.problems(core.drainer, [core.slots], None) == ["a task blocks the drainer's loop"]
        assert read_stats(core.queue).stuck == (timeout is not None)

        gate.open()
        core.drain()
        core.logs.wait("the drainer's loop answers again")

        assert drainer_state(core.drainer) == "running"
        assert len(core.logs.of("has not answered")) == 1


def test_functions_go_on_while_coroutines_wait_for_a_blocked_loop() -> None:
    """Coroutines that slots were given before hold none of them, and all run when the loop answers."""
    with Watched(conn_max=3) as core, Gate() as gate:

        async def block() -> None:
            gate()

        core.spawn("blocks", block)
        gate.wait_entered()
        for _ in range(4):
            core.spawn("coroutine", asyncio.sleep, 0)
            core.spawn("plain", int)
        core.logs.wait("has not answered")
        wait_until(lambda: core.stats().succeeded == 4)
        stats = core.stats()

        assert (stats.running, stats.queued) == (1, 4)

        gate.open()
        core.drain()

        assert core.stats().succeeded == 9
        assert_whole(core)


def test_loop_that_answers_is_not_reported() -> None:
    """Coroutines that wait, for however long, block nobody; the watch ends with the last of them."""
    with Watched(conn_max=2) as core, AsyncGate() as gate:
        core.spawn("waits", gate)
        gate.wait_entered()
        wait_until(core.is_watched)
        core.spawn("turns", asyncio.sleep, 0.1)
        wait_until(lambda: core.stats().succeeded == 1)
        gate.open()
        core.drain()
        wait_until(lambda: not core.is_watched())

        assert not core.logs.of("has not answered")


def test_the_watch_ends_also_if_the_loop_takes_a_moment_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last answer is still on its way as the watch has asked, and must not keep it for good."""
    monkeypatch.setattr(loop_watch, "LOOK_INTERVAL", 0.05)
    with Watched(conn_max=1) as core, AsyncGate() as gate:
        call_soon = core.drainer.loop.call_soon
        asked: list[object] = []

        def call_a_little_later(*call: Any) -> bool:
            asked.append(call)
            threading.Timer(0.01, call_soon, call).start()
            return True

        core.spawn("waits", gate)
        gate.wait_entered()
        monkeypatch.setattr(core.drainer.loop, "call_soon", call_a_little_later)
        wait_until(lambda: asked)
        gate.open()
        core.drain()

        wait_until(lambda: not core.is_watched())


def test_plain_functions_need_no_watch() -> None:
    """A pool without coroutines has no such thread."""
    with Watched(conn_max=1) as core, Gate() as gate:
        core.spawn("plain", gate)
        gate.wait_entered()

        assert not core.is_watched()


def test_callback_that_blocks_the_loop_is_reported_as_such() -> None:
    """What no task is part of has no name; its stack says what it is."""
    with Watched(conn_max=1) as core, Gate() as gate, AsyncGate() as waits:
        core.spawn("waits", waits)
        waits.wait_entered()
        core.drainer.loop.call_soon(gate)

        [line] = core.logs.wait("has not answered")
        gate.open()

        assert "a callback blocks it" in line


# A loop that is deaf.


def deafen() -> None:
    os.closerange(3, 256)


async def deafen_and_go_on() -> None:
    deafen()
    await asyncio.sleep(0)


def script_deaf(bad: Any, sleeps: bool) -> dict[str, Any]:
    """Have a task close all descriptors, and go on spawning until a coroutine has run; return the figures."""
    loop_watch.LOOK_INTERVAL, loop_watch.PATIENCE = 0.05, 0.1
    places.CLAIM_PATIENCE = 0.1
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    if sleeps:
        held = AsyncGate(bound=10 * BOUND)
        bgtasks.spawn("sleeps", held)
        held.wait_entered()
    bgtasks.spawn("deafens", bad)
    bgtasks.drain(0.1)
    for _ in range(100 * BOUND):
        if ran:
            break
        bgtasks.spawn("plain", int)
        bgtasks.spawn("coroutine", run)
        sleep(0.01)
    bgtasks.drain(BOUND)
    stats = bgtasks.stats()["default"]
    ended = stats.succeeded + stats.failed
    return {"ran": bool(ran), "failed": stats.failed, "left": stats.spawned - ended}


def script_deaf_by_a_function() -> dict[str, Any]:
    return script_deaf(deafen, sleeps=True)


def script_deaf_by_a_coroutine() -> dict[str, Any]:
    return script_deaf(deafen_and_go_on, sleeps=True)


def script_deaf_while_nothing_runs_on_it() -> dict[str, Any]:
    return script_deaf(deafen, sleeps=False)


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        (script_deaf_by_a_function, 1),
        (script_deaf_by_a_coroutine, 2),
        (script_deaf_while_nothing_runs_on_it, 0),
    ],
)
def test_deaf_loop_is_replaced(script: Any, failed: int) -> None:
    """What ran on it has failed, and whatever is spawned afterwards runs, coroutines too."""
    result, errors = run_function(script)

    assert result == {"ran": True, "failed": failed, "left": 0}
    assert "the drainer's loop cannot be woken" in errors
    assert errors.count("RuntimeError: the drainer's loop could not be woken, and was replaced") == failed


def test_coroutine_that_was_lent_to_a_deaf_loop_runs_on_the_new_one() -> None:
    """A plain function has begun it, and only the loop goes on with it."""
    with Core(conn_max=1) as core, Gate(bound=10 * BOUND) as held:
        core.drainer.loop.call_soon(held)
        held.wait_entered()
        old, thread = core.drainer.loop.running, core.drainer.loop.thread
        core.spawn("returns a coroutine", lambda: asyncio.sleep(0))
        wait_until(lambda: any(task.asynchronous for task in core.queue.running()))
        core.drainer.pace.interval = 0.001
        core.drainer.replace_loop()
        assert core.drainer.pace.interval == 0  # the old loop has set it, and nobody would lower it
        core.drain()

        assert core.stats().succeeded == 1

        assert old is not None
        assert thread is not None
        old.call_soon_threadsafe(old.stop)
        held.open()
        thread.join(BOUND)
        old.close()


def fail(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_loop_is_not_replaced_if_there_is_no_thread_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next look tries again."""
    with Core(conn_max=1) as core, AsyncGate() as gate:
        core.spawn("waits", gate)
        gate.wait_entered()
        before = core.drainer.loop.running, core.drainer.loop.thread
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError):
                core.drainer.replace_loop()

        assert (core.drainer.loop.running, core.drainer.loop.thread) == before

        gate.open()
        core.drain()

        assert core.stats().succeeded == 1


def test_callback_that_waits_in_a_selector_of_its_own_is_not_taken_for_a_deaf_loop() -> None:
    """Nor is a task: subprocess.communicate() waits so."""
    with Watched(conn_max=1) as core, AsyncGate() as waits:
        core.spawn("waits", waits)
        waits.wait_entered()
        one, other = socket.socketpair()
        with one, other, selectors.DefaultSelector() as selector:
            selector.register(one, selectors.EVENT_READ)
            core.drainer.loop.call_soon(selector.select)
            [line] = core.logs.wait("has not answered")
            other.send(b"x")
            core.logs.wait("the drainer's loop answers again")

        assert "a callback blocks it" in line
