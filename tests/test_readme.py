"""The README says what the code does: its snippets run, and its tables are those of the code."""

import re
from pathlib import Path
from typing import Any, cast

import pytest
from django.contrib.auth.models import User
from django.core.mail import EmailMessage
from django.http import HttpResponse
from django.test import RequestFactory, override_settings

import bgtasks
from bgtasks import conf, signals
from tests.gate import BOUND

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippet(containing: str) -> str:
    """Return the one Python block of the README that contains a text."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [found] = [block for block in blocks if containing in block]
    return found


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the README's table under a header row."""
    table = README.split(heading, 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.django_db(transaction=True)
def test_the_first_example_sends_its_mail(mailoutbox: list[EmailMessage]) -> None:
    """The ten lines on the first screen do what they say."""
    names = {"User": User, "HttpResponse": HttpResponse}
    exec(snippet("def sign_up"), names)

    response: Any = names["sign_up"](RequestFactory().post("/", {"name": "ada", "email": "ada@example.com"}))

    assert response.content == b"Welcome!"
    assert bgtasks.drain(BOUND)
    assert [mail.to for mail in mailoutbox] == [["ada@example.com"]]


@pytest.mark.django_db(transaction=True)
def test_every_way_of_spawning_runs_the_task() -> None:
    """Each line of the README's list of ways to spawn has its task run."""
    ran = []

    async def ping_partner(url: str) -> None:
        ran.append(url)

    with override_settings(BGTASKS={"email": {}}):
        exec(
            snippet("bgtasks.spawn_on_commit("),
            {
                "bgtasks": bgtasks,
                "user": User(pk=7),
                "send_welcome": ran.append,
                "ping_partner": ping_partner,
                "send_newsletter": lambda: ran.append("newsletter"),
            },
        )
        assert bgtasks.drain(BOUND)

    assert sorted(map(str, ran)) == ["7", "7", "https://...", "https://...", "newsletter"]


def test_the_asgi_snippet_is_an_application() -> None:
    """The lines for asgi.py can be copied as they are."""
    names: dict[str, object] = {}
    exec(snippet("get_asgi_application"), names)

    assert callable(names["application"])


def test_the_settings_snippet_shows_the_defaults() -> None:
    """The settings in the README are valid, and those of the default pool are the defaults."""
    names: dict[str, dict[str, object]] = {}
    exec(snippet("BGTASKS = {"), names)

    assert list(conf.problems(names["BGTASKS"])) == []
    with override_settings(BGTASKS=names["BGTASKS"]):
        assert conf.pool_config("default") == conf.PoolConfig()
    assert list(cast("dict[str, dict[str, object]]", names["BGTASKS"])["default"]) == [
        name.upper() for name in conf.PoolConfig._fields
    ]


def test_the_snapshot_snippet_shows_the_defaults() -> None:
    """The setting of the snapshots in the README is valid, and it is the default."""
    names: dict[str, dict[str, object]] = {}
    exec(snippet("BGTASKS_SNAPSHOT = {"), names)

    with override_settings(BGTASKS_SNAPSHOT=names["BGTASKS_SNAPSHOT"]):
        assert conf.snapshot_config() == conf.SnapshotConfig()
    assert list(names["BGTASKS_SNAPSHOT"]) == [name.upper() for name in conf.SnapshotConfig._fields]


def test_the_equation_of_the_readme_holds() -> None:
    """The assertion in the README about the figures is true."""
    exec(snippet("assert stats.spawned"), {"bgtasks": bgtasks})


def test_every_option_is_documented() -> None:
    """The table of options has each option, and no other."""
    assert first_column("| option | default | |") == [name.upper() for name in conf.PoolConfig._fields]


def test_every_check_is_documented() -> None:
    """The table of checks has each id that the code can report, and no other."""
    source = "".join(path.read_text() for path in Path(conf.__file__).parent.glob("*.py"))
    ids = set(re.findall(r'"(bgtasks\.[EW]\d{3})"', source))

    assert set(first_column("| id | |")) == ids


def test_every_signal_is_documented() -> None:
    """The table of signals has each signal, and no other."""
    names = [name for name in vars(signals) if name.startswith("task_")]

    assert sorted(first_column("| signal | arguments | sent |")) == sorted(names)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI runs what the README tells a newcomer to run, to the letter."""
    [command] = re.findall(r"```sh\n(python3 .*tox run-parallel)\n```", README)

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
