"""Hints of the testing kit: the likeliest mistake behind a test that fails."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.sqlite3.base import DatabaseWrapper as SQLite

from bgtasks.submission import OnCommit

UNCOMMITTED = (
    "it waits for a commit, which a TestCase never makes; spawn it with "
    "captureOnCommitCallbacks(execute=True), or pytest-django's django_capture_on_commit_callbacks"
)
IN_TRANSACTION = (
    "this test runs in a transaction, and tasks run on connections of their own, which do not see it: use "
    "TransactionTestCase or @pytest.mark.django_db(transaction=True), or bgtasks.testing.inline"
)
IN_MEMORY = (
    "the tests' database is SQLite in memory, where a second writer fails at once: give it a file by "
    '"TEST": {"NAME": "test.sqlite3"} in DATABASES'
)


def is_uncommitted(name: str) -> bool:
    """Tell whether ``spawn_on_commit`` waits with a task called `name` for a transaction of this thread."""
    callbacks = [entry[1] for connection in _connections() for entry in connection.run_on_commit]
    return any(isinstance(callback, OnCommit) and callback.name == name for callback in callbacks)


def for_failure(error: BaseException | None) -> list[str]:
    """Return what may be wrong with a test that has failed while its tasks run in the real pools."""
    hints: list[str] = []
    if any(connection.in_atomic_block for connection in _connections()):
        hints.append(IN_TRANSACTION)
    if (
        isinstance(error, OperationalError)
        and "locked" in str(error)
        and any(map(_is_in_memory, _connections()))
    ):
        hints.append(IN_MEMORY)
    return hints


def _connections() -> Sequence[BaseDatabaseWrapper]:
    return connections.all(initialized_only=True)


def _is_in_memory(connection: BaseDatabaseWrapper) -> bool:
    return isinstance(connection, SQLite) and bool(connection.is_in_memory_db())
