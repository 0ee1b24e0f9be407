"""Settings of the sample project: its tests use SQLite in memory, or what the environment names."""

import os
from typing import Any

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "bgtasks", "tests.kit.shop"]
ROOT_URLCONF = "tests.kit.shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
STATIC_URL = "static/"

DATABASES: dict[str, dict[str, Any]] = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
}
if file := os.environ.get("KIT_SQLITE"):
    DATABASES["default"]["TEST"] = {"NAME": file}
if server := os.environ.get("KIT_POSTGRESQL"):
    DATABASES["default"] = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": server,
        "USER": "postgres",
        "NAME": "postgres",
        "TEST": {"NAME": "kit"},
        "CONN_MAX_AGE": None,  # so that every slot keeps its connection
    }
