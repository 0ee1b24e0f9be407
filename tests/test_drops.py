"""Tasks that are not accepted: the answer, the signal, the counter, and warnings in a bounded number."""

import gc
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.test import override_settings

import bgtasks
from bgtasks import pools, testing
from bgtasks.core.figures import DropReason
from bgtasks.core.log import logger
from bgtasks.core.queue import TaskQueue
from bgtasks.drops import DROP_INTERVAL, DROP_NAMES, DropLog
from bgtasks.signals import task_dropped, task_spawned
from tests.gate import BOUND, Gate
from tests.pool import Calling, Core, Logs, Raising
from tests.public import (
    SMALL,
    connected,
    full,
    function,
    heard,
    is_closed,
    never,
    refuse_threads,
    warned,
)

COUNT = re.compile(r"dropped (\d+) times more")


class Clock:
    """A clock that the test moves, and the calls that are due on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, delay: float, callback: Callable[[], object]) -> None:
        self.calls.append((self.now + delay, callback))

    def advance(self, seconds: float) -> None:
        """Let time go by and make the calls that have come due."""
        self.now += seconds
        due = [callback for at, callback in self.calls if at <= self.now]
        self.calls = [(at, callback) for at, callback in self.calls if at > self.now]
        for callback in due:
            callback()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = Clock()
    monkeypatch.setattr("bgtasks.drops.monotonic", clock)
    return clock


@pytest.fixture
def drops(clock: Clock) -> Any:
    return DropLog(TaskQueue("mail", 5, 1), clock.later)


@pytest.fixture
def logs() -> Iterator[Any]:
    with Logs() as logs:
        yield logs


def counted(lines: list[str]) -> int:
    """Return how many drops the lines report in all."""
    return sum(int(match[1]) if (match := COUNT.search(line)) else 1 for line in lines)


@pytest.fixture
def handler() -> Iterator[Any]:
    """Return a function that adds a handler to the logger for the time of the test."""
    added: list[logging.Handler] = []

    def add(handler: logging.Handler) -> None:
        added.append(handler)
        logger.addHandler(handler)

    yield add
    for one in added:
        logger.removeHandler(one)


# In a pool.


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Give every test new pools, small enough to be filled, and end them after it."""
    with override_settings(BGTASKS=SMALL):
        yield


def test_spawn_past_capacity_returns_false() -> None:
    """Running tasks hold no place in the queue; with every place taken, the next task is dropped."""
    with full(pools.default):
        assert bgtasks.spawn("one too many", print) is False

        stats = bgtasks.stats()["default"]
        assert (stats.running, stats.queued, stats.dropped) == (2, 4, 1)


def test_drop_is_logged_with_pool_and_capacity(caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the task, the pool and its capacity."""
    with full(pools["email"]):
        pools["email"].spawn("one too many", print)

    assert warned(caplog) == ["task 'one too many' dropped: pool 'email' is full (capacity 2)"]


def test_drop_is_signalled() -> None:
    """task_dropped says which pool dropped which task and why, after task_spawned."""
    with full(pools.default), heard(task_spawned, task_dropped) as calls:
        bgtasks.spawn("one too many", print)

    assert calls == [
        (pools.default, {"name": "one too many"}),
        (pools.default, {"name": "one too many", "reason": "full"}),
    ]


def test_dropped_coroutine_object_is_closed() -> None:
    """A dropped coroutine object gives no warning that it was never awaited."""
    coroutine = never()

    with full(pools.default), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert bgtasks.spawn("one too many", coroutine) is False
        assert is_closed(coroutine)
        del coroutine
        gc.collect()

    assert caught == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_broken_receivers_do_not_reach_the_spawner(error: Any) -> None:
    """Whatever a receiver of task_spawned or task_dropped raises, spawn answers."""

    def receiver(**kwargs: Any) -> None:
        raise error("receiver")

    with full(pools.default), connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("one too many", print) is False
    bgtasks.drain(BOUND)
    with connected(receiver, task_spawned, task_dropped):
        assert bgtasks.spawn("task", function, [], value=7) is True


def test_full_queue_drops_nothing_that_goes_elsewhere() -> None:
    """While tasks are captured for a test, or run inline, they need no place in the queue."""
    with full(pools.default), testing.captured() as tasks:
        assert bgtasks.spawn("captured", print) is True

        assert tasks.names == ["captured"]
        assert bgtasks.stats()["default"].dropped == 0


def test_exact_capacity_with_many_spawners() -> None:
    """64 threads that spawn at once do not get one task more in than there are places."""
    barrier = threading.Barrier(64)

    def spawn() -> bool:
        barrier.wait(BOUND)
        return bgtasks.spawn("task", gate)

    with Gate() as gate:
        for _ in range(2):
            bgtasks.spawn("held", gate)
        gate.wait_entered(2)
        with ThreadPoolExecutor(64) as executor:
            accepted = sum(future.result(BOUND) for future in [executor.submit(spawn) for _ in range(64)])

    assert accepted == 4


def test_spawn_without_a_thread_to_be_had_returns_false(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no thread can be started, the task is dropped, closed and reported, and its place is free again."""
    refuse_threads(monkeypatch)
    coroutine = never()

    with heard(task_dropped) as calls:
        assert bgtasks.spawn("task", coroutine) is False

    assert calls == [(pools.default, {"name": "task", "reason": "no_thread"})]
    assert warned(caplog) == ["task 'task' dropped: pool 'default' cannot start a thread"]
    assert is_closed(coroutine)
    stats = bgtasks.stats()["default"]
    assert (stats.spawned, stats.dropped, stats.queued) == (1, 1, 0)


# The warnings.


def test_first_drop_is_warned_of_at_once(drops: DropLog, logs: Logs) -> None:
    """The warning of the first drop names the task, the pool and the reason."""
    drops.note("send-mail", DropReason.FULL)

    assert logs.lines == ["task 'send-mail' dropped: pool 'mail' is full (capacity 5)"]
    assert logs.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (DropReason.FULL, "pool 'mail' is full (capacity 5)"),
        (DropReason.SHUTDOWN, "pool 'mail' is shut down"),
        (DropReason.NO_THREAD, "pool 'mail' cannot start a thread"),
        (DropReason.NO_LOOP, "gevent has replaced threads, so there is no event loop for asynchronous tasks"),
        (DropReason.PROPAGATOR, "a propagator could not capture its value"),
    ],
)
def test_warning_says_why(drops: DropLog, logs: Logs, reason: Any, why: Any) -> None:
    """Each reason has its words, and is in the record for a machine."""
    drops.note("send-mail", reason)

    assert logs.lines == [f"task 'send-mail' dropped: {why}"]
    record = logs.records[0]
    assert (record.task, record.pool, record.reason) == ("send-mail", "mail", reason.value)
    assert record.queue_length == 0


def test_second_drop_within_the_interval_is_not_warned_of(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """A full queue does not log once a request."""
    drops.note("send-mail", DropReason.FULL)
    clock.advance(DROP_INTERVAL - 1)

    drops.note("send-mail", DropReason.FULL)

    assert len(logs.lines) == 1


def test_suppressed_drops_are_reported_when_the_interval_is_over(
    drops: DropLog, logs: Logs, clock: Clock
) -> None:
    """The count of the drops left out is logged once the interval is over, without another drop."""
    for _ in range(5):
        drops.note("send-mail", DropReason.FULL)

    clock.advance(DROP_INTERVAL)

    assert logs.lines[1:] == ["task 'send-mail' dropped 4 times more: pool 'mail' is full (capacity 5)"]


def test_interval_without_drops_is_not_reported(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """Nothing is logged, and nothing is due any more, if there was nothing to leave out."""
    drops.note("send-mail", DropReason.FULL)

    clock.advance(DROP_INTERVAL)

    assert len(logs.lines) == 1
    assert clock.calls == []


def test_report_of_suppressed_drops_begins_a_new_interval(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """As long as tasks are dropped there is one line an interval."""
    for _ in range(3):
        drops.note("send-mail", DropReason.FULL)
        drops.note("send-mail", DropReason.FULL)
        clock.advance(DROP_INTERVAL)

    assert [counted([line]) for line in logs.lines] == [1, 1, 2, 2]


def test_drop_after_a_quiet_time_is_warned_of_at_once(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """The limit is on the rate: a drop that comes alone is always said."""
    drops.note("send-mail", DropReason.FULL)
    clock.advance(DROP_INTERVAL)

    drops.note("send-mail", DropReason.FULL)

    assert logs.lines == ["task 'send-mail' dropped: pool 'mail' is full (capacity 5)"] * 2


def test_next_drop_reports_if_nothing_called_back(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """If the drainer that would call back has gone, the next drop after the interval tells the count."""
    for _ in range(3):
        drops.note("send-mail", DropReason.FULL)
    clock.calls.clear()
    clock.now += DROP_INTERVAL

    drops.note("send-mail", DropReason.FULL)

    assert counted(logs.lines[1:]) == 3


def test_each_name_has_a_limit_of_its_own(drops: DropLog, logs: Logs) -> None:
    """A name that is dropped all the time does not hide the first drop of another."""
    drops.note("send-mail", DropReason.FULL)
    drops.note("send-mail", DropReason.FULL)

    drops.note("resize", DropReason.FULL)

    assert [record.task for record in logs.records] == ["send-mail", "resize"]


def test_names_past_the_limit_share_one_warning(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """Names made of ids cannot fill the memory nor the log: further ones are counted together."""
    for i in range(DROP_NAMES + 10):
        drops.note(f"mail-{i}", DropReason.FULL)
    clock.advance(DROP_INTERVAL)

    assert len(logs.of("'(of many names)'")) == 2
    assert counted(logs.lines) == DROP_NAMES + 10
    assert len(drops._names) == DROP_NAMES + 1


def test_known_name_keeps_its_own_warning_past_the_limit(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """A name that was there before the limit was reached is told apart for good."""
    drops.note("send-mail", DropReason.FULL)
    for i in range(DROP_NAMES):
        drops.note(f"mail-{i}", DropReason.FULL)

    drops.note("send-mail", DropReason.FULL)
    clock.advance(DROP_INTERVAL)

    assert counted(logs.of("'send-mail'")) == 2


def test_handler_that_raises_does_not_reach_the_spawner(
    drops: DropLog, handler: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken handler does not make spawn raise; the line goes to standard error."""
    handler(Raising(ValueError("broken handler")))

    drops.note("send-mail", DropReason.FULL)

    assert "task 'send-mail' dropped: pool 'mail' is full" in capsys.readouterr().err


def test_signal_in_a_handler_reaches_the_spawner_and_the_next_drop_is_logged(
    drops: DropLog, logs: Logs, handler: Any, clock: Clock
) -> None:
    """A SystemExit that a signal handler raises while a line is written is passed on, and ends no log."""
    broken = Raising(SystemExit())
    handler(broken)
    with pytest.raises(SystemExit):
        drops.note("send-mail", DropReason.FULL)
    logger.removeHandler(broken)
    clock.advance(DROP_INTERVAL)

    drops.note("send-mail", DropReason.FULL)

    assert len(logs.lines) == 2


def test_handler_that_is_dropped_itself_does_not_recurse(
    drops: DropLog, logs: Logs, handler: Any, clock: Clock
) -> None:
    """A logging handler that spawns, and is dropped, is counted and does not come back to itself."""
    handler(Calling(lambda: drops.note("send-mail", DropReason.FULL)))

    drops.note("send-mail", DropReason.FULL)
    clock.advance(DROP_INTERVAL)

    assert counted(logs.lines) == 2


def test_handler_that_spawns_into_the_full_pool_goes_on() -> None:
    """The same with a real pool: a handler that spawns what it logs gets False."""
    spawned: list[bool] = []
    with Core(capacity=1, conn_max=1) as core, Gate() as gate:
        calling = Calling(lambda: spawned.append(core.spawn("log-to-db", gate)))
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", gate)
        logger.addHandler(calling)
        try:
            assert core.spawn("one too many", gate) is False
        finally:
            logger.removeHandler(calling)

        assert spawned == [False]
        assert len(core.logs.of("'log-to-db'")) == 1
        assert core.stats().dropped == 2


def test_reported_drops_of_threads_add_up(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """However many threads drop at once, and while time goes by, each drop is reported just once."""
    start = threading.Barrier(9)

    def drop() -> None:
        start.wait(BOUND)
        for _ in range(500):
            drops.note("send-mail", DropReason.FULL)

    threads = [threading.Thread(target=drop) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait(BOUND)
    while any(thread.is_alive() for thread in threads):
        clock.advance(DROP_INTERVAL)
    for thread in threads:
        thread.join()
    clock.advance(DROP_INTERVAL)
    clock.advance(DROP_INTERVAL)

    assert counted(logs.lines) == 8 * 500


def test_drop_while_another_is_written_does_not_wait(
    drops: DropLog, logs: Logs, handler: Any, clock: Clock
) -> None:
    """A handler that takes long to write a warning holds up nobody else whose task is dropped."""
    dropped = threading.Event()

    def drop_elsewhere() -> None:
        thread = threading.Thread(target=drops.note, args=("send-mail", DropReason.FULL))
        thread.start()
        thread.join(BOUND)
        assert not thread.is_alive()
        dropped.set()

    handler(Calling(drop_elsewhere))

    drops.note("send-mail", DropReason.FULL)
    assert dropped.is_set()
    clock.advance(DROP_INTERVAL)

    assert counted(logs.lines) == 2


class InterruptedLock:
    """A lock with which a signal handler raises once, as soon as it is held: a `with` leaves it so."""

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


@pytest.mark.parametrize(
    "step", [lambda drops: drops.note("a", DropReason.FULL), lambda drops: drops.flush()]
)
def test_signal_handler_that_raises_holds_up_nobody(
    drops: DropLog, logs: Logs, step: Callable[[DropLog], None]
) -> None:
    """Wherever a signal handler raises, the lock is free afterwards, and others can drop."""
    lock: Any = InterruptedLock()
    drops._lock = lock
    with pytest.raises(KeyboardInterrupt):
        step(drops)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(drops.note, "b", DropReason.FULL).result(BOUND)

    assert logs.of("'b'")


def test_pool_reports_suppressed_drops_from_the_drainers_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a running pool the count of the drops left out is logged without another drop."""
    monkeypatch.setattr("bgtasks.drops.DROP_INTERVAL", 0.01)
    with Core(capacity=1, conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", gate)

        for _ in range(10):
            core.spawn("one too many", gate)
        core.logs.wait_until(lambda lines: counted(lines) >= 10)

        assert counted(core.logs.of("'one too many'")) == 10


def test_flush_reports_what_was_suppressed(drops: DropLog, logs: Logs, clock: Clock) -> None:
    """At the end of the process the drops left out are logged without waiting for the interval."""
    for _ in range(3):
        drops.note("send-mail", DropReason.FULL)
    drops.note("send-mail", DropReason.SHUTDOWN)
    drops.note("resize", DropReason.FULL)

    drops.flush()

    assert logs.lines[-1] == "task 'send-mail' dropped 3 times more: pool 'mail' is shut down"
    assert counted(logs.lines) == 5


FORGED = "mail\nERROR forged line \x1b[31mred"


def test_name_cannot_forge_a_line(drops: DropLog, logs: Logs) -> None:
    """A line break or a terminal escape in a name is written as such."""
    drops.note(FORGED, DropReason.FULL)

    assert repr(FORGED) in logs.lines[0]
    assert "\n" not in logs.lines[0]
    assert "\x1b" not in logs.lines[0]
