from django.db import models
from django_tenants.models import DomainMixin, TenantMixin


class Shop(TenantMixin):
    """A tenant."""

    title = models.CharField(max_length=100)
    auto_create_schema = False


class Domain(DomainMixin):
    """Where a tenant is found. No test asks for it."""


class Order(models.Model):
    """A row in the schema of a tenant."""

    text = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.text
