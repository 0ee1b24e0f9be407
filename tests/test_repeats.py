"""What is logged again and again: at once, then once a minute with the number left out, by another thread."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bgtasks import pools
from bgtasks.core.log import log
from bgtasks.repeats import INTERVAL, KINDS_MAX, MANY, Repeats, repeats
from tests.gate import BOUND, wait_until
from tests.pool import Logs, Raising
from tests.processes import run_python
from tests.public import no_threads


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Said:
    """What is said of kinds, by a Repeats that nothing writes but the test."""

    def __init__(self) -> None:
        self.repeats = Repeats()
        self.said: list[tuple[str, int]] = []  # names, each with the number left out, or 0

    def note(self, name: str) -> None:
        """Note that there was one more of a kind."""
        if self.repeats.is_first(("dropped", name), lambda name, count: self.said.append((name, count))):
            self.said.append((name, 0))

    def total(self) -> int:
        """Return of how many it was said that they were there."""
        return sum(count or 1 for _, count in self.said)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = Clock()
    monkeypatch.setattr("bgtasks.repeats.monotonic", clock)
    return clock


@pytest.fixture
def said(clock: Clock) -> Any:
    return Said()


# How often.


def test_first_of_a_kind_is_said_at_once_and_the_second_is_not(said: Said, clock: Clock) -> None:
    """A full queue does not log once a request."""
    said.note("send-mail")
    clock.now += INTERVAL - 1
    said.note("send-mail")
    said.repeats.write()

    assert said.said == [("send-mail", 0)]


def test_number_left_out_is_said_when_the_interval_is_over(said: Said, clock: Clock) -> None:
    """It needs no other one of that kind."""
    for _ in range(5):
        said.note("send-mail")
    clock.now += INTERVAL

    assert said.repeats.write() is False
    assert said.said == [("send-mail", 0), ("send-mail", 4)]


def test_nothing_is_said_of_a_quiet_interval(said: Said, clock: Clock) -> None:
    """If nothing was left out, there is nothing to write."""
    said.note("send-mail")
    clock.now += INTERVAL

    assert not said.repeats.has_lines()
    said.repeats.write()
    assert said.said == [("send-mail", 0)]


def test_number_left_out_begins_a_new_interval(said: Said, clock: Clock) -> None:
    """As long as it goes on there is one record an interval."""
    for _ in range(3):
        said.note("send-mail")
        said.note("send-mail")
        clock.now += INTERVAL
        said.repeats.write()

    assert [count for _, count in said.said] == [0, 1, 2, 2]


def test_one_after_a_quiet_time_is_said_at_once(said: Said, clock: Clock) -> None:
    """The limit is on the rate: one that comes alone is always said."""
    said.note("send-mail")
    clock.now += INTERVAL
    said.note("send-mail")

    assert said.said == [("send-mail", 0)] * 2


def test_next_one_has_the_number_said_if_no_thread_does(said: Said, clock: Clock) -> None:
    """Without a thread, the next one after the interval tells the number, and its own."""
    for _ in range(3):
        said.note("send-mail")
    clock.now += INTERVAL
    said.note("send-mail")

    assert said.said == [("send-mail", 0), ("send-mail", 3)]


def test_each_kind_has_a_limit_of_its_own(said: Said) -> None:
    """One that comes all the time does not hide the first of another."""
    said.note("send-mail")
    said.note("send-mail")
    said.note("resize")

    assert said.said == [("send-mail", 0), ("resize", 0)]


def test_kinds_past_the_limit_share_one_record(said: Said, clock: Clock) -> None:
    """Names made of ids cannot fill the memory nor the log. Known ones, and other sorts, are told apart."""
    for i in range(KINDS_MAX + 10):
        said.note(f"mail-{i}")
    said.note("mail-0")
    assert said.repeats.is_first(("failed", "mail"), lambda name, count: None)
    clock.now += INTERVAL
    said.repeats.write()

    assert said.said[KINDS_MAX:] == [(f"mail-{KINDS_MAX}", 0), (MANY, 9), ("mail-0", 1)]
    assert len(said.repeats._kinds) == KINDS_MAX + 2


def test_flush_says_what_was_left_out_and_begins_anew(said: Said) -> None:
    """At the end of the process nobody waits for the interval."""
    for name in ("send-mail", "send-mail", "send-mail", "resize"):
        said.note(name)
    said.repeats.flush()
    said.note("resize")

    assert said.said == [("send-mail", 0), ("resize", 0), ("send-mail", 2), ("resize", 0)]


def test_numbers_of_threads_add_up(said: Said, clock: Clock) -> None:
    """However many threads note at once, and while time goes by, each one is told just once."""
    start = threading.Barrier(9)

    def note() -> None:
        start.wait(BOUND)
        for _ in range(500):
            said.note("send-mail")

    threads = [threading.Thread(target=note) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait(BOUND)
    while any(thread.is_alive() for thread in threads):
        clock.now += INTERVAL
        said.repeats.write()
    for thread in threads:
        thread.join()
    said.repeats.flush()

    assert said.total() == 8 * 500


class InterruptedLock:
    """Raises what a signal handler may raise as soon as it is held: a `with` leaves it so."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._errors = [KeyboardInterrupt]
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        self.acquire()
        if self._errors:
            raise self._errors.pop()
        return True

    def __exit__(self, *exc_info: Any) -> None:
        self.release()


@pytest.mark.parametrize("step", [lambda said: said.note("a"), lambda said: said.repeats.flush()])
def test_signal_handler_that_raises_holds_up_nobody(said: Said, step: Callable[[Said], None]) -> None:
    """Wherever a signal handler raises, the lock is free afterwards."""
    lock: Any = InterruptedLock()
    said.repeats._lock = lock
    with pytest.raises(KeyboardInterrupt):
        step(said)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(said.note, "b").result(BOUND)

    assert said.said == [("b", 0)]


def test_line_that_raises_leaves_no_lock_held(said: Said) -> None:
    """The lines after it are written, by whoever comes next."""

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        said.repeats.hand_over(fail)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(said.repeats.hand_over, lambda: said.said.append(("b", 0))).result(BOUND)

    assert said.said == [("b", 0)]


# The thread that writes.


def test_lines_are_written_by_a_thread_that_ends() -> None:
    """It is there as long as it has something to write, and a process that is quiet has none."""
    threads: list[threading.Thread] = []
    repeats.hand_over(lambda: threads.append(threading.current_thread()))
    wait_until(lambda: bool(threads))
    threads[0].join(BOUND)

    assert threads[0].name == "bgtasks-log-writer"
    assert not threads[0].is_alive()


def test_thread_writes_the_number_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the end of the interval, and what is left out meanwhile of another kind is not late."""
    monkeypatch.setattr("bgtasks.repeats.INTERVAL", 0.01)
    said: list[tuple[str, int]] = []

    def more(name: str, count: int) -> None:
        said.append((name, count))

    for kind in ("send-mail", "resize"):
        while kind not in {name for name, _ in said.copy()}:
            repeats.is_first(("dropped", kind), more)

    assert {name for name, _ in said} == {"send-mail", "resize"}


def test_without_a_thread_the_caller_writes(logs: Logs) -> None:
    """On a machine that has no thread left, nothing goes unsaid."""
    with no_threads():
        repeats.hand_over(lambda: log(logging.WARNING, "said"))

        # At once, unless a thread of an earlier test is just about to end.
        assert logs.wait("said") == ["said"]


def test_thread_that_cannot_be_started_costs_no_line(monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    """If only the last thread is to be had, the bare one, that one writes."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    repeats.hand_over(lambda: log(logging.WARNING, "said"))

    assert logs.wait("said") == ["said"]


def test_after_a_shutdown_the_caller_writes(logs: Logs) -> None:
    """The process ends, and a thread might not get its turn."""
    pools.shutdown()
    try:
        repeats.hand_over(lambda: log(logging.WARNING, "said"))

        assert logs.wait("said") == ["said"]  # at once, unless the thread is just about to end
    finally:
        pools.restart()


def test_shutdown_waits_for_the_line_that_is_being_written(handler: Any) -> None:
    """What was said before is written when it returns."""
    entered, release, written = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        entered.set()
        release.wait(BOUND)
        written.set()

    repeats.hand_over(write)
    assert entered.wait(BOUND)
    with ThreadPoolExecutor(1) as executor:
        flushed = executor.submit(repeats.flush)
        release.set()
        flushed.result(BOUND)

        assert written.is_set()


def test_handler_that_raises_reaches_nobody(handler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken handler does not end the thread; the line goes to standard error."""
    handler(Raising(ValueError("broken handler")))
    repeats.hand_over(lambda: log(logging.WARNING, "said"))
    repeats.write_lines(BOUND)

    assert "said" in capsys.readouterr().err


def test_handler_that_is_left_out_itself_does_not_recurse(said: Said) -> None:
    """What a handler notes while it writes is counted, and does not come back to it."""
    said.repeats.hand_over(lambda: [said.note("send-mail"), said.note("send-mail")])
    said.repeats.flush()

    assert said.said == [("send-mail", 0), ("send-mail", 1)]


FORKING = """
import os
import django
django.setup()
from bgtasks.repeats import repeats

def more(name, count):
    print("left out", count, flush=True)

for _ in range(3):
    repeats.is_first(("dropped", "x"), more)
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    print("first", repeats.is_first(("dropped", "x"), print), flush=True)
    repeats.flush()
    os._exit(0)
"""


def test_forked_child_says_nothing_of_its_parents() -> None:
    """The numbers of the parent are told by the parent."""
    process = run_python(FORKING)

    assert process.stdout == "first True\nleft out 2\n"
