"""django-tenants: a task runs in the tenant of the code that spawned it.

::

    BGTASKS_PROPAGATORS = ["bgtasks.contrib.tenants.TenantPropagator"]
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections
from django_tenants import utils

from bgtasks.propagators import Propagator

# The schema in which a task runs, for its asynchronous code, which cannot look at the connection.
_schema: ContextVar[str | None] = ContextVar("bgtasks.tenants.schema", default=None)


class TenantPropagator(Propagator):
    """Carries the name of the tenant's schema. A task of a tenant that is gone fails, and does not run."""

    def capture(self) -> str:
        """Return the name of the schema in which the caller is.

        Raises:
            SynchronousOnlyOperation: The caller is an asynchronous view: its tenant is on the ORM's thread.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            connection: Any = connections[utils.get_tenant_database_alias()]
            return str(connection.schema_name)
        schema = _schema.get()
        if schema is None:
            raise SynchronousOnlyOperation(
                "django-tenants has no tenant in asynchronous code; "
                "write 'await sync_to_async(bgtasks.spawn)(...)'"
            )
        return schema

    @contextmanager
    def restore(self, value: str) -> Generator[None]:
        """Set the tenant of the schema called `value`."""
        token = _schema.set(value)
        try:
            with self._context(value):
                yield
        finally:
            _schema.reset(token)

    @staticmethod
    def _context(schema: str) -> Any:
        if schema == utils.get_public_schema_name():
            return utils.schema_context(schema)
        tenant = cast(Any, utils).get_tenant_model()._default_manager.get(schema_name=schema)
        return utils.tenant_context(tenant)
