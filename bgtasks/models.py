"""A model without a table: it gives the page in the admin its place and its permissions."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class _NoRows(models.Manager["BackgroundTasks"]):
    """Finds nothing, without asking the database: ``dumpdata`` asks every model for its rows."""

    def get_queryset(self) -> models.QuerySet[BackgroundTasks]:
        """Return no row."""
        return super().get_queryset().none()


class BackgroundTasks(models.Model):
    """The pools of a site. ``migrate`` creates the permissions, and no table."""

    name: models.CharField[str, str] = models.CharField("pool", max_length=200, primary_key=True)

    objects = _NoRows()

    class Meta:
        """No table, and only the permissions that mean something here."""

        managed = False
        base_manager_name = "objects"  # what ``dumpdata --all`` asks
        default_permissions = ()
        permissions: ClassVar = [
            ("view_background_tasks", "Can view background tasks"),
            ("pause_pools", "Can pause and resume pools of background tasks"),
            ("cancel_waiting_tasks", "Can cancel waiting background tasks"),
        ]
        verbose_name = "pool of background tasks"
        verbose_name_plural = "background tasks"

    def __str__(self) -> str:
        return self.name
