from django.db import models
from django_tenants.models import DomainMixin, TenantMixin


class Shop(TenantMixin):  # type: ignore[misc]  # django-tenants has no types
    """A tenant."""

    title = models.CharField(max_length=100)
    auto_create_schema = False


class Domain(DomainMixin):  # type: ignore[misc]
    """Where a tenant is found. No test asks for it."""


class Order(models.Model):
    """A row in the schema of a tenant."""

    text = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.text
