"""The README says what the code does and what was measured, and its links work where it is read."""

import json
import re
import tomllib
from typing import Any, cast

import pytest
from django.contrib.auth.models import User
from django.core.mail import EmailMessage
from django.test import Client, RequestFactory, override_settings
from django.urls import path

import bgtasks
from bgtasks import conf, testing
from tests.gate import BOUND
from tests.snippets import ROOT, snippet

README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = 180  # at most
BADGE = "https://img.shields.io/badge/"


@pytest.mark.django_db(transaction=True)
def test_the_first_example_sends_its_mail(mailoutbox: list[EmailMessage]) -> None:
    """The ten lines on the first screen do what they say."""
    names: dict[str, Any] = {}
    exec(snippet("README.md", "def sign_up"), names)

    response: Any = names["sign_up"](RequestFactory().post("/", {"name": "ada", "email": "ada@example.com"}))

    assert response.content == b"Welcome!"
    assert bgtasks.drain(BOUND)
    assert [mail.to for mail in mailoutbox] == [["ada@example.com"]]


def test_the_first_example_passes_the_test_that_is_shown(
    client: Client, db: None, django_capture_on_commit_callbacks: object
) -> None:
    """What "Testing" shows is a test of what the first screen shows."""
    names: dict[str, Any] = {"__name__": "views"}
    exec(snippet("README.md", "def sign_up"), names)
    exec(snippet("README.md", "bgtasks_captured"), names)

    with (
        override_settings(ROOT_URLCONF=(path("sign-up/", names["sign_up"]),)),
        testing.captured() as bgtasks_captured,
    ):
        names["test_sign_up_sends_a_welcome"](
            client, db, bgtasks_captured, django_capture_on_commit_callbacks
        )


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("page", ["README.md", "docs/spawning.md"])
def test_every_way_of_spawning_runs_the_task(page: str) -> None:
    """Each line of the list of ways to spawn has its task run."""
    ran: list[str] = []

    async def ping_partner(url: str) -> None:
        ran.append(url)

    lines = snippet(page, 'bgtasks.pools["email"]')
    with override_settings(BGTASKS={"email": {}}):
        exec(
            lines,
            {
                "bgtasks": bgtasks,
                "user": User(pk=7),
                "send_welcome": lambda pk: ran.append(f"welcome {pk}"),
                "ping_partner": ping_partner,
                "send_newsletter": lambda: ran.append("newsletter"),
            },
        )
        assert bgtasks.drain(BOUND)

    assert set(ran) == {"welcome 7", "https://...", "newsletter"}
    assert len(ran) == lines.count("bgtasks.")


def test_the_asgi_snippet_is_an_application() -> None:
    """The lines for asgi.py can be copied as they are."""
    names: dict[str, object] = {}
    exec(snippet("README.md", "get_asgi_application"), names)

    assert callable(names["application"])


@pytest.mark.parametrize("page", ["README.md", "docs/settings.md"])
def test_the_settings_snippet_shows_the_defaults(page: str) -> None:
    """The settings that are shown are valid, and those of the default pool are the defaults."""
    names: dict[str, dict[str, object]] = {}
    exec(snippet(page, '"default": {"CAPACITY"' if page == "README.md" else "BGTASKS = {"), names)

    assert list(conf.problems(names["BGTASKS"])) == []
    with override_settings(BGTASKS=names["BGTASKS"]):
        assert conf.pool_config("default") == conf.PoolConfig()


def test_the_page_of_the_settings_shows_all_of_them() -> None:
    """The first snippet has every option of a pool in its order, the second those of the snapshots."""
    names: dict[str, dict[str, object]] = {}
    exec(snippet("docs/settings.md", "BGTASKS = {"), names)
    exec(snippet("docs/settings.md", "BGTASKS_SNAPSHOT = {"), names)

    assert list(cast("dict[str, dict[str, object]]", names["BGTASKS"])["default"]) == [
        name.upper() for name in conf.PoolConfig._fields
    ]
    with override_settings(BGTASKS_SNAPSHOT=names["BGTASKS_SNAPSHOT"]):
        assert conf.snapshot_config() == conf.SnapshotConfig()
    assert list(names["BGTASKS_SNAPSHOT"]) == [name.upper() for name in conf.SnapshotConfig._fields]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI runs what the README tells a newcomer to run, to the letter."""
    [command] = re.findall(r"```sh\n(python3 .*tox run-parallel)\n```", README)

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_is_short() -> None:
    """What does not fit belongs in the documentation."""
    assert len(README.splitlines()) <= LINES


# The table.


def measured(script: str) -> dict[str, list[Any]]:
    """Return the row that a benchmark has for each way of starting tasks on uvicorn."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{script}.json").read_text())["rows"]
    [second] = [number for number, row in enumerate(rows) if row[0].startswith("**gunicorn")]
    return {row[0]: row for row in rows[1:second]}


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def test_the_table_is_what_was_measured() -> None:
    """Every figure of the table is that of the benchmarks in this repository."""
    table = README.split("| tasks started by |", 1)[1].split("\n\n", 1)[0]
    holding, computing = (
        re.findall(r"^\| (?!\*\*)(.+?) \|$", part, re.MULTILINE) for part in table.split("| **")[1:]
    )

    for script, rows in (("burst", holding), ("compute", computing)):
        found = measured(script)
        for row in rows:
            name, *figures = row.split(" | ")
            _, _, p50, p99, _, failed, lost, _ = found[name]
            assert figures == [milliseconds(p50), milliseconds(p99), failed, lost], name
    assert len(holding) == 4
    assert len(computing) == 2


def test_the_p99_without_a_burst_is_what_was_measured() -> None:
    """The range under the table is that of its rows."""
    [(low, high)] = re.findall(r"without a burst, the p99 is (\d+) to (\d+) ms", README)
    idle = [row[1] for script in ("burst", "compute") for row in measured(script).values()]

    assert (int(low), int(high)) == (round(min(idle)), round(max(idle)))


# Its links, and the description of the package.


def substituted(text: str, address: str) -> str:
    """Return `text` as the package's description has it, for a repository at an `address`."""
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    first, *others = hook["substitutions"]
    assert first["replacement"] == "", "the address is known: it belongs into the tests too"
    for each in ({**first, "replacement": address}, *others):
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def targets(text: str) -> list[str]:
    """Return what links and pictures lead to, except for the badges."""
    found = [*re.findall(r"\]\(([^)]*)\)", text), *re.findall(r'src="([^"]*)"', text)]
    return [target for target in found if not target.startswith(BADGE)]


def test_badges_say_what_the_package_says() -> None:
    """The oldest and the newest Python and Django of the classifiers, and the license."""
    project = PYPROJECT["project"]
    text = "\n".join(project["classifiers"])
    pythons = re.findall(r"Python :: (3\.\d+)$", text, re.MULTILINE)
    djangos = re.findall(r"Django :: (\d\.\d)$", text, re.MULTILINE)

    assert re.findall(r"!\[([^]]*)\]\(https://img\.shields\.io/badge/([^)]*)\)", README) == [
        (f"Python {pythons[0]} to {pythons[-1]}", f"Python-{pythons[0]}_to_{pythons[-1]}-blue"),
        (f"Django {djangos[0]} to {djangos[-1]}", f"Django-{djangos[0]}_to_{djangos[-1]}-blue"),
        (f"License: {project['license']}", f"license-{project['license']}-blue"),
    ]


def test_links_lead_to_files_of_the_repository() -> None:
    """Each relative link of the README names a file, and a heading that is in it."""
    for target in targets(README):
        file, _, heading = target.partition("#")
        text = (ROOT / file).read_bytes().decode(errors="replace")
        headings = [
            re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        ]
        assert not heading or heading in headings, target


def test_description_names_files_as_long_as_there_is_no_address() -> None:
    """Without the address of the repository, the package's description has no link that leads nowhere."""
    description = substituted(README, "")

    assert targets(description) == []
    assert "docs/settings.md" in description
    assert "<img" not in description
    assert description.count("![") == README.count(BADGE)


def test_description_links_to_the_repository_once_its_address_is_known() -> None:
    """One line of pyproject.toml turns every relative link and picture into an address."""
    address = "https://example.com/owner/django-bgtasks/blob/main/"
    description = substituted(README, address)

    assert len(targets(description)) == len(targets(README))
    assert all(
        target.startswith("https://example.com/owner/django-bgtasks/") for target in targets(description)
    )
    assert 'src="https://example.com/owner/django-bgtasks/raw/main/docs/images/light.png"' in description
    assert "](https://example.com/owner/django-bgtasks/raw/main/benchmarks/burst.svg)" in description
