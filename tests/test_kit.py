"""The testing kit in a project that uses it: under pytest, pytest-xdist and Django's runner."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.processes import environment, run_python

pytestmark = pytest.mark.kit

ROOT = Path(__file__).parent.parent
PYTEST = [
    "-m",
    "pytest",
    "-c",
    os.devnull,
    f"--rootdir={ROOT}",
    "--noconftest",
    "--import-mode=append",
    "-o",
    "python_files=tests.py pytest_tests.py",
    "-o",
    "asyncio_default_fixture_loop_scope=function",
    "-o",
    "django_find_project=false",
    "-p",
    "no:randomly",
    "-p",
    "no:hypothesispytest",  # would import hypothesis, with its asserts rewritten, at the end
    "-W",
    "error",
    str(ROOT / "tests" / "kit"),
]
RUNNERS = {
    "pytest": PYTEST,
    "xdist": [*PYTEST, "-n", "2"],
    "django": ["-W", "error", "-m", "django", "test", "tests.kit", "--noinput"],
    "django-parallel": ["-m", "django", "test", "tests.kit", "--noinput", "--parallel", "2"],
}


@pytest.mark.parametrize("database", ["sqlite-in-memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_project_tests_itself(runner: str, database: str, tmp_path: Path) -> None:
    """Every runner passes, drops its databases, and leaves no connection to them."""
    server = os.environ["BGTASKS_TEST_POSTGRESQL"]
    env = environment({"DJANGO_SETTINGS_MODULE": "tests.kit.settings", "PYTEST_ADDOPTS": ""})
    if database == "postgresql":
        env["KIT_POSTGRESQL"] = server
    if database == "sqlite":
        env["KIT_SQLITE"] = str(tmp_path / "kit.sqlite3")

    done = subprocess.run(
        [sys.executable, *RUNNERS[runner]],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout or "Ran 8 tests" in done.stderr
    with psycopg.connect(host=server, user="postgres", dbname="postgres") as connection:
        [(databases,)] = connection.execute("SELECT count(*) FROM pg_database WHERE datname LIKE 'kit%'")
    assert databases == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("database", ["sqlite-in-memory", "postgresql"])
def test_mistakes_of_a_test_are_explained(database: str) -> None:
    """A test that goes wrong says what is likely to be wrong with it, and only then."""
    env = environment({"DJANGO_SETTINGS_MODULE": "tests.kit.settings", "PYTEST_ADDOPTS": ""})
    if database == "postgresql":
        env["KIT_POSTGRESQL"] = os.environ["BGTASKS_TEST_POSTGRESQL"]
    argv = [*PYTEST[:-1], "-o", "python_files=mistakes.py", "--tb=short", *PYTEST[-1:]]

    done = subprocess.run(
        [sys.executable, *argv], env=env, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )

    titles = re.split(r"^_+ (?:ERROR at teardown of )?(test_\w+) _+$", done.stdout, flags=re.MULTILINE)[1:]
    said = dict(zip(titles[::2], titles[1::2], strict=True))
    assert "it waits for a commit, which a TestCase never makes" in said["test_captured_without_a_commit"]
    for name in ("test_drained_in_a_transaction", "test_task_in_a_transaction"):
        assert "this test runs in a transaction" in said[name]
    assert (
        "AssertionError: task 'fails' of pool 'default' failed: ZeroDivisionError()"
        in said["test_task_that_fails"]
    )
    assert "hint: " not in said["test_task_that_fails"]
    assert ("the tests' database is SQLite in memory" in said["test_second_writer"]) is (
        database != "postgresql"
    )
    assert "test_failure_that_is_allowed" not in said


def test_the_plugin_does_not_import_django() -> None:
    """Pytest loads it in every project, with Django or without."""
    done = run_python(
        "import sys, pytest_bgtasks; print([m for m in ('django', 'bgtasks') if m in sys.modules])"
    )

    assert done.stdout == "[]\n"
