"""The tests' settings for a site of its own: two slots, and what `bgtasks` logs on standard error."""

import os

from tests.settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.urls"
ASGI_APPLICATION = "tests.servers.asgi.application"
WSGI_APPLICATION = "tests.servers.wsgi.application"

BGTASKS = {"default": {"CONN_MAX": 2, "SHUTDOWN_TIMEOUT": float(os.environ["BGTASKS_TEST_SHUTDOWN_TIMEOUT"])}}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "plain": {"format": "{created:.3f} {process} {name} {levelname}: {message}", "style": "{"},
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"bgtasks": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}
