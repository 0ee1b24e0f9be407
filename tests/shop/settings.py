"""Settings of the shop. SHOP_ENGINE is "pool" or an engine that the pool hands everything to."""

import os
from typing import Any

ENGINE = os.environ.get("SHOP_ENGINE", "pool")
WHEN = os.environ.get("SHOP_WHEN", "always")  # or "overflow", or "never" if only jobs of its own go there
VALKEY = os.environ.get("SHOP_VALKEY", "redis://127.0.0.1:1/0")

SECRET_KEY = os.environ.get("SHOP_SECRET_KEY", "not a secret")
USE_TZ = True
LANGUAGE_CODE = "en"
LANGUAGES = [("en", "English"), ("fr", "French")]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["bgtasks", "tests.shop"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ.get("SHOP_POSTGRESQL", ""),
        "PORT": os.environ.get("SHOP_POSTGRESQL_PORT", ""),
        "USER": "postgres",
        "NAME": os.environ.get("SHOP_DATABASE", "shop"),
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 25, "timeout": 10}}
        if "SHOP_POOLED" in os.environ
        else {},
    }
}

# The diff between one process and an engine: these lines, and the app of the engine.
TASKS: dict[str, dict[str, Any]] = {"default": {"BACKEND": "bgtasks.backends.PoolBackend"}}
BGTASKS: dict[str, dict[str, Any]] = {
    "default": {
        "CAPACITY": int(os.environ.get("SHOP_CAPACITY", "1024")),
        "CONN_MAX": int(os.environ.get("SHOP_CONN_MAX", "8")),
        "SHUTDOWN_TIMEOUT": float(os.environ.get("SHOP_SHUTDOWN_TIMEOUT", "8")),
    }
}
if ENGINE != "pool" and WHEN != "never":
    BGTASKS["default"] |= {"HANDOFF_TO": "engine", "HANDOFF_WHEN": WHEN}

if ENGINE == "db":
    INSTALLED_APPS += ["django_tasks_db"]
    TASKS["engine"] = {"BACKEND": "django_tasks_db.DatabaseBackend"}
elif ENGINE == "rq":
    INSTALLED_APPS += ["django_rq"]
    TASKS["engine"] = {"BACKEND": "django_tasks_rq.RQBackend"}
    RQ_QUEUES = {"default": {"URL": VALKEY}}
elif ENGINE == "celery":
    TASKS["engine"] = {
        "BACKEND": "django_tasks_celery.CeleryBackend",
        "OPTIONS": {"CELERY_APP": "tests.shop.celery.app"},
    }
    CELERY_BROKER_URL = VALKEY
    CELERY_RESULT_BACKEND = VALKEY
    CELERY_RESULT_EXTENDED = True
elif ENGINE == "huey":
    INSTALLED_APPS += ["huey.contrib.djhuey"]
    TASKS["engine"] = {"BACKEND": "huey.contrib.djhuey.tasks_backend.HueyBackend"}
    HUEY = {"huey_class": "huey.RedisHuey", "name": "shop", "immediate": False, "connection": {"url": VALKEY}}
