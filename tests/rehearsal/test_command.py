"""`manage.py bgtasks rehearse`, as a user has it: its arguments, its statuses, and what it leaves behind."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.core.management import CommandError, call_command

from bgtasks.rehearsal import ENVIRONMENT, command, runner
from bgtasks.rehearsal.accounts import Account, append, read_order, read_participants
from tests.gate import BOUND, wait_until
from tests.processes import Server, environment, free_port
from tests.snippets import ROOT

BIN = Path(sys.executable).parent
COULD_NOT = "This could not be rehearsed: "


def rehearse(*args: str) -> tuple[str, Any]:
    """Rehearse; return what is printed and the exit status."""
    return run("rehearse", *args)


def run(*args: str) -> tuple[str, Any]:
    """Run the command; return what it prints and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command("bgtasks", *args, stdout=out, stderr=err)
    except SystemExit as end:
        return out.getvalue() + err.getvalue(), end.code
    return out.getvalue() + err.getvalue(), 0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A project as `django-admin startproject` makes it, with bgtasks in INSTALLED_APPS; its environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    env = environment({"DJANGO_SETTINGS_MODULE": "mysite.settings", "TMPDIR": str(tmp_path / "tmp")})
    parts = filter(None, [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    env |= {
        "PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in parts),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{free_port()} --no-control-socket",
        "UVICORN_PORT": str(free_port()),
    }
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(folder)
    call_command("startproject", "mysite", ".")
    settings = folder / "mysite" / "settings.py"
    text = settings.read_text().replace("INSTALLED_APPS = [", "INSTALLED_APPS = [\n    'bgtasks',")
    text += "\nDATABASES['default']['OPTIONS'] = {'transaction_mode': 'IMMEDIATE'}  # as the check advises\n"
    settings.write_text(text)
    return env


def left_behind(folder: Path) -> list[psutil.Process]:
    """Return the processes of rehearsals whose files are in `folder`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            value = process.environ().get(ENVIRONMENT, "")
        except psutil.Error:
            continue
        if value.startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_command_that_cannot_be_started_is_status_2() -> None:
    """A typing mistake is told from a loss."""
    text, status = rehearse("--", "no-such-program", "--workers", "2")

    assert status == 2
    assert text.startswith("This could not be rehearsed: the command 'no-such-program' cannot be started")


def test_port_that_is_in_use_has_a_line_to_change() -> None:
    """The site itself may be running beside the rehearsal."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        text, status = rehearse("--", sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port)

    assert status == 2
    assert f"  To do: {runner.PORT}." in text.splitlines()


@pytest.mark.parametrize("args", [["--json", "rehearse"], ["rehearse", "--json"]])
def test_json_says_why_it_could_not_be_rehearsed(args: list[str]) -> None:
    """A script reads the same."""
    text, status = run(*args, "--no-color", "--", "sh", "-c", "echo no port; exit 3")

    assert status == 2
    assert json.loads(text) == {
        "status": 2,
        "verdict": COULD_NOT + "the command ended by itself (status 3) before the signal was sent",
        "change": "",
        "output": ["no port"],
    }


def test_process_without_bgtasks_cannot_be_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has forgotten INSTALLED_APPS, or starts another container, hears of it."""
    monkeypatch.setattr(runner, "START_LIMIT", 0.2)
    text, status = rehearse("--", "sleep", "60")

    assert status == 2
    assert "no process with bgtasks has started within 0.2 s" in text
    assert "INSTALLED_APPS" in text


def test_progress_is_shown_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what is waited for, and is gone afterwards. A file or a pipe gets none of it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(runner, "START_LIMIT", 0.2)
    out, err = io.StringIO(), Terminal()
    with pytest.raises(SystemExit):
        call_command("bgtasks", "rehearse", "--force-color", "--", "sleep", "60", stdout=out, stderr=err)

    wait = "waiting for the server to start; processes with bgtasks so far: 0"
    assert err.getvalue().split(command.CLEAR_LINE) == ["", wait, ""]
    assert out.getvalue().startswith("\x1b[")


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "nothing"])
def test_url_that_does_not_answer_cannot_be_rehearsed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a mistake in it taken for a slow start."""
    monkeypatch.setattr(runner, "START_LIMIT", 0.2)
    text, status = rehearse("--url", url.format(port=free_port()), "--", "sleep", "60")

    assert status == 2
    assert "did not answer within 0.2 s" in text


@pytest.mark.parametrize(
    "args", [["--signal", "NOTHING"], ["--seconds", "0"], ["--kill-after", "nan"], ["--requests", "3"], []]
)
def test_mistake_in_the_arguments_is_an_error(args: list[str]) -> None:
    """Nothing is started then."""
    with pytest.raises(CommandError):
        rehearse(*args, *(["--", "sleep", "60"] if args else []))


@pytest.mark.parametrize("text", ["TERM", "sigterm", "15"])
def test_signal_has_a_name_or_a_number(text: str) -> None:
    """As for kill."""
    assert command.signal_named(text) is signal.SIGTERM


def test_account_outlives_its_process_and_its_folder(tmp_path: Path) -> None:
    """Each event is there at once; a process that goes on after the rehearsal writes nowhere."""
    append(tmp_path, 7, "accepted")
    append(tmp_path, 7, "accepted")
    append(tmp_path, 7, "succeeded")
    append(tmp_path / "gone", 7, "accepted")
    account = Account.read(tmp_path, 7)

    assert (account.accepted, account.finished, account.lost) == (2, 1, 1)
    assert Account.read(tmp_path, 8).accepted == 0
    assert read_order(tmp_path, 7) is None
    assert read_participants(tmp_path) == {}


def test_new_project_is_rehearsed_without_a_change(project: dict[str, str], tmp_path: Path) -> None:
    """All it takes is bgtasks in INSTALLED_APPS. Nothing is left behind, and no row is written."""
    argv = ["manage.py", "bgtasks", "rehearse", "--json", "--seconds", "1", "--", "gunicorn", "mysite.wsgi"]
    done = subprocess.run(
        [sys.executable, *argv, "--workers", "2"],
        env=project,
        capture_output=True,
        timeout=2 * BOUND,
        check=False,
    )
    seen = json.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, b"")
    assert [process["server"] for process in seen["processes"]] == ["gunicorn"] * 2
    assert all(process["accepted"] == process["finished"] >= 16 for process in seen["processes"])
    assert (seen["advice"], seen["notes"]) == ([], [])
    assert list((tmp_path / "tmp").iterdir()) == []
    assert left_behind(tmp_path) == []


def test_probes_that_are_too_old_to_run_are_not_lost(project: dict[str, str]) -> None:
    """The pool sheds them, as its EXPIRES says, and their warnings say so."""
    with Path("mysite/settings.py").open("a") as settings:
        settings.write("BGTASKS = {'default': {'EXPIRES': 1, 'CONN_MAX': 1}}\n")
    argv = ["manage.py", "bgtasks", "rehearse", "--json", "--seconds", "4", "--", "gunicorn", "mysite.wsgi"]
    done = subprocess.run(
        [sys.executable, *argv], env=project, capture_output=True, timeout=2 * BOUND, check=False
    )
    [process] = json.loads(done.stdout)["processes"]

    assert (done.returncode, process["lost"]) == (0, 0)
    assert process["accepted"] == process["finished"] > 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_rehearsal_leaves_nothing_behind(
    signum: int, project: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C ends the server that was started, also if it comes twice, and removes the files."""
    tmp = tmp_path / "tmp"
    argv = [sys.executable, "manage.py", "bgtasks", "rehearse", "--", "gunicorn", "mysite.wsgi"]
    with Server(argv, env=project, cwd=Path.cwd()) as server:
        wait_until(lambda: any(tmp.glob("*/account-*")))
        assert left_behind(tmp)

        os.kill(server.pid, signum)
        os.kill(server.pid, signum)
        status = server.stop(0)

    assert status == command.INTERRUPTED
    assert server.output == ""
    assert left_behind(tmp) == []
    assert list(tmp.iterdir()) == []


def transcripts() -> list[tuple[str, str]]:
    """Return each rehearsal that the documentation shows: its command line, and what it prints."""
    page = (ROOT / "docs" / "deploying.md").read_text()
    blocks = re.findall(
        r"^```text\n\$ (python manage\.py bgtasks rehearse .*)\n((?:.*\n)*?)```", page, re.MULTILINE
    )
    assert len(blocks) == 2
    return blocks


def shape(text: str) -> str:
    """Return `text` without what differs from run to run: numbers, and the widths of columns."""
    return re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "N", text)).strip()


@pytest.mark.servers
@pytest.mark.parametrize(("line", "shown"), transcripts())
def test_transcript_is_what_the_command_prints(line: str, shown: str, project: dict[str, str]) -> None:
    """The rehearsals of the documentation are those of a new project."""
    done = subprocess.run(
        shlex.split(line), env=project, capture_output=True, text=True, timeout=2 * BOUND, check=False
    )

    assert shape(done.stdout) == shape(shown)
