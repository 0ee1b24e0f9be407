"""Settings of a site of django-tenants, on the server of the tests; for subprocesses."""

import os
from typing import Any

SECRET_KEY = "not a secret"
SHARED_APPS = ["django_tenants", "tests.tenants", "django.contrib.contenttypes", "bgtasks"]
TENANT_APPS = ["tests.tenants"]
INSTALLED_APPS = SHARED_APPS
TENANT_MODEL = "tenants.Shop"
TENANT_DOMAIN_MODEL = "tenants.Domain"
DATABASE_ROUTERS = ["django_tenants.routers.TenantSyncRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
BGTASKS = {"default": {"CONN_MAX": 1}}  # the next task is the next one on the same connection

# What becomes of a connection after a task.
KEPT: dict[str, dict[str, Any]] = {
    "closed": {},
    "kept": {"CONN_MAX_AGE": 60},
    "pooled": {"OPTIONS": {"pool": {"min_size": 1, "max_size": 4}}},
}
DATABASES = {
    "default": {
        "ENGINE": "django_tenants.postgresql_backend",
        "HOST": os.environ["BGTASKS_TEST_POSTGRESQL"],
        "USER": "postgres",
        "NAME": "bgtasks_tenants",
        **KEPT[os.environ.get("BGTASKS_TEST_CONNECTIONS", "closed")],
    }
}
