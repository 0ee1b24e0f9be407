"""docs/troubleshooting.md tells the truth: its mistakes are made, and what it quotes is what they log."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.test import RequestFactory

import bgtasks
from bgtasks.core.figures import DropReason
from tests.gate import BOUND
from tests.pool import Logs
from tests.processes import run_python
from tests.snippets import ROOT, Reader, blocks, snippet

PAGE = ROOT / "docs" / "troubleshooting.md"


@pytest.mark.django_db(transaction=True)
def test_the_mistakes_of_the_page_log_what_it_quotes(tmp_path: Path) -> None:
    """A reader finds the line of their log on the page, word for word."""
    bgtasks.pools.restart()
    quoted = []
    with Logs() as logs:
        with Reader(PAGE, {"__name__": "snippet"}, tmp_path) as reader:
            for block in blocks(PAGE):
                reader.do(block)
                if block.kind == "text" and not block.mark:
                    quoted.append(block.text.strip())
        assert bgtasks.drain(BOUND)

    assert len(quoted) == 3
    assert [text for text in quoted if not logs.of(text)] == []


def test_an_awaited_spawn_raises_what_the_page_quotes() -> None:
    """The message of this Python is on the page, under its version, and the task was accepted and runs."""
    quoted = [block.text.strip() for block in blocks(PAGE) if "awaited_spawn" in block.mark]
    ran: list[str] = []

    async def view() -> None:
        await bgtasks.spawn("awaited", ran.append, "ran")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]

    with pytest.raises(TypeError) as caught:
        asyncio.run(view())
    assert bgtasks.drain(BOUND)

    assert len(quoted) == 2
    assert str(caught.value) == quoted[sys.version_info >= (3, 14)]
    assert ran == ["ran"]


@pytest.mark.django_db(transaction=True)
def test_the_view_that_awaits_as_the_page_says_runs_both_tasks() -> None:
    """`spawn` without an await, and `aspawn_on_commit` with one."""
    ran: list[str] = []

    async def ping_partner(pk: int) -> None:
        ran.append(f"ping {pk}")

    names: dict[str, Any] = {
        "bgtasks": bgtasks,
        "User": User,
        "HttpResponse": HttpResponse,
        "ping_partner": ping_partner,
        "send_welcome": lambda pk: ran.append(f"welcome {pk}"),
    }
    exec(snippet("docs/troubleshooting.md", "async def sign_up"), names)

    response = async_to_sync(names["sign_up"])(RequestFactory().post("/", {"name": "ada"}))
    assert bgtasks.drain(BOUND)

    pk = User.objects.get(username="ada").pk
    assert response.content == b"Welcome!"
    assert sorted(ran) == [f"ping {pk}", f"welcome {pk}"]


def test_every_reason_of_a_drop_has_its_row() -> None:
    """The table of "spawn returned False" has each reason, and each figure of the first one exists."""
    figures = set(bgtasks.PoolStats.__dataclass_fields__)
    first, second = re.findall(r"^\| (?:what you see|reason) .*\n(?:\|.*\n)+", PAGE.read_text(), re.MULTILINE)

    assert {reason.value for reason in DropReason} == set(re.findall(r"^\| `(\w+)` \|", second, re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)`", first, re.MULTILINE)) <= figures


SQLITE = """
import sys, threading
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["bgtasks", "tests.testapp"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
if sys.argv[2:]:
    DATABASES = settings.DATABASES
    exec(sys.argv[2])
import django
django.setup()
from django.core.management import call_command
from django.db import transaction
import bgtasks
from tests.testapp.models import Note
call_command("migrate", run_syncdb=True, verbosity=0)
together = threading.Barrier(2)

def read_and_write():
    with transaction.atomic():
        Note.objects.count()
        if not sys.argv[2:]:
            together.wait(30)
        Note.objects.create(text="new")

bgtasks.spawn("writes", read_and_write)
bgtasks.spawn("writes", read_and_write)
bgtasks.drain(60)
stats = bgtasks.stats()["default"]
print(stats.succeeded, stats.failed)
"""


def test_sqlite_is_locked_without_the_option(tmp_path: Path) -> None:
    """Two tasks that read and then write: one fails at once, and with the page's line none does."""
    [quoted] = [block.text.strip() for block in blocks(PAGE) if "OperationalError" in block.text]
    [option] = [block.text for block in blocks(PAGE) if "transaction_mode" in block.text]

    locked = run_python(SQLITE, str(tmp_path / "locked"), env={"PYTHONWARNINGS": "ignore"})
    waiting = run_python(SQLITE, str(tmp_path / "waits"), option, env={"PYTHONWARNINGS": "ignore"})

    assert (locked.stdout, waiting.stdout) == ("1 1\n", "2 0\n"), locked.stderr + waiting.stderr
    assert quoted in locked.stderr
