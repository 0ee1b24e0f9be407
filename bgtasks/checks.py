"""System checks of the settings. Every id is documented in docs/checks.md."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any, cast
from warnings import catch_warnings

import django
from django.conf import settings
from django.core import checks
from django.core.cache import caches
from django.db import connections, router
from django.utils.module_loading import import_string

from bgtasks import conf, propagators
from bgtasks.core.log import enabled, logger
from bgtasks.greenlets import NO_GREENLETS, NO_LOOP, patched
from bgtasks.monitoring import journal, journal_file

# Backends in TASKS that no worker of another process takes tasks from, and what they do instead.
NO_ENGINES = {
    "bgtasks.backends.PoolBackend": "gives tasks back to the pools of this process",
    "django.tasks.backends.immediate.ImmediateBackend": "runs tasks at once, where they are enqueued",
    "django.tasks.backends.dummy.DummyBackend": "runs nothing",
}

NAMES = ["BGTASKS", "BGTASKS_JOURNAL", "BGTASKS_MAIL", "BGTASKS_PROPAGATORS", "BGTASKS_SNAPSHOT"]

PSYCOPG_POOL_SIZE = 4  # of psycopg_pool when neither min_size nor max_size is given


def check_settings(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Report every mistake in the settings.

    They are BGTASKS (bgtasks.E001 to E008), BGTASKS_SNAPSHOT (E020 to E023), BGTASKS_PROPAGATORS (E030 to
    E033) and BGTASKS_JOURNAL (E070 to E072).
    """
    return [
        checks.Error(problem.message, hint=problem.hint, id=problem.id)
        for problem in (
            *conf.problems(conf.configured()),
            *conf.snapshot_problems(getattr(settings, "BGTASKS_SNAPSHOT", None)),
            *propagators.problems(getattr(settings, "BGTASKS_PROPAGATORS", ())),
            *journal.problems(getattr(settings, "BGTASKS_JOURNAL", None)),
        )
    ]


def check_mail(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Report mistakes in how mails are sent (bgtasks.E060 to E064, W061), and no time-out (W060)."""
    options, mailers = getattr(settings, "BGTASKS_MAIL", None), getattr(settings, "MAILERS", None)
    is_used = options is not None or mailers is not None or settings.is_overridden("EMAIL_BACKEND")
    if not is_used or any(conf.problems(conf.configured())):
        return []
    from bgtasks import mail  # a start without it does not need Django's mail

    errors: list[checks.CheckMessage] = [
        checks.Error(problem.message, hint=problem.hint, id=problem.id)
        for problem in (
            *mail.problems({} if options is None else options),
            *mail.mailers_problems(mailers),
        )
    ]
    if errors:
        return errors
    with catch_warnings(action="ignore"):  # of Django 6.1, about EMAIL_BACKEND
        found: list[checks.CheckMessage] = [
            checks.Warning(
                "bgtasks.mail.EmailBackend delivers by SMTP without a time-out.",
                hint=f"Set {where} to some seconds. A mail server that accepts a connection but never "
                "responds blocks a slot forever.",
                id="bgtasks.W060",
            )
            for where in mail.without_timeout()
        ]
    if options is not None and mailers is not None:
        found.append(
            checks.Warning(
                "BGTASKS_MAIL does not apply to the mailers in MAILERS.",
                hint='Write its options into the "OPTIONS" of the mailer whose "BACKEND" is '
                '"bgtasks.mail.EmailBackend", and remove it.',
                id="bgtasks.W061",
            )
        )
    return found


def check_handoff(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Report engines that nothing can be handed off to (bgtasks.E014 to E016, W010)."""
    if any(conf.problems(conf.configured())):
        return []
    found: list[checks.CheckMessage] = []
    for pool, options in conf.configured().items():
        where = f"BGTASKS[{pool!r}]"
        alias = options.get("HANDOFF_TO")
        if alias is not None:
            found += _engine_problems(f'{where}["HANDOFF_TO"]', alias)
        elif "HANDOFF_WHEN" in options:
            found.append(
                checks.Warning(
                    f'{where}["HANDOFF_WHEN"] has no effect without HANDOFF_TO.',
                    hint="Name the engine in HANDOFF_TO, or remove HANDOFF_WHEN.",
                    id="bgtasks.W010",
                )
            )
    return found


def _engine_problems(where: str, alias: str) -> list[checks.CheckMessage]:
    if django.VERSION < (6, 0):
        return [
            checks.Error(
                f"{where} needs django.tasks, which came with Django 6.0.",
                hint="Upgrade Django, or remove HANDOFF_TO: tasks run in this process only.",
                id="bgtasks.E014",
            )
        ]
    aliases: dict[str, dict[str, Any]] = settings.TASKS
    if alias not in aliases:
        return [
            checks.Error(
                f"{where} is {alias!r}, which is not an alias in TASKS.",
                hint=f"TASKS defines: {', '.join(map(repr, aliases)) or 'nothing'}.",
                id="bgtasks.E015",
            )
        ]
    backend = aliases[alias].get("BACKEND")
    if backend not in NO_ENGINES:
        return []
    return [
        checks.Error(
            f"{where} is {alias!r}, whose backend {backend} is not an engine: it {NO_ENGINES[backend]}.",
            hint="Name the alias of an engine with workers of its own, such as django-tasks-db.",
            id="bgtasks.E016",
        )
    ]


def check_database_pools(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn if background tasks alone can take every connection of a database's pool (bgtasks.W001)."""
    if any(conf.problems(conf.configured())):
        return []
    slots = {name: config.conn_max for name in conf.pool_names() if (config := conf.pool_config(name))}
    total = sum(slots.values())
    by_pool = ", ".join(f"{name!r}: {conn_max}" for name, conn_max in slots.items())
    cache_databases = _cache_databases()
    found: list[checks.CheckMessage] = []
    for alias in connections:
        size = _pool_size(connections.settings[alias])
        publishing = alias in cache_databases
        if size is None or total + publishing < size:
            continue
        who = (
            "Background tasks, and the snapshots in the database cache," if publishing else "Background tasks"
        )
        found.append(
            checks.Warning(
                f"{who} can hold {total + publishing} connections of the database {alias!r} at once, and its "
                f"pool has {size}: nothing is left for requests.",
                hint=(
                    f"Lower CONN_MAX in BGTASKS ({by_pool}), or raise the size of the connection pool: "
                    f'DATABASES[{alias!r}]["OPTIONS"]["pool"] = {{"max_size": {3 * total}}}.'
                ),
                id="bgtasks.W001",
            )
        )
    return found


def _cache_databases() -> set[str]:
    """Return the databases that publishing a snapshot takes a connection of, if its cache is in one."""
    config = conf.snapshot_config()
    if config is None:
        return set()
    from django.core.cache.backends.db import BaseDatabaseCache  # a start without checks does not need it

    try:
        cache = caches[config.cache]
    except Exception:
        return set()  # whoever uses it will hear of it
    if not isinstance(cache, BaseDatabaseCache):
        return set()
    model: Any = cache.cache_model_class
    return {router.db_for_read(model), router.db_for_write(model)}


def check_greenlets(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Report that threads are greenlets: of gevent (bgtasks.W003), or of eventlet (bgtasks.E040)."""
    patch = patched()
    if patch == "gevent":
        return [
            checks.Warning(
                f"{NO_LOOP}: they are dropped.",
                hint="Spawn plain functions, which do run, or use a server with threads or asyncio.",
                id="bgtasks.W003",
            )
        ]
    if patch == "eventlet":
        return [
            checks.Error(
                f"{NO_GREENLETS}: every task is dropped.",
                hint="Use a server with threads, asyncio or gevent: eventlet is no longer developed.",
                id="bgtasks.E040",
            )
        ]
    return []


def check_journal(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn if the journal cannot be written: no folder (bgtasks.W070), not ours (W071), no locks (W072)."""
    value = getattr(settings, "BGTASKS_JOURNAL", None)
    if value is None or any(journal.problems(value)):
        return []
    where, folder = 'BGTASKS_JOURNAL["DIR"]', Path(value["DIR"])
    hint = "Lost tasks of killed processes will not be reported. "
    if not journal_file.HAS_LOCKS:
        message, ending = "The journal needs file locks of Python's fcntl.", "Set it to None."
        return [checks.Warning(message, hint=hint + ending, id="bgtasks.W072")]
    if not folder.is_dir():
        message, ending = f"{where} is {str(folder)!r}, which is not a folder.", "Create the folder."
        return [checks.Warning(message, hint=hint + ending, id="bgtasks.W070")]
    if not os.access(folder, os.W_OK | os.X_OK):
        message = f"{where} is {str(folder)!r}, in which this process may not write."
        ending = "Make it writable for the user that runs the server."
        return [checks.Warning(message, hint=hint + ending, id="bgtasks.W071")]
    return []


def check_sqlite(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn if tasks that run side by side would fail on SQLite (bgtasks.W005)."""
    if any(conf.problems(conf.configured())):
        return []
    configs = [config for name in conf.pool_names() if (config := conf.pool_config(name))]
    if sum(config.conn_max for config in configs) < 2:  # noqa: PLR2004  # one task at a time
        return []
    return [
        checks.Warning(
            f"The database {alias!r} is SQLite. A transaction that reads and then writes fails there with "
            "'database is locked' if a request or another task has written in between.",
            hint=(
                f'Write DATABASES["{alias}"]["OPTIONS"] = {{"transaction_mode": "IMMEDIATE", "timeout": 20}} '
                "after DATABASES."
            ),
            id="bgtasks.W005",
        )
        for alias in connections
        if connections[alias].vendor == "sqlite" and _begins_with_a_read(connections.settings[alias])
    ]


def _begins_with_a_read(database: dict[str, Any]) -> bool:
    mode = database.get("OPTIONS", {}).get("transaction_mode") or "DEFERRED"
    return str(mode).upper() == "DEFERRED"  # Django will say what is wrong with another one


def check_inline(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn before a deployment if a pool runs its tasks in the code that spawns them (bgtasks.W006)."""
    if any(conf.problems(conf.configured())):
        return []
    return [
        checks.Warning(
            f"BGTASKS[{name!r}][\"MODE\"] is 'inline': every task runs in the request that spawns it, which "
            "waits for it and fails with it.",
            hint='Set it in the settings of the tests only; the default is "pool".',
            id="bgtasks.W006",
        )
        for name in conf.pool_names()
        if (config := conf.pool_config(name)) and config.mode == conf.INLINE
    ]


def check_names(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn of a setting whose name is nearly one of ours (bgtasks.W007)."""
    near = [name for name in dir(settings) if re.match("BG_?TASK", name) and name not in NAMES]
    return [
        checks.Warning(
            f"The setting {name} is not one of bgtasks, and has no effect.",
            hint=_meant(name),
            id="bgtasks.W007",
        )
        for name in near
    ]


def _meant(name: str) -> str:
    if close := difflib.get_close_matches(name, NAMES, n=1, cutoff=0.8):
        return f"Did you mean {close[0]}?"
    return f"The settings are {', '.join(NAMES)}."


def check_logging(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn if nothing writes the warnings of the logger "bgtasks" (bgtasks.W004)."""
    if enabled(logging.WARNING) and _has_handler():
        return []
    return [
        checks.Warning(
            'LOGGING lets no warning of the logger "bgtasks" through: nobody would see what is dropped.',
            hint='Give it a handler and the level "WARNING" or a lower one: LOGGING["loggers"]["bgtasks"].',
            id="bgtasks.W004",
        )
    ]


def _has_handler() -> bool:
    """Tell whether a handler writes the warnings of our logger. Without any, Python does it by itself."""
    handlers: list[logging.Handler] = []
    of: logging.Logger | None = logger
    while of is not None:
        handlers += of.handlers
        of = of.parent if of.propagate else None
    return not handlers or any(
        each.level <= logging.WARNING and not isinstance(each, logging.NullHandler) for each in handlers
    )


def check_lifespan(**_kwargs: Any) -> list[checks.CheckMessage]:
    """Warn before a deployment if the ASGI application is not wrapped in lifespan (bgtasks.W002)."""
    named, path, application = _asgi_application()
    if application is None or hasattr(application, "bgtasks_lifespan"):
        return []
    return [
        checks.Warning(
            f"{named} ({path!r}) is not wrapped in bgtasks.asgi.lifespan: under uvicorn, the tasks "
            "that are queued or running when a process ends would be lost.",
            hint=(
                "Write application = bgtasks.asgi.lifespan(get_asgi_application()) in asgi.py. "
                "If the site is served by WSGI only, remove the file, or silence this check."
            ),
            id="bgtasks.W002",
        )
    ]


def _asgi_application() -> tuple[str, str, object]:
    """Return the project's ASGI application, after what it is called and its path; None if there is none.

    It is that of the setting ASGI_APPLICATION, which only some servers read, or else that of the asgi.py
    which startproject has written beside wsgi.py and the root URLconf.
    """
    path = getattr(settings, "ASGI_APPLICATION", None)
    if path is not None:
        return "ASGI_APPLICATION", path, _imported(path)
    wsgi = str(getattr(settings, "WSGI_APPLICATION", None) or "").rpartition(".")[0]
    for neighbour in (wsgi, str(getattr(settings, "ROOT_URLCONF", ""))):
        package = neighbour.rpartition(".")[0]
        path = f"{package}.asgi.application"
        if package and (application := _imported(path)) is not None:
            return "The application in asgi.py", path, application
    return "", "", None


def _imported(path: str) -> object:
    try:
        return import_string(path)
    except Exception:
        return None  # whoever starts the server will hear of it


def _pool_size(database: dict[str, Any]) -> int | None:
    """Return how many connections the psycopg pool of a database may hold; None if that cannot be told."""
    pool = database.get("OPTIONS", {}).get("pool")
    if not pool:
        return None
    options = cast(dict[str, Any], pool) if isinstance(pool, dict) else {}
    least = options.get("min_size", PSYCOPG_POOL_SIZE)
    most = options.get("max_size")
    size = least if most is None else most
    return size if isinstance(size, int) else None  # psycopg_pool will say what is wrong with it
