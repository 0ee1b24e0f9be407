"""Forks: a child has nothing of its parent's work, and a parent loses nothing to its child (design G9).

Each `script_...` runs in an interpreter of its own, since pytest's process must not be forked. A child
tells its parent what it saw as JSON through a pipe.
"""

import asyncio
import gc
import itertools
import json
import logging
import multiprocessing
import os
import posix
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.test import override_settings

import bgtasks
from bgtasks import pools, signals
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.scripts import run_function
from tests.scripts.call import threads_at_fork
from tests.testapp.models import Note

# CPython 3.12 warns of a fork in a process with threads; where a script has some on purpose, it is no error.
BUSY = {"PYTHONWARNINGS": "error,ignore::DeprecationWarning"}


def fork(child: Callable[..., Any], leave: Callable[..., Any] | None = None) -> Any:
    """Fork, call `child` in the child, and return what it returns there. No exit hook runs in the child."""
    reading, writing = os.pipe()
    pid = os.fork() or be_child(child, writing, leave)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    assert wait_for(pid) == 0
    return json.loads(answer)


def be_child(child: Callable[..., Any], writing: int, leave: Callable[..., Any] | None) -> Any:
    status = 1
    try:
        with os.fdopen(writing, "w") as pipe:
            json.dump(child(), pipe)
        status = 0
    finally:
        (leave or os._exit)(status)  # looked up in the child: coverage has wrapped it anew


def wait_for(pid: int) -> Any:
    """Return the exit status of a child; kill it if it does not end within the bound.

    A child itself, for which `pid` is 0, has none to wait for.
    """
    if pid == 0:
        return 0
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGABRT)  # pragma: no cover  # with PYTHONFAULTHANDLER=1 it says where it hangs
    os.waitpid(pid, 0)  # pragma: no cover
    raise AssertionError(f"child {pid} did not end")  # pragma: no cover


def figures() -> list[Any]:
    """Return what the default pool has counted in this process."""
    stats = bgtasks.stats()["default"]
    return [stats.spawned, stats.succeeded, stats.queued + stats.running]


def bgtasks_threads() -> list[str]:
    """Return the names of the threads that run tasks, or wait for some."""
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("bgtasks")]
    end_later = {"bgtasks-publisher", "bgtasks-loop-watch", "bgtasks-switch-watch"}
    return sorted(set(names) - end_later)


async def double(ran: list[Any]) -> None:
    await asyncio.sleep(0)
    ran.append(2)


def spawn_and_drain() -> list[Any]:
    """Spawn a sync and an async task in this process; return what ran, and what was counted."""
    ran: list[Any] = []
    accepted = [bgtasks.spawn("sync", ran.append, 1), bgtasks.spawn("async", double, ran)]
    drained = bgtasks.drain(BOUND)
    return [accepted, drained, sorted(ran), figures()]


# spawn_and_drain in a process that has spawned nothing before, and the threads that it has then.
FRESH = [[True, True], True, [1, 2], [2, 2, 0]]
OWN_THREADS = [*(f"bgtasks-default-{number}" for number in range(1, 9)), "bgtasks-drainer"]


@contextmanager
def queued_and_running() -> Iterator[Any]:
    """Hold a sync and an async task running and as many waiting as fill nothing."""
    with Gate() as gate, AsyncGate() as async_gate:
        held = settings.BGTASKS["default"]["CONN_MAX"] if hasattr(settings, "BGTASKS") else 8
        for number in range(held):
            bgtasks.spawn("held", gate if number % 2 else async_gate)
        gate.wait_entered(held // 2)
        async_gate.wait_entered(held // 2)
        yield gate, async_gate


def script_idle() -> Any:
    spawn_and_drain()
    before = []
    os.register_at_fork(before=lambda: before.append(bgtasks_threads()))  # runs before bgtasks' own hook
    child = fork(lambda: [figures(), bgtasks_threads(), spawn_and_drain(), bgtasks_threads()])
    after = bgtasks_threads()
    return {
        "before": before[0],
        "at": threads_at_fork[0],
        "child": child,
        "after": after,
        "parent": spawn_and_drain(),
    }


def test_idle_process_forks_without_a_thread() -> None:
    """An idle drainer steps aside: at the fork there is no thread of ours, and Python does not warn."""
    result, errors = run_function(script_idle)

    assert result["before"] == OWN_THREADS
    assert result["at"] == ["MainThread"]
    assert errors == ""


def test_child_of_an_idle_process_starts_anew() -> None:
    """The child's figures are zero, and it starts threads of its own when it spawns; so does the parent."""
    result, _ = run_function(script_idle)

    assert result["child"] == [[0, 0, 0], [], FRESH, OWN_THREADS]
    assert result["after"] == []
    assert result["parent"] == [[True, True], True, [1, 2], [4, 4, 0]]


def script_again_and_again() -> list[Any]:
    children = []
    process = psutil.Process()
    for _ in range(20):
        spawn_and_drain()
        # A bare thread that has started others may not have left the system yet. There is no way to join it.
        wait_until(lambda: process.num_threads() == threading.active_count())
        children.append(fork(spawn_and_drain))
    return [children == [FRESH] * 20, threads_at_fork, figures()]


def test_idle_process_forks_again_and_again_without_a_thread() -> None:
    """However soon after its last task it forks, and however often its threads are started again."""
    result, errors = run_function(script_again_and_again)

    assert result == [True, [["MainThread"]] * 20, [40, 40, 0]]
    assert errors == ""


def script_busy() -> Any:
    ran: list[Any] = []
    with queued_and_running():
        for number in range(50):
            bgtasks.spawn("queued", ran.append, number)
            bgtasks.spawn("queued", double, [])
        child = fork(lambda: [figures(), spawn_and_drain(), ran])
    drained = bgtasks.drain(BOUND)
    return {"child": child, "drained": drained, "ran": sorted(ran), "parent": figures()}


def test_child_of_a_busy_process_runs_nothing_of_its_parent() -> None:
    """What waits or runs in the parent at the fork is not in the child, which spawns and drains alone."""
    result, _ = run_function(script_busy, env=BUSY)

    assert result["child"] == [[0, 0, 0], FRESH, []]


def test_parent_runs_its_queue_exactly_once() -> None:
    """What waited in the parent at the fork runs there, once."""
    result, _ = run_function(script_busy, env=BUSY)

    assert result["drained"] is True
    assert result["ran"] == list(range(50))
    assert result["parent"] == [108, 108, 0]


def script_rows() -> None:
    with queued_and_running():
        for number in range(20):
            bgtasks.spawn("row", Note.objects.create, text=f"parent {number}")
            bgtasks.spawn("row", Note.objects.acreate, text=f"async parent {number}")

        def child() -> bool:
            for number in range(20):
                bgtasks.spawn("row", Note.objects.create, text=f"child {number}")
            return bgtasks.drain(BOUND)

        fork(child)
    bgtasks.drain(BOUND)


@pytest.mark.django_db(transaction=True)
def test_rows_of_parent_and_child_are_written_once() -> None:
    """The database sees each task of either process once."""
    run_function(script_rows, env=BUSY)

    kinds = ["parent", "async parent", "child"]
    expected = sorted(f"{kind} {number}" for kind in kinds for number in range(20))
    assert sorted(Note.objects.values_list("text", flat=True)) == expected


def script_coroutine_objects() -> list[Any]:
    with queued_and_running():
        bgtasks.spawn("queued", double([]))

        def child() -> Any:
            gc.collect()
            return figures()

        child_figures = fork(child)
    bgtasks.drain(BOUND)
    return [child_figures, figures()]


def test_coroutine_objects_in_the_queue_are_closed_in_the_child() -> None:
    """The child's copies of waiting coroutine objects give no warning that they were never awaited."""
    result, errors = run_function(script_coroutine_objects, env=BUSY)

    assert result == [[0, 0, 0], [9, 9, 0]]
    assert errors == ""


def script_inside_a_sync_task() -> list[Any]:
    answers = []
    bgtasks.spawn("forking", lambda: answers.append(fork(spawn_and_drain)))
    bgtasks.drain(BOUND)
    return [answers, figures(), spawn_and_drain()]


def script_inside_an_async_task() -> list[Any]:
    async def task() -> None:
        answers.append(fork(spawn_and_drain))

    answers: list[Any] = []
    bgtasks.spawn("forking", task)
    bgtasks.drain(BOUND)
    return [answers, figures(), spawn_and_drain()]


@pytest.mark.parametrize("script", [script_inside_a_sync_task, script_inside_an_async_task])
def test_fork_inside_a_task(script: Any) -> None:
    """A task may fork: the child is not a part of the task any more, and the parent goes on."""
    result, _ = run_function(script, env=BUSY)

    assert result == [[FRESH], [1, 1, 0], [[True, True], True, [1, 2], [3, 3, 0]]]


class Spawners:
    """Threads that keep the queue full, until the exit, which waits for their tasks."""

    def __init__(self, number: int) -> None:
        self.ran: list[Any] = []
        self.accepted = 0  # under _lock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._spawn) for _ in range(number)]

    def __enter__(self) -> "Spawners":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        bgtasks.drain(BOUND)

    def _spawn(self) -> None:
        accepted = 0
        while not self._stop.is_set():
            accepted += bgtasks.spawn("task", self.ran.append, 1)
            if bgtasks.spawn("task", double, self.ran):
                accepted += 1
            else:
                time.sleep(0.001)  # leave the processors to the others
        with self._lock:
            self.accepted += accepted


def script_while_another_thread_spawns() -> list[Any]:
    with Spawners(1) as spawners:
        # Not os._exit: coverage wraps it, and would wait in the child for a lock of the parent's spawner.
        children = [fork(spawn_and_drain, leave=posix._exit) for _ in range(30)]
    return [children == [FRESH] * 30, len(spawners.ran) - spawners.accepted]


def test_fork_while_another_thread_spawns() -> None:
    """However a fork and spawns interleave, no child hangs, and the parent loses nothing."""
    result, _ = run_function(script_while_another_thread_spawns, env=BUSY)

    assert result == [True, 0]


FORKERS, FORKS = 4, 75


def script_forks_under_load() -> list[Any]:
    def forker(children: list[Any]) -> None:
        children += [fork(spawn_and_drain, leave=posix._exit) for _ in range(FORKS)]

    children: list[list[Any]] = [[] for _ in range(FORKERS)]
    forkers = [threading.Thread(target=forker, args=(of,)) for of in children]
    with Spawners(2) as spawners:
        for thread in forkers:
            thread.start()
        for thread in forkers:
            thread.join()
    other = [child for of in children for child in of if child != FRESH]
    forks = sum(map(len, children))
    return [forks, other, len(spawners.ran) - spawners.accepted, spawn_and_drain()[:3]]


def test_many_forks_under_load() -> None:
    """Several threads fork and spawn at once: no child finds a lock held, and the parent goes on."""
    result, _ = run_function(script_forks_under_load, env=BUSY, timeout=150)  # coverage measures each child

    assert result == [FORKERS * FORKS, [], 0, FRESH[:3]]


SPAWNED_MAX = 500  # tasks that wait, of the 1,024 that may


def script_spawn_by_a_signal_handler() -> list[Any]:
    ran: list[Any] = []
    accepted: list[bool] = []

    def spawn(*args: Any) -> None:
        if len(accepted) - len(ran) < SPAWNED_MAX:  # or a slow machine fills the queue
            accepted.append(bgtasks.spawn("sync", ran.append, 1))
            accepted.append(bgtasks.spawn("async", double, ran))

    signal.signal(signal.SIGALRM, spawn)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)  # a child has no timers
    children = [fork(lambda: [len(accepted), spawn_and_drain()], leave=posix._exit) for _ in range(50)]
    signal.setitimer(signal.ITIMER_REAL, 0)
    drained = bgtasks.drain(BOUND)
    fresh = [child for _, child in children] == [FRESH] * 50
    return [fresh, drained, len(ran) - sum(accepted), all(accepted), children[-1][0] > 0]


def test_spawn_by_a_signal_handler_in_the_middle_of_a_fork() -> None:
    """A signal may come anywhere in a fork: what its handler spawns runs in the parent, once."""
    result, _ = run_function(script_spawn_by_a_signal_handler, env=BUSY)

    assert result == [True, True, 0, True, True]


def script_helper_threads() -> list[Any]:
    async def task() -> None:
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(4)))

    bgtasks.spawn("task", task)
    bgtasks.drain(BOUND)
    return [fork(spawn_and_drain), threads_at_fork]


def test_idle_process_forks_without_the_helper_threads_of_tasks() -> None:
    """The threads of asyncio.to_thread end as well before an idle process forks."""
    result, errors = run_function(script_helper_threads)

    assert result == [FRESH, [["MainThread"]]]
    assert errors == ""


def spawn_and_exit() -> Any:
    gc.collect()
    spawn_and_drain()
    gc.collect()
    raise SystemExit  # with exit hooks, destructors and all


def script_finally() -> list[Any]:
    async def task() -> None:
        try:
            await gate()
        finally:
            os.write(writing, b"x")

    reading, writing = os.pipe()
    with AsyncGate() as gate:
        for _ in range(4):
            bgtasks.spawn("async", task)
        gate.wait_entered(4)
        status = wait_for(os.fork() or spawn_and_exit())
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 100)
    bgtasks.drain(BOUND)
    return [status, os.read(reading, 100).decode(), figures()]


def test_coroutines_of_the_parent_are_not_ended_in_the_child() -> None:
    """No finally block of a task that runs in the parent runs in the child: not by gc, nor at its exit."""
    result, errors = run_function(script_finally, env=BUSY)

    assert result == [0, "xxxx", [4, 4, 0]]
    assert errors == ""


def script_finally_of_forgotten() -> list[Any]:
    async def task() -> None:
        entered.release()
        try:
            await asyncio.get_running_loop().create_future()  # nobody but the loop's own tasks know of it
        finally:
            os.write(writing, b"x")

    entered = threading.Semaphore(0)
    reading, writing = os.pipe()
    for _ in range(4):
        bgtasks.spawn("async", task)
        assert entered.acquire(timeout=BOUND)
    status = wait_for(os.fork() or spawn_and_exit())
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 100)
    bgtasks.shutdown(0)
    return [status, os.read(reading, 100).decode()]


def test_coroutines_that_a_child_has_forgotten_are_not_ended_in_it() -> None:
    """Nor does one whose last reference the child would drop by forgetting its parent's pools."""
    result, _ = run_function(script_finally_of_forgotten, env=BUSY)

    assert result == [0, "xxxx"]


def script_loop_of_the_parent() -> list[Any]:
    async def task() -> None:
        await first()
        await asyncio.sleep(0)
        await second()

    with AsyncGate() as first, AsyncGate() as second:
        bgtasks.spawn("async", task)
        first.wait_entered()
        fork(spawn_and_drain)
        first.open()
        second.wait_entered()
        second.open()
        drained = bgtasks.drain(BOUND)
    return [drained, spawn_and_drain()]


def test_loop_of_the_parent_works_after_a_child_has_ended() -> None:
    """The child shares the parent's epoll object, and leaves it as it is: the parent's loop is not deaf."""
    result, _ = run_function(script_loop_of_the_parent, env=BUSY)

    assert result == [True, [[True, True], True, [1, 2], [3, 3, 0]]]


def write_rows() -> None:
    for number in range(20):
        bgtasks.spawn("row", Note.objects.create, text=f"row {number}")


def script_multiprocessing() -> list[Any]:
    spawn_and_drain()
    process = multiprocessing.get_context("fork").Process(target=write_rows)
    process.start()
    process.join(BOUND)
    return [process.exitcode, spawn_and_drain()]


@pytest.mark.django_db(transaction=True)
def test_child_of_multiprocessing_shuts_its_pools_down() -> None:
    """A Process whose target spawns waits for its tasks before it ends, as any interpreter does.

    It ends by os._exit, where no atexit hook runs, but calls those of threading before.
    """
    result, errors = run_function(script_multiprocessing, env=BUSY)

    assert result == [0, [[True, True], True, [1, 2], [4, 4, 0]]]
    assert Note.objects.count() == 20
    assert errors == ""


def script_nested() -> Any:
    return fork(lambda: [spawn_and_drain(), fork(lambda: [figures(), spawn_and_drain()])])


def test_grandchild_starts_anew() -> None:
    """A child that forks is a parent like any other."""
    result, errors = run_function(script_nested)

    assert result == [FRESH, [[0, 0, 0], FRESH]]
    assert errors == ""


def script_life() -> list[Any]:
    pools.restart()
    lives = [pools.drainer.running is False]
    child = fork(lambda: [pools.drainer.running is False, spawn_and_drain()])
    return [lives, child, spawn_and_drain()]


def test_fork_of_a_process_whose_drainer_is_not_running() -> None:
    """A process that has no threads forks as well, and both can start them."""
    result, errors = run_function(script_life)

    assert result == [[True], [True, FRESH], FRESH]
    assert errors == ""


def script_closed() -> list[Any]:
    bgtasks.shutdown()
    return [bgtasks.spawn("late", print), fork(spawn_and_drain)]


def test_child_of_a_process_that_is_shut_down_is_open() -> None:
    """A child is a process of its own: its parent's shutdown is not its own."""
    result, _ = run_function(script_closed)

    assert result == [False, FRESH]


# Forks inside a task.


class ForkingTasks:
    """Tasks that fork: their children note the lines that they come to, and end as they are told."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.parent = os.getpid()

    def note(self, line: str) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{'parent' if os.getpid() == self.parent else 'child'} {line}\n")

    async def anote(self, line: str) -> None:
        self.note(line)

    def noted(self) -> int:
        return len(Path(self.path).read_text().splitlines()) if Path(self.path).exists() else 0

    def fork(self, end: str) -> None:
        if os.fork():
            return
        self.note(f"forked {end}")
        if end == "raises":
            raise ValueError("in the child")
        if end == "exits":
            raise SystemExit(7)

    async def afork(self, end: str) -> None:
        self.fork(end)

    async def fork_in_call(self, end: str) -> None:
        await sync_to_async(self.fork)(end)

    async def fork_in_thread(self, end: str) -> None:
        await asyncio.to_thread(self.fork, end)

    async def sleep(self, number: int) -> None:
        try:
            await asyncio.sleep(0.3)
        finally:
            self.note(f"slept {number}")


ENDS = {"returns": 0, "raises": 1, "exits": 7}  # of a child, with its status


def script_tasks_that_fork() -> list[Any]:
    kind, path = os.environ["FORK_KIND"], os.environ["FORK_NOTES"]
    tasks = ForkingTasks(path)
    drained: list[bool] = []
    statuses: list[int] = []
    for end in ENDS:
        for number in range(3):
            bgtasks.spawn("sleeps", tasks.sleep, number)
        bgtasks.spawn("forks", getattr(tasks, kind), end)
        for number in range(5):
            bgtasks.spawn("plain", tasks.note, f"plain {number}")
        drained.append(bgtasks.drain(BOUND))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
    return [drained, statuses, bgtasks.stats()["default"].succeeded]


@pytest.mark.parametrize("kind", ["fork", "afork", "fork_in_call", "fork_in_thread"])
def test_child_of_a_task_ends_as_its_own_code_ends(kind: str, tmp_path: Path) -> None:
    """A child that is forked inside a task runs nothing of its parent's; its status says how it ended."""
    path = tmp_path / "notes"

    env = {"FORK_KIND": kind, "FORK_NOTES": str(path)}
    result, _ = run_function(script_tasks_that_fork, env=BUSY | env)

    assert result == [[True] * 3, [*ENDS.values()], 3 * 9]
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("child")] == [f"child forked {end}" for end in ENDS]
    assert len(lines) == 3 * 9


ONE_SLOT = {"default": {"CONN_MAX": 1}}  # which goes on with the next task, and tells of all that was shed


class ForksOnce(logging.Handler):
    """What forks beside a task, once: a receiver, a handler of the log, or the end of an argument."""

    def __init__(self, tasks: ForkingTasks) -> None:
        super().__init__(logging.DEBUG)
        self._tasks = tasks
        self._left = 1

    def fork(self, name: str) -> None:
        if name == "forks" and self._left:
            self._left = 0
            self._tasks.fork("returns")

    def receive(self, name: str, **_: Any) -> None:
        self.fork(name)

    def emit(self, record: logging.LogRecord) -> None:
        self.fork(getattr(record, "task", ""))


class Argument:
    """An argument of a task that forks as it is freed."""

    def __init__(self, forks: ForksOnce) -> None:
        self._forks = forks

    def __del__(self) -> None:
        self._forks.fork("forks")


def script_fork_beside_a_task() -> list[Any]:
    override_settings(BGTASKS=ONE_SLOT).enable()
    where, path = os.environ["FORK_WHERE"], os.environ["FORK_NOTES"]
    tasks = ForkingTasks(path)
    forks = ForksOnce(tasks)
    if where in {"started", "finished"}:
        getattr(signals, f"task_{where}").connect(forks.receive)
    if where == "handler":
        logging.getLogger("bgtasks").setLevel(logging.DEBUG)
        logging.getLogger("bgtasks").addHandler(forks)

    spawned = threading.Event()  # until then, this thread holds the argument as well

    def plain(_: object) -> None:
        assert spawned.wait(BOUND)
        tasks.note("ran")

    async def coroutine(_: object) -> None:
        while not spawned.is_set():  # noqa: ASYNC110  # it is set on another thread
            await asyncio.sleep(0.001)
        tasks.note("ran")

    function = coroutine if os.environ["FORK_KIND"] == "coroutine" else plain
    bgtasks.spawn("forks", function, Argument(forks) if where == "argument" else None)
    spawned.set()
    note = tasks.anote if os.environ["FORK_KIND"] == "coroutine" else tasks.note
    for number in range(int(os.environ["FORK_OTHERS"])):
        bgtasks.spawn("other", note, f"other {number}")
    drained = bgtasks.drain(BOUND)
    wait_until(lambda: "child" in Path(path).read_text())  # the argument is freed after the task is counted
    return [drained, os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]), bgtasks.stats()["default"].succeeded]


@pytest.mark.parametrize(
    ("where", "kind", "others"),
    [
        *itertools.product(["started", "finished", "handler", "argument"], ["plain", "coroutine"], [2]),
        ("finished", "plain", 0),
    ],
)
def test_child_forked_beside_a_task_runs_none(where: str, kind: str, others: int, tmp_path: Path) -> None:
    """Neither the task that it belongs to, nor the next one; and it ends, whether or not there is one."""
    path = tmp_path / "notes"

    env = {"FORK_WHERE": where, "FORK_KIND": kind, "FORK_OTHERS": str(others), "FORK_NOTES": str(path)}
    result, _ = run_function(script_fork_beside_a_task, env=BUSY | env)

    drained, status, succeeded = result
    # On the loop, it may also end as a coroutine that waits.
    on_loop = kind == "coroutine" and where in {"handler", "argument"}
    assert (drained, succeeded) == (True, 1 + others)
    assert status in ({0, 1} if on_loop else {0})
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("child")] == ["child forked returns"]
    assert len(lines) == 2 + others


def script_fork_as_a_task_is_shed() -> list[Any]:
    override_settings(BGTASKS=ONE_SLOT).enable()
    tasks = ForkingTasks(os.environ["FORK_NOTES"])
    forks = ForksOnce(tasks)

    def receive(name: str, **_: Any) -> None:
        tasks.note(f"shed {name}")
        forks.fork(name)

    signals.task_shed.connect(receive)
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        for name in ("forks", "second"):
            bgtasks.using(expires=1e-9).spawn(name, int)
    drained = bgtasks.drain(BOUND)
    wait_until(lambda: tasks.noted() >= 3)  # a task is counted before its receivers hear of it
    return [drained, os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]), bgtasks.stats()["default"].shed]


def test_child_forked_as_a_task_is_shed_tells_of_no_other(tmp_path: Path) -> None:
    """A receiver has forked: its child hears of no task that the parent has shed as well."""
    path = tmp_path / "notes"

    result, _ = run_function(script_fork_as_a_task_is_shed, env=BUSY | {"FORK_NOTES": str(path)})

    assert result == [True, 0, 2]
    assert Counter(path.read_text().splitlines()) == {
        "parent shed forks": 1,
        "child forked returns": 1,
        "parent shed second": 1,
    }


def script_coroutine_that_forks_and_waits() -> list[Any]:
    async def fork_and_wait() -> None:
        os.fork()
        await asyncio.sleep(0)

    bgtasks.spawn("forks", fork_and_wait)
    drained = bgtasks.drain(BOUND)
    return [drained, os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1])]


def test_child_of_a_coroutine_cannot_wait() -> None:
    """It has no event loop: that of its parent is the parent's. So it ends, and says why."""
    result, output = run_function(script_coroutine_that_forks_and_waits, env=BUSY)

    assert result == [True, 1]
    assert "a coroutine that has forked cannot wait in the child" in output
