"""Real processes for the tests: scripts in an interpreter of their own, and servers.

Both get the settings of the tests, whose databases are those of the running session, and are measured by
coverage, as it starts itself in every Python process below a measured one.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

from tests.gate import BOUND


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a subprocess: this one's, the tests' settings, and `env` on top."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONSAFEPATH": "1",  # the installed package, not the one of the checkout
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
    }


def restore_signals() -> None:
    """Have the processes below this one end on Ctrl-C, which a shell makes its background jobs ignore."""
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)


def run_python(
    code_or_file: str | Path, *args: str, env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a script (a Path) or code (a str) in a fresh interpreter, where warnings are errors.

    Args:
        code_or_file: What to run.
        args: Its `sys.argv[1:]`.
        env: Additions to the environment; PYTHONWARNINGS is "error" unless given here.
        timeout: Seconds after which it is killed.

    Raises:
        AssertionError: If it had to be killed; the message holds its output.
    """
    source = [str(code_or_file)] if isinstance(code_or_file, Path) else ["-c", code_or_file]
    process = subprocess.Popen(
        [sys.executable, *source, *args],
        env=environment({"PYTHONWARNINGS": "error", **(env or {})}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()
        raise AssertionError(f"killed after {timeout} s: {process.args!r}\n{''.join(output)}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def program(name: str, *others: str) -> str:
    """Return the path of a program of the system, or skip the test that needs it.

    Args:
        name: Of its package in Debian, too.
        others: Names that it may have elsewhere.
    """
    path = next(filter(None, map(shutil.which, (name, *others))), None)
    if path is None:  # pragma: no cover  # CI has each of them
        missing = f"no {name} on the PATH; on Debian: apt-get install {name}"
        if "CI" in os.environ:
            raise AssertionError(missing)
        pytest.skip(missing)
    return path


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on, and that the system gives to no client."""
    while True:
        # `random` is seeded anew for each test. Browsers refuse some ports, the last of which is 10080.
        port = 11_000 + secrets.randbelow(19_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """A server in a process group of its own: ready on entry, ended on exit.

    It is ready once it listens on `port` (if one is given) and has printed `line` (if one is given).

    Example:
        port = free_port()
        argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "app:app"]
        with Server(argv, port=port) as server:
            ...
            assert server.stop() == 0

            assert "Shutting down" in server.output

    Args:
        argv: The command.
        port: The port of 127.0.0.1 to wait for.
        line: The part of a line of output to wait for.
        env: Additions to the environment.
        cwd: The directory it is started in.
        bound: Seconds for each wait.
    """

    def __init__(
        self,
        argv: list[str],
        *,
        port: int | None = None,
        line: str | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        bound: float = BOUND,
    ) -> None:
        self.port = port
        self._argv = argv
        self._line = line
        self._env = env
        self._cwd = cwd
        self._bound = bound
        self._lines: list[str] = []  # written by the reader, under _changed
        self._ended = False  # no more output will come; written by the reader, under _changed
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        """The address of the server, without a closing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the command, which is the group's as well."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams. Complete after `stop`."""
        with self._changed:
            return "".join(self._lines)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv,
            env=environment(self._env),
            cwd=self._cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output-of-{self._process.pid}")
        self._reader.start()
        try:
            if self._line is not None:
                self.wait_line(self._line)
            if self.port is not None:
                self._wait_port()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._kill()

    def wait_line(self, part: str, count: int = 1) -> None:
        """Wait until `count` lines of the output contain `part`.

        Raises:
            AssertionError: If they do not when the bound is over or the output has ended.
        """

        def seen() -> bool:
            return sum(part in line for line in self._lines) >= count

        with self._changed:
            self._changed.wait_for(lambda: seen() or self._ended, self._bound)
            found = seen()
        if not found:
            self._fail(f"did not print {part!r} {count} times")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal to the command (not to its group) and wait for its end.

        gunicorn loses a SIGTERM that comes while a worker is booting, and then waits for its graceful
        timeout: wait until every worker is ready (`post_worker_init`) before you stop it.

        Returns:
            Its exit status: negative for the signal it died of, as in `subprocess`.

        Raises:
            AssertionError: If it still runs when the bound is over; it is killed then.
        """
        self._process.send_signal(signum)
        try:
            status = self._process.wait(self._bound)
        except subprocess.TimeoutExpired:
            self._kill()
            self._fail(f"did not end on signal {signum}")
        self._reader.join(self._bound)  # its workers may hold the output open
        return status

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_port(self) -> None:
        deadline = time.monotonic() + self._bound
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)  # a server cannot say when it listens
            else:
                return
        self._fail(f"does not listen on port {self.port}")

    def _kill(self) -> None:
        """End what is left of the group, workers without their master too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(BOUND)
        self._reader.join(BOUND)  # it ends when nobody holds the output open any more

    def _fail(self, what: str) -> NoReturn:
        if self._process.poll() is not None:
            self._reader.join(self._bound)  # what it has printed may not have been read yet
        raise AssertionError(f"{self._argv} {what} (status {self._process.poll()}), output:\n{self.output}")
