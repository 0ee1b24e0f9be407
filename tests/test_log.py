"""What is logged: each drop counted once, each end once, and nothing that a handler does gets in the way."""

import ast
import asyncio
import logging
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bgtasks.drainer
import bgtasks.log
from bgtasks.log import DROP_INTERVAL, DROP_NAMES, DropLog, indented, log, logger
from bgtasks.queue import DropReason, TaskQueue
from tests.core import Core, ForcedDeque, Logs, exit_
from tests.gate import BOUND, Gate

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
    monkeypatch.setattr(bgtasks.log, "monotonic", clock)
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


class Raising(logging.Handler):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self._error


class Calling(logging.Handler):
    """Calls a function the first time that it handles a record."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self._functions = [function]

    def emit(self, record: logging.LogRecord) -> None:
        if self._functions:
            self._functions.pop()()


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


# Drops.


def test_first_drop_is_warned_of_at_once(drops: DropLog, logs: Logs) -> None:
    """The warning of the first drop names the task, the pool and the reason."""
    drops.note("send-mail", DropReason.FULL)

    assert logs.lines == ["task 'send-mail' dropped: pool 'mail' is full (capacity 5)"]
    assert logs.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (DropReason.FULL, "is full (capacity 5)"),
        (DropReason.SHUTDOWN, "is shut down"),
        (DropReason.NO_THREAD, "cannot start a thread"),
    ],
)
def test_warning_says_why(drops: DropLog, logs: Logs, reason: Any, why: Any) -> None:
    """Each reason has its words, and is in the record for a machine."""
    drops.note("send-mail", reason)

    assert logs.lines == [f"task 'send-mail' dropped: pool 'mail' {why}"]
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


def test_drop_while_another_is_written_is_left_to_the_report(
    drops: DropLog, logs: Logs, handler: Any, clock: Clock
) -> None:
    """A drop that finds its line being written by another thread counts, and does not wait.

    1. thread A: has the token, and writes
    2. thread B: counts its drop, and finds no token
    3. thread A: gives the token back
    """
    dropped = threading.Event()

    def drop_elsewhere() -> None:
        # The clock is past the interval again: B is stopped by the token and by nothing else.
        clock.now += DROP_INTERVAL
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


def test_drop_while_there_seems_nothing_to_report_is_reported(
    drops: DropLog, logs: Logs, clock: Clock
) -> None:
    """A drop that comes just as the report finds nothing left out is logged all the same.

    1. the drainer: has the token, and reads that all drops were said
    2. a spawner: counts its drop, finds the interval over but no token, and leaves it to the holder
    3. the drainer: gives the token back, has to look again
    """
    drops.note("send-mail", DropReason.FULL)
    entry = drops._names["send-mail"]
    entry.token = ForcedDeque(entry.token)
    entry.token.force("before append", lambda: drops.note("send-mail", DropReason.FULL))

    clock.advance(DROP_INTERVAL)

    assert counted(logs.lines) == 2


def test_pool_reports_suppressed_drops_from_the_drainers_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a running pool the count of the drops left out is logged without another drop."""
    monkeypatch.setattr(bgtasks.log, "DROP_INTERVAL", 0.01)
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


# Names and arguments.


FORGED = "mail\nERROR forged line \x1b[31mred"


def test_name_cannot_forge_a_line(drops: DropLog, logs: Logs) -> None:
    """A line break or a terminal escape in a name is written as such."""
    drops.note(FORGED, DropReason.FULL)

    assert repr(FORGED) in logs.lines[0]
    assert "\n" not in logs.lines[0]
    assert "\x1b" not in logs.lines[0]


async def fail_async(*args: object, **kwargs: object) -> None:
    raise ValueError("failed")


def fail(*args: object, **kwargs: object) -> None:
    raise ValueError("failed")


@pytest.mark.parametrize("function", [fail, fail_async])
def test_name_of_a_failed_task_cannot_forge_a_line(function: Callable[..., Any]) -> None:
    """The message of an ERROR has the name as its repr too."""
    with Core() as core:
        core.spawn(FORGED, function)
        core.drain()

        [record] = [record for record in core.logs.records if record.levelno == logging.ERROR]
        assert record.getMessage() == f"task {FORGED!r} of pool 'core' failed: ValueError"


def test_names_of_cancelled_tasks_cannot_forge_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the warning of a shutdown."""
    monkeypatch.setattr(bgtasks.drainer, "STOP_PATIENCE", 0.01)
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn(FORGED, gate)

        core.close(0)

        [line] = core.logs.of("cancelled")
        assert repr(FORGED) in line
        assert "\n" not in line


def test_name_of_an_overrunning_task_cannot_forge_a_line() -> None:
    """Nor does the report of a task past its TASK_TIMEOUT."""
    with Core(task_timeout=0.01) as core, Gate() as gate:
        core.spawn(FORGED, gate)

        [line] = core.logs.wait("runs for longer")

        assert line.startswith(f"task {FORGED!r} of pool 'core' runs for longer than 0.01 s")


HOSTILE = (
    "anna\r\n2026-11-25 CRITICAL forged line \x1b[31mred\x1b[0m \x9b2J \u2028CRITICAL forged \u202egnp \ud800"
)


class HostileError(Exception):
    """Says what an attacker has sent, in all places in which an exception can say something."""

    def __init__(self) -> None:
        super().__init__(HOSTILE)
        self.add_note(HOSTILE)


def fail_hostile() -> None:
    try:
        raise HostileError
    except HostileError as error:
        raise ExceptionGroup(
            HOSTILE, [HostileError(), SyntaxError(HOSTILE, (HOSTILE, 1, 1, HOSTILE))]
        ) from error


async def fail_hostile_async() -> None:
    fail_hostile()


async def fail_hostile_late() -> None:
    await asyncio.sleep(0)
    raise type(HOSTILE.replace("\ud800", ""), (Exception,), {})(HOSTILE)


def assert_one_record(text: str, start: str) -> None:
    """Assert that nothing in `text` but its `start` begins at the margin or moves a terminal's cursor."""
    first, *others = text.split("\n")
    assert first.startswith(start)
    assert all(line.startswith("  ") for line in others)
    assert [character for character in text if unicodedata.category(character) in {"Cc", "Cs", "Zl"}] == [
        "\n"
    ] * len(others)
    assert "\u202e" not in text


@pytest.mark.parametrize("function", [fail_hostile, fail_hostile_async, fail_hostile_late])
def test_exception_cannot_forge_a_line(function: Callable[..., Any]) -> None:
    """Only the first line of a record begins at the margin, whatever an exception, its cause or note says."""
    with Core() as core:
        core.spawn(FORGED, function)
        core.drain()

        [line] = core.logs.above(logging.ERROR)
        assert_one_record(line, f"task {FORGED!r} of pool 'core' failed: ")
        assert "anna\\r" in line
        assert "\\x1b[31mred" in line


def test_exception_of_a_hook_cannot_forge_a_line(logs: Logs) -> None:
    """What is logged of errors around tasks is written in the same way."""
    log(logging.ERROR, "connection %r could not be closed", "default", error=HostileError())

    [line] = logs.lines
    assert_one_record(line, "connection 'default' could not be closed")


def test_fields_of_a_record_cannot_forge_a_line(drops: DropLog, logs: Logs) -> None:
    """A format that has %(task)s in it gets a name of one line, too."""
    drops.note(FORGED, DropReason.FULL)
    with Core() as core:
        core.spawn(FORGED, fail)
        core.drain()
        [failed] = [record for record in core.logs.records if record.levelno == logging.ERROR]

    assert logs.records[0].task == failed.task == "mail\\nERROR forged line \\x1b[31mred"


def test_exception_stays_in_the_record(handler: Any) -> None:
    """Error trackers get the exception itself, and a format of one line keeps what it is about."""
    records: list[logging.LogRecord] = []
    keeping: Any = logging.Handler()
    keeping.emit = records.append
    handler(keeping)
    error = ValueError("fine")

    log(logging.ERROR, "failed", error=error)

    assert records[0].exc_info == (ValueError, error, error.__traceback__)
    assert records[0].funcName == "test_exception_stays_in_the_record"


def test_traceback_that_cannot_be_made_is_said(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a traceback cannot be written, the record is, and says why."""
    monkeypatch.setattr("bgtasks.log.traceback.format_exception", lambda error: exit_())

    log(logging.ERROR, "failed", error=ValueError())

    assert logs.lines == ["failed\n  ValueError (its traceback raised SystemExit)"]


def test_indented_ends_as_it_began() -> None:
    """Ordinary text, in any language and with tabs, is not changed but for the indent."""
    assert (
        indented("Zo\u00eb\u00a0: \tça va\u202f?\n👩\u200d💻\n")
        == "  Zo\u00eb\u00a0: \tça va\u202f?\n  👩\u200d💻"
    )


DANGEROUS_MODULES = {"pickle", "marshal", "shelve", "copyreg", "dill", "cloudpickle"}
DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__"}


def test_nothing_is_pickled_or_evaluated() -> None:
    """No module of the package imports a serialiser that runs code, or runs code that is text."""
    package = Path(bgtasks.log.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0], *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [f"{node.func.id}()"]
            found += [
                (path.name, name)
                for name in names
                if name.removesuffix("()") in (DANGEROUS_CALLS if name.endswith("()") else DANGEROUS_MODULES)
            ]

    assert found == []


@pytest.mark.parametrize("function", [fail, fail_async])
def test_arguments_are_never_logged(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a drop, a failure, an overrun nor a shutdown shows what a task was given: it may be personal."""
    monkeypatch.setattr(bgtasks.drainer, "STOP_PATIENCE", 0.01)
    secret = "anna@example.org"
    with Core(capacity=1, conn_max=1, task_timeout=0.01) as core, Gate() as gate:
        core.spawn("fails", function, secret, to=secret)
        core.drain()
        core.spawn("overruns", gate, secret, to=secret)
        core.logs.wait("'overruns'")
        core.spawn("waits", gate, secret, to=secret)
        core.spawn("dropped", gate, secret, to=secret)
        core.close(0)

        for name in ("fails", "overruns", "waits", "dropped"):
            assert core.logs.of(repr(name))
        assert core.logs.of(secret) == []


# Ends.


def test_end_is_logged_at_debug_with_its_figures() -> None:
    """A task that succeeds is a DEBUG line; how long it waited and ran is in the record."""
    with Core() as core:
        logger.setLevel(logging.DEBUG)
        core.logs.setLevel(logging.DEBUG)
        core.spawn("works", print, end="")
        core.drain()

        [line] = core.logs.of("'works'")
        [record] = [record for record in core.logs.records if record.getMessage() == line]
        assert line == "task 'works' of pool 'core' succeeded"
        assert record.levelno == logging.DEBUG
        assert (record.task, record.pool, record.outcome) == ("works", "core", "succeeded")
        assert record.wait_s >= 0
        assert record.run_s >= 0
        assert record.queue_length == 0


def test_failure_is_logged_with_its_traceback_and_figures() -> None:
    """A task that fails is an ERROR with where it was raised."""
    with Core() as core:
        core.spawn("fails", fail)
        core.drain()

        [line] = core.logs.of("'fails'")
        [record] = [record for record in core.logs.records if record.levelno == logging.ERROR]
        assert line.startswith("task 'fails' of pool 'core' failed: ValueError\n  Traceback")
        assert ", in fail\n" in line
        assert (record.task, record.pool, record.outcome) == ("fails", "core", "failed")


def test_success_is_not_logged_above_debug() -> None:
    """An INFO log of a busy process is not filled with its tasks."""
    with Core() as core:
        core.spawn("works", print, end="")
        core.drain()

        assert core.logs.of("'works'") == []


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(), KeyboardInterrupt()])
@pytest.mark.parametrize("last_resort", [True, False])
def test_handler_that_raises_loses_no_line(
    handler: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
    last_resort: Any,
) -> None:
    """Whatever a handler raises, a thread of bgtasks goes on, and says it on standard error if it can."""
    if not last_resort:
        monkeypatch.setattr(logging, "lastResort", None)
    handler(Raising(error))

    log(logging.ERROR, "task %r failed", "send-mail")

    assert ("task 'send-mail' failed" in capsys.readouterr().err) is last_resort


def test_record_factory_that_raises_loses_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A project's record factory that is broken keeps the line from its handlers, not from standard error."""

    def broken(*args: Any, **kwargs: Any) -> logging.LogRecord:
        raise ValueError("broken factory")

    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(broken)
    try:
        log(logging.ERROR, "task %r failed", "send-mail")
    finally:
        logging.setLogRecordFactory(factory)

    assert "task 'send-mail' failed" in capsys.readouterr().err


def test_handler_that_raises_fails_no_task(handler: Any) -> None:
    """A task whose end cannot be logged has ended all the same, and the next one runs."""
    with Core(conn_max=1) as core:
        handler(Raising(SystemExit()))
        core.spawn("fails", fail)
        core.spawn("fails", fail_async)
        core.spawn("works", print, end="")
        core.drain()
        logger.handlers.pop()

        assert (core.stats().failed, core.stats().succeeded) == (2, 1)
