"""The tutorial works: its blocks are done, in their order, in an empty directory."""

import doctest
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import httpx
import psycopg
import pytest

from tests.gate import BOUND
from tests.processes import Server, environment, free_port
from tests.snippets import TUTORIAL, Block, blocks

pytestmark = pytest.mark.kit

# The packages are those of this environment, which has the very wheel that is tested.
INSTALLED = ("python -m venv", ". .venv/bin/activate", "python -m pip install")
FILE = re.compile(r"# (?P<path>[\w/]+\.py)(?P<end>, at the end)?(, for (?P<database>\w+))?\n")


class Follower:
    """Somebody who follows the tutorial to the letter."""

    def __init__(self, home: Path, stack: ExitStack, server: str | None) -> None:
        self._home = home
        self._stack = stack
        self._server = server
        self._database = "SQLite" if server is None else "PostgreSQL"
        self._port = free_port()
        self._rehearsal_port = free_port()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._env = environment({"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
        self._env.pop("DJANGO_SETTINGS_MODULE")
        self._env.pop("PYTHONSAFEPATH")  # a reader's manage.py is found in the directory it is in
        if server is not None:
            self._env |= {"PGHOST": server, "PGUSER": "postgres"}

    def do(self, block: Block) -> None:
        """Write the file, or run the commands, of one block."""
        if block.kind == "python":
            if block.text.startswith("# "):
                self._write(block.text)
            else:
                exec(block.text, {"logged_in": self._logged_in})
        elif block.kind == "sh":
            for command in block.text.splitlines():
                self._run(command)
        else:
            assert block.kind == "console"
            for session in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, _, expected = session.partition("\n")
                # The task that a look is about, in the server, may not have ended yet.
                deadline = monotonic() + (BOUND if "Order.objects.get()" in command else 0)
                while True:
                    output = self._run(command)
                    if doctest.OutputChecker().check_output(expected, output, doctest.ELLIPSIS):
                        break
                    assert monotonic() < deadline, f"$ {command}\n{output}"

    def _write(self, text: str) -> None:
        head = FILE.match(text)
        assert head is not None, text
        if head["database"] not in {None, self._database}:
            return
        file = self._home / head["path"]
        before = file.read_text() if head["end"] else ""
        file.write_text(before + text)

    def _run(self, command: str) -> str:
        if command.startswith(INSTALLED):
            return ""
        if command.startswith("createdb "):
            self._create_database(command.split()[1])
            return ""
        command = command.replace("8000", str(self._port)).replace("8001", str(self._rehearsal_port))
        if command.startswith("uvicorn "):
            env = {**self._env, "DJANGO_SETTINGS_MODULE": "mysite.settings", "PYTHONSAFEPATH": ""}
            argv = [sys.executable, "-m", *shlex.split(command)]
            self._stack.enter_context(Server(argv, port=self._port, env=env, cwd=self._home))
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._home,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
        return done.stdout

    def _logged_in(self, username: str, password: str) -> httpx.Client:
        """Return a client that has logged in to the admin."""
        browser = httpx.Client(
            base_url=f"http://127.0.0.1:{self._port}", follow_redirects=True, timeout=BOUND
        )
        self._stack.enter_context(browser)
        browser.get("/admin/login/")
        form = {
            "username": username,
            "password": password,
            "csrfmiddlewaretoken": browser.cookies["csrftoken"],
        }
        browser.post("/admin/login/", data=form)
        return browser

    def _create_database(self, name: str) -> None:
        if self._server is not None:
            with psycopg.connect(
                host=self._server, user="postgres", dbname="postgres", autocommit=True
            ) as db:
                db.execute(f'CREATE DATABASE "{name}"'.encode())


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_tutorial_works(tmp_path: Path, database: str) -> None:
    """A scratch project made of the tutorial's own blocks does what the tutorial shows."""
    server = os.environ["BGTASKS_TEST_POSTGRESQL"] if database == "postgresql" else None
    with ExitStack() as stack:
        follower = Follower(tmp_path, stack, server)
        for block in blocks(TUTORIAL):
            follower.do(block)
