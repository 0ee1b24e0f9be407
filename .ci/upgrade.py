"""Upgrade a project from the previous release to the wheel that is about to be released (part of `dist`).

What users have when they upgrade has to be good afterwards: their settings, their database, their call sites,
and the tasks that wait at a durable engine. Not before there is a tag of a release to upgrade from.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

SETTINGS = """
import django

SECRET_KEY = "of a project that is upgraded"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "bgtasks"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "project.sqlite3"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
BGTASKS_SNAPSHOT = {"INTERVAL": 1.0, "CACHE": "default"}
BGTASKS = {
    "default": {"CAPACITY": 100, "CONN_MAX": 2, "TASK_TIMEOUT": 10, "SHUTDOWN_TIMEOUT": 8, "MODE": "pool"},
}
if django.VERSION >= (6, 0):
    INSTALLED_APPS += ["django_tasks_db"]
    TASKS = {
        "default": {"BACKEND": "bgtasks.backends.PoolBackend", "OPTIONS": {"RESULTS": 10}},
        "engine": {"BACKEND": "django_tasks_db.DatabaseBackend"},
    }
    BGTASKS["outbox"] = {"CONN_MAX": 2, "HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}
"""

# Both releases run it: the first argument says which is installed.
USE = """
import sys
from importlib.metadata import version

import django

django.setup()

from django.contrib.auth.models import Group, Permission
from django.core.management import call_command

import bgtasks
from bgtasks import signals

call_command("migrate", verbosity=0)
call_command("check", fail_level="WARNING")
assert Permission.objects.filter(content_type__app_label="bgtasks").count() == 2

import shop

ended = []


def end(sender, name, outcome, **kwargs):
    ended.append((sender.name, name, outcome))


signals.task_finished.connect(end)
assert bgtasks.spawn("sync", shop.note, f"{sys.argv[1]}-sync")
assert bgtasks.spawn("async", shop.anote, f"{sys.argv[1]}-async")
bgtasks.spawn_on_commit("committed", shop.note, f"{sys.argv[1]}-committed")
if django.VERSION >= (6, 0):
    assert bgtasks.pools["outbox"].spawn("later", shop.note, f"{sys.argv[1]}-later")
assert bgtasks.drain(60)
stats = bgtasks.stats()["default"]
assert (stats.spawned, stats.succeeded) == (3, 3), stats
assert {("default", name, "succeeded") for name in ("sync", "async", "committed")} <= {*ended}, ended
if django.VERSION >= (6, 0):
    assert bgtasks.stats()["outbox"].handed_off == 1, bgtasks.stats()
if sys.argv[1] == "after":
    expected = {f"{when}-{how}" for when in ("before", "after") for how in ("sync", "async", "committed")}
    if django.VERSION >= (6, 0):
        # A worker of the new release does what the old one has handed off.
        call_command("db_worker", "--backend=engine", "--batch", "--interval=0", "--no-startup-delay")
        expected |= {"before-later", "after-later"}
    found = set(Group.objects.values_list("name", flat=True))
    assert found == expected, found
print("django-bgtasks", version("django-bgtasks"), "works", sys.argv[1], "the upgrade")
"""

SHOP = """
from django.contrib.auth.models import Group


def note(name):
    Group.objects.create(name=name)


async def anote(name):
    await Group.objects.acreate(name=name)
"""


def git(root: Path, *args: str) -> str:
    """Return what git prints, or "" where it fails: in an sdist there is no repository."""
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def previous_tag(root: Path) -> str | None:
    """Return the tag of the release before this commit; None if there is none, or tags were not fetched."""
    merged = git(root, "tag", "--list", "v[0-9]*", "--sort=-version:refname", "--merged", "HEAD")
    here = git(root, "tag", "--points-at", "HEAD").split()
    return next((tag for tag in merged.split() if tag not in here), None)


def run(*argv: str | Path, **kwargs: Any) -> None:
    """Run a command, which has to succeed."""
    print("$", *argv, flush=True)
    subprocess.run([str(arg) for arg in argv], check=True, **kwargs)


def build_tag(root: Path, tag: str, directory: Path) -> Path:
    """Build the wheel of a tag in `directory`, and return its path."""
    source = directory / "source"
    source.mkdir()
    archive = directory / "source.tar"
    run("git", "archive", "--output", archive, tag, cwd=root)
    run("tar", "-xf", archive, "-C", source, cwd=root)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", directory, source, cwd=root)
    [wheel] = directory.glob("*.whl")
    return wheel


def main(root: Path, wheel: Path) -> None:
    """Use the previous release in a project, upgrade the project to `wheel`, and use it again."""
    tag = previous_tag(root)
    if tag is None:
        print("SKIPPED: the upgrade from the previous release, since no tag v* of one is here")
        return
    with tempfile.TemporaryDirectory() as scratch:
        old = build_tag(root, tag, Path(scratch))
        environment = Path(scratch) / "environment"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        project = Path(scratch) / "project"
        project.mkdir()
        (project / "settings.py").write_text(SETTINGS)
        (project / "shop.py").write_text(SHOP)
        (project / "use.py").write_text(USE)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        use: list[str | Path] = [python, "-W", "default::DeprecationWarning:bgtasks", "use.py"]
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": "settings"}
        run(*pip, old, "django-tasks-db", cwd=project)
        run(*use, "before", cwd=project, env=env)
        # By force, since the version is raised only when it is released.
        run(*pip, "--upgrade", "--force-reinstall", wheel, cwd=project)
        run(*use, "after", cwd=project, env=env)
        run(python, "-m", "pip", "check", cwd=project)
    print("the upgrade from", tag, "works")
