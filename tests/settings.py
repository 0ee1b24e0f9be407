"""Django settings of the tests.

They need the server that tests/conftest.py starts. The server is the tests' own, so the test databases carry
the names of the real ones, and a subprocess that loads these settings is connected to them.
"""

import os
from pathlib import Path
from typing import Any

TEST_HOME = Path(os.environ["BGTASKS_TEST_HOME"])

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "bgtasks",
    "tests.testapp",
]
# What the admin asks for.
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
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
STATIC_URL = "static/"
ROOT_URLCONF = "tests.testapp.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}  # Django 6.1

if "BGTASKS_TEST_JOURNAL" in os.environ:
    BGTASKS_JOURNAL = {"DIR": os.environ["BGTASKS_TEST_JOURNAL"]}

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
LANGUAGES = [("en", "English"), ("fr", "French")]


def _postgresql(name: str, **options: Any) -> Any:
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ["BGTASKS_TEST_POSTGRESQL"],
        "USER": "postgres",
        "NAME": name,
        "OPTIONS": options,
        "TEST": {"NAME": name, "MIGRATE": False},
    }


DATABASES = {
    "default": _postgresql("bgtasks"),
    "pooled": _postgresql("bgtasks_pooled", pool={"min_size": 1, "max_size": 25, "timeout": 10}),
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": TEST_HOME / "sqlite.db",
        # Writers on several threads wait for each other instead of failing.
        "OPTIONS": {
            "timeout": 30,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF",
        },
        "TEST": {"NAME": TEST_HOME / "sqlite.db", "MIGRATE": False},
    },
}
