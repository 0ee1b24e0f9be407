"""The page in the admin: who may see it, what it answers, and that it needs no table."""

from time import time
from typing import Any

import pytest
from django.apps import apps
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.urls import reverse
from pytest_django import Settings

import bgtasks
from bgtasks.models import BackgroundTasks
from bgtasks.monitoring.overview import overview
from bgtasks.pools import pools
from tests.gate import BOUND, Gate
from tests.monitoring.test_publisher import BrokenCache, locmem
from tests.pool import Logs

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.urls("tests.browser.urls")]


@pytest.fixture(autouse=True)
def own_cache(settings: Settings, request: pytest.FixtureRequest) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
            "LOCATION": request.node.name,
        }
    }


def login(client: Client, *codenames: str, **options: Any) -> User:
    """Log a member of staff in who has these permissions."""
    user = User.objects.create_user("ada", password="x", is_staff=True, **options)
    user.user_permissions.add(*Permission.objects.filter(codename__in=codenames))
    client.force_login(user)
    return user


PAGE, DATA, PAUSE, CANCEL = (
    f"admin:bgtasks_backgroundtasks_{view}" for view in ("changelist", "data", "pause", "cancel")
)


def test_model_has_permissions_and_no_table() -> None:
    """`migrate` creates the three permissions; no table is ever made."""
    codenames = Permission.objects.filter(content_type__app_label="bgtasks").values_list(
        "codename", flat=True
    )

    assert sorted(codenames) == ["cancel_waiting_tasks", "pause_pools", "view_background_tasks"]
    assert BackgroundTasks._meta.db_table not in connection.introspection.table_names()


def test_migrations_are_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to migrate, whatever changes."""
    call_command("makemigrations", "--check", "--dry-run")

    assert "No changes detected" in capsys.readouterr().out
    assert apps.get_app_config("bgtasks").models_module is not None


@pytest.mark.parametrize("option", [[], ["--all"]])
def test_dump_does_not_ask_for_the_table(option: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`dumpdata` asks every model for its rows. This one has none, and no table to look for them."""
    call_command("dumpdata", "bgtasks", *option)

    assert capsys.readouterr().out.strip() == "[]"


def test_page_is_listed_for_who_may_see_it(client: Client) -> None:
    """The index of the admin links to the page."""
    login(client, "view_background_tasks")

    assert reverse(PAGE) in client.get(reverse("admin:index")).text


def test_page_is_not_listed_for_others(client: Client) -> None:
    """Staff without the permission do not learn of it."""
    login(client)

    assert reverse(PAGE) not in client.get(reverse("admin:index")).text


@pytest.mark.parametrize("view", [PAGE, DATA])
def test_staff_without_the_permission_are_refused(view: Any, client: Client) -> None:
    """Being of the staff is not enough."""
    login(client, "pause_pools")

    assert client.get(reverse(view)).status_code == 403


@pytest.mark.parametrize("view", [PAGE, DATA, PAUSE, CANCEL])
def test_strangers_are_sent_to_the_login(view: Any, client: Client) -> None:
    """Nobody sees anything without having logged in."""
    response = client.get(reverse(view))

    assert response.status_code == 302
    assert reverse("admin:login") in response["Location"]


def test_page_has_no_inline_code_and_no_foreign_address(client: Client) -> None:
    """What a strict Content-Security-Policy forbids is not there."""
    login(client, "view_background_tasks")
    page = client.get(reverse(PAGE)).text

    assert 'data-may-pause="false"' in page
    assert 'data-may-cancel="false"' in page
    ours = page.split('id="content-main"')[1].split('id="footer"')[0]
    for forbidden in (" style=", " onclick=", "<style", "<script", "javascript:", "http://", "https://"):
        assert forbidden not in ours


def test_data_is_what_the_processes_do(client: Client) -> None:
    """The data of the page is the overview, and nobody keeps a copy of it."""
    login(client, "view_background_tasks")
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        response = client.get(reverse(DATA))

    [pool] = response.json()["pools"]
    assert [task["name"] for task in pool["running"]] == ["held"]
    assert "no-store" in response["Cache-Control"]


@pytest.mark.parametrize("codename", ["view_background_tasks", "pause_pools"])
def test_who_may_not_pause_is_refused(codename: Any, client: Client) -> None:
    """Pausing needs both permissions."""
    login(client, codename)

    assert client.post(reverse(PAUSE), {"pool": "default", "paused": "true"}).status_code == 403


def test_pause_and_resume_are_written_into_the_log(client: Client) -> None:
    """Who paused which pool, and when, can be read in the log of the admin."""
    user = login(client, "view_background_tasks", "pause_pools")
    assert 'data-may-pause="true"' in client.get(reverse(PAGE)).text

    assert client.post(reverse(PAUSE), {"pool": "default", "paused": "true"}).json()["paused"] is True
    assert [pool["paused"] for pool in overview(pools)["pools"]] == [True]
    assert client.post(reverse(PAUSE), {"pool": "default", "paused": "false"}).json()["paused"] is False
    assert bgtasks.drain(BOUND)

    entries = LogEntry.objects.order_by("pk").values_list("user", "object_id", "change_message")
    assert list(entries) == [(user.pk, "default", "Paused."), (user.pk, "default", "Resumed.")]
    assert reverse(PAGE) in client.get(reverse("admin:index")).text  # the index shows the entries


@pytest.mark.parametrize("view", [PAUSE, CANCEL])
def test_order_needs_a_post(view: Any, client: Client) -> None:
    """A link that somebody is made to follow pauses and cancels nothing."""
    login(client, is_superuser=True)

    assert client.get(reverse(view), {"pool": "default", "paused": "true"}).status_code == 405


def test_paused_pool_tells_who_has_paused_it_and_when(client: Client) -> None:
    """The data of the page has the name of the user, and the time."""
    login(client, is_superuser=True)
    before = time()
    client.post(reverse(PAUSE), {"pool": "default", "paused": "true"})
    [pool] = client.get(reverse(DATA)).json()["pools"]
    client.post(reverse(PAUSE), {"pool": "default", "paused": "false"})

    assert (pool["state"], pool["pause"]["by"]) == ("paused", "ada")
    assert before <= pool["pause"]["at"] <= time()


@pytest.mark.parametrize(
    "codenames", [["view_background_tasks", "pause_pools"], ["pause_pools", "cancel_waiting_tasks"]]
)
def test_who_may_not_cancel_is_refused(codenames: Any, client: Client) -> None:
    """Cancelling has a permission of its own, and needs that to look as well."""
    login(client, *codenames)

    assert client.post(reverse(CANCEL), {"pool": "default", "name": "waits"}).status_code == 403


def test_waiting_tasks_of_a_name_are_cancelled(client: Client, settings: Settings) -> None:
    """All that waits under the name is cancelled and counted so, and the log of the admin has it."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1}}
    user = login(client, "view_background_tasks", "cancel_waiting_tasks")
    assert 'data-may-cancel="true"' in client.get(reverse(PAGE)).text
    before = bgtasks.stats()["default"]
    with Gate() as gate, Logs() as logs:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        for _ in range(3):
            bgtasks.spawn("waits", int)
            bgtasks.spawn("stays", int)
        answer = client.post(reverse(CANCEL), {"pool": "default", "name": "waits"}).json()
    assert bgtasks.drain(BOUND)
    after = bgtasks.stats()["default"]

    assert answer == {"pool": "default", "name": "waits", "here": 3}
    assert (after.cancelled - before.cancelled, after.succeeded - before.succeeded) == (3, 4)
    assert logs.of("pool 'default': 3 waiting tasks called 'waits' were cancelled by 'ada'")
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_id, entry.change_message) == (
        user,
        "default",
        "Cancelled what waited as 'waits'.",
    )


@pytest.mark.parametrize("fields", [{}, {"pool": "mial", "name": "x"}, {"pool": "default", "name": "x"}])
def test_unknown_name_is_not_cancelled(fields: Any, client: Client) -> None:
    """Only what waits can be cancelled."""
    login(client, is_superuser=True)
    response = client.post(reverse(CANCEL), fields)

    assert response.status_code == 404
    assert response.json()["error"].startswith("no task ")


def test_orders_are_refused_while_the_cache_is_down(client: Client, settings: Settings) -> None:
    """The answer says so; a pool that is paused can be resumed all the same."""
    login(client, is_superuser=True)
    settings.CACHES = {"default": locmem("broken", BrokenCache)}
    with Gate() as gate:
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        pools["default"].build().slots.queue.pause()
        bgtasks.spawn("waits", int)
        answers = [
            client.post(reverse(PAUSE), {"pool": "default", "paused": "true"}),
            client.post(reverse(CANCEL), {"pool": "default", "name": "waits"}),
        ]
        resumed = client.post(reverse(PAUSE), {"pool": "default", "paused": "false"})

    assert [answer.status_code for answer in answers] == [409, 409]
    assert all("the cache does not answer" in answer.json()["error"] for answer in answers)
    assert resumed.json() == {"pool": "default", "paused": False, "told": False}
    assert bgtasks.drain(BOUND)


def test_unknown_pool_is_not_paused(client: Client) -> None:
    """A pool that no process has cannot be paused."""
    login(client, is_superuser=True)
    response = client.post(reverse(PAUSE), {"pool": "mial", "paused": "true"})

    assert (response.status_code, response.json()) == (404, {"error": "no pool named 'mial'"})


def test_nothing_is_paused_where_nothing_is_published(client: Client, settings: Settings) -> None:
    """Without snapshots there is no way to tell the processes: no button, and a refusal."""
    settings.BGTASKS_SNAPSHOT = None
    login(client, is_superuser=True)

    assert 'data-may-pause="false"' in client.get(reverse(PAGE)).text
    response = client.post(reverse(PAUSE), {"pool": "default", "paused": "true"})
    assert response.status_code == 409


def test_nothing_can_be_added_changed_or_deleted(client: Client) -> None:
    """Not even a superuser finds a form here."""
    login(client, is_superuser=True)
    [app] = [
        app for app in client.get(reverse("admin:index")).context["app_list"] if app["app_label"] == "bgtasks"
    ]

    assert app["models"][0]["perms"] == {"add": False, "change": False, "delete": False, "view": True}


def test_name_of_a_pool_is_the_text_of_its_row() -> None:
    """The log of the admin names the pool."""
    assert str(BackgroundTasks(name="email")) == "email"
