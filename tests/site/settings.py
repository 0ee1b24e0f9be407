"""Settings of the tests' site: those of the tests, with a short time for the shutdown if a test says so."""

import os

from tests.settings import *  # noqa: F403  # these are the settings

ROOT_URLCONF = "tests.site.urls"
BGTASKS = {"default": {"CONN_MAX": 4, "SHUTDOWN_TIMEOUT": float(os.environ.get("SHUTDOWN_TIMEOUT", "25"))}}
