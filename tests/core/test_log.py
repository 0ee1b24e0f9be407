"""What is logged: each end once, nothing that could forge a line, and whatever a handler does."""

import ast
import asyncio
import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bgtasks
from bgtasks.core.figures import DropReason
from bgtasks.core.log import log, logger
from bgtasks.core.queue import TaskQueue
from bgtasks.drops import warn
from bgtasks.monitoring.watchdog import Watchdog
from bgtasks.repeats import repeats
from bgtasks.text import counts_of, indented
from tests.gate import BOUND, Gate
from tests.pool import Core, Logs, Raising, exit_

FORGED = "mail\nERROR forged line \x1b[31mred"


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


@pytest.mark.usefixtures("impatient")
def test_names_of_cancelled_tasks_cannot_forge_a_line() -> None:
    """Nor does the warning of a shutdown."""
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
        core.drainer.background.append(Watchdog(lambda: [core.slots]))
        core.spawn(FORGED, gate)

        [line] = core.logs.wait("has been running for more")

        assert line.startswith(f"task {FORGED!r} of pool 'core' has been running for more than 0.01 s")


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


def test_fields_of_a_record_cannot_forge_a_line(logs: Logs) -> None:
    """A format that has %(task)s in it gets a name of one line, too."""
    warn(TaskQueue("mail", 5, 1), FORGED, DropReason.FULL)
    repeats.write_lines(BOUND)
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
    monkeypatch.setattr("bgtasks.core.log.traceback.format_exception", lambda error: exit_())

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
    package = Path(bgtasks.__file__).parent
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


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("function", [fail, fail_async])
def test_arguments_are_never_logged(function: Callable[..., Any]) -> None:
    """Not a drop, a failure, an overrun nor a shutdown shows what a task was given: it may be personal."""
    secret = "anna@example.org"
    with Core(capacity=1, conn_max=1, task_timeout=0.01) as core, Gate() as gate:
        core.drainer.background.append(Watchdog(lambda: [core.slots]))
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


def fail_elsewhere(number: int) -> None:
    raise LookupError(f"{number} is not there")


def test_failures_of_one_name_and_place_are_logged_once() -> None:
    """A burst that fails writes one traceback for each name and place, and then how many more there were."""
    with Core() as core:
        for number in range(50):
            core.spawn("fails", fail)
            core.spawn("fails too", fail_async)
            core.spawn("fails", fail_elsewhere, number)
        core.drain()
        assert len(core.logs.above(logging.ERROR)) == 3

        repeats.flush()

        errors = core.logs.above(logging.ERROR)[3:]
        place = f"raised in {__file__}:{fail.__code__.co_firstlineno + 1}"
        assert f"task 'fails' of pool 'core' failed again (49 more): ValueError, {place}" in errors
        assert sorted(error.partition(": ")[0] for error in errors) == [
            "task 'fails too' of pool 'core' failed again (49 more)",
            "task 'fails' of pool 'core' failed again (49 more)",
            "task 'fails' of pool 'core' failed again (49 more)",
        ]
        [record] = [record for record in core.logs.records if record.getMessage() == errors[0]]
        assert (record.pool, record.outcome, record.count) == ("core", "failed", 49)
        assert core.stats().failed == 150


def test_each_failure_is_logged_at_debug() -> None:
    """With DEBUG on, the traceback of each one is there."""
    with Core() as core:
        logger.setLevel(logging.DEBUG)
        core.logs.setLevel(logging.DEBUG)
        for number in range(3):
            core.spawn("fails", fail_elsewhere, number)
        core.drain()

        assert sum("is not there" in line for line in core.logs.of("Traceback")) == 3


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


def test_counts_of_names_are_bounded() -> None:
    """The most frequent ones are told, and how many there are beside them."""
    names = ["twice", *map(str, range(100_000)), "twice", "long" * 1000]

    text = counts_of(names)

    assert text.startswith("2 'twice', 1 '0', 1 '1', ")
    assert text.endswith(", 1 '198', 99802 of other names")
    assert len(text) < 3000


def test_counts_of_few_names_are_whole() -> None:
    """Each is told, and a long one is cut."""
    assert counts_of([]) == ""
    assert counts_of(["a", "b\n", "b\n", "x" * 101]) == f"2 'b\\n', 1 'a', 1 {'x' * 100!r}"


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


def test_record_factory_that_knows_a_task_loses_no_line(logs: Logs) -> None:
    """A project may have records with attributes of our names; in our records they are ours."""

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        vars(record).update(task="theirs", user="theirs")
        return record

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(factory)
    try:
        log(logging.WARNING, "a line", extra={"task": "ours"})
    finally:
        logging.setLogRecordFactory(before)

    [record] = logs.records
    assert (record.getMessage(), record.task, record.user) == ("a line", "ours", "theirs")


PLACES = re.compile(r"%(?:\.\d+)?([a-z])")  # of the arguments of a message

NAMED = re.compile(r"\b(?:task|pool|slot|name) (?:%|\{)(?!r|d)")  # a name that is written as it is


def misnamed(tree: ast.AST) -> list[str]:
    """Return what in a module writes the name of a task into text other than by its repr."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.search(node.value):
            found.append(node.value)  # a message, wherever it is logged
        elif isinstance(node, ast.FormattedValue) and ast.unparse(node.value) == "task.name":
            found += [ast.unparse(node)] if node.conversion != ord("r") else []
        elif isinstance(node, ast.Call):
            for number, argument in enumerate(node.args):
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    written = zip(PLACES.findall(argument.value), node.args[number + 1 :], strict=False)
                    found += [
                        argument.value
                        for letter, what in written
                        if letter != "r" and isinstance(what, ast.Attribute | ast.Name)
                        if ast.unparse(what).rpartition(".")[2] in {"name", "_name", "pool"}
                    ]
    return found


def test_name_of_a_task_is_logged_as_its_repr() -> None:
    """No message of the package has a place for a name but %r. Names of spans are data, and no lines."""
    package = Path(bgtasks.__file__).parent
    found = [
        (path.name, text)
        for path in package.rglob("*.py")
        if path.parent.name != "contrib"
        for text in misnamed(ast.parse(path.read_text(encoding="utf-8")))
    ]

    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'log(20, "task %s ran", of)',
        'log(20, "%s has run %d times", task.name, 2)',
        'log(20, "%.1f s: %s", seconds, self._name)',
        'log(20, f"{task.name} ran")',
    ],
)
def test_name_that_is_logged_as_it_is_would_be_found(source: str) -> None:
    """The test above sees each way to forget it."""
    assert misnamed(ast.parse(source))
    assert not misnamed(ast.parse(source.replace("%s", "%r").replace("name}", "name!r}")))
