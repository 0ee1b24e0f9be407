"""What the other tests stand on: the installed package, real databases, gates, processes."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import django
import httpx
import pytest
from django.db import connections
from django.test import Client
from django.utils import translation

import bgtasks
from tests.conftest import left_behind
from tests.gate import BOUND, AsyncGate, Gate, wait_until
from tests.processes import Server, environment, free_port, restore_signals, run_python
from tests.testapp.models import Note

ALIASES = ["default", "pooled", "sqlite"]
MODULE_LINES = 400  # of a module of the package at most
CORE_LINES = 2337  # of the core at most, in all; 2000 are aimed at
CHECKOUT = Path(__file__).parent.parent
KINDS = ["servers", "engines", "browser", "kit"]  # of the environments that run the tests of one marker

under_tox = pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="not under tox")


@under_tox
def test_tested_package_is_the_installed_wheel() -> None:
    """The package comes from site-packages, in this process and below it."""
    installed = Path(sysconfig.get_path("purelib"), "bgtasks", "__init__.py")
    below = run_python("import bgtasks, tests; print(bgtasks.__file__)")

    assert Path(bgtasks.__file__) == installed
    assert below.stdout.strip() == str(installed)
    assert (installed.parent / "py.typed").exists()


def test_import_warns_of_nothing() -> None:
    """``python -W error -c "import bgtasks"`` works on every version of Python and Django."""
    argv = [sys.executable, "-W", "error", "-c", "import bgtasks"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@under_tox
@pytest.mark.parametrize(
    "suffix",
    ["", *(pytest.param(f"-{kind}", marks=getattr(pytest.mark, kind)) for kind in KINDS)],
)
def test_environment_runs_what_its_name_says(suffix: str) -> None:
    """The tox environment has the Python and the Django it is named for, whatever else it installs."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    version = f"django{django.VERSION[0]}{django.VERSION[1]}"

    assert os.environ["TOX_ENV_NAME"] == f"{python}-{version}{suffix}"


@pytest.mark.skipif("t" not in sys.abiflags, reason="this Python has a GIL")
def test_free_threaded_python_runs_without_the_gil() -> None:
    """No extension module that was imported until now has turned it on."""
    assert sys.version_info < (3, 13) or not sys._is_gil_enabled()


def lines_of(folder: Path) -> dict[str, int]:
    """Return the number of lines of each module in `folder` and below."""
    modules = sorted(folder.rglob("*.py"))
    return {str(each.relative_to(folder)): len(each.read_text().splitlines()) for each in modules}


def test_modules_can_be_read_in_one_sitting() -> None:
    """No module of the package is long, and the core is short as a whole."""
    package = Path(bgtasks.__file__).parent

    too_long = {name: lines for name, lines in lines_of(package).items() if lines > MODULE_LINES}

    assert too_long == {}
    assert sum(lines_of(package / "core").values()) <= CORE_LINES


def test_workflows_pin_every_action_to_a_commit() -> None:
    """An action of others is named by the hash of a commit, which cannot be moved, and its version."""
    workflows = sorted((CHECKOUT / ".github" / "workflows").glob("*.yml"))
    used = [line for path in workflows for line in re.findall(r"uses: (.*)", path.read_text())]

    others = [line for line in used if not line.startswith("$/")]  # what is in this repository

    assert len(others) > len(workflows)
    assert [line for line in others if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line)] == []


def test_workflow_runs_every_python() -> None:
    """GitHub runs each Python that the package is declared for, and each that tox has an environment for."""
    workflow = (CHECKOUT / ".github" / "workflows" / "ci.yml").read_text()
    project = (CHECKOUT / "pyproject.toml").read_text()
    environments = (CHECKOUT / "tox.ini").read_text().split("[testenv]")[0]

    run = set(re.findall(r'"([^"]+)"', re.findall(r"python: \[(.*)\]", workflow)[0]))
    declared = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", project))
    tested = {f"3.{minor}" for minor in re.findall(r"^ +py3(\d+t?)-", environments, re.MULTILINE)}

    assert declared
    assert declared | tested <= run


def test_citation_names_the_version() -> None:
    """Whoever cites the package cites the version that is released."""
    project = (CHECKOUT / "pyproject.toml").read_text()
    citation = (CHECKOUT / "CITATION.cff").read_text()

    assert re.findall(r'^version = "(.*)"$', project, re.MULTILINE) == re.findall(
        r"^version: (.*)$", citation, re.MULTILINE
    )


@pytest.mark.django_db(transaction=True, databases=["default", "pooled"])
@pytest.mark.parametrize("alias", ["default", "pooled"])
def test_postgresql_is_real(alias: str) -> None:
    """Two aliases are a PostgreSQL server with room for every test's connections."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SHOW server_version_num")
        version = int(cursor.fetchone()[0])
        cursor.execute("SHOW max_connections")
        max_connections = int(cursor.fetchone()[0])

    assert version >= 160000
    assert max_connections >= 200


@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("alias", ALIASES)
def test_rows_are_seen_by_another_thread(alias: str) -> None:
    """What a test commits is there on a thread of its own connection, and the other way round."""
    Note.objects.using(alias).create(text="from the test")

    def work() -> Any:
        try:
            seen = [str(note) for note in Note.objects.using(alias).all()]
            Note.objects.using(alias).create(text="from the thread")
            return seen
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as executor:
        seen = executor.submit(work).result()

    assert seen == ["from the test"]
    assert Note.objects.using(alias).count() == 2


@pytest.mark.django_db(transaction=True, databases=ALIASES)
@pytest.mark.parametrize("alias", ALIASES)
def test_rows_are_seen_by_a_subprocess(alias: str) -> None:
    """A script that loads the settings is connected to the databases of the running session."""
    Note.objects.using(alias).create(text="from the test")

    done = run_python(
        "import sys, django; django.setup()\n"
        "from tests.testapp.models import Note\n"
        "print(Note.objects.using(sys.argv[1]).get())",
        alias,
    )

    assert done.stderr == ""
    assert done.stdout == "from the test\n"


def test_unknown_url_is_not_found(client: Client) -> None:
    """The tests' site has a URL configuration; a test that needs a view overrides it."""
    assert client.get("/nowhere/").status_code == 404


def test_french_is_translated() -> None:
    """Django's own French catalogue is there to tell languages apart."""
    with translation.override("fr"):
        assert translation.gettext("Password") == "Mot de passe"


def test_leaked_thread_is_found() -> None:
    """The check after every test sees a thread that the test has started and not ended."""
    before = set(threading.enumerate())
    with Gate() as gate:
        thread = threading.Thread(target=gate)
        thread.start()
        gate.wait_entered()
        held = left_behind(before, bound=0)
    ended = left_behind(before)

    assert held == [thread]
    assert ended == []


def test_gate_holds_its_tasks_until_opened() -> None:
    """Tasks enter, are counted, and leave only when the test lets them."""
    with ThreadPoolExecutor(2) as executor, Gate() as gate:
        futures = [executor.submit(gate, "any", argument="at all") for _ in range(2)]
        gate.wait_entered(2)

        assert not any(future.done() for future in futures)
        assert repr(gate) == "<Gate closed, 2 inside, 2 entered>"

        gate.open()
        gate.wait_left()

        assert repr(gate) == "<Gate open, 0 inside, 2 entered>"
        assert gate.peak == 2
        assert [future.result() for future in futures] == [None, None]


def test_async_gate_holds_its_tasks_without_blocking_their_loop() -> None:
    """Two tasks of one loop are inside at once, and another thread opens the gate for them."""

    async def main() -> None:
        await asyncio.gather(gate("any"), gate(argument="at all"))

    with ThreadPoolExecutor(1) as executor, AsyncGate() as gate:
        future = executor.submit(asyncio.run, main())
        gate.wait_entered(2)

        assert not future.done()
        assert repr(gate) == "<AsyncGate closed, 2 inside, 2 entered>"

        gate.open()
        future.result()
        gate.wait_left()

        assert gate.peak == 2


def test_open_gates_hold_nobody() -> None:
    """A task that comes after the opening goes straight through."""
    gate, async_gate = Gate(), AsyncGate()
    gate.open()
    async_gate.open()

    gate()
    asyncio.run(async_gate())

    assert gate.entered == async_gate.entered == 1


def test_cancelled_task_leaves_the_async_gate() -> None:
    """A gate may be opened when the loop of a task that was inside is gone."""

    async def main() -> None:
        task = asyncio.create_task(gate())
        await asyncio.sleep(0)  # two turns of the loop: it runs up to its wait
        await asyncio.sleep(0)
        assert gate.inside == 1

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with AsyncGate() as gate:
        asyncio.run(main())

        assert gate.inside == 0


def test_gates_say_what_they_waited_for() -> None:
    """A wait past its bound is an AssertionError with the state of the gate."""
    with pytest.raises(AssertionError, match="0 s for 3 inside: <Gate closed, 0 inside"):
        Gate(bound=0).wait_entered(3)
    with pytest.raises(AssertionError, match="0 s for being opened: <Gate closed, 1 inside"):
        Gate(bound=0)()
    with pytest.raises(AssertionError, match="0 s for being opened: <AsyncGate closed, 1 inside"):
        asyncio.run(AsyncGate(bound=0)())


def test_run_python_runs_a_file(tmp_path: Path) -> None:
    """A script file gets its arguments and the environment, and its exit status comes back."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['COLOUR']); sys.exit(int(sys.argv[1]))")

    done = run_python(script, "3", env={"COLOUR": "blue"})

    assert (done.returncode, done.stdout, done.stderr) == (3, "blue\n", "")


def test_run_python_makes_warnings_errors() -> None:
    """A warning ends the script."""
    done = run_python("import warnings; warnings.warn('careful')")

    assert done.returncode == 1
    assert "UserWarning: careful" in done.stderr


def test_run_python_kills_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that does not end is killed, and the failure shows what it had printed."""
    printed = tmp_path / "printed"

    class Process(subprocess.Popen[str]):
        """One whose time begins when it has printed."""

        def communicate(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
            wait_until(printed.exists)
            return super().communicate(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Process)
    code = f"import pathlib, signal; print('here')\npathlib.Path({str(printed)!r}).touch()\nsignal.pause()"
    with pytest.raises(AssertionError, match=r"(?s)killed after 1 s.*print\('here'\).*\nhere\n"):
        run_python(code, timeout=1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT])
def test_processes_do_not_inherit_that_a_signal_is_ignored(signum: signal.Signals) -> None:
    """Tests that were started as a background job end their servers with Ctrl-C all the same."""
    code = "import signal, sys; print(signal.getsignal(int(sys.argv[1])) is signal.SIG_IGN)"
    usual = signal.signal(signum, signal.SIG_IGN)
    try:
        ignored = run_python(code, str(int(signum)))
        restore_signals()
        restored = run_python(code, str(int(signum)))
    finally:
        signal.signal(signum, usual)

    assert (ignored.stdout, restored.stdout) == ("True\n", "False\n")


def test_no_process_of_this_session_inherits_that_ctrl_c_is_ignored() -> None:
    """Whatever this session was started by. `.ci/run` starts it with SIGINT ignored."""
    done = run_python("import signal; signal.raise_signal(signal.SIGINT)")

    assert "KeyboardInterrupt" in done.stderr


def wsgi(port: int, *options: Any, workers: int = 1) -> list[Any]:
    """A server with an application of the standard library."""
    argv = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", str(workers)]
    return [*argv, "--no-control-socket", *options, "wsgiref.simple_server:demo_app"]


def test_server_answers_and_ends_on_sigterm(tmp_path: Path) -> None:
    """A real server is there on entry and shut down in an orderly way by `stop`."""
    config = tmp_path / "gunicorn.conf.py"
    config.write_text("def post_worker_init(worker): worker.log.info('worker is ready')")
    port = free_port()
    with Server(wsgi(port, "--config", str(config), workers=2), port=port, line="Listening at") as server:
        server.wait_line("worker is ready", 2)
        response = httpx.get(server.url, timeout=BOUND)
        status = server.stop()

    assert response.text.startswith("Hello world!")
    assert status == 0
    assert f"({server.pid})" in server.output
    assert "Shutting down: Master" in server.output


def test_server_is_killed_on_exit_with_its_workers() -> None:
    """Leaving the block early leaves nobody who listens."""
    port = free_port()
    with Server(wsgi(port), port=port) as server:
        pass

    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_server_that_fails_to_start_shows_its_output() -> None:
    """A server that ends instead of listening, or never says the word, fails with what it printed."""
    code = "print('no such file'); raise SystemExit(2)"
    ways: list[dict[str, Any]] = [{"port": free_port()}, {"line": "ready"}]
    for wanted in ways:
        with pytest.raises(AssertionError, match="output:\nno such file\n"):
            Server([sys.executable, "-c", code], **wanted).__enter__()


def test_server_that_ignores_the_signal_is_killed() -> None:
    """`stop` says so when the process outlives its bound."""
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready')\n"
        "while True: signal.pause()"
    )
    with Server([sys.executable, "-c", code], line="ready") as server:
        server._bound = 0
        with pytest.raises(AssertionError, match=r"did not end on signal 15 \(status -9\)"):
            server.stop(signal.SIGTERM)


@under_tox
@pytest.mark.skipif("coverage" not in sys.modules, reason="not measured in this environment")
def test_subprocesses_and_forks_are_measured(tmp_path: Path) -> None:
    """Coverage sees a subprocess, what it forks, and a child that leaves by os._exit."""
    code = "import os, sys\nfor leave in (sys.exit, os._exit):\n if not os.fork(): leave(0)\n os.wait()\n"
    run_python(code, env={"COVERAGE_PROCESS_CONFIG": ""})
    before = measured()

    done = run_python("import tests.testapp\n" + code)

    assert done.returncode == 0, done.stderr
    assert len(measured() - before) == 3


def measured() -> set[Path]:
    name = Path(os.environ["COVERAGE_FILE"])
    return set(name.parent.glob(f"{name.name}.*"))
