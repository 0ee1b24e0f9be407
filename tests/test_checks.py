"""What "manage.py check" says of BGTASKS, and of the databases' connection pools."""

import io
import logging
import logging.config
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core import checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections
from pytest_django import Settings

import bgtasks.asgi
from bgtasks import conf
from bgtasks.checks import NAMES, check_database_pools, check_journal, check_settings
from bgtasks.monitoring import journal_file
from bgtasks.pools import pools

PAGE = Path(__file__).parent.parent / "docs" / "checks.md"


def ours(**options: Any) -> list[Any]:
    """The messages of bgtasks among those of a real run of all checks."""
    return [message for message in checks.run_checks(**options) if message.id.startswith("bgtasks.")]


def output_of_check(*args: Any) -> Any:
    """What "manage.py check" writes."""
    out = io.StringIO()
    call_command("check", *args, stdout=out, stderr=out)
    return out.getvalue()


@pytest.fixture
def database_pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the database "pooled" another connection pool, as its OPTIONS would."""
    return lambda pool: monkeypatch.setitem(connections.settings["pooled"]["OPTIONS"], "pool", pool)


# Mistakes in BGTASKS.


def test_settings_of_the_tests_are_without_fault() -> None:
    """No mistake, no message."""
    assert ours() == []


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        ([], "bgtasks.E001"),
        ({"": {}}, "bgtasks.E002"),
        ({"email": 5}, "bgtasks.E003"),
        ({"email": {"CONN_MX": 8}}, "bgtasks.E004"),
        ({"email": {"CONN_MAX": "8"}}, "bgtasks.E005"),
        ({"email": {"CONN_MAX": 0}}, "bgtasks.E006"),
    ],
)
def test_mistake_is_an_error_of_the_checks(settings: Settings, pools: Any, expected: Any) -> None:
    """Every kind of mistake has its id, a full sentence and a hint, which is a full sentence too."""
    settings.BGTASKS = pools
    (message,) = ours()

    assert message.id == expected
    assert message.level == checks.ERROR
    for sentence in (message.msg, message.hint):
        assert re.fullmatch(r"[A-Z].*[.?]", sentence)


def test_check_fails_on_a_mistake_and_lists_all(settings: Settings) -> None:
    """The command "check" ends with an error that shows every mistake and its hint."""
    settings.BGTASKS = {"default": {"CONN_MX": 8}, "email": {"CAPACITY": 0}}

    with pytest.raises(SystemCheckError) as caught:
        output_of_check()

    text = str(caught.value)
    assert "(bgtasks.E004) BGTASKS['default']['CONN_MX'] is not an option of a pool." in text
    assert "HINT: Did you mean 'CONN_MAX'?" in text
    assert "(bgtasks.E006) BGTASKS['email']['CAPACITY'] is 0, which is less than 1." in text


def test_ids_are_documented() -> None:
    """The page of the checks explains every id that the code reports, each once, and no other."""
    source = "".join(path.read_text() for path in Path(bgtasks.__file__).parent.rglob("*.py"))
    reported = re.findall(r'"(bgtasks\.[EW]\d{3})"', source)
    documented = re.findall(r"^\| `(bgtasks\.[EW]\d{3})` \|", PAGE.read_text(), re.MULTILINE)

    assert len(reported) == len(set(reported))
    assert documented == sorted(reported)


# Snapshots (E020 to E023).


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, []),
        ({}, []),
        ({"INTERVAL": 0.1, "CACHE": "default"}, []),
        ([], ["bgtasks.E020"]),
        ({"PERIOD": 1}, ["bgtasks.E021"]),
        ({"INTERVAL": 0}, ["bgtasks.E022"]),
        ({"INTERVAL": True, "CACHE": "mine"}, ["bgtasks.E022", "bgtasks.E023"]),
        ({"CACHE": ["default"]}, ["bgtasks.E023"]),
    ],
)
def test_mistakes_in_the_snapshots_are_reported(value: Any, ids: list[str], settings: Settings) -> None:
    """Each mistake in BGTASKS_SNAPSHOT is an error, and as long as there is one nothing is published."""
    settings.BGTASKS_SNAPSHOT = value

    assert [message.id for message in check_settings()] == ids
    assert (conf.snapshot_config() is None) is bool(ids or value is None)


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, []),
        ({"DIR": "/run/mysite"}, []),
        ({"DIR": Path("run")}, []),
        ("/run/mysite", ["bgtasks.E070"]),
        ({"DIR": "/run/mysite", "SIZE": 1}, ["bgtasks.E071"]),
        ({}, ["bgtasks.E072"]),
        ({"DIR": ""}, ["bgtasks.E072"]),
        ({"dir": 5}, ["bgtasks.E071", "bgtasks.E072"]),
    ],
)
def test_mistakes_in_the_journal_are_reported(value: Any, ids: list[str], settings: Settings) -> None:
    """Each mistake in BGTASKS_JOURNAL is an error, and as long as there is one there is no journal."""
    settings.BGTASKS_JOURNAL = value

    assert [message.id for message in check_settings()] == ids
    assert (pools.journal.folder is None) is bool(ids or value is None)
    if ids:
        assert check_journal() == []


def test_folder_without_a_journal_is_warned_of(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal needs a folder that is there, that it may write, and a system with locks."""
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path)}
    assert check_journal() == []
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path / "missing")}
    [missing] = check_journal()
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
        [forbidden] = check_journal()
    monkeypatch.setattr(journal_file, "HAS_LOCKS", False)
    [without_locks] = check_journal()

    found = [missing, forbidden, without_locks]
    assert [message.id for message in found] == ["bgtasks.W070", "bgtasks.W071", "bgtasks.W072"]
    assert "which is not a folder" in missing.msg
    assert "may not write" in forbidden.msg


# Connection pools of databases (W001).


def test_tasks_that_may_take_the_whole_pool_are_warned_of(
    settings: Settings, database_pool: Callable[..., Any]
) -> None:
    """The warning names the database and all the numbers, and the hint says how to have more."""
    settings.BGTASKS = {"default": {"CONN_MAX": 6}, "email": {"CONN_MAX": 4}}
    database_pool({"min_size": 2, "max_size": 10})
    (message,) = ours()

    assert message.id == "bgtasks.W001"
    assert message.level == checks.WARNING
    assert message.msg == (
        "Background tasks can hold 10 connections of the database 'pooled' at once, and its pool has 10: "
        "nothing is left for requests."
    )
    assert message.hint == (
        "Lower CONN_MAX in BGTASKS ('default': 6, 'email': 4), or raise the size of the connection pool: "
        'DATABASES[\'pooled\']["OPTIONS"]["pool"] = {"max_size": 30}.'
    )


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (True, 4),
        ({"timeout": 5}, 4),
        ({"max_size": 7}, 7),
        ({"min_size": 5}, 5),
        ({"min_size": 5, "max_size": None}, 5),
        ({"max_size": None}, 4),
        ({"min_size": 1, "max_size": 7}, 7),
        ({"min_size": 0, "max_size": 7}, 7),
    ],
)
def test_size_of_a_pool_is_what_psycopg_makes_of_its_options(
    settings: Settings, database_pool: Callable[..., Any], pool: Any, size: Any
) -> None:
    """Without max_size a pool does not grow, and without min_size it has 4 connections."""
    settings.BGTASKS = {"default": {"CONN_MAX": size}}
    database_pool(pool)
    (message,) = ours()

    assert f"its pool has {size}:" in message.msg


@pytest.mark.parametrize(("slots", "ids"), [(6, []), (7, ["bgtasks.W001"]), (8, ["bgtasks.W001"])])
def test_as_many_slots_as_connections_are_warned_of(
    settings: Settings, database_pool: Callable[..., Any], slots: int, ids: list[str]
) -> None:
    """As many slots as the pool has connections, or more, are warned of; one less is not."""
    settings.BGTASKS = {"default": {"CONN_MAX": slots}}
    database_pool({"max_size": 7})

    assert [message.id for message in ours()] == ids


class PooledCache:
    """A router that keeps the cache's table in the database "pooled"."""

    def db_for_read(self, model: Any, **hints: object) -> str | None:
        return "pooled" if model._meta.app_label == "django_cache" else None

    db_for_write = db_for_read


def test_connection_of_a_database_cache_is_counted_with_those_of_the_slots(
    settings: Settings, database_pool: Callable[[object], None]
) -> None:
    """Publishing a snapshot takes one connection more, of the database that the cache is in."""
    settings.BGTASKS = {"default": {"CONN_MAX": 6}}
    database_pool({"max_size": 7})
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.db.DatabaseCache", "LOCATION": "c"}}
    elsewhere = ours()
    settings.DATABASE_ROUTERS = [PooledCache()]
    (message,) = ours()
    settings.BGTASKS_SNAPSHOT = None

    assert elsewhere == ours() == []
    assert message.msg == (
        "Background tasks, and the snapshots in the database cache, can hold 7 connections of the database "
        "'pooled' at once, and its pool has 7: nothing is left for requests."
    )


def test_cache_that_cannot_be_made_is_not_counted(
    settings: Settings, database_pool: Callable[[object], None]
) -> None:
    """Its own error comes where it is used; this check is about something else."""
    settings.CACHES = {"default": {"BACKEND": "no.such.Cache"}}
    settings.BGTASKS = {"default": {"CONN_MAX": 6}}
    database_pool({"max_size": 7})

    assert check_database_pools() == []


@pytest.mark.parametrize("pool", [True, {"timeout": 5}, {"min_size": 5}, {"min_size": 2, "max_size": 7}])
def test_size_of_a_pool_is_that_of_the_real_one(
    settings: Settings, database_pool: Callable[..., Any], pool: Any
) -> None:
    """psycopg_pool itself says how large a pool with these options may grow."""
    from psycopg_pool import ConnectionPool

    options = {} if pool is True else pool
    size = ConnectionPool(open=False, **options).max_size
    settings.BGTASKS = {"default": {"CONN_MAX": size}}
    database_pool(pool)
    (message,) = ours()

    assert f"its pool has {size}:" in message.msg


@pytest.mark.parametrize("pool", [None, False, {}])
def test_database_without_a_pool_is_not_warned_of(
    settings: Settings, database_pool: Callable[..., Any], pool: Any
) -> None:
    """Without a pool, as Django understands it, there is nothing to compare with. SQLite has none either."""
    settings.BGTASKS = {"default": {"CONN_MAX": 1000}}
    database_pool(pool)

    assert ours() == []


def test_every_database_is_looked_at(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each database whose pool is too small has a warning of its own."""
    for alias in ("default", "pooled"):
        monkeypatch.setitem(connections.settings[alias]["OPTIONS"], "pool", True)

    assert [re.findall("database '(.*?)'", message.msg)[0] for message in ours()] == ["default", "pooled"]


def test_plain_check_warns(database_pool: Callable[..., Any]) -> None:
    """The command "check" shows it without --database, without which no check tagged "database" runs."""
    database_pool(True)

    assert "(bgtasks.W001)" in output_of_check()


def test_check_of_pools_opens_no_connection(database_pool: Callable[..., Any]) -> None:
    """The check reads the settings. This test may not use a database."""
    database_pool(True)

    assert len(check_database_pools()) == 1


def test_mistake_in_bgtasks_comes_first(settings: Settings, database_pool: Callable[..., Any]) -> None:
    """Without valid settings there is no sum to compare: only the mistake is reported."""
    settings.BGTASKS = {"default": {"CONN_MAX": "8"}}
    database_pool(True)

    assert [message.id for message in ours()] == ["bgtasks.E005"]


# The lifespan (W002).


async def bare(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """An ASGI application that is not wrapped."""


wrapped = bgtasks.asgi.lifespan(bare)


def deployment_warnings() -> list[Any]:
    return [message for message in ours(include_deployment_checks=True) if message.id == "bgtasks.W002"]


def test_application_without_lifespan_is_warned_of_before_a_deployment(settings: Settings) -> None:
    """The warning names the application, and the hint shows the line to write."""
    settings.ASGI_APPLICATION = "tests.test_checks.bare"
    (message,) = deployment_warnings()

    assert message.level == checks.WARNING
    assert message.msg == (
        "ASGI_APPLICATION ('tests.test_checks.bare') is not wrapped in bgtasks.asgi.lifespan: under uvicorn, "
        "the tasks that are queued or running when a process ends would be lost."
    )
    assert message.hint == (
        "Write application = bgtasks.asgi.lifespan(get_asgi_application()) in asgi.py. "
        "If the site is served by WSGI only, remove the file, or silence this check."
    )


def test_application_with_lifespan_is_not_warned_of(settings: Settings) -> None:
    """A wrapped application is what the check asks for."""
    settings.ASGI_APPLICATION = "tests.test_checks.wrapped"

    assert deployment_warnings() == []


def test_lifespan_is_checked_only_before_a_deployment(settings: Settings) -> None:
    """Without --deploy nothing is said of ASGI_APPLICATION, and nothing of it is imported."""
    settings.ASGI_APPLICATION = "tests.test_checks.bare"

    assert ours() == []


@pytest.mark.parametrize("path", [None, "tests.test_checks.missing", "no.such.module", "nonsense"])
def test_application_that_is_not_there_is_not_warned_of(settings: Settings, path: Any) -> None:
    """A project without ASGI_APPLICATION has no such trouble; a wrong one is for the server to report."""
    settings.ASGI_APPLICATION = path

    assert deployment_warnings() == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("BGTASK", "Did you mean BGTASKS?"),
        ("BG_TASKS", "Did you mean BGTASKS?"),
        ("BGTASKS_SNAPSHOTS", "Did you mean BGTASKS_SNAPSHOT?"),
        ("BGTASKS_TIMEOUT", f"The settings are {', '.join(NAMES)}."),
    ],
)
def test_setting_with_a_name_that_is_nearly_ours_is_warned_of(
    name: str, hint: str, settings: Settings
) -> None:
    """It has no effect, and nothing else would say so."""
    setattr(settings, name, {})

    (message,) = ours()
    assert message.id == "bgtasks.W007"
    assert message.msg == f"The setting {name} is not one of bgtasks, and has no effect."
    assert message.hint == hint


# What a deployment should not have (W006), and what would not be seen (W004). SQLite: test_new_projects.py.


def test_inline_pool_is_warned_of_before_a_deployment(settings: Settings) -> None:
    """The setting for tests, copied into production, would have every visitor wait for the tasks."""
    settings.BGTASKS = {"email": {"MODE": "inline"}}

    assert ours() == []
    (message,) = ours(include_deployment_checks=True)
    assert message.id == "bgtasks.W006"
    assert message.msg.startswith("BGTASKS['email'][\"MODE\"] is 'inline': every task runs in the request ")


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, []),
        ({"level": "ERROR"}, ["bgtasks.W004"]),
        ({"handlers": ["null"], "propagate": False}, ["bgtasks.W004"]),
        ({"handlers": ["errors"], "propagate": False}, ["bgtasks.W004"]),
        ({"handlers": ["errors", "console"], "propagate": False}, []),
        ({"propagate": False}, []),  # Python writes it to standard error
    ],
)
def test_logger_that_lets_no_warning_through_is_warned_of(options: Any, ids: list[str]) -> None:
    """Whatever hides a drop from the log is said by the check."""
    handlers = {
        "null": {"class": "logging.NullHandler"},
        "errors": {"class": "logging.StreamHandler", "level": "ERROR"},
        "console": {"class": "logging.StreamHandler"},
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": handlers,
            "loggers": {"bgtasks": options},
        }
    )
    try:
        assert [message.id for message in ours()] == ids
    finally:
        logging.config.dictConfig(
            {"version": 1, "disable_existing_loggers": False, "loggers": {"bgtasks": {"level": "NOTSET"}}}
        )


def test_size_that_is_no_number_is_left_to_the_pool(database_pool: Callable[..., Any]) -> None:
    """A pool whose size is a text does not break the check: psycopg_pool reports it, when it is opened."""
    database_pool({"max_size": "25"})

    assert check_database_pools() == []
