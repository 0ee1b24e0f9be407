"""What bgtasks raises: only for mistakes in the calling code or the settings, never because of load."""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured


class PoolDoesNotExist(KeyError):  # noqa: N818  # the words of Django's own errors of this kind
    """``bgtasks.pools[name]`` with a name that the setting BGTASKS does not define."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the repr of its message


class InvalidSettings(ImproperlyConfigured):
    """The setting BGTASKS has a mistake. ``manage.py check`` lists all of them, with hints."""


class TaskDropped(Exception):  # noqa: N818  # an outcome, not a mistake
    """The error of a ``django.tasks`` task that its pool did not accept, or gave up before it had run.

    It is never raised: ``enqueue`` returns a result with the status FAILED and this error in its ``errors``.
    """


class TemporaryMailError(Exception):
    """A mail could not be delivered yet: the mail server could not be reached, or reported a temporary error.

    A task of ``bgtasks.mail`` that raises it is tried again. Its cause is the mail backend's exception.
    """


class PayloadError(Exception):
    """A worker of the engine got a function that it must not, or cannot, run. The message says why."""
