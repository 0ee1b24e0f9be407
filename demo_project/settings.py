"""Settings of the demo site. Importing them starts nothing; `manage.py demo` and `compare` do.

Those two commands describe what they started to the site through the environment (`DATABASE_URL`, `DEMO_*`).
Without that, as in `manage.py check`, the site uses a SQLite file.
"""

import os
from pathlib import Path
from typing import Any

import django
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent
DATA_DIR = Path(os.environ.get("DEMO_DATA_DIR", BASE_DIR / ".data"))

DEBUG = False
SECRET_KEY = "demo-only: this site is for one machine and one talk"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", "testserver"]

# What the commands may change.
DEMO_POOL_SIZE = int(os.environ.get("DEMO_POOL_SIZE", "25"))
DEMO_POOL_TIMEOUT = float(os.environ.get("DEMO_POOL_TIMEOUT", "3"))
DEMO_TASK_SECONDS = float(os.environ.get("DEMO_TASK_SECONDS", "0.3"))
DEMO_MAIL_PORT = int(os.environ.get("DEMO_MAIL_PORT", "1025"))
DEMO_PROBE_TOKEN = os.environ.get("DEMO_PROBE_TOKEN", "")  # only who knows it may report request latencies
DEMO_PASSWORD = os.environ.get("DEMO_PASSWORD", "")  # who knows it may log in to the admin; "" lets nobody in

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "bgtasks",
    "demo_project",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "demo_project.urls"
ASGI_APPLICATION = "demo_project.asgi.application"
WSGI_APPLICATION = "demo_project.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTHENTICATION_BACKENDS = ["demo_project.auth.PasswordOfTheDay"]
STATIC_URL = "static/"
USE_TZ = True


def database(url: str) -> dict[str, Any]:
    """Turn a database URL into an entry of `DATABASES`.

    Args:
        url: `postgresql://...` in any form libpq understands, `sqlite:///path`, or "" for a SQLite file.

    Raises:
        ImproperlyConfigured: if the URL names another database.
    """
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        from psycopg.conninfo import conninfo_to_dict

        options: dict[str, Any] = dict(conninfo_to_dict(url))
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": options.pop("dbname", ""),
            "USER": options.pop("user", ""),
            "PASSWORD": options.pop("password", ""),
            "HOST": options.pop("host", ""),
            "PORT": options.pop("port", ""),
            # A visitor waits DEMO_POOL_TIMEOUT seconds for a connection, then the request fails.
            "OPTIONS": options
            | {
                "pool": {"min_size": DEMO_POOL_SIZE, "max_size": DEMO_POOL_SIZE, "timeout": DEMO_POOL_TIMEOUT}
            },
        }
    if scheme in ("", "sqlite"):
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": rest.removeprefix("/") or DATA_DIR / "demo.sqlite3",
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;",
            },
        }
    raise ImproperlyConfigured(
        f"DATABASE_URL has scheme {scheme!r}; the demo knows postgresql:// and sqlite:///"
    )


DATABASES = {"default": database(os.environ.get("DATABASE_URL", ""))}

# Through it the processes of a site show one another what they do; `manage.py bgtasks` is one of them.
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": DATA_DIR / "cache",
    }
}

# The reason for all this: 8 of the 25 connections are for background work, 17 stay with the visitors.
BGTASKS: dict[str, dict[str, Any]] = {
    "default": {
        "CAPACITY": 1024,
        "CONN_MAX": max(1, DEMO_POOL_SIZE // 3),
        "SHUTDOWN_TIMEOUT": 8,
    }
}

# The day one process is not enough: an engine that the pool hands its tasks to. No other line changes.
DEMO_ENGINE = os.environ.get("DEMO_ENGINE", "pool")
DEMO_BROKER = os.environ.get("DEMO_BROKER", "redis://127.0.0.1:6379/0")
if DEMO_ENGINE != "pool":
    BGTASKS["default"] |= {"HANDOFF_TO": "engine", "HANDOFF_WHEN": os.environ.get("DEMO_HANDOFF", "overflow")}
if DEMO_ENGINE == "db":
    INSTALLED_APPS += ["django_tasks_db"]
    TASKS: dict[str, dict[str, Any]] = {"engine": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
elif DEMO_ENGINE == "rq":
    INSTALLED_APPS += ["django_rq"]
    TASKS = {"engine": {"BACKEND": "django_tasks_rq.RQBackend"}}
    RQ_QUEUES = {"default": {"URL": DEMO_BROKER}}
elif DEMO_ENGINE == "celery":
    TASKS = {
        "engine": {
            "BACKEND": "django_tasks_celery.CeleryBackend",
            "OPTIONS": {"CELERY_APP": "demo_project.celery_app.app"},
        }
    }
    CELERY_BROKER_URL = DEMO_BROKER
elif DEMO_ENGINE == "huey":
    INSTALLED_APPS += ["huey.contrib.djhuey"]
    TASKS = {"engine": {"BACKEND": "huey.contrib.djhuey.tasks_backend.HueyBackend"}}
    HUEY = {"huey_class": "huey.RedisHuey", "immediate": False, "connection": {"url": DEMO_BROKER}}
elif DEMO_ENGINE != "pool":
    raise ImproperlyConfigured(
        f"DEMO_ENGINE is {DEMO_ENGINE!r}; the demo knows pool, db, rq, celery and huey"
    )

DEFAULT_FROM_EMAIL = "Guestlist <hello@guestlist.example>"
if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "django.core.mail.backends.smtp.EmailBackend",
            "OPTIONS": {"host": "127.0.0.1", "port": DEMO_MAIL_PORT, "timeout": 30},
        }
    }
else:
    EMAIL_HOST = "127.0.0.1"
    EMAIL_PORT = DEMO_MAIL_PORT
    EMAIL_TIMEOUT = 30

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
