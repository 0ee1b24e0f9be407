"""The database connections of a thread, and of a forked child.

After a task they are as Django leaves them between two requests, whatever the task has done.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as DummyWrapper
from django.utils.functional import cached_property

from bgtasks import shortcuts
from bgtasks.core.task import current_task
from bgtasks.repeats import report

# Attributes of a connection that Django itself writes: in all backends, and in one of them when it is in use.
DJANGOS_OWN = vars(DummyWrapper({})).keys() | {
    *("isolation_level", "_named_cursor_idx"),  # PostgreSQL and MySQL
    *("init_commands", "transaction_mode"),  # SQLite
    *("operators", "pattern_ops"),  # Oracle
}

# What a forked child has of its parent's. It must neither use it nor close it: the parent does use it.
_inherited: list[object] = []

IN_TRANSACTION = frozenset({1, 2, 3})  # libpq's statuses ACTIVE, INTRANS and INERROR


def close() -> None:
    """Close the database connections of this thread."""
    for connection in shortcuts.open_connections():
        try:
            connection.close()
            if connection.connection is not None and not connection.in_atomic_block:
                # SQLite in memory, as in tests, where Django's own close() does nothing, so as not to lose
                # the data. Those of a test are kept by the connection of the thread that runs it.
                BaseDatabaseWrapper.close(connection)
        except Exception as error:
            report(logging.ERROR, "connection %r could not be closed", connection.alias, error)


def clean() -> None:
    """Leave each database connection of this thread as Django leaves it between two requests.

    Like the receivers of ``request_started`` and ``request_finished``: a pooled connection goes back to its
    pool, one past its CONN_MAX_AGE or in an error is closed. One on which a task has left something is thrown
    away, or the next task would find it: the transaction, in which all that it writes would be lost, or a
    tenant.
    """
    for connection in shortcuts.open_connections():
        try:
            connection.queries_log.clear()
            if connection.in_atomic_block or _is_in_transaction(connection):
                _discard(connection)
                message = "a task has left connection %r in a transaction, which is rolled back"
                report(logging.WARNING, message, connection.alias)
                continue
            connection.close_if_unusable_or_obsolete()
            if _is_changed(connection):
                _discard(connection)
        except Exception as error:
            report(logging.ERROR, "connection %r could not be reset", connection.alias, error)
            with contextlib.suppress(Exception):
                connection.close()  # or its pool would miss it for ever
            del connections[connection.alias]


def let_go_of_inherited() -> None:
    """Forget, in a forked child, the parent's connection pools, and the connections that must not be shared.

    Those are the ones of the pools and, if a task has forked, all of its slot. Whether another thread may
    share its connection with a child is not for us to say.
    """
    forked_by_task = current_task() is not None
    for connection in shortcuts.open_connections():
        if forked_by_task or connection.settings_dict["OPTIONS"].get("pool"):
            _inherited.append(connection)
            del connections[connection.alias]
    _inherited.extend(shortcuts.take_connection_pools())


def _discard(connection: BaseDatabaseWrapper) -> None:
    connection.close()
    del connections[connection.alias]


def _is_in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether the real connection is in a transaction, as far as its driver knows by itself."""
    real: Any = connection.connection
    if real is None:
        return False
    status = getattr(getattr(real, "info", None), "transaction_status", None)
    if status is not None:  # psycopg
        return status in IN_TRANSACTION or bool(real.autocommit) != connection.autocommit
    return bool(getattr(real, "in_transaction", False))  # sqlite3


def _is_changed(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether a connection has attributes, not Django's own, that a new one does not have.

    So are the tenants of django-tenants: ``set_tenant`` writes one on the connection, and it stays.
    """
    state = vars(connection)
    own = {
        name: state[name]
        for name in state.keys() - DJANGOS_OWN
        if not isinstance(getattr(type(connection), name, None), cached_property)
    }
    if not own:
        return False
    new = vars(connections.create_connection(connection.alias))
    return any(name not in new or new[name] != value for name, value in own.items())
