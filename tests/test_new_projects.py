"""What a project that `startproject` has just made is told by "manage.py check", and what it logs."""

import subprocess
import sys
from pathlib import Path

import django
import pytest
from django.core.management import call_command

from tests.processes import environment

needs_tasks = pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks is new in 6.0")


class Project:
    """A project with the app in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        call_command("startproject", "mysite", str(home))
        self.add("INSTALLED_APPS.append('bgtasks')\nALLOWED_HOSTS = ['*']")

    def add(self, text: str, file: str = "settings.py") -> None:
        """Add `text` to a file of the project."""
        with (self.home / "mysite" / file).open("a") as stream:
            stream.write(f"\n{text}\n")

    def run(self, *args: str) -> str:
        """Run Python in the project, and return what it prints, on both streams."""
        env = environment({"PYTHONSAFEPATH": ""})
        env.pop("DJANGO_SETTINGS_MODULE")
        done = subprocess.run(
            [sys.executable, *args],
            cwd=self.home,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    def check(self, *args: str) -> str:
        """Return what "manage.py check" says."""
        return self.run("manage.py", "check", *args)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@needs_tasks
def test_mistake_in_tasks_is_reported(project: Project) -> None:
    """Also if nothing in the project has imported django.tasks, and once if something has."""
    project.add(
        "TASKS = {'default': {'BACKEND': 'bgtasks.backends.PoolBackend', 'OPTIONS': {'POOL': 'mail'}}}"
    )
    alone = project.check()
    project.add("import django.tasks", "urls.py")

    assert [output.count("bgtasks.E011") for output in (alone, project.check())] == [1, 1]


def test_asgi_application_is_found_before_a_deployment(project: Project) -> None:
    """The one that startproject makes is not named by any setting, and is what uvicorn is given."""
    told = project.check("--deploy")
    project.add("import bgtasks.asgi\napplication = bgtasks.asgi.lifespan(application)", "asgi.py")

    assert "(bgtasks.W002) The application in asgi.py ('mysite.asgi.application') is not wrapped" in told
    assert "bgtasks.W002" not in project.check("--deploy")
    assert "bgtasks.W002" not in project.check()


def test_sqlite_is_warned_of_until_the_line_of_the_hint_is_written(project: Project) -> None:
    """The database of a new project, with more than one slot."""
    told = project.check()
    project.add("DATABASES['default']['OPTIONS'] = {'transaction_mode': 'IMMEDIATE', 'timeout': 20}")

    assert "(bgtasks.W005) The database 'default' is SQLite" in told
    assert '"transaction_mode": "IMMEDIATE", "timeout": 20' in told
    assert project.check() == "System check identified no issues (0 silenced).\n"


# LOGGING whose disable_existing_loggers is the default, which is True.

LOGGING = """
LOGGING = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}
"""

FAIL = "bgtasks.spawn('fails', divmod, 1, 0); bgtasks.drain(30)"
FAILED = "task 'fails' of pool 'default' failed: ZeroDivisionError"


def test_log_of_a_site_that_imports_us_in_asgi_py(project: Project) -> None:
    """As the README says it: bgtasks.asgi is imported before Django configures the logging."""
    project.add(LOGGING)
    asgi = project.home / "mysite" / "asgi.py"
    asgi.write_text(f"import bgtasks.asgi\n{asgi.read_text()}")

    assert FAILED in project.run("-c", f"import mysite.asgi, bgtasks; {FAIL}")


def test_log_of_a_site_whose_settings_import_us(project: Project) -> None:
    """As docs/settings.md shows it, for a type checker."""
    project.add(f"from bgtasks.conf import PoolOptions\n{LOGGING}")

    assert FAILED in project.run("-c", f"import mysite.wsgi, bgtasks; {FAIL}")


def test_log_of_a_site_that_configures_its_logging_twice(project: Project) -> None:
    """As "manage.py runserver" does: once by itself, and once as it imports wsgi.py."""
    project.add(LOGGING)

    assert FAILED in project.run("manage.py", "shell", "-c", f"import mysite.wsgi, bgtasks; {FAIL}")


BY_EMAIL_BACKEND = """
globals().pop("MAILERS", None)  # which the startproject of Django 6.1 has written
EMAIL_BACKEND = "bgtasks.mail.EmailBackend"
BGTASKS_MAIL = {"BACKEND": "django.core.mail.backends.console.EmailBackend"}
"""
BY_MAILERS = """
MAILERS = {
    "default": {"BACKEND": "bgtasks.mail.EmailBackend", "OPTIONS": {"mailer": "out"}},
    "out": {"BACKEND": "django.core.mail.backends.console.EmailBackend"},
}
"""
MAIL = """
import bgtasks
from django.core import mail
from django.test import SimpleTestCase

class Tests(SimpleTestCase):
    def test_mail(self):
        mail.send_mail("hello", "text", "site@example.com", ["ada@example.com"])
        self.assertEqual([sent.subject for sent in mail.outbox], ["hello"])
        self.assertEqual(bgtasks.stats()["default"].spawned, 0)
"""
by_generation = pytest.mark.parametrize(
    "setting",
    [
        BY_EMAIL_BACKEND,
        pytest.param(
            BY_MAILERS, marks=pytest.mark.skipif(django.VERSION < (6, 1), reason="MAILERS is new in 6.1")
        ),
    ],
    ids=["email_backend", "mailers"],
)


@by_generation
def test_mails_of_a_projects_tests_are_in_the_outbox(setting: str, project: Project) -> None:
    """Django's test runner puts its own backend in the place of ours, whatever the settings say."""
    project.add(setting)
    (project.home / "mysite" / "tests.py").write_text(MAIL)

    assert project.run("-W", "ignore", "manage.py", "test", "mysite").rstrip().endswith("OK")


@by_generation
def test_mail_of_a_command_is_delivered_before_it_ends(setting: str, project: Project) -> None:
    """A command of Django that sends a mail knows of no pool: what is queued as it exits is delivered."""
    project.add(setting)
    output = project.run("-W", "ignore", "manage.py", "sendtestemail", "ada@example.com")

    assert "To: ada@example.com" in output
    assert "Traceback" not in output
