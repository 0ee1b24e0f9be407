"""The journal: what a killed process has lost, told by another one, once.

Each `script_...` runs in an interpreter of its own, which is killed, or forks. The tests tell of them with a
journal of their own, in pytest's process.
"""

import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bgtasks
from bgtasks import health
from bgtasks.core.figures import NAMES_MAX, OTHERS, RUNNING, UNFINISHED
from bgtasks.management.commands import bgtasks as command
from bgtasks.monitoring import journal, journal_file
from bgtasks.monitoring.journal import Journal
from bgtasks.monitoring.journal_file import JournalFile, Loss, LostTasks
from bgtasks.monitoring.overview import overview
from bgtasks.pools import pools
from tests.core.test_fork import BUSY
from tests.gate import BOUND, Gate, wait_until
from tests.pool import Core, Logs, make_task
from tests.processes import run_python
from tests.scripts import run_function, run_script

pytestmark = pytest.mark.usefixtures("patient")

CRASHES = 100
READERS = 3


class Reader:
    """A journal of a process that runs no task, and what it has told."""

    def __init__(self, folder: Path) -> None:
        self.losses: list[Loss] = []
        self.journal = Journal(list, self.losses.append)
        self.journal.folder = folder

    def look(self) -> list[Loss]:
        """Look once, and return what it has told so far."""
        self.journal._look()
        return self.losses


class Journaled(Core):
    """A pool with a journal of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.journal = Journal(lambda: [self.slots], print)
        self.journal.folder = folder
        self.drainer.background = [self.journal]

    def __enter__(self) -> "Journaled":
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self.journal.close()

    def wait_counted(self) -> None:
        """Wait until the tasks are counted in the file."""
        wait_until(lambda: self.queue in self.journal._queues)


def own_file(folder: Path, pools: int = 1) -> JournalFile:
    return JournalFile(folder, pools=pools, host="web-1", pid=41)


def content(path: Path) -> Loss | None:
    """Read what a file says, also one of this very process, which loses its lock by that."""
    with path.open("rb") as file:
        return journal_file.read(file.fileno())


def leave(folder: Path, *names: str) -> Path:
    """Leave the file of a process that was killed with one waiting task of each of `names`."""
    file = own_file(folder)
    row_of = file.rows_for("default")
    for name, number in Counter(names).items():
        row_of(name)[UNFINISHED] += number
    file.let_go()
    return file.path


# What is counted.


def test_unfinished_tasks_are_counted_by_name(tmp_path: Path) -> None:
    """The file says which tasks have not ended, and which of them run, at any moment."""
    with Journaled(tmp_path, conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.wait_counted()
        core.spawn("waits", int)
        core.spawn("held", gate)
        [path] = tmp_path.iterdir()
        before = content(path)
        gate.open()
        core.drain()
        after = content(path)

    assert before is not None
    assert sorted(before.tasks) == [LostTasks("core", "held", 2, 1), LostTasks("core", "waits", 1, 0)]
    assert (before.host, before.pid) == (socket.gethostname(), os.getpid())
    assert after is not None
    assert after.tasks == []


def test_tasks_that_were_there_before_are_counted(tmp_path: Path) -> None:
    """The file is made by a thread that the first task has started, and the others do not wait for it."""
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", int)
        file = own_file(tmp_path)
        core.queue.read(lambda queue: journal._count_in_file(file, queue))

        loss = content(file.path)
        gate.open()
        core.drain()
        ended = content(file.path)
        stats = core.stats()
    file.remove()

    assert loss is not None
    assert sorted(loss.tasks) == [LostTasks("core", "held", 1, 1), LostTasks("core", "waits", 1, 0)]
    assert ended is not None
    assert ended.tasks == []
    assert (stats.queued, stats.running, stats.succeeded) == (0, 0, 2)


def test_file_has_a_row_for_every_name_that_a_pool_tells_apart(tmp_path: Path) -> None:
    """The tasks of all further names are counted under one; of a pool too many, they are not."""
    core = Core()
    file = own_file(tmp_path)
    core.queue.read(lambda queue: journal._count_in_file(file, queue))
    for number in range(NAMES_MAX + 50):
        core.queue.put(make_task(f"name-{number}"))
    uncounted = file.rows_for("another")("name")

    loss = content(file.path)
    file.remove()

    assert loss is not None
    assert len(loss.tasks) == NAMES_MAX + 1
    assert LostTasks("core", OTHERS, 50, 0) in loss.tasks
    assert loss.total == NAMES_MAX + 50
    assert uncounted == [0, 0]


def test_long_name_is_cut_between_two_characters(tmp_path: Path) -> None:
    """A row has room for so many bytes, and a name of several bytes a character stays readable."""
    path = leave(tmp_path, "ß" * 100 + "\ud800")
    path_of_odd = leave(tmp_path, "a" + "ß" * 100)

    losses = content(path), content(path_of_odd)

    assert [loss.tasks[0].name for loss in losses if loss] == ["ß" * 84, "a" + "ß" * 83]


def test_no_argument_is_in_the_file(tmp_path: Path) -> None:
    """Arguments hold personal data."""
    with Journaled(tmp_path, conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        core.wait_counted()
        core.spawn("waits", print, "secret-argument")
        [path] = tmp_path.iterdir()
        written = path.read_bytes()

    assert b"waits" in written
    assert b"secret-argument" not in written


# The end of a process.


def script_killed() -> None:
    with Gate() as gate:
        bgtasks.spawn("send-welcome", gate)
        wait_until(lambda: pools.default.slots and pools.default.slots.queue in pools.journal._queues)
        for _ in range(11):
            bgtasks.spawn("send-welcome", gate)
        for _ in range(2):
            bgtasks.spawn("ping-partner", gate)
        gate.wait_entered(8)
        os.kill(os.getpid(), signal.SIGKILL)


def script_ended() -> None:
    bgtasks.spawn("plain", int)
    wait_until(lambda: list(Path(os.environ["BGTASKS_TEST_JOURNAL"]).iterdir()))


def script_cancelled() -> None:
    gate = Gate()
    bgtasks.spawn("held", gate)
    gate.wait_entered()
    wait_until(lambda: pools.default.slots and pools.default.slots.queue in pools.journal._queues)
    bgtasks.shutdown(timeout=0)
    gate.open()


def test_killed_process_is_told_once(tmp_path: Path, logs: Logs) -> None:
    """One warning has the process, its host, and what it has lost by name; then the file is gone."""
    done = run_script(script_killed, env={"BGTASKS_TEST_JOURNAL": str(tmp_path)})
    first, second = Reader(tmp_path), Reader(tmp_path)

    [loss] = first.look()
    second.look()
    first.look()

    assert done.returncode == -signal.SIGKILL
    [line] = logs.of("was killed")
    assert line.startswith(f"process {loss.pid} of {socket.gethostname()} was killed with 14 tasks: ")
    assert line.endswith(": 12 'send-welcome' (8 running), 2 'ping-partner'")
    assert (len(first.losses), second.losses) == (1, [])
    assert first.journal.lost == {("default", "send-welcome"): 12, ("default", "ping-partner"): 2}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [script_ended, script_cancelled])
def test_process_that_ends_leaves_no_file(script: Callable[[], Any], tmp_path: Path) -> None:
    """What has ended, or was cancelled by a shutdown and reported, is no loss."""
    _, errors = run_function(script, env={"BGTASKS_TEST_JOURNAL": str(tmp_path)})

    assert list(tmp_path.iterdir()) == []
    assert ("1 tasks cancelled: 1 'held'" in errors) is (script is script_cancelled)


def script_starts() -> Any:
    wait_until(lambda: pools.journal.lost)
    return sum(pools.journal.lost.values())


def test_process_that_starts_tells(tmp_path: Path) -> None:
    """It looks once, before it has any task."""
    leave(tmp_path, "lost", "lost")

    told, errors = run_function(script_starts, env={"BGTASKS_TEST_JOURNAL": str(tmp_path)})

    assert told == 2
    assert "process 41 of web-1 was killed with 2 tasks: 2 'lost'" in errors


def script_command() -> Any:
    looks = pools.journal._awake
    bgtasks.spawn("task", int)
    wait_until(lambda: pools.journal.lost)
    return looks


def test_management_command_tells_only_while_it_runs_tasks(tmp_path: Path) -> None:
    """The `migrate` of a deploy leaves it to the server, whose log and figures somebody looks at."""
    leave(tmp_path, "lost")
    program = "import sys; sys.argv[0] = '/site/manage.py'; from tests.scripts.call import main; main()"

    done = run_python(program, __name__, "script_command", env={"BGTASKS_TEST_JOURNAL": str(tmp_path)})

    assert (done.returncode, done.stdout.strip()) == (0, "false")
    assert "process 41 of web-1 was killed with 1 tasks: 1 'lost'" in done.stderr


def test_sibling_tells_while_it_runs_tasks(tmp_path: Path) -> None:
    """It looks again and again, but not when it is idle: then its thread has ended."""
    with Journaled(tmp_path) as core, Gate() as gate:
        core.spawn("held", gate)
        for number in (1, 2):
            core.wait_counted()
            leave(tmp_path, "lost")
            core.logs.wait("was killed", number)
        gate.open()
        core.drain()
        wait_until(lambda: not core.journal.threads())

        assert len(list(tmp_path.iterdir())) == 1


def test_process_killed_without_tasks_is_not_told(tmp_path: Path, logs: Logs) -> None:
    """It has lost nothing; its file is removed."""
    path = leave(tmp_path)

    losses = Reader(tmp_path).look()

    assert (losses, logs.lines, path.exists()) == ([], [], False)


def script_forks() -> Any:
    """Fork in the middle of work, and kill the child in the middle of its own. Tell what the parent sees."""
    folder = Path(os.environ["BGTASKS_TEST_JOURNAL"])
    losses: list[Loss] = []
    pools.journal._on_loss = losses.append
    with Gate() as gate:
        bgtasks.spawn("of-the-parent", gate)
        gate.wait_entered()
        wait_until(lambda: pools.default.slots and pools.default.slots.queue in pools.journal._queues)
        [own] = folder.iterdir()
        pid = os.fork() or _be_killed_child()
        os.waitpid(pid, 0)
        bgtasks.spawn("of-the-parent", gate)
        wait_until(lambda: losses)
        left = [path.name for path in folder.iterdir()]
        # The lock is the parent's still: somebody else cannot take it.
        other = subprocess.run([sys.executable, "-c", TRY_LOCK, own], check=True, capture_output=True)
        counts = [list(figures.counts) for figures in pools.default.build().slots.queue.account.values()]
    return {
        "losses": [[each.pid == pid, each.tasks] for each in losses],
        "left": left == [own.name],
        "locked": other.stdout.decode().strip(),
        "counts": counts,
    }


TRY_LOCK = """
import sys
from pathlib import Path
from bgtasks.monitoring.journal_file import claimed
with claimed(Path(sys.argv[1])) as descriptor:
    print(descriptor)
"""


def _be_killed_child() -> int:
    try:
        gate = Gate()
        bgtasks.spawn("of-the-child", gate)
        bgtasks.spawn("of-the-child", gate)
        gate.wait_entered(2)
        wait_until(lambda: pools.default.slots and pools.default.slots.queue in pools.journal._queues)
        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)


def test_forked_child_has_a_file_of_its_own(tmp_path: Path) -> None:
    """The parent tells what its child has lost, and keeps its own file, numbers and lock."""
    env = {"BGTASKS_TEST_JOURNAL": str(tmp_path), **BUSY}

    told, _ = run_function(script_forks, env=env)

    assert told["losses"] == [[True, [["default", "of-the-child", 2, 2]]]]
    assert told["left"]
    assert told["locked"] == "None"
    assert told["counts"] == [[2, 2]]


def test_child_does_not_write_into_the_file_of_its_parent(tmp_path: Path) -> None:
    """It shares the parent's memory until it forgets it."""
    with Journaled(tmp_path, conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        core.wait_counted()
        figures = core.queue.account.of("held")
        shared = figures.counts
        core.journal.stop()[0].join(BOUND)

        core.journal.forget()  # as in a child
        figures.counts[RUNNING] += 5

        assert list(shared) == [1, 1]
        assert figures.counts == [1, 6]
        figures.counts[RUNNING] -= 5


# Those who tell.


def crash(folder: str, number: int) -> None:
    row_of = own_file(Path(folder)).rows_for("default")
    row_of("crashed")[UNFINISHED] += number
    os.kill(os.getpid(), signal.SIGKILL)


def script_crashes() -> Any:
    """Have processes crash one after the other while others look, and tell what these have told."""
    folder = os.environ["BGTASKS_TEST_FOLDER"]
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    told: Any = context.SimpleQueue()
    readers = [context.Process(target=read_until, args=(folder, ended, told)) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for number in range(1, CRASHES + 1):
        crashed = context.Process(target=crash, args=(folder, number))
        crashed.start()
        crashed.join(BOUND)
    ended.set()
    losses = [told.get() for _ in readers]
    for reader in readers:
        reader.join(BOUND)
    return losses


def read_until(folder: str, ended: Any, told: Any) -> None:
    reader = Reader(Path(folder))
    while not ended.is_set():
        reader.look()
        time.sleep(0.001)  # or those who crash hardly get a processor
    told.put([loss.total for loss in reader.look()])


def test_each_of_many_crashes_is_told_once(tmp_path: Path) -> None:
    """However many look at the same time, one of them tells, and nothing is missing in the sum."""
    told, _ = run_function(script_crashes, env={"BGTASKS_TEST_FOLDER": str(tmp_path)})

    assert sorted(number for each in told for number in each) == list(range(1, CRASHES + 1))
    assert list(tmp_path.iterdir()) == []


def test_file_that_somebody_has_just_told_of_is_left_alone(tmp_path: Path) -> None:
    """A reader that had it open before it was removed gets the lock after that, and says nothing."""
    path = leave(tmp_path, "lost")
    descriptor = os.open(path, os.O_RDWR)
    Reader(tmp_path).look()

    assert journal_file._lock(descriptor) is False
    os.close(descriptor)
    with journal_file.claimed(path) as gone:
        assert gone is None


def test_file_that_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    """Not every file system has locks. Nobody is taken for dead there."""
    descriptor = os.open(leave(tmp_path, "lost"), os.O_RDONLY)  # an exclusive lock needs more
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal_file._lock(descriptor)
    os.close(descriptor)


def test_loss_is_told_once_where_no_file_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    """It is written into the file that it was told."""

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    leave(tmp_path, "lost")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        first, second = Reader(tmp_path).look(), Reader(tmp_path).look()

    assert (len(first), second) == (1, [])
    assert len(logs.lines) == 1


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: b"not ours", "it is no journal"),
        (lambda file: b"", "it is no journal"),
        (lambda file: b"x" * len(file), "it is no journal"),
        (lambda file: file[:-1], "its header is damaged"),
        (lambda file: file[:20] + b"\xff" + file[21:], "its header is damaged"),
        (lambda file: file[:276] + b"\xff" + file[277:], "its numbers are damaged"),
        (lambda file: file[:256] + b"\xff" * 8 + file[264:], "its numbers are damaged"),
    ],
)
def test_damaged_file_is_one_warning(
    damage: Callable[[bytes], bytes], why: str, tmp_path: Path, logs: Logs
) -> None:
    """It is given another name, under which nobody looks at it again."""
    path = leave(tmp_path, "lost")
    path.write_bytes(damage(path.read_bytes()))

    losses = Reader(tmp_path).look() + Reader(tmp_path).look()

    assert losses == []
    [line] = logs.lines
    assert line == f"the journal {str(path)!r} says nothing: {why}. What its process has lost is not known"
    assert list(tmp_path.iterdir()) == [path.with_suffix(".damaged")]


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_file_is_one_warning(make: Callable[[Path], Any], tmp_path: Path, logs: Logs) -> None:
    """A folder or a link with such a name is left alone."""
    make(tmp_path / "bgtasks-1-odd.journal")
    os.mkfifo(tmp_path / "bgtasks-1-pipe.journal")
    (tmp_path / "bgtasks-2-later.journal").write_text("of another version")
    reader = Reader(tmp_path)
    reader.look()

    assert reader.look() == []
    assert len(logs.of("cannot be read")) == 1
    assert len(logs.lines) == 2


# Where it cannot be written.


@pytest.mark.parametrize("folder", ["missing", "/proc"])
def test_folder_that_cannot_be_written_is_one_warning(folder: str, tmp_path: Path) -> None:
    """The warning says what to do, and tasks run. Once it can be written, the journal is on."""
    with Journaled(tmp_path / folder) as core:
        core.spawn("runs", int)
        line = core.logs.wait("the journal is off")[0]
        core.spawn("runs", int)
        core.drain()
        wait_until(lambda: not core.journal.threads())
        stats = core.stats()

    assert "Tasks run. Have BGTASKS_JOURNAL" in line
    assert len(core.logs.of("the journal is off")) == 1
    assert stats.succeeded == 2


def script_disk_full() -> Any:
    """Run tasks while no file can have more than a few bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    with Journaled(Path(os.environ["BGTASKS_TEST_FOLDER"])) as core:
        core.spawn("runs", int)
        core.logs.wait("the journal is off")
        core.drain()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return core.logs.of("the journal is off")


def test_full_disk_is_a_warning(tmp_path: Path) -> None:
    """Room is taken at once, so that it is not found missing by a task, as a SIGBUS."""
    [line], _ = run_function(script_disk_full, env={"BGTASKS_TEST_FOLDER": str(tmp_path)})

    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_file_has_all_its_room_at_once(tmp_path: Path) -> None:
    """It is not sparse: a disk that is full later takes nothing from it."""
    file = own_file(tmp_path)
    status = file.path.stat()
    file.remove()

    assert status.st_blocks * 512 >= status.st_size


def test_file_that_was_removed_is_written_anew(tmp_path: Path) -> None:
    """A program that cleans up has taken it. The next file has the tasks that are there."""
    with Journaled(tmp_path, conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        core.wait_counted()
        [path] = tmp_path.iterdir()
        path.unlink()
        core.logs.wait("was removed")
        wait_until(lambda: list(tmp_path.glob("*.journal")) and core.queue in core.journal._queues)
        [new] = tmp_path.iterdir()
        loss = content(new)

    assert new != path
    assert loss is not None
    assert loss.total == 1


def test_process_ends_while_the_disk_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread holds the file; a shutdown does not wait for it."""
    monkeypatch.setattr(journal, "STOP_PATIENCE", 0.01)
    with Journaled(tmp_path) as core:
        core.spawn("runs", int)
        core.wait_counted()
        core.drain()
        wait_until(lambda: not core.journal.threads())
        with core.journal._using:
            core.journal.close()

            assert len(list(tmp_path.iterdir())) == 1


def test_journal_needs_locks(monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path) -> None:
    """Windows has no such locks: there it is off."""
    monkeypatch.setattr(journal_file, "HAS_LOCKS", False)
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path)}

    assert pools.journal.folder is None
    assert bgtasks.spawn("runs", int)


# What is said of it.


def test_numbers_of_lost_tasks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the most frequent ones, and the counter has a bound."""
    monkeypatch.setattr(journal, "COUNTED_MAX", 2)
    leave(tmp_path, "often", "often", "second", "third")
    reader = Reader(tmp_path)

    [loss] = reader.look()

    assert reader.journal.lost == {("default", "often"): 2, ("default", "second"): 1, ("default", OTHERS): 1}
    many = [LostTasks("default", f"name-{number:03}", 2, 0) for number in range(NAMES_MAX + 3)]
    assert journal_file.described(many).endswith("2 'name-199', 6 of other names")
    assert loss.total == 4


def test_loss_is_shown_wherever_one_looks(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overview, the command and the health module have it. It is no problem of the process that tells."""
    monkeypatch.setattr(pools.publisher, "losses", deque())
    monkeypatch.setattr(pools.journal, "lost", Counter())
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path)}
    leave(tmp_path, "lost", "lost")
    bgtasks.spawn("task", int)
    wait_until(lambda: pools.publisher.losses)
    [loss] = overview(pools)["losses"]
    text = command._text({**overview(pools), "processes": []})

    assert (loss["host"], loss["pid"], loss["tasks"], loss["names"]) == ("web-1", 41, 2, "2 'lost'")
    assert health.losses() == ["process 41 of web-1 was killed with 2 tasks: 2 'lost'"]
    assert health.problems() == []
    assert re.search(r"^web-1:41 +2 +2 'lost'", text, re.MULTILINE)


def test_tasks_can_be_told_apart_by_pool(tmp_path: Path) -> None:
    """Each row has its pool."""
    file = own_file(tmp_path, pools=2)
    for pool in ("default", "email"):
        file.rows_for(pool)("same")[UNFINISHED] += 1
    file.let_go()

    [loss] = Reader(tmp_path).look()

    assert Counter(each.pool for each in loss.tasks) == {"default": 1, "email": 1}
