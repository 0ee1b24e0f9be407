"""The settings of all benchmarks: a site with the middleware's usual work, and one pool."""

from demo_project.settings import *  # noqa: F403

BGTASKS = {"default": {"CAPACITY": 2_000_000, "CONN_MAX": 8}, "small": {"CAPACITY": 8, "CONN_MAX": 1}}
# Django's default, and no files of the demo's.
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
USE_I18N = True
USE_TZ = True
LOGGING_CONFIG = None
TASKS = {
    "default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    "pool": {"BACKEND": "bgtasks.backends.PoolBackend"},
    "local": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 8, "MAX_RESULTS": 1000},
    },
}
ROOT_URLCONF = "benchmarks.site"
ALLOWED_HOSTS = ["127.0.0.1"]
