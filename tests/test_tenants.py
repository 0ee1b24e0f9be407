"""django-tenants: what a task does to the tenant of its connection stays with that task.

Each `script_...` runs in an interpreter of its own, with the site of tests/tenants on the tests' server.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connection as django_connection

import bgtasks
from tests.gate import BOUND
from tests.scripts import run_function

pytest.importorskip("django_tenants")

connection: Any = django_connection  # which has what django-tenants adds

on_all = pytest.mark.parametrize("connections", ["closed", "kept", "pooled"])


@pytest.fixture(scope="module")
def site() -> None:
    """Make the database of the site, with the tenants ada and bob."""
    host = settings.DATABASES["default"]["HOST"]
    with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as server:
        server.execute("DROP DATABASE IF EXISTS bgtasks_tenants")
        server.execute("CREATE DATABASE bgtasks_tenants")
    run(script_make_site)


def run(script: Callable[[], Any], connections: str = "closed") -> Any:
    """Run a script on the site, and return what it returned; whatever it wrote is an error."""
    env = {"DJANGO_SETTINGS_MODULE": "tests.tenants.settings", "BGTASKS_TEST_CONNECTIONS": connections}
    result, errors = run_function(script, env=env)
    assert errors == ""
    return result


def script_make_site() -> None:
    from tests.tenants.models import Domain, Order, Shop

    with connection.schema_editor() as editor:
        editor.create_model(Shop)
        editor.create_model(Domain)
    for name in ("ada", "bob"):
        shop = Shop.objects.create(schema_name=name, title=f"The shop of {name}")
        connection.cursor().execute(f"CREATE SCHEMA {name}")
        connection.set_tenant(shop)
        with connection.schema_editor() as editor:
            editor.create_model(Order)
        connection.set_schema_to_public()


def search_path() -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SHOW search_path")
        return cursor.fetchone()[0]


def in_task(probe: Callable[[], Any]) -> Any:
    """Run `probe` in a task, and return what it returned."""
    answers: list[Any] = []
    assert bgtasks.spawn("probe", lambda: answers.append(probe()))
    assert bgtasks.drain(BOUND)
    [answer] = answers
    return answer


def in_async_task(probe: Callable[[], Any]) -> Any:
    """Run `probe` in an asynchronous task, where its ORM calls run, and return what it returned."""
    answers: list[Any] = []

    async def task() -> None:
        answers.append(await sync_to_async(probe)())

    assert bgtasks.spawn("probe", task)
    assert bgtasks.drain(BOUND)
    [answer] = answers
    return answer


def script_leave_a_tenant() -> Any:
    from tests.tenants.models import Shop

    ada = Shop.objects.get(schema_name="ada")

    def leave() -> Any:
        connection.set_tenant(ada)
        return search_path()

    return [[run(leave), run(search_path)] for run in (in_task, in_async_task)]


@on_all
def test_next_task_is_not_in_the_tenant_of_the_last(site: None, connections: str) -> None:
    """A task that sets a tenant, and leaves it set, does so for itself only."""
    assert run(script_leave_a_tenant, connections) == [["ada, public", "public"]] * 2


def where() -> Any:
    """Return the tenant of the caller, and where its rows go."""
    return [connection.schema_name, getattr(connection.tenant, "title", None), search_path()]


ADA, BOB = ([name, f"The shop of {name}", f"{name}, public"] for name in ("ada", "bob"))
PUBLIC = ["public", None, "public"]


def script_spawn_in_tenants() -> Any:
    from django_tenants.utils import tenant_context

    from tests.tenants.models import Shop

    settings.BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"]
    seen = []
    for name in ("ada", "bob"):
        with tenant_context(Shop.objects.get(schema_name=name)):
            seen.append(in_task(where))
    return [*seen, in_task(where)]


@on_all
def test_task_runs_in_the_tenant_of_its_spawner(site: None, connections: str) -> None:
    """In that of each spawner, and in the public schema if there is none."""
    assert run(script_spawn_in_tenants, connections) == [ADA, BOB, PUBLIC]


def script_spawn_async_in_tenants() -> Any:
    from django_tenants.utils import tenant_context

    from tests.tenants.models import Shop

    settings.BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"]
    grandchildren: list[Any] = []

    async def task() -> None:
        seen.append(await sync_to_async(where)())
        bgtasks.spawn("child", lambda: grandchildren.append(where()))

    seen: list[Any] = []
    with tenant_context(Shop.objects.get(schema_name="ada")):
        bgtasks.spawn("task", task)
    bgtasks.drain(BOUND)
    bgtasks.drain(BOUND)
    return [*seen, *grandchildren]


@on_all
def test_coroutine_runs_in_the_tenant_of_its_spawner(site: None, connections: str) -> None:
    """So do the tasks that it spawns in its asynchronous code."""
    assert run(script_spawn_async_in_tenants, connections) == [ADA, ADA]


def script_tenant_is_gone() -> Any:
    from django_tenants.utils import tenant_context

    from tests.tenants.models import Shop

    settings.BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"]
    logging.getLogger("bgtasks").setLevel(logging.CRITICAL)
    ran: list[Any] = []
    with tenant_context(Shop(schema_name="gone")):
        accepted = bgtasks.spawn("task", ran.append, 1)
    bgtasks.drain(BOUND)
    return [accepted, ran, bgtasks.stats()["default"].failed]


def test_task_of_a_tenant_that_is_gone_fails(site: None) -> None:
    """It does not run in the public schema."""
    assert run(script_tenant_is_gone) == [True, [], 1]


def script_spawn_in_async_view() -> Any:
    settings.BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"]
    logging.getLogger("bgtasks").setLevel(logging.CRITICAL)

    async def view() -> Any:
        spawn: Any = bgtasks.spawn
        return [spawn("task", print), await sync_to_async(spawn)("task", where)]

    return [asyncio.run(view()), bgtasks.drain(BOUND), bgtasks.stats()["default"].succeeded]


def test_spawn_beside_the_tenant_is_dropped(site: None) -> None:
    """An asynchronous view spawns on the thread that has its tenant."""
    assert run(script_spawn_in_async_view) == [[False, True], True, 1]
