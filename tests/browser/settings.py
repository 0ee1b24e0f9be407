"""Settings of the site that a browser looks at: an admin, a shared cache and a strict policy."""

from tests.settings import *  # noqa: F403  # these are the settings
from tests.settings import INSTALLED_APPS as TEST_APPS
from tests.settings import MIDDLEWARE as TEST_MIDDLEWARE
from tests.settings import TEST_HOME

INSTALLED_APPS = [*TEST_APPS]
ROOT_URLCONF = "tests.browser.urls"
MIDDLEWARE = ["tests.browser.policy.strict_policy", *TEST_MIDDLEWARE]
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": TEST_HOME / "cache",
    }
}
BGTASKS = {
    "default": {"CAPACITY": 50, "CONN_MAX": 4, "TASK_TIMEOUT": 60},
    "email": {"CONN_MAX": 2},
    "strict": {"CONN_MAX": 2, "TASK_TIMEOUT": 1},
}
