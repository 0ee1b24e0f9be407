"""The Django app: it starts the pools, and checks the settings."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from importlib import import_module
from typing import Any

import django
from django.apps import AppConfig
from django.conf import settings
from django.core.checks import register
from django.core.signals import setting_changed
from django.db.backends.signals import connection_created

from bgtasks import conf, context
from bgtasks.checks import (
    check_database_pools,
    check_greenlets,
    check_handoff,
    check_inline,
    check_journal,
    check_lifespan,
    check_logging,
    check_mail,
    check_names,
    check_settings,
    check_sqlite,
)
from bgtasks.core.log import log
from bgtasks.pools import pools
from bgtasks.rehearsal import ENVIRONMENT
from bgtasks.submission import Development

MISTAKE = "every spawn raises InvalidSettings until this is fixed: %s %s (%s)"


class BgtasksConfig(AppConfig):
    """Starts the drainer as soon as Django is ready."""

    name = "bgtasks"
    verbose_name = "Background tasks"

    def ready(self) -> None:
        """Register the checks, and start the pools, unless the settings have a mistake, which is logged."""
        register(check_settings)
        register(check_database_pools)  # not Tags.database: it opens no connection, and has to run always
        register(check_handoff)
        register(check_greenlets)
        register(check_journal)
        register(check_logging)
        register(check_mail)
        register(check_names)
        register(check_sqlite)
        register(check_inline, deploy=True)
        register(check_lifespan, deploy=True)
        if django.VERSION >= (6, 0) and settings.is_overridden("TASKS"):
            # It registers the checks of the backends, and maybe nobody else imports it before they run.
            import_module("django.tasks")
        Development.configure()
        setting_changed.connect(_on_setting_changed, dispatch_uid="bgtasks")
        connection_created.connect(_on_connection_created, dispatch_uid="bgtasks")
        mistakes = list(conf.problems(conf.configured()))
        for mistake in mistakes:  # a server runs no checks
            log(logging.ERROR, MISTAKE, mistake.message, mistake.hint, mistake.id)
        if not mistakes:
            pools.start()
            if "gunicorn" in sys.modules:
                from bgtasks.servers import warn_of_limits

                warn_of_limits(conf.longest_shutdown())
            if folder := os.environ.get(ENVIRONMENT):
                from bgtasks.rehearsal.probes import take_part

                take_part(folder)


def _on_connection_created(*, connection: Any, **_kwargs: Any) -> None:
    """In a test run, have the pools end before a test database is dropped: their slots are connected to it.

    It is done here, when a connection to the database is made, because it serves every test runner.
    """
    utils = sys.modules.get("django.test.utils")
    if utils is not None and hasattr(utils._TestState, "saved_data"):
        creation = connection.creation
        if not hasattr(creation, "bgtasks_destroy"):
            creation.bgtasks_destroy = creation.destroy_test_db
            creation.destroy_test_db = partial(_destroy_test_db, creation)


def _destroy_test_db(creation: Any, *args: Any, **kwargs: Any) -> Any:
    pools.restart()
    return creation.bgtasks_destroy(*args, **kwargs)


def _on_setting_changed(*, setting: str, **_kwargs: Any) -> None:
    if setting in {"BGTASKS", "BGTASKS_JOURNAL"}:
        pools.restart()
    elif setting == "DEBUG":
        Development.configure()
    elif setting == "BGTASKS_PROPAGATORS":
        context.forget_propagators()
    elif setting in {"BGTASKS_SNAPSHOT", "CACHES"}:
        pools.publisher.configure()
