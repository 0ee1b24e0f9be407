"""The switch interval: shorter while one plain function computes and others wait, and put back after it."""

import sys
import threading
from collections.abc import Iterator
from time import thread_time
from typing import Any, Self

import pytest

from bgtasks.core.lock import has_gil
from bgtasks.monitoring import switching
from bgtasks.monitoring.pace import CAN_MEASURE, LATE, WANTED
from bgtasks.monitoring.switching import (
    COMPUTES,
    DEFAULT,
    LOOK_INTERVAL,
    SHORTER,
    SwitchWatch,
    Used,
)
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.pool import Core, wait_idle

pytestmark = [
    pytest.mark.usefixtures("patient"),
    pytest.mark.skipif(not CAN_MEASURE, reason="needs the processor time of each thread"),
]

needs_gil = pytest.mark.skipif(not has_gil(), reason="without the GIL nobody waits for it")


def interval() -> float:
    return round(sys.getswitchinterval(), 6)


@pytest.fixture(autouse=True)
def _python_default() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(DEFAULT)
    yield
    sys.setswitchinterval(before)


class Watched(Core):
    """A pool with a watch of its own, beside a thread that computes a little, as requests do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.watch = SwitchWatch(lambda: [self.slots])
        self.drainer.background = [self.watch]
        self._end = threading.Event()
        self._requests = threading.Thread(target=self._answer)

    def __enter__(self) -> Self:
        super().__enter__()
        self._requests.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._end.set()
        self._requests.join()
        super().__exit__(*exc_info)

    def _answer(self) -> None:
        while not self._end.wait(0.005):
            until = thread_time() + 0.001
            while thread_time() < until:
                pass

    def is_watched(self) -> bool:
        return any(thread.name == "bgtasks-switch-watch" for thread in self.threads())


def compute(end: threading.Event) -> None:
    """Use the processor, in Python, until told to end."""
    while not end.is_set():
        sum(range(1000))


@needs_gil
def test_the_interval_is_shorter_while_one_function_computes_and_others_wait() -> None:
    """And it is put back soon after, whether or not another function runs that computes nothing."""
    with Watched(conn_max=2) as core, Gate() as gate:
        end = threading.Event()
        core.spawn("computes", compute, end)
        core.spawn("waits", gate)
        wait_until(lambda: interval() == SHORTER)
        end.set()

        wait_until(lambda: interval() == DEFAULT)
        assert core.is_watched()


@needs_gil
def test_a_shutdown_puts_it_back() -> None:
    """The thread that would have done so ends."""
    with Watched(conn_max=1) as core:
        end = threading.Event()
        core.spawn("computes", compute, end)
        wait_until(lambda: interval() == SHORTER)
        threads = core.watch.stop()
        for thread in threads:
            thread.join()

        assert interval() == DEFAULT
        end.set()


@needs_gil
def test_a_forked_child_puts_it_back() -> None:
    """It inherits the interval, and not the thread that would put it back."""
    with Watched(conn_max=1) as core:
        core.watch._set(shorter=True)
        assert interval() == SHORTER

        core.watch.forget()

        assert interval() == DEFAULT


def test_the_thread_ends_when_no_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not at once: many tasks one after the other do not start a thread each."""
    monkeypatch.setattr(switching, "STAYS", BOUND)
    monkeypatch.setattr(switching, "has_gil", lambda: True)
    with Watched(conn_max=1) as core:
        core.spawn("first", print)
        core.drain()
        wait_until(core.watch.threads)
        [thread] = core.watch.threads()
        core.spawn("second", print)
        core.drain()
        assert core.watch.threads() == [thread]

        monkeypatch.setattr(switching, "STAYS", 0.0)
        wait_until(lambda: not core.is_watched())
        monkeypatch.setattr(switching, "STAYS", BOUND)
        assert core.spawn("third", print)
        wait_until(core.is_watched)


def test_no_thread_watches_without_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it there."""
    monkeypatch.setattr(switching, "has_gil", lambda: False)
    with Watched(conn_max=1) as core, Gate() as gate:
        core.spawn("first", gate)
        gate.wait_entered()
        assert not core.watch._awake


def test_only_plain_functions_are_looked_at() -> None:
    """A coroutine that computes blocks all others anyway, and runs on the loop's thread."""
    with Core(conn_max=2) as core, Gate() as gate, AsyncGate() as agate:
        watch = SwitchWatch(lambda: [core.slots])
        core.spawn("coroutine", agate)
        agate.wait_entered()
        assert not watch._is_needed()
        core.spawn("function", gate)
        gate.wait_entered()
        [(thread, _started_at)] = watch._functions()
        assert thread in {each.native_id for each in core.slots.threads()}
        gate.open()
        agate.open()
        core.drain()
        wait_idle(core.slots)
        assert not watch._is_needed()


# When it is worth it.

FIRST, SECOND = (1, 10.0), (2, 20.0)  # two functions: thread, and start
BEFORE = Used({FIRST: 5.0, SECOND: 7.0}, others=3.0)


def used(first: float, second: float, others: float) -> Used:
    """Return the readings after one look, of functions and others that have used parts of a processor."""
    return Used(
        {FIRST: 5.0 + first * LOOK_INTERVAL, SECOND: 7.0 + second * LOOK_INTERVAL},
        others=3.0 + others * LOOK_INTERVAL,
    )


@pytest.mark.parametrize(
    ("after", "late", "is_shorter", "is_worth_it"),
    [
        (used(0.9, 0.0, 0.1), LATE * 5, False, True),
        (used(0.0, 0.9, 0.1), LATE * 5, False, True),
        # Nobody is late by now: that is why it has to stay as it is.
        (used(0.9, 0.0, 0.1), 0.0, True, True),
        # It computes without the GIL, or there are processors for all.
        (used(0.9, 0.0, 0.1), LATE / 2, False, False),
        # Nobody else has anything to do.
        (used(0.9, 0.0, WANTED / 2), LATE * 5, False, False),
        (used(0.9, 0.0, WANTED / 2), LATE * 5, True, False),
        # Nobody computes, or several do.
        (used(COMPUTES / 2, 0.0, 0.5), LATE * 5, True, False),
        (used(0.45, 0.45, 0.1), LATE * 5, True, False),
        # It has only just begun.
        (Used({(1, 11.0): 9.0}, others=4.0), LATE * 5, True, False),
    ],
)
def test_when_it_is_worth_it(after: Used, late: float, is_shorter: bool, is_worth_it: bool) -> None:
    """One function computes, others use the processor, and they wait, or would."""
    watch = SwitchWatch(list)
    watch._is_shorter = is_shorter

    assert watch._is_worth_it(BEFORE, after, LOOK_INTERVAL, late) is is_worth_it


def test_an_interval_of_somebody_else_is_left_alone() -> None:
    """Whoever has set it before, or in the meantime, knows why."""
    watch = SwitchWatch(list)
    sys.setswitchinterval(0.001)
    watch._set(shorter=True)
    assert interval() == 0.001

    sys.setswitchinterval(DEFAULT)
    watch._set(shorter=True)
    assert interval() == SHORTER
    sys.setswitchinterval(0.002)
    watch._set(shorter=False)
    assert interval() == 0.002
