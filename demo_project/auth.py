"""Who may look at the admin of the demo site: the person who started it."""

from typing import Any

from django.conf import settings
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.utils.crypto import constant_time_compare

STAFF = "staff"


class PasswordOfTheDay(ModelBackend):
    """Lets `STAFF` in with the password that `manage.py demo` has made up and printed, and nobody else."""

    def authenticate(
        self,
        request: HttpRequest | None,  # noqa: ARG002  # Django's signature
        username: str | None = None,
        password: str | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> User | None:
        """Return the one user there is, if the password is right."""
        known = settings.DEMO_PASSWORD
        if username != STAFF or not known or not constant_time_compare(password or "", known):
            return None
        user, _ = User.objects.get_or_create(
            username=STAFF, defaults={"is_staff": True, "is_superuser": True}
        )
        return user
