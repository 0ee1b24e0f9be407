"""A mail backend that sends through a pool. Another one, which the settings name, delivers.

A view that sends a mail does not wait for the mail server: the message is checked and copied at once, and
delivered by a task.
"""

from __future__ import annotations

import errno
import smtplib
import socket
import ssl
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, NamedTuple, cast

import django
from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.mail.backends import smtp
from django.core.mail.backends.base import BaseEmailBackend
from django.utils.module_loading import import_string

from bgtasks import conf
from bgtasks.conf import Problem
from bgtasks.core.task import current_task
from bgtasks.exceptions import InvalidSettings, TemporaryMailError
from bgtasks.messages import copied, fixed, fixed_headers, from_fields, to_fields
from bgtasks.pools import pools

NAME = "mail"  # of every task that delivers a message
PATH = "bgtasks.mail.EmailBackend"
HAS_MAILERS = django.VERSION >= (6, 1)

# What says that the mail server was not reached, and may be later.
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
UNREACHABLE = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
TOO_MANY_REQUESTS, SERVER_ERROR = 429, 500  # statuses of HTTP


class MailConfig(NamedTuple):
    """How mails are sent: the keys of the setting BGTASKS_MAIL in lower case.

    Attributes:
        backend: The path of the mail backend that delivers. Under MAILERS, the option ``mailer`` names it.
        pool: The pool whose tasks deliver.
        retries: How many times delivery is retried if the mail server could not accept a message.
        retry_delay: Seconds before the first of these tries, doubled with each, up to 60.
    """

    backend: str = "django.core.mail.backends.smtp.EmailBackend"
    pool: str = conf.DEFAULT_POOL
    retries: int = 10
    retry_delay: float = 1.0


class EmailBackend(BaseEmailBackend):
    """Sends each message through a pool: ``EMAIL_BACKEND = "bgtasks.mail.EmailBackend"``.

    ``send_messages`` checks and copies the messages, spawns a task called "mail" for each, and returns how
    many were accepted.

    Args:
        fail_silently: Nothing is raised for a message that cannot be delivered, in the MODE "inline" either.
        alias: Of this mailer in MAILERS (Django 6.1).
        mailer: Alias in MAILERS of the mailer that delivers.
        pool: As in BGTASKS_MAIL, and so the following two.
        retries: See there.
        retry_delay: See there.
        **options: Before MAILERS, passed to the backend that delivers: ``username``, ``password``.

    Raises:
        ImproperlyConfigured: The options in MAILERS have a mistake.
        InvalidSettings: BGTASKS_MAIL has a mistake.
    """

    def __init__(
        self,
        fail_silently: bool = False,
        *,
        alias: str | None = None,
        mailer: str | None = None,
        pool: str | None = None,
        retries: int | None = None,
        retry_delay: float | None = None,
        **options: Any,
    ) -> None:
        options.pop("_ignore_unknown_kwargs", None)  # of get_connection(); none of them is ignored here
        if alias is None:
            super().__init__()
            config = mail_config()
            # send_mail() of older versions gives None for what it was not given.
            self._options = {name: value for name, value in options.items() if value is not None}
        else:
            # Raises an error that names them, if there are any.
            super().__init__(**cast("dict[str, Any]", {"alias": alias, **options}))
            self._options = {}
            config = MailConfig()
            if mailer is None or mailer == alias:
                problem = "OPTIONS must define 'mailer', the alias of another mailer, which delivers"
                raise ImproperlyConfigured(f"MAILERS[{alias!r}]: {problem}.")
        self.fail_silently = fail_silently
        self._mailer = mailer
        given: dict[str, Any] = {"pool": pool, "retries": retries, "retry_delay": retry_delay}
        self._config = config._replace(**{key: value for key, value in given.items() if value is not None})

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """Deliver each message in a task of its own.

        All are checked before the first is sent.

        Returns:
            How many messages were accepted. Messages that the pool has dropped are logged, and not counted.

        Raises:
            ValueError: A header or an address is invalid. No message is sent.
        """
        if _reports_own_failure():
            return 0
        config = self._config
        pool = pools[config.pool]
        using = pool.using(
            retries=config.retries, retry_delay=config.retry_delay, retry_on=TemporaryMailError
        )
        connection = connect(self._mailer, self._options)
        contents = [self._content(message, connection) for message in email_messages if message.recipients()]
        call = partial(deliver, **self._options) if self._options else deliver
        return sum(self._spawn(using.spawn, call, content) for content in contents)

    def _content(self, message: EmailMessage, connection: Any) -> Any:
        """Check `message`, and return what a task is given of it."""
        headers = fixed_headers(message)
        check_addresses(message, connection)
        config = conf.pool_config(self._config.pool)
        if config is not None and config.handoff_to is not None:
            fields = to_fields(message, headers)
            if fields is not None:
                return fields
        return copied(message), headers

    def _spawn(self, spawn: Any, call: Any, content: Any) -> bool:
        try:
            return cast(bool, spawn(NAME, call, self._mailer, content))
        except Exception:  # in the MODE "inline", what it was delivered with
            if not self.fail_silently:
                raise
            return False


def connect(mailer: str | None, options: Mapping[str, Any]) -> Any:
    """Return the backend that delivers: of an alias in MAILERS, or with None as BGTASKS_MAIL says.

    Raises:
        ImproperlyConfigured: It would give the message back to a pool.
    """
    if mailer is not None:
        connection: Any = cast(Any, mail).mailers[mailer]
    else:
        # Without an alias, Django 6.1 would warn that the backend is not one of MAILERS.
        alias = {"alias": None} if HAS_MAILERS else {}
        connection = import_string(mail_config().backend)(**alias, **options)
    if isinstance(connection, EmailBackend):
        raise ImproperlyConfigured(
            f"the mailer {mailer!r} delivers nothing: it is a bgtasks.mail.EmailBackend"
        )
    return connection


def check_addresses(message: EmailMessage, connection: Any) -> None:
    """Raise ValueError here for an address that the SMTP backend would refuse later."""
    prepare = getattr(connection, "prep_address", None)
    if prepare is None:
        if not isinstance(connection, smtp.EmailBackend):
            return
        sanitize: Any = import_string("django.core.mail.message.sanitize_address")  # before Django 6.0
        prepare = partial(sanitize, encoding=message.encoding or settings.DEFAULT_CHARSET)
    for address in (message.from_email, *message.recipients()):
        prepare(address)


# The task.


def deliver(
    mailer: str | None, content: tuple[EmailMessage, dict[str, str]] | dict[str, Any], **options: Any
) -> None:
    """Deliver one message, on a connection of its own.

    Args:
        mailer: As for ``connect``.
        content: The message and its headers that stay the same, or both as fields of JSON.
        **options: As for ``connect``.

    Raises:
        TemporaryMailError: The mail server could not be reached, or has asked to try again later.
        Exception: Whatever else the backend raises. It would raise the same another time.
    """
    message, headers = (from_fields(content), content["headers"]) if isinstance(content, dict) else content
    connection = connect(mailer, options)
    try:
        connection.open()
        with fixed(message, headers) as twin:
            connection.send_messages([twin])
    except Exception as error:
        if is_temporary(error):
            reason = "".join(traceback.format_exception_only(error)).strip()
            raise TemporaryMailError(f"the mail could not be delivered: {reason}") from error
        raise
    finally:
        # Either the server has the message, which must not be sent again, or we know the error that matters.
        with suppress(Exception):
            connection.close()


def is_temporary(error: Exception) -> bool:
    """Tell whether the same message may be taken if it is sent again later."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return any(_is_4xx(code) for code, _ in error.recipients.values())
    if isinstance(error, smtplib.SMTPResponseException):
        return _is_4xx(error.smtp_code)
    if isinstance(error, smtplib.SMTPException):
        return isinstance(error, smtplib.SMTPServerDisconnected)
    status = getattr(error, "status_code", None)  # of the API of a mail service, as django-anymail has it
    if isinstance(status, int):
        return status == TOO_MANY_REQUESTS or status >= SERVER_ERROR
    if isinstance(error, NETWORK):
        return not isinstance(error, ssl.SSLCertVerificationError)
    requests: Any = sys.modules.get("requests")
    if requests is not None and isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return True
    return isinstance(error, OSError) and error.errno in UNREACHABLE


def _is_4xx(code: int) -> bool:
    return code // 100 == 4  # noqa: PLR2004  # SMTP: try again later


def _reports_own_failure() -> bool:
    """Tell whether what is sent here reports that a mail was not delivered, as AdminEmailHandler does.

    That mail would not be delivered either, and the next one would tell of it.
    """
    task = current_task()
    if task is not None and _is_delivery(task.function):
        return True
    # On the worker of an engine, and in the MODE "inline".
    error = sys.exception()
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    return any(frame.f_code is deliver.__code__ for frame, _ in frames)


def _is_delivery(function: Any) -> bool:
    return getattr(function, "func", function) is deliver


# The settings.


def mail_config() -> MailConfig:
    """Return the setting BGTASKS_MAIL.

    Raises:
        InvalidSettings: It has a mistake.
    """
    value: Any = getattr(settings, "BGTASKS_MAIL", {})
    for problem in problems(value):
        raise InvalidSettings(f"{problem.message} {problem.hint} ({problem.id})")
    return MailConfig(**{key.lower(): option for key, option in value.items()})


def problems(value: Any) -> Iterator[Problem]:
    """Yield every mistake in `value`, the setting BGTASKS_MAIL."""
    if not isinstance(value, Mapping):
        yield _no_dictionary("BGTASKS_MAIL", value, 'Write BGTASKS_MAIL = {"POOL": "default"}.')
        return
    known = [name.upper() for name in MailConfig._fields]
    hint = f"The options are {', '.join(map(repr, known))}."
    yield from _option_problems("BGTASKS_MAIL", cast("Mapping[str, Any]", value), known, hint)


MAILER_OPTIONS = ["pool", "retries", "retry_delay", "fail_silently"]  # beside "mailer"
MAILER_HINT = (
    f"The options are 'mailer', {', '.join(map(repr, MAILER_OPTIONS))}; those of a mail server belong to the "
    "mailer that delivers."
)


def mailers_problems(mailers: Any) -> Iterator[Problem]:
    """Yield every mistake in the mailers of `mailers`, the setting MAILERS, that send through a pool."""
    if not isinstance(mailers, Mapping):
        return  # Django will say so
    entries = cast("Mapping[str, Any]", mailers)
    ours = {alias: entry for alias, entry in entries.items() if _backend_of(entry) == PATH}
    for alias, entry in ours.items():
        where, value = f"MAILERS[{alias!r}]['OPTIONS']", entry.get("OPTIONS", {})
        if not isinstance(value, Mapping):
            yield _no_dictionary(where, value, 'Write {"mailer": "smtp"}.')
            continue
        options = dict(cast("Mapping[str, Any]", value))
        target = options.pop("mailer", None)
        if target not in list(entries) or target in list(ours):  # it need not be hashable
            others = ", ".join(repr(each) for each in entries if each not in ours) or "no other one"
            yield Problem(
                "bgtasks.E064",
                f"{where}['mailer'] is {target!r}, which is not the alias of a mailer that delivers.",
                f"Name one that is not a bgtasks.mail.EmailBackend itself. MAILERS defines: {others}.",
            )
        yield from _option_problems(where, options, MAILER_OPTIONS, MAILER_HINT)


def _no_dictionary(where: str, value: Any, hint: str) -> Problem:
    return Problem("bgtasks.E060", f"{where} is {value!r}, not a dictionary of options.", hint)


def without_timeout() -> Iterator[str]:
    """Yield where to set the time-out of each SMTP backend that delivers and has none."""
    mailers: Any = getattr(settings, "MAILERS", None)
    if mailers is not None:
        ours = [entry for entry in mailers.values() if _backend_of(entry) == PATH]
        targets = {entry["OPTIONS"]["mailer"] for entry in ours}
        yield from (f"MAILERS[{each!r}]['OPTIONS']['timeout']" for each in targets if _waits_forever(each))
    elif settings.EMAIL_BACKEND == PATH and _waits_forever(None):
        yield "EMAIL_TIMEOUT"


def _waits_forever(mailer: str | None) -> bool:
    try:
        connection = connect(mailer, {})
    except Exception:
        return False  # the first mail will say what is wrong
    return isinstance(connection, smtp.EmailBackend) and connection.timeout is None


def _backend_of(entry: Any) -> Any:
    return cast("Mapping[str, Any]", entry).get("BACKEND") if isinstance(entry, Mapping) else None


def _option_problems(
    where: str, options: Mapping[str, Any], known: list[str], hint: str
) -> Iterator[Problem]:
    for key, value in options.items():
        here = f"{where}[{key!r}]"
        if key not in known:
            yield Problem("bgtasks.E061", f"{here} is not an option of mails.", hint)
        elif key.lower() == "pool":
            if value not in list(conf.configured()):
                pools = f"BGTASKS defines: {', '.join(map(repr, conf.configured()))}."
                yield Problem("bgtasks.E063", f"{here} is {value!r}, which is not a pool.", pools)
        elif (expected := _expected(key.lower(), value)) is not None:
            yield Problem(
                "bgtasks.E062", f"{here} is {value!r}, which is not {expected}.", HINTS[key.lower()]
            )


HINTS = {
    "backend": "BACKEND is the backend that delivers: Django's for SMTP by default.",
    "retries": "RETRIES is how many times a mail that the server could not take is retried: 10 by default.",
    "retry_delay": "RETRY_DELAY is in seconds: 1.0 by default.",
    "fail_silently": "fail_silently is True or False, the default.",
}


def _expected(key: str, value: Any) -> str | None:
    """Return what `value` should be instead; None if it is right."""
    if key == "retries":
        return None if type(value) is int and value >= 0 else "a whole number, 0 or more"
    if key == "retry_delay":
        is_right = type(value) in {int, float} and 0 <= value < inf
        return None if is_right else "a number of seconds, 0 or more"
    if key == "fail_silently":
        return None if type(value) is bool else "True or False"
    try:
        works = value != PATH and callable(import_string(value))
    except Exception:
        works = False
    return None if works else "the path of a mail backend that delivers"
