"""Real servers: every task that a process has accepted is done when it ends, or reported.

Each test starts the server itself, has a site (tests/servers) spawn tasks over HTTP, and sends the signal.
None of the tasks can end before the test opens a gate in the database. Then it counts: the rows that they
wrote, and those that the log says were cancelled.
"""

import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import connection

import bgtasks
from tests.gate import BOUND
from tests.processes import Server, free_port
from tests.testapp.models import Note

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.servers]

BIN = Path(sys.executable).parent
ENOUGH = 60  # seconds; a SHUTDOWN_TIMEOUT that no test reaches
N = 10  # tasks a request: more than two slots can run
TOLD_WITHIN = 5  # seconds after a SIGKILL


class Site(Server):
    """The site of tests/servers under a server's command line, and the tasks it has accepted.

    Its gate is a lock in the database. The test holds it from the start, until it opens the gate.
    """

    def __init__(
        self, command: str, directory: Path, *, shutdown_timeout: float = ENOUGH, measured: bool = True
    ) -> None:
        port = free_port()
        python_path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # empty under tox
        program, *args = shlex.split(command.format(port=port))
        env = {
            "DJANGO_SETTINGS_MODULE": "tests.servers.settings",
            "BGTASKS_TEST_SHUTDOWN_TIMEOUT": str(shutdown_timeout),
            "PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in python_path),
        }
        if not measured:
            # Coverage handles SIGTERM, which would otherwise end a process on the spot.
            env |= {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
        # Not in the checkout: most servers put their directory at the front of sys.path.
        super().__init__([str(BIN / program), *args], port=port, env=env, cwd=directory)
        self.accepted: Counter[int] = Counter()  # tasks by process
        self.run = secrets.token_hex(8)  # the text of its rows
        self.gate = 0

    def __enter__(self) -> "Site":
        self.close_gate()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self.open_gate()

    def get(self, path: str, **query: Any) -> Any:
        """Return the answer to one request on a connection of its own."""
        return httpx.get(self.url + path, params=query, timeout=BOUND).raise_for_status().json()

    def spawn(self, path: str = "/spawn/", *, n: int = N) -> None:
        """Have one request spawn `n` tasks."""
        answer = self.get(path, run=self.run, gate=self.gate, n=n)
        assert answer["accepted"] == n
        self.accepted[answer["pid"]] += n

    def spawn_everywhere(self, workers: int) -> None:
        """Have each of the `workers` accept tasks, from sync and async views.

        It waits until all of them answer, as gunicorn can lose a SIGTERM while a worker boots; and until they
        are at rest, with both slots at the gate, as granian's WSGI worker can lose one while its main thread
        is on its way into a lock's wait.
        """
        assert self.get("/")["package"] == bgtasks.__file__
        self.spawn("/spawn/")
        self.spawn("/aspawn/")
        self.poll(lambda: self._accept(workers), f"{workers} workers to accept tasks")
        self.poll(lambda: self.at_gate() == 2 * workers, "both slots of each to wait")

    def _accept(self, workers: int) -> bool:
        if len(self.accepted) < workers and self.get("/")["pid"] not in self.accepted:
            if secrets.randbelow(2):
                self.get("/")  # workers that take turns would never have the next request, too
            self.spawn(n=2)  # not necessarily there
        return len(self.accepted) >= workers

    def poll(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a `condition` that nobody tells of."""
        deadline = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < deadline, f"waited {BOUND} s for {what}, output:\n{self.output}"
            time.sleep(0.01)

    def close_gate(self) -> None:
        """Have the tasks of all requests to come wait."""
        self.gate = secrets.randbits(31)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [self.gate])

    def open_gate(self) -> None:
        """Let all tasks go on."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock_all()")

    def at_gate(self) -> int:
        """Return how many wait there."""
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s",
                [self.gate],
            )
            number: int = cursor.fetchone()[0]
        return number

    def rows(self) -> int:
        """Return how many of its tasks have written their row."""
        return Note.objects.filter(text=self.run).count()

    def reported(self) -> int:
        """Return how many tasks the log says were cancelled."""
        return sum(map(int, re.findall(r"was shut down with (\d+) tasks cancelled", self.output)))

    def warnings(self) -> list[str]:
        """Return what bgtasks has logged at WARNING and above."""
        return re.findall(r"\d+ bgtasks (?:WARNING|ERROR|CRITICAL): (.*)", self.output)

    def account(self) -> tuple[int, int]:
        """Return how many tasks are done and how many were reported, of those that were accepted."""
        return self.rows(), self.reported()

    def end(self, signum: int = signal.SIGTERM) -> None:
        """Send a signal to the command, and wait until the workers that have tasks begin to shut down."""
        self.send(signum)
        self.wait_line("shuts its pools down", len(self.accepted))

    def send(self, signum: int) -> None:
        """Send a signal to the command."""
        os.kill(self.pid, signum)

    def kill_all(self, signum: int) -> None:
        """Send a signal to every process, as systemd does by default."""
        for pid in {self.pid, *self.accepted}:
            os.kill(pid, signum)

    def wait(self) -> int:
        """Wait for the end of the command, and return its status."""
        return self.stop(0)  # which is no signal


@dataclass(frozen=True)
class Row:
    """A server of the matrix.

    Attributes:
        command: How it is started, on `{port}`.
        workers: Processes that answer requests.
        status: What its command ends with.
        signum: The signal it is sent.
        warnings: What bgtasks warns of there, in part.
    """

    command: str
    workers: int = 1
    status: int = 0
    signum: int = signal.SIGTERM
    warnings: tuple[str, ...] = ()


ASGI = "tests.servers.asgi:application"
UNWRAPPED = "tests.servers.asgi:unwrapped"
WSGI = "tests.servers.wsgi:application"
MULE = str(Path(__file__).parent / "servers" / "mule.py")
WSGI_EARLY = "tests.servers.wsgi_early:application"
WSGI_SIGTERM = "tests.servers.wsgi_sigterm:application"

DAPHNE = "daphne -p {port} "
GRANIAN = "granian --port {port} "
GUNICORN = "gunicorn -b 127.0.0.1:{port} --graceful-timeout 90 "  # longer than ENOUGH, or each one would warn
HYPERCORN = "hypercorn -b 127.0.0.1:{port} "
RUNSERVER = "python -m django runserver {port} "
UVICORN = "uvicorn --port {port} "
UVICORN_WORKER = "-k uvicorn_worker.UvicornWorker "
UWSGI = "uwsgi --http-socket 127.0.0.1:{port} --need-app --enable-threads --master "
# Told by --die-on-term instead, a worker that is just answering a request runs no exit hook.
UWSGI_GRACEFUL = UWSGI + "--hook-master-start 'unix_signal:15 gracefully_kill_them_all' "
WAITRESS = "waitress-serve --listen 127.0.0.1:{port} "

NO_LIFESPAN = "the server has not announced its lifespan"

ROWS = {
    "uvicorn": Row(UVICORN + ASGI, status=-signal.SIGTERM),
    "uvicorn-workers": Row(UVICORN + "--workers 2 --timeout-worker-healthcheck 60 " + ASGI, workers=2),
    "gunicorn-sync": Row(GUNICORN + "--workers 2 " + WSGI, workers=2),
    "gunicorn-gthread": Row(GUNICORN + "-k gthread --threads 4 " + WSGI),
    "gunicorn-worker-exit": Row(GUNICORN + "-c python:tests.servers.gunicorn_conf " + WSGI),
    "gunicorn-preload": Row(GUNICORN + "--preload --workers 2 " + WSGI, workers=2),
    "gunicorn-asgi": Row(GUNICORN + "-k asgi " + ASGI),
    "gunicorn-uvicorn-worker": Row(GUNICORN + UVICORN_WORKER + ASGI),
    "gunicorn-uvicorn-worker-preload": Row(GUNICORN + UVICORN_WORKER + "--preload " + ASGI),
    "hypercorn": Row(HYPERCORN + ASGI),
    "daphne": Row(DAPHNE + ASGI),
    "granian-asgi": Row(GRANIAN + "--interface asgi --workers 2 " + ASGI, workers=2),
    "granian-wsgi": Row(GRANIAN + "--interface wsgi --workers 2 " + WSGI, workers=2),
    "uwsgi": Row(UWSGI_GRACEFUL + "--processes 2 --module " + WSGI, workers=2),
    "uwsgi-threads": Row(UWSGI_GRACEFUL + "--threads 2 --module " + WSGI),
    "uwsgi-lazy-apps": Row(UWSGI_GRACEFUL + "--processes 2 --lazy-apps --module " + WSGI, workers=2),
    "waitress": Row(WAITRESS + WSGI_SIGTERM),
    "waitress-ctrl-c": Row(WAITRESS + WSGI, signum=signal.SIGINT),
    "runserver-ctrl-c": Row(RUNSERVER + "--noreload", signum=signal.SIGINT),
}


def on(*names: str, **rows: Row) -> pytest.MarkDecorator:
    """Run a test on these rows of the matrix, and on `rows` of its own."""
    chosen = {name: ROWS[name] for name in names} | {name.replace("_", "-"): rows[name] for name in rows}
    return pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in chosen.items()])


@on(*ROWS)
def test_accepted_tasks_are_done_when_the_server_has_ended(row: Any, tmp_path: Path) -> None:
    """Whatever waits or runs when the server is told to end is done before its processes are gone."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        assert site.rows() == 0

        site.open_gate()
        status = site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        assert status == row.status, site.output
        assert len(site.warnings()) == len(row.warnings), site.output
        assert all(part in line for part, line in zip(row.warnings, site.warnings(), strict=True))


@on("uvicorn", "gunicorn-sync", "gunicorn-asgi", "hypercorn", "daphne", "granian-wsgi", "uwsgi")
def test_second_signal_changes_nothing(row: Any, tmp_path: Path) -> None:
    """A server that is told once more to end, while it drains, still drains."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        site.send(row.signum)
        site.open_gate()
        status = site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        assert status == row.status, site.output


@on("waitress", "waitress-ctrl-c", "runserver-ctrl-c")
def test_second_signal_that_raises_ends_the_drain(row: Any, tmp_path: Path) -> None:
    """A second Ctrl-C, or a SystemExit from a signal handler, ends it at once: what is left is reported."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        site.send(row.signum)
        site.wait()

        assert site.account() == (0, site.accepted.total()), site.output


@on("uvicorn-workers", "gunicorn-sync", "gunicorn-uvicorn-worker", "granian-asgi")
def test_signal_to_every_process_changes_nothing(row: Any, tmp_path: Path) -> None:
    """Workers that get a signal of their own as well, as by systemd's default KillMode, still drain."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        site.kill_all(row.signum)
        site.open_gate()
        status = site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        assert status == row.status, site.output


@on("hypercorn", "uwsgi")
def test_signal_to_every_process_loses_tasks(row: Any, tmp_path: Path) -> None:
    """A worker of these servers ends at once by a SIGTERM of its own."""
    with Site(row.command, tmp_path, measured=False) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        site.kill_all(row.signum)
        site.wait()

        assert site.account() == (0, 0), site.output


@on("gunicorn-sync", "uvicorn", "granian-wsgi", "uwsgi")
def test_tasks_that_outlast_shutdown_timeout_are_reported(row: Any, tmp_path: Path) -> None:
    """What is not done in SHUTDOWN_TIMEOUT seconds is cancelled, and one warning says what and how many."""
    with Site(row.command, tmp_path, shutdown_timeout=1) as site:
        site.open_gate()
        site.spawn(n=4)
        site.poll(lambda: site.rows() == 4, "4 rows")
        site.accepted.clear()  # each worker must have some that it cannot end
        site.close_gate()
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        status = site.wait()

        assert site.account() == (4, site.accepted.total()), site.output
        warned = site.warnings()
        assert len(warned) == row.workers  # one of each
        for line in warned:
            n, half = re.fullmatch(
                r"pool 'default' was shut down with (\d+) tasks cancelled: (\d+) 'a?write', \2 'a?write'",
                line,
            ).groups()
            assert int(n) == 2 * int(half)
        assert status == row.status, site.output


@on(
    "uvicorn",
    "gunicorn-sync",
    "gunicorn-gthread",
    "gunicorn-asgi",
    "hypercorn",
    "granian-asgi",
    "granian-wsgi",
    "uwsgi",
    "waitress",
)
def test_request_in_flight_is_answered_and_its_tasks_are_done(row: Any, tmp_path: Path) -> None:
    """A signal that comes while a request is being answered loses neither."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        with ThreadPoolExecutor(1) as executor:
            request = executor.submit(site.spawn, "/busy/")
            site.poll(lambda: site.at_gate() == 2 * row.workers + 1, "the request")
            site.send(row.signum)
            site.open_gate()
            status = site.wait()
            request.result(BOUND)

        assert site.account() == (site.accepted.total(), 0), site.output
        assert status == row.status, site.output


@on(
    gunicorn_sync=Row(GUNICORN + "--max-requests 3 " + WSGI),
    gunicorn_asgi=Row(GUNICORN + "--max-requests 3 -k asgi " + ASGI),
    gunicorn_uvicorn_worker=Row(GUNICORN + "--max-requests 3 " + UVICORN_WORKER + ASGI),
)
def test_worker_that_is_replaced_ends_its_tasks(row: Any, tmp_path: Path) -> None:
    """A worker that has answered its number of requests drains before it makes room for the next one."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.wait_line("shuts its pools down")
        site.open_gate()
        site.close_gate()
        site.spawn()
        assert len(site.accepted) == 2
        site.end(row.signum)
        site.open_gate()
        status = site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        assert status == row.status, site.output


@on(
    gunicorn_gevent=Row(GUNICORN + "-k gevent " + WSGI),
    gunicorn_gevent_preload=Row(GUNICORN + "-c python:tests.servers.gevent_conf -k gevent --preload " + WSGI),
)
def test_gevent_runs_plain_functions_and_leaves_requests_alone(row: Any, tmp_path: Path) -> None:
    """Threads are greenlets there: beside an event loop in one of them, Django would refuse all ORM calls."""
    with Site(row.command, tmp_path) as site:
        for _ in range(2):
            answer = site.get("/spawn/", run=site.run, gate=site.gate, n=N)
            assert answer["accepted"] == N // 2
            site.accepted[answer["pid"]] += answer["accepted"]
        site.poll(lambda: site.at_gate() == 2, "both slots to wait")
        assert site.get("/rows/", run=site.run)["rows"] == 0
        site.end(row.signum)
        site.kill_all(row.signum)  # once more, to every process
        site.open_gate()
        status = site.wait()

        assert site.account() == (N, 0), site.output
        assert status == row.status, site.output
        first, rest = site.warnings()
        why = "gevent has replaced threads, so there is no event loop for asynchronous tasks"
        assert first == f"task 'awrite' dropped: {why}"
        assert rest == f"task 'awrite' dropped again ({N - 1} more): {why}"


@on(gunicorn_timeout=Row(GUNICORN + "--max-requests 3 --timeout 600 " + WSGI))
def test_drain_that_gunicorn_aborts_is_reported(row: Any, tmp_path: Path) -> None:
    """A replaced worker that drains for longer than --timeout is sent SIGABRT, which raises SystemExit.

    The test sends it: gunicorn follows with SIGKILL a second later, and a loaded machine may need more.
    """
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.wait_line("shuts its pools down")
        [worker] = site.accepted
        time.sleep(0.5)  # it waits by then: what a signal raises while something is logged, that swallows
        os.kill(worker, signal.SIGABRT)
        site.poll(lambda: site.reported() > 0, "the report")

        assert site.account() == (0, site.accepted.total()), site.output


# What ends without a word to anybody: what is lost, and that it is.


@on(gunicorn_uvicorn_worker=Row(GUNICORN + "--max-requests 3 --timeout 5 " + UVICORN_WORKER + ASGI))
def test_drain_that_outlasts_the_timeout_of_a_uvicorn_worker_loses_tasks(row: Any, tmp_path: Path) -> None:
    """A worker that drains does not tell gunicorn that it lives, and this one does not handle the SIGABRT."""
    with Site(row.command, tmp_path, measured=False) as site:
        site.spawn_everywhere(row.workers)
        site.wait_line("shuts its pools down")
        site.wait_line("was sent SIGABRT")

        assert site.account() == (0, 0), site.output
        site.wait_line("--max-requests, comes after 5 s")


@on(
    gunicorn_graceful_timeout=Row(GUNICORN + "--graceful-timeout 1 " + WSGI),
    runserver_reload_ctrl_c=Row(RUNSERVER, signum=signal.SIGINT),
)
def test_drain_that_the_server_cuts_short_loses_tasks(row: Any, tmp_path: Path) -> None:
    """Some servers kill a worker that drains."""
    with Site(row.command, tmp_path, measured=False) as site:
        site.spawn("/spawn/")
        if row.signum == signal.SIGINT:
            os.killpg(site.pid, signal.SIGINT)  # as a terminal does
        else:
            site.wait_line("gunicorn's --graceful-timeout comes after 1 s")
            site.send(row.signum)
        site.wait()

        assert site.account() == (0, 0), site.output


@on(hypercorn_workers=Row(HYPERCORN + "-w 2 " + ASGI))
def test_worker_that_outlasts_another_loses_tasks(row: Any, tmp_path: Path) -> None:
    """Hypercorn kills the others when the first worker has ended: while they drain, or even before that."""
    with Site(row.command, tmp_path, measured=False) as site:
        site.spawn("/spawn/")
        site.send(row.signum)
        site.wait()

        assert site.account() == (0, 0), site.output


@on(
    uvicorn_unwrapped=Row(
        UVICORN + UNWRAPPED,
        status=-signal.SIGTERM,
        warnings=(NO_LIFESPAN + ": under uvicorn they would be lost",),
    ),
    runserver_sigterm=Row(RUNSERVER + "--noreload", status=-signal.SIGTERM),
    waitress_sigterm=Row(WAITRESS + WSGI, status=-signal.SIGTERM),
)
def test_process_that_hears_of_no_shutdown_loses_tasks(row: Any, tmp_path: Path) -> None:
    """These run no hook on SIGTERM. On uvicorn, where that can be helped, a warning has said so once."""
    with Site(row.command, tmp_path, measured=False) as site:
        site.spawn("/spawn/")
        site.spawn("/aspawn/")
        site.send(row.signum)
        status = site.wait()

        assert site.account() == (0, 0), site.output
        assert "shuts its pools down" not in site.output
        assert status == row.status, site.output
        assert len(site.warnings()) == len(row.warnings), site.output
        assert all(part in line for part, line in zip(row.warnings, site.warnings(), strict=True))


@on(
    gunicorn_three=Row(GUNICORN + "--workers 3 " + WSGI, workers=3),
    gunicorn_three_preload=Row(GUNICORN + "--workers 3 --preload " + WSGI, workers=3),
)
def test_journal_tells_once_what_a_killed_worker_has_lost(
    row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its siblings have tasks, and another one takes its place: one of them tells, with the exact numbers.

    They look once a second, so it is told within 5 s of the kill, also on a slow machine. That is the time of
    the log record: how long this test waits to read it does not count.
    """
    folder = tmp_path / "journal"
    folder.mkdir()
    monkeypatch.setenv("BGTASKS_TEST_JOURNAL", str(folder))
    with Site(row.command, tmp_path) as site:
        site.spawn(n=200)
        [killed] = site.accepted
        site.spawn_everywhere(row.workers)
        lost = site.accepted.pop(killed)
        killed_at = time.time()
        os.kill(killed, signal.SIGKILL)
        site.wait_line("was killed with")
        site.end(row.signum)
        site.open_gate()
        site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        [line] = [line for line in site.warnings() if "was killed" in line]
        told = re.fullmatch(r"process (\d+) of \S+ was killed with (\d+) tasks: (.*)", line)
        assert told is not None
        assert (int(told[1]), int(told[2])) == (killed, lost)
        assert sorted(re.findall(r"(\d+) '(\w+)'", told[3])) == [
            (str(lost // 2), "awrite"),
            (str(lost // 2), "write"),
        ]
        assert sum(map(int, re.findall(r"\((\d+) running\)", told[3]))) == 2
        [told_at] = re.findall(r"([\d.]+) \d+ bgtasks WARNING: process \d+ of \S+ was killed", site.output)
        assert float(told_at) - killed_at < TOLD_WITHIN
        assert list(folder.iterdir()) == []


@on(uwsgi_die_on_term=Row(UWSGI + "--die-on-term --module " + WSGI))
def test_worker_that_is_killed_in_a_request_loses_tasks(row: Any, tmp_path: Path) -> None:
    """With --die-on-term uWSGI ends a worker in the middle of a request, and runs no hook of it then."""
    with Site(row.command, tmp_path, measured=False) as site, ThreadPoolExecutor(1) as executor:
        request = executor.submit(site.get, "/busy/", run=site.run, gate=site.gate, n=N)
        site.poll(lambda: site.at_gate() == 3, "the request")
        site.send(row.signum)
        site.wait()

        with pytest.raises(httpx.TransportError):
            request.result(BOUND)
        assert site.account() == (0, 0), site.output


@on(
    uwsgi_mule=Row(UWSGI_GRACEFUL + "--env MULE=1 --lazy-apps --mule=" + MULE + " --module " + WSGI),
    uwsgi_spooler=Row(
        UWSGI_GRACEFUL + "--lazy-apps --spooler . --spooler-import tests.servers.mule --module " + WSGI
    ),
)
def test_mules_and_spoolers_say_that_they_do_not_wait(row: Any, tmp_path: Path) -> None:
    """UWSGI kills them at its end. The first task says so once, and what to do; and that does help."""
    with Site(row.command, tmp_path) as site:
        site.wait_line("the message is worked off")

        assert "the task is done" in site.output
        [warning] = site.warnings()
        assert warning.startswith("a mule or spooler of uWSGI spawns tasks")


@on(uwsgi_early=Row(UWSGI_GRACEFUL + "--processes 2 --module " + WSGI_EARLY, workers=2))
def test_spawn_before_uwsgi_forks_is_dropped(row: Any, tmp_path: Path) -> None:
    """It forks past Python's hooks, so that a thread started before would be missing in the workers."""
    with Site(row.command, tmp_path) as site:
        site.spawn_everywhere(row.workers)
        site.end(row.signum)
        site.open_gate()
        site.wait()

        assert site.account() == (site.accepted.total(), 0), site.output
        assert site.warnings() == ["task 'early' dropped: pool 'default' cannot start a thread"]
