"""The end of a process: interpreters that exit and servers that are told to, with tasks still to run (G10).

Each `script_...` is the main program of an interpreter of its own. What a task did is known by the rows it
wrote and the lines it printed.
"""

import asyncio
import importlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.core.management import BaseCommand, call_command
from django.db import connection

import bgtasks
import bgtasks.waiting
from bgtasks import pools
from bgtasks.core.places import State
from tests.core.test_fork import BUSY, OWN_THREADS, wait_for
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.processes import Server, free_port, run_python
from tests.scripts import run_function, run_script
from tests.site.urls import LOCK
from tests.testapp.models import Note


def rows() -> Any:
    return sorted(Note.objects.values_list("text", flat=True))


def gate_until_exit() -> Any:
    """Return a gate that opens when the interpreter begins to exit, just before bgtasks hears of it."""
    gate = Gate()
    module: Any = threading
    shut_down = module._shutdown  # ours, called as the exit begins

    def open_and_shut_down() -> None:
        gate.open()
        shut_down()

    module._shutdown = open_and_shut_down
    return gate


def hold_slots() -> None:
    """Hold every slot of the default pool until the interpreter exits, so that all that follows waits."""
    gate = gate_until_exit()
    conn_max = bgtasks.stats()["default"].conn_max
    for _ in range(conn_max):
        bgtasks.spawn("held", gate)
    gate.wait_entered(conn_max)


# CPython 3.12.0-3.12.2 starts no thread once the exit has begun, for nobody (python/cpython#113964).
NO_THREADS_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 3)
starts_threads_at_exit = pytest.mark.skipif(NO_THREADS_AT_EXIT, reason="3.12.0-3.12.2: no threads at exit")

SITE = {"DJANGO_SETTINGS_MODULE": "tests.site.settings"}

# The interpreter exits.


def spawn_rows() -> None:
    for number in range(10):
        bgtasks.spawn("sync", Note.objects.create, text=f"sync {number}")
        bgtasks.spawn("async", Note.objects.acreate, text=f"async {number}")


ROWS = sorted(f"{kind} {number}" for kind in ("sync", "async") for number in range(10))


def script_return() -> None:
    hold_slots()
    spawn_rows()


def script_sys_exit() -> None:
    hold_slots()
    spawn_rows()
    sys.exit(3)


def script_exception() -> None:
    hold_slots()
    spawn_rows()
    raise ZeroDivisionError


def script_keyboard_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    hold_slots()
    spawn_rows()
    signal.raise_signal(signal.SIGINT)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("script", "status"),
    [
        (script_return, 0),
        (script_sys_exit, 3),
        (script_exception, 1),
        (script_keyboard_interrupt, -signal.SIGINT),
    ],
)
def test_exit_runs_what_was_accepted(script: Any, status: Any) -> None:
    """However the main program ends, tasks that wait or run are done at exit, and its status is its own."""
    run_function(script, status=status)

    assert rows() == ROWS


def say(word: Any) -> None:
    """Write a line in one piece, whatever other threads write."""
    os.write(1, f"{word}\n".encode())


def script_getaddrinfo() -> None:
    async def look_up() -> None:
        await asyncio.get_running_loop().getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        say("ran")

    hold_slots()
    bgtasks.spawn("task", look_up)


def script_to_thread() -> None:
    hold_slots()
    bgtasks.spawn("task", asyncio.to_thread(say, "ran"))


def script_hanging_thread() -> None:
    async def hang() -> None:
        await asyncio.to_thread(threading.Event().wait, 10 * BOUND)

    bgtasks.spawn("hangs", hang)
    wait_until(lambda: any(thread.name.startswith("bgtasks-helper") for thread in threading.enumerate()))
    bgtasks.shutdown(timeout=0)


def test_thread_of_a_task_that_hangs_does_not_keep_the_interpreter_from_exiting() -> None:
    """What ``asyncio.to_thread`` runs may outlive a shutdown; the process does not wait for it."""
    _, errors = run_function(script_hanging_thread)

    assert "1 tasks cancelled: 1 'hangs'" in errors


def script_sensitive() -> None:
    hold_slots()
    bgtasks.spawn("task", sync_to_async(say), "ran")


def script_insensitive() -> None:
    hold_slots()
    bgtasks.spawn("task", sync_to_async(say, thread_sensitive=False), "ran")


@pytest.mark.parametrize(
    "script",
    [
        script_sensitive,
        pytest.param(script_insensitive, marks=starts_threads_at_exit),
        pytest.param(script_to_thread, marks=starts_threads_at_exit),
        pytest.param(script_getaddrinfo, marks=starts_threads_at_exit),
    ],
)
def test_tasks_at_exit_may_use_threads(script: Any) -> None:
    """sync_to_async, to_thread and DNS look-ups work in a task that runs at exit (trap 5)."""
    done = run_script(script)

    assert done.stderr == ""
    assert done.stdout == "ran\n"


def in_process_pool() -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as executor:
        say(executor.submit(abs, -7).result(BOUND))


def script_process_pool() -> None:
    hold_slots()
    bgtasks.spawn("task", in_process_pool)


def script_process_pool_used_before() -> None:
    in_process_pool()
    script_process_pool()


def script_process_pool_imported_while_a_task_runs() -> None:
    hold_slots()
    bgtasks.spawn("task", in_process_pool)
    importlib.import_module("concurrent.futures.process")


def script_multiprocessing_pool() -> None:
    def task() -> None:
        with multiprocessing.Pool(1) as pool:
            say(pool.map(abs, [-7])[0])

    hold_slots()
    bgtasks.spawn("task", task)


def script_own_hook() -> None:
    """Use a library that ends its executor in a hook that was registered after ours."""
    executor = ThreadPoolExecutor(1)
    vars(threading)["_register_atexit"](executor.shutdown)
    hold_slots()
    bgtasks.spawn("task", lambda: say(executor.submit(abs, -7).result(BOUND)))


@starts_threads_at_exit
@pytest.mark.parametrize(
    ("script", "number"),
    [
        (script_process_pool, 1),
        (script_process_pool_used_before, 2),
        (script_process_pool_imported_while_a_task_runs, 1),
        (script_multiprocessing_pool, 1),
        (script_own_hook, 1),
    ],
)
def test_tasks_at_exit_may_use_processes(script: Any, number: int) -> None:
    """Whatever ends its executors at exit does so after the tasks, whenever it was imported."""
    done = run_script(script, env={**SITE, "PYTHONWARNINGS": "error,ignore::DeprecationWarning"})

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["7"] * number


def script_out_of_time() -> None:
    gate, async_gate = Gate(), AsyncGate()
    bgtasks.spawn("sync", gate)
    for _ in range(3):
        bgtasks.spawn("async", async_gate)
    gate.wait_entered()
    async_gate.wait_entered(3)
    for _ in range(4):
        bgtasks.spawn("waiting", gate)
    for _ in range(2):
        bgtasks.spawn("coroutine", async_gate())


def test_exit_out_of_time_reports_what_is_left() -> None:
    """After SHUTDOWN_TIMEOUT what has not ended is cancelled; one warning has names and numbers; status 0."""
    done = run_script(
        script_out_of_time,
        env={"DJANGO_SETTINGS_MODULE": "tests.site.settings", "SHUTDOWN_TIMEOUT": "1"},
    )

    assert done.returncode == 0
    assert done.stderr == (
        "pool 'default' was shut down with 10 tasks cancelled: "
        "4 'waiting', 3 'async', 2 'coroutine', 1 'sync'\n"
    )


def script_interrupted_at_exit() -> None:
    gate, never_opened = gate_until_exit(), Gate()
    interrupted = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def task() -> None:
        gate()
        wait_until(lambda: pools.default.slots.queue.state is not State.OPEN)
        # A signal that comes *just* before the main thread begins to wait is only handled with the next one.
        while not interrupted.wait(0.1):
            os.kill(os.getpid(), signal.SIGINT)
        never_opened()

    signal.signal(signal.SIGINT, handler)

    bgtasks.spawn("interrupting", task)
    gate.wait_entered()
    bgtasks.spawn("held", never_opened)
    never_opened.wait_entered()


def script_interrupted_again_and_again() -> None:
    """Have a handler raise at the second shutdown as well, while another thread is at a third one."""
    gate, never_opened = gate_until_exit(), Gate()

    def shut_down() -> None:
        gate()
        bgtasks.shutdown()

    threading.Thread(target=shut_down, daemon=True).start()
    waiting: Any = bgtasks.waiting
    shut_down_pools, calls = waiting.shut_down, iter(range(10))

    def interrupted(plan: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and next(calls) < 3:
            raise KeyboardInterrupt
        return shut_down_pools(plan)

    waiting.shut_down = interrupted
    bgtasks.spawn("held", never_opened)
    never_opened.wait_entered()
    gate.wait_entered()


def test_every_further_interrupt_at_exit_leaves_the_account() -> None:
    """However often signal handlers raise while the exit gives up what is left, it is reported."""
    env = {**SITE, "SHUTDOWN_TIMEOUT": str(3 * BOUND)}
    done = run_script(script_interrupted_again_and_again, env=env)

    assert done.stderr.count("was shut down with 1 tasks cancelled: 1 'held'") == 1
    assert "KeyboardInterrupt" in done.stderr


def test_second_interrupt_at_exit_ends_the_wait() -> None:
    """Who presses Ctrl-C while the exit waits for tasks waits no longer, and is told what was cancelled."""
    done = run_script(script_interrupted_at_exit, env={**SITE, "SHUTDOWN_TIMEOUT": str(3 * BOUND)})

    assert "was shut down with 2 tasks cancelled: " in done.stderr
    assert "KeyboardInterrupt" in done.stderr


def script_spawn_at_exit() -> None:
    gate = gate_until_exit()

    def task() -> None:
        gate()
        wait_until(lambda: pools.default.slots.queue.state is not State.OPEN)
        say(bgtasks.spawn("late", print))

    bgtasks.spawn("task", task)
    gate.wait_entered()


def test_spawn_by_a_task_at_exit_is_dropped() -> None:
    """Once the interpreter exits, even a task's own spawns are refused, or a chain of them would not end."""
    done = run_script(script_spawn_at_exit)

    assert done.returncode == 0
    assert done.stdout == "False\n"
    assert done.stderr == "task 'late' dropped: pool 'default' is shut down\n"


class Command(BaseCommand):
    """A management command that leaves work behind."""

    def handle(self, **options: Any) -> None:
        hold_slots()
        spawn_rows()
        self.stdout.write("handled")


def script_thread_that_goes_on() -> None:
    def go_on() -> None:
        wait_until(lambda: pools.default.build().slots.queue.state is not State.OPEN)
        say(bgtasks.spawn("late", print))

    threading.Thread(target=go_on).start()


def test_spawn_by_a_thread_after_the_main_thread_is_dropped() -> None:
    """The pools shut down as the main thread returns. Later spawns are dropped, and warned of."""
    done = run_script(script_thread_that_goes_on, env=SITE)

    assert (done.returncode, done.stdout) == (0, "False\n")
    assert done.stderr == "task 'late' dropped: pool 'default' is shut down\n"


def script_command() -> None:
    call_command(Command())


@pytest.mark.django_db(transaction=True)
def test_management_command_waits_for_its_tasks() -> None:
    """A command that spawned ends after its tasks."""
    done = run_script(script_command)

    assert done.stdout == "handled\n"
    assert rows() == ROWS


def script_after_a_fork() -> None:
    bgtasks.spawn("before", print, end="")
    bgtasks.drain(BOUND)
    pid = os.fork()
    hold_slots()
    for number in range(10):
        name = "parent" if pid else "child"
        bgtasks.spawn("row", Note.objects.create, text=f"{name} {number}")
        bgtasks.spawn("row", Note.objects.acreate, text=f"async {name} {number}")
    wait_for(pid)


@pytest.mark.django_db(transaction=True)
def test_exit_after_a_fork() -> None:
    """Parent and child both run at exit what they accepted after the fork, each for itself."""
    run_function(script_after_a_fork, env=BUSY)

    kinds = ["parent", "async parent", "child", "async child"]
    assert rows() == sorted(f"{kind} {number}" for kind in kinds for number in range(10))


# What is spawned in the last line, by whom, and what it prints.


async def say_async(word: Any) -> None:
    await asyncio.sleep(0)
    say(word)


async def say_by_its_slot(word: Any) -> None:
    await sync_to_async(say)(word)


def script_last_function() -> None:
    bgtasks.spawn("task", say, 1)


def script_last_coroutine() -> None:
    bgtasks.spawn("task", say_async, 1)


def script_last_coroutine_object() -> None:
    bgtasks.spawn("task", say_by_its_slot(1))


def script_last_function_that_returns_a_coroutine() -> None:
    bgtasks.spawn("task", lambda: say_async(1))


def script_last_of_several_threads() -> None:
    threads = [threading.Thread(target=bgtasks.spawn, args=("task", say, word)) for word in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def script_last_burst() -> None:
    for word in range(40):
        bgtasks.spawn("task", say if word % 2 else say_async, word)


def script_last_of_a_task() -> None:
    """Spawn a task that has spawned another one before the exit begins."""
    spawned = threading.Event()

    def task() -> None:
        bgtasks.spawn("task", say_by_its_slot, 1)
        spawned.set()
        say(0)

    bgtasks.spawn("task", task)
    assert spawned.wait(BOUND)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (script_last_function, [1]),
        (script_last_coroutine, [1]),
        (script_last_coroutine_object, [1]),
        (script_last_function_that_returns_a_coroutine, [1]),
        (script_last_of_several_threads, range(4)),
        (script_last_burst, range(40)),
        (script_last_of_a_task, range(2)),
    ],
)
def test_tasks_of_the_last_line_run(script: Any, words: Any) -> None:
    """An interpreter that spawns and ends at once runs what it has accepted, on threads started for it."""
    done = run_script(script)

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split(), key=int) == [str(word) for word in words]


def script_spawn_as_the_exit_begins() -> None:
    def spawn(word: int) -> None:
        if not bgtasks.spawn("task", say, word):
            say(f"{word} dropped")

    for word in range(4):
        threading.Thread(target=spawn, args=(word,)).start()


def test_tasks_of_threads_that_spawn_as_the_exit_begins_run_unless_they_are_dropped() -> None:
    """The threads are not joined, so some may come after the pools were closed. What was accepted runs."""
    done = run_script(script_spawn_as_the_exit_begins)

    lines = done.stdout.splitlines()
    dropped = sum("dropped" in line for line in lines)
    assert done.returncode == 0
    assert sorted(line.split()[0] for line in lines) == ["0", "1", "2", "3"]
    more = f"task 'task' dropped again ({dropped - 1} more): pool 'default' is shut down\n"
    first = "task 'task' dropped: pool 'default' is shut down\n"
    assert done.stderr == first * (dropped > 0) + more * (dropped > 1)


def script_spawn_last() -> None:
    bgtasks.spawn("sync", Note.objects.create, text="sync")
    bgtasks.spawn("async", Note.objects.acreate, text="async")


def script_fork_and_spawn_last() -> None:
    pid = os.fork()
    script_spawn_last()
    wait_for(pid)


@pytest.mark.django_db(transaction=True)
def test_exit_right_after_the_only_spawn() -> None:
    """Tasks that were spawned in the last line run: the threads exist before the exit begins (trap 8)."""
    _, errors = run_function(script_spawn_last)

    assert errors == ""
    assert rows() == ["async", "sync"]


@pytest.mark.django_db(transaction=True)
def test_exit_right_after_the_first_spawn_after_a_fork() -> None:
    """Tasks of the last line, in parent and child, run; where no thread can be started, they are reported."""
    _, errors = run_function(script_fork_and_spawn_last)

    assert len(rows()) + reported(errors) == 4
    assert NO_THREADS_AT_EXIT or rows() == ["async", "async", "sync", "sync"]


def test_process_that_only_loads_the_app_has_one_thread() -> None:
    """A management command pays for no slots, unless its Python could not start them as it ends."""
    done = run_python(
        "import threading, django; django.setup()\n"
        "print(*sorted(thread.name for thread in threading.enumerate()))\n"
    )

    ours = OWN_THREADS if NO_THREADS_AT_EXIT else ["bgtasks-drainer"]
    assert done.stdout.split() == ["MainThread", *ours]


def test_exit_of_an_idle_process_is_silent() -> None:
    """A process that loaded the app, and spawned nothing, ends as if it had not."""
    done = run_python("import django; django.setup()")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.django_db(transaction=True)
def test_exit_without_the_hooks_of_threading() -> None:
    """Without the private function of threading, and without forks to register for, atexit has to do."""
    done = run_python(
        "import concurrent.futures.thread, multiprocessing.util, os, random, threading\n"
        "import asgiref.sync, psycopg_pool, logging, weakref\n"
        "del os.register_at_fork\n"
        "shut_down = threading._shutdown\n"
        "import django; django.setup()\n"
        "threading._shutdown = shut_down\n"
        "from tests.core.test_shutdown import script_spawn_last\n"
        "script_spawn_last()\n"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert rows() == ["async", "sync"]


def test_exit_writes_of_drops_that_were_only_counted() -> None:
    """A second drop of one name is only counted for a while; at exit the count is written."""
    done = run_script(script_drops, env={"DJANGO_SETTINGS_MODULE": "tests.site.settings"})

    assert done.stderr == (
        "task 'late' dropped: pool 'default' is shut down\n"
        "task 'late' dropped again (4 more): pool 'default' is shut down\n"
    )


def script_drops() -> None:
    pools["default"].shutdown()
    for _ in range(5):
        bgtasks.spawn("late", print)


def test_mod_wsgi_shutdown() -> None:
    """Inside Apache, the event that mod_wsgi sends at its shutdown shuts the pools down."""
    done = run_python(
        "import sys, types\n"
        "subscribed = []\n"
        "sys.modules['mod_wsgi'] = types.SimpleNamespace(subscribe_shutdown=subscribed.append)\n"
        "import django; django.setup()\n"
        "import bgtasks\n"
        "bgtasks.spawn('task', print, 'ran')\n"
        "[hook] = subscribed\n"
        "hook('process_stopping', shutdown_reason='')\n"
        "print(bgtasks.spawn('late', print))\n"
    )

    assert done.stdout == "ran\nFalse\n"


def test_uwsgi_master_starts_no_thread() -> None:
    """The master of uWSGI loads the site, and forks past Python's hooks: its workers start the threads."""
    done = run_python(
        "import os, sys, threading, types\n"
        "uwsgi = types.SimpleNamespace(worker_id=lambda: 0, masterpid=os.getpid)\n"
        "sys.modules['uwsgi'] = uwsgi\n"
        "import django; django.setup()\n"
        "import bgtasks\n"
        "print([thread.name for thread in threading.enumerate()])\n"
        "uwsgi.worker_id = lambda: 1\n"
        "print(bgtasks.spawn('worker', print, 'ran'), flush=True)\n"
        "bgtasks.drain(30)\n"
    )

    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "['MainThread']"
    assert sorted(done.stdout.splitlines()[1:]) == ["True", "ran"]


# Servers.


@contextmanager
def held_lock() -> Iterator[Any]:
    """Hold the gate of the site's tasks; call what is given to open it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])

        def release() -> None:
            cursor.execute("SELECT pg_advisory_unlock_all()")

        try:
            yield release
        finally:
            release()


def reported(output: Any) -> int:
    """Return how many tasks the warnings of a shutdown say were cancelled."""
    return sum(map(int, re.findall(r"was shut down with (\d+) tasks cancelled", output)))


def request_tasks(server: Any, path: Any, requests: Any) -> int:
    """Make `requests` and return how many tasks they had accepted."""
    answers = [httpx.get(f"{server.url}/{path}/", timeout=BOUND) for _ in range(requests)]
    return sum(answer.json()["accepted"] for answer in answers)


def gunicorn(port: int, *options: Any) -> list[Any]:
    command = [sys.executable, "-m", "gunicorn", "-c", "python:tests.site.gunicorn_conf", "--workers", "2"]
    return [*command, "--bind", f"127.0.0.1:{port}", *options, "tests.site.wsgi"]


def uvicorn(port: int) -> list[Any]:
    return [sys.executable, "-m", "uvicorn", "--port", str(port), "tests.site.asgi:application"]


# How it is started, what it writes once its shutdown has begun, and how it ends.
SYNC = (gunicorn, ("Worker exiting", 2), 0)
SYNC_PRELOAD = (lambda port: gunicorn(port, "--preload"), ("Worker exiting", 2), 0)
GTHREAD = (lambda port: gunicorn(port, "--threads", "4"), ("Worker exiting", 2), 0)
GTHREAD_PRELOAD = (lambda port: gunicorn(port, "--threads", "4", "--preload"), ("Worker exiting", 2), 0)
UVICORN = (uvicorn, ("Waiting for application shutdown", 1), -signal.SIGTERM)  # it raises the signal again


@contextmanager
def serving(command: Any, **env: Any) -> Iterator[Any]:
    """Run a server with the tests' site, ready to be told to stop."""
    port = free_port()
    env = {"DJANGO_SETTINGS_MODULE": "tests.site.settings", **env}
    with Server(command(port), port=port, env=env) as server:
        if "gunicorn" in command(port):
            server.wait_line("worker is ready", 2)
        yield server


@pytest.mark.servers
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("server_kind", "path"),
    [
        pytest.param(SYNC, "spawn", id="gunicorn sync"),
        pytest.param(GTHREAD, "spawn", id="gunicorn gthread"),
        pytest.param(GTHREAD, "aspawn", id="gunicorn gthread, async view"),
        pytest.param(SYNC_PRELOAD, "aspawn", id="gunicorn sync --preload, async view"),
        pytest.param(GTHREAD_PRELOAD, "spawn", id="gunicorn gthread --preload"),
        pytest.param(UVICORN, "spawn", id="uvicorn"),
        pytest.param(UVICORN, "aspawn", id="uvicorn, async view"),
    ],
)
def test_server_told_to_stop_runs_what_was_accepted(server_kind: Any, path: Any) -> None:
    """After a SIGTERM every accepted task, queued or running, still writes its row; nothing is reported."""
    command, shutdown_has_begun, status = server_kind
    with serving(command) as server, held_lock() as release:
        accepted = request_tasks(server, path, 20)
        os.kill(server.pid, signal.SIGTERM)
        server.wait_line(*shutdown_has_begun)
        release()

        assert server.stop(0) == status

    assert accepted == 40
    assert len(rows()) == accepted
    assert reported(server.output) == 0


@pytest.mark.servers
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "server_kind",
    [
        pytest.param(SYNC, id="gunicorn sync"),
        pytest.param(GTHREAD_PRELOAD, id="gunicorn gthread --preload"),
        pytest.param(UVICORN, id="uvicorn"),
    ],
)
def test_server_told_to_stop_reports_what_it_could_not_run(server_kind: Any) -> None:
    """Tasks that are not through at SHUTDOWN_TIMEOUT are all in the warnings: accepted = rows + reported."""
    command, _, status = server_kind
    with serving(command, SHUTDOWN_TIMEOUT="1") as server:
        written = request_tasks(server, "spawn", 5)
        wait_until(lambda: Note.objects.count() == written)
        with held_lock():
            accepted = written + request_tasks(server, "spawn", 20)

            assert server.stop() == status

    assert (written, accepted) == (10, 50)
    assert len(rows()) == written
    assert reported(server.output) == accepted - written
