"""Mails through a pool, delivered by the backend that the settings name, to a real mail server."""

import email.message
import gc
import json
import logging
import smtplib
import socket
import ssl
import weakref
from collections.abc import Callable, Iterator, Sequence
from email.mime.base import MIMEBase
from email.mime.image import MIMEImage
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any, ClassVar

import django
import pytest
from django.contrib.auth.models import User
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.core.mail.backends.base import BaseEmailBackend
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import include, path
from django.utils.html import format_html
from django.utils.log import AdminEmailHandler
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy
from pytest_django import Settings

import bgtasks
from bgtasks.checks import check_mail
from bgtasks.core.log import logger
from bgtasks.exceptions import InvalidSettings
from bgtasks.mail import EmailBackend, is_temporary
from bgtasks.messages import CONNECTIONS, fixed, fixed_headers, from_fields, to_fields
from tests.gate import BOUND, Gate, wait_until
from tests.mail_server import MailServer
from tests.pool import Logs

OURS = "bgtasks.mail.EmailBackend"
SMTP = "django.core.mail.backends.smtp.EmailBackend"
LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
FAST = {"RETRIES": 10, "RETRY_DELAY": 0.001}
PIXEL = bytes.fromhex("89504e470d0a1a0a") + b"not really a picture\r\n\x00\xff"

# What Django 6.1 says of EMAIL_BACKEND and of what goes with it. It has nothing to say of bgtasks.
OLD = ["The EMAIL_", r"get_connection\(\)", "The 'fail_silently'", "The 'auth_user'", "The 'connection'"]

pytestmark = [
    pytest.mark.filterwarnings(*(f"ignore:{start}" for start in OLD)),
    pytest.mark.usefixtures("django_mail_patch_dns"),
]
has_mailers = pytest.mark.skipif(django.VERSION < (6, 1), reason="MAILERS is new in 6.1")
has_tasks = pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks is new in 6.0")

Use = Callable[..., None]


# The settings of both generations.


def by_email_backend(settings: Settings, backend: str, options: dict[str, Any], config: Any) -> None:
    if hasattr(settings, "MAILERS"):
        del settings.MAILERS
    settings.EMAIL_BACKEND = OURS
    for name, value in options.items():
        setattr(settings, f"EMAIL_{name.upper()}", value)
    settings.BGTASKS_MAIL = {"BACKEND": backend, **config}


def by_mailers(settings: Settings, backend: str, options: dict[str, Any], config: Any) -> None:
    ours = {"mailer": "out", **{key.lower(): value for key, value in config.items()}}
    settings.MAILERS = {
        "default": {"BACKEND": OURS, "OPTIONS": ours},
        "out": {"BACKEND": backend, "OPTIONS": options},
    }


@pytest.fixture(params=[by_email_backend, pytest.param(by_mailers, marks=has_mailers)])
def use(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Use]:
    """Send mails by a backend, with options of it, and with those of bgtasks in capitals."""

    def use(backend: str = SMTP, options: dict[str, Any] | None = None, **config: Any) -> None:
        request.param(settings, backend, options or {}, {**FAST, **config})

    yield use
    bgtasks.drain(BOUND)


def smtp(server: MailServer) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": server.port}


def message(subject: str = "hello", to: str = "ada@example.com", **more: Any) -> EmailMultiAlternatives:
    return EmailMultiAlternatives(subject, "text", "site@example.com", [to], **more)


def send(subject: str) -> int:
    return mail.send_mail(subject, "text", None, ["ada@example.com"])


def stats() -> bgtasks.PoolStats:
    assert bgtasks.drain(BOUND)
    return bgtasks.stats()["default"]


@pytest.fixture(autouse=True)
def fresh(settings: Settings) -> None:
    settings.BGTASKS = {"default": {"CAPACITY": 2000}}


# A site.


def sign_up(request: HttpRequest) -> HttpResponse:
    name = request.POST["name"]
    count = mail.send_mail(f"welcome {name}", "text", None, [f"{name}@example.com"])
    return HttpResponse(str(count))


def newsletter(request: HttpRequest) -> HttpResponse:
    number = request.POST["number"]
    batch = [(f"news {number} for {n}", "text", None, [f"reader{n}@example.com"]) for n in range(10)]
    return HttpResponse(str(mail.send_mass_mail(batch)))


urlpatterns = [
    path("sign-up/", sign_up),
    path("newsletter/", newsletter),
    path("accounts/", include("django.contrib.auth.urls")),
]


@pytest.mark.parametrize("mails", [100, pytest.param(1000, marks=pytest.mark.servers)])
def test_a_site_loses_no_mail_to_a_server_that_refuses_connections(
    mails: int, use: Use, settings: Settings
) -> None:
    """Each mail is delivered, once, while every third connection is refused."""
    settings.ROOT_URLCONF = __name__
    client = Client()
    with MailServer(refuse_every=3) as server:
        use(options=smtp(server))
        singles, batches = range(mails // 2), range(mails // 20)
        answers = {client.post("/sign-up/", {"name": f"user{n}"}).content for n in singles}
        answers |= {client.post("/newsletter/", {"number": n}).content for n in batches}
        assert bgtasks.drain(5 * BOUND)
        figures = bgtasks.stats()["default"]

        expected = [f"welcome user{n}" for n in singles]
        expected += [f"news {number} for {n}" for number in batches for n in range(10)]
        assert answers == {b"1", b"10"}
        assert sorted(server.subjects) == sorted(expected)
        assert server.connections > 1.4 * mails
        assert (figures.succeeded, figures.failed, figures.dropped) == (mails, 0, 0)


@pytest.mark.django_db(databases=["default"])
def test_djangos_password_reset_is_mailed(use: Use, settings: Settings) -> None:
    """The view of django.contrib.auth, which knows nothing of tasks."""
    settings.ROOT_URLCONF = __name__
    User.objects.create_user("ada", "ada@example.com", "a password")
    with MailServer() as server:
        use(options=smtp(server))
        response = Client().post("/accounts/password_reset/", {"email": "ada@example.com"})
        figures = stats()

        assert response.status_code == 302
        assert server.recipients == [["ada@example.com"]]
        assert "/accounts/reset/" in server.accepted[0].get_content()
        assert figures.succeeded == 1


@pytest.mark.django_db(transaction=True, databases=["default"])
def test_mail_in_a_transaction_that_rolls_back_is_sent(use: Use) -> None:
    """As with every mail backend: who wants it otherwise sends it on commit."""
    with MailServer() as server:
        use(options=smtp(server))
        with transaction.atomic():
            send("at once")
            transaction.on_commit(lambda: send("on commit"))
            bgtasks.spawn_on_commit("notify", send, "by a task on commit")
            transaction.set_rollback(True)
        stats()

        assert server.subjects == ["at once"]


# In the caller.


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject": "two\nlines"},
        {"to": "one@example.com, two@example.com"},
        {"bcc": ["a@example.com\nRCPT TO:<b@example.com>"]},
        {"headers": {"X-Wrong": "two\nlines"}},
    ],
)
def test_mistake_in_a_mail_is_raised_in_the_caller(wrong: dict[str, Any], use: Use) -> None:
    """No mail of the batch is sent, not even those before it."""
    with MailServer() as server:
        use(options=smtp(server))
        with pytest.raises(ValueError):
            mail.get_connection().send_messages([message("right"), message(**wrong)])

        assert stats().spawned == 0


def test_mail_is_what_it_was_when_it_was_sent(use: Use) -> None:
    """What its owner changes afterwards changes nothing, and the owner's message is not changed."""
    with MailServer() as server, Gate() as gate:
        use(options=smtp(server))
        hold_all(gate)
        mine = message("first", headers={"X-Shop": "1"})
        mine.attach("a.txt", "attached", "text/plain")
        before = {name: repr(value) for name, value in vars(mine).items() if "connection" not in name}
        mine.send()
        after = {name: repr(value) for name, value in vars(mine).items() if "connection" not in name}
        mine.subject, mine.body = "second", "other"
        mine.to.append("eve@example.com")
        mine.attachments.clear()
        mine.extra_headers["X-Shop"] = "2"
        gate.open()
        stats()

        [sent] = server.accepted
        assert before == after
        assert (sent["Subject"], sent["X-Shop"]) == ("first", "1")
        assert server.recipients == [["ada@example.com"]]
        assert [part.get_filename() for part in sent.iter_attachments()] == ["a.txt"]


def test_mail_is_what_it_was_down_to_its_parts(use: Use) -> None:
    """A part of a mail, and a dictionary in a dictionary, may be changed afterwards as well."""
    use(LOCMEM)
    mine, part = message(), MIMEText("attached")
    vars(mine)["merge_data"] = {"ada@example.com": {"name": "Ada"}}
    mine.attachments.append(part)
    with Gate() as gate:
        hold_all(gate)
        mine.send()
        vars(mine)["merge_data"]["ada@example.com"]["name"] = "Eve"
        part["X-Changed"] = "yes"
        gate.open()
        stats()

    [sent] = mail.outbox
    [sent_part] = sent.attachments
    assert vars(sent)["merge_data"] == {"ada@example.com": {"name": "Ada"}}
    assert "X-Changed" not in sent_part


class Watcher(BaseEmailBackend):
    """Has a weak reference to each message, and changes it, as a backend of a project may."""

    seen: ClassVar[list[weakref.ref[EmailMessage]]] = []
    subjects: ClassVar[list[str]] = []

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        for each in email_messages:
            each.subject = f"[site] {each.subject}"
            self.subjects.append(each.subject)
            self.seen.append(weakref.ref(each))
        if len(self.seen) < 3:
            raise ConnectionResetError
        return len(email_messages)


def test_mail_is_freed_as_soon_as_it_is_sent(use: Use) -> None:
    """Its attachments may be large. And each try has the message as it was sent."""
    Watcher.seen.clear()
    Watcher.subjects.clear()
    use(f"{__name__}.Watcher")
    gc.disable()  # which would free it in the end, one day
    try:
        send("hello")
        stats()
        alive = [seen() is not None for seen in Watcher.seen]
    finally:
        gc.enable()

    assert alive == [False, False, False]
    assert Watcher.subjects == ["[site] hello"] * 3


def hold_all(gate: Gate) -> None:
    """Have every slot of the default pool held."""
    for _ in range(8):
        bgtasks.spawn("held", gate)
    gate.wait_entered(8)


def test_dropped_mail_lowers_the_count(
    use: Use, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue with one place left takes one of three, and the warning names the task."""
    settings.BGTASKS = {"default": {"CAPACITY": 1}}
    with MailServer() as server, Gate() as gate:
        use(options=smtp(server))
        hold_one_by_one(gate)
        batch = [(f"mail {n}", "text", None, ["ada@example.com"]) for n in range(3)]
        count = mail.send_mass_mail(batch)
        gate.open()
        stats()

        assert count == 1
        assert server.subjects == ["mail 0"]
        wait_until(lambda: any("task 'mail' dropped" in line for line in caplog.messages))


def hold_one_by_one(gate: Gate) -> None:
    for n in range(8):
        bgtasks.spawn("held", gate)
        gate.wait_entered(n + 1)


def test_mail_without_recipients_is_none(use: Use) -> None:
    """It is not counted, as by Django's own backend."""
    use(LOCMEM)
    count = mail.get_connection().send_messages([message(to="")])

    assert (count, stats().spawned) == (0, 0)


# On the wire.


def test_all_parts_of_a_mail_arrive(use: Use) -> None:
    """Alternatives, attachments, an inline image, headers, and a recipient whom no header names."""
    with MailServer() as server:
        use(options=smtp(server))
        rich().send()
        stats()

        [sent] = server.accepted
        check_rich(sent)
        assert server.recipients == [["ada@example.com", "cc@example.com", "bcc@example.com"]]
        assert "bcc@example.com" not in sent.as_string()


def rich() -> EmailMultiAlternatives:
    """Return a mail with one of everything."""
    mail = message("Grüße", cc=["cc@example.com"], bcc=["bcc@example.com"], reply_to=["re@example.com"])
    mail.body = "Grüße\nFrom here on\n"
    mail.attach_alternative("<b>Grüße</b><img src='cid:pixel'>", "text/html")
    mail.attach_alternative(b"\x00\xff", "application/x-binary")
    mail.attach("a.txt", "From: attached ü", "text/plain")
    mail.attach("b.bin", PIXEL, "application/octet-stream")
    image = MIMEImage(PIXEL, "png")
    image.add_header("Content-ID", "<pixel>")
    mail.attachments.append(image)
    mail.attachments.append(MIMEText("From the older interface", "x-note"))
    mail.attachments.append(new_part())
    mail.extra_headers["X-Shop"] = "Grüße"
    return mail


def new_part() -> Any:
    """Return a part that Python's newer interface has made, which Django takes from 6.0 on."""
    part: Any = email.message.MIMEPart() if django.VERSION >= (6, 0) else MIMEImage(PIXEL, "gif")
    if django.VERSION >= (6, 0):
        part.set_content(PIXEL, maintype="image", subtype="gif", disposition="inline", cid="<gif>")
    return part


def check_rich(sent: Any) -> None:
    """Fail unless `sent`, which a server has got, is that mail."""
    parts = {part.get_content_type(): part for part in sent.walk() if not part.is_multipart()}
    plain, attached = [part for part in sent.walk() if part.get_content_type() == "text/plain"]
    assert (sent["Subject"], sent["X-Shop"], sent["Reply-To"]) == ("Grüße", "Grüße", "re@example.com")
    assert plain.get_content().splitlines() == ["Grüße", "From here on"]
    assert (attached.get_filename(), attached.get_content().strip()) == ("a.txt", "From: attached ü")
    assert parts["text/html"].get_content().strip() == "<b>Grüße</b><img src='cid:pixel'>"
    assert parts["application/x-binary"].get_payload(decode=True) == b"\x00\xff"
    assert (parts["image/png"]["Content-ID"], parts["image/png"].get_payload(decode=True)) == (
        "<pixel>",
        PIXEL,
    )
    assert parts["image/gif"].get_payload(decode=True) == PIXEL
    assert parts["application/octet-stream"].get_payload(decode=True) == PIXEL


def test_date_and_message_id_are_those_of_the_first_try(use: Use) -> None:
    """A server that got the mail twice after all, and any reader, can tell that it is the same."""
    with MailServer(answer=lambda server: "451 later" if len(server.offered) < 3 else "250 OK") as server:
        use(options=smtp(server))
        message("mine", headers={"message-id": "<mine@example.com>"}).send()
        stats()
        send("Django's")
        stats()

        assert server.offered[:3] == ["<mine@example.com>"] * 3
        assert server.subjects == ["mine", "Django's"]
        assert all(sent["Date"] and len(sent.get_all("Message-ID", [])) == 1 for sent in server.accepted)


def test_mail_that_the_server_has_is_not_sent_again(use: Use) -> None:
    """Whatever happens after the server has accepted it: here, an answer to QUIT that smtplib chokes on."""
    with MailServer(quit_line="221 " + "x" * 9000) as server:
        use(options=smtp(server))
        send("once")
        figures = stats()

        assert (server.subjects, server.connections) == (["once"], 1)
        assert (figures.succeeded, figures.retried) == (1, 0)


@pytest.mark.parametrize(
    ("to", "tries", "kind"),
    [
        ("unknown", 1, "SMTPRecipientsRefused"),
        ("greylisted", 3, "TemporaryMailError"),
    ],
)
def test_only_what_may_succeed_later_is_tried_again(
    to: str, tries: int, kind: str, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A 5xx answer is final, a 4xx answer is not. The log says what it was in the end."""
    answers = {"unknown": "550 No such user", "greylisted": "450 Try again later"}
    with MailServer(answers=answers) as server:
        use(options=smtp(server), RETRIES=2)
        message(to=f"{to}@example.com").send()
        figures = stats()

        assert server.connections == tries
        assert (figures.failed, figures.retried) == (1, tries - 1)
        assert any(f"task 'mail' of pool 'default' failed: {kind}" in line for line in caplog.messages)
        retries = [line for line in caplog.messages if line.startswith("try 1 of task 'mail'")]
        assert len(retries) == (tries > 1)
        assert all("Try again later" in line for line in retries)  # not only that there was an error


def test_batch_repeats_only_what_was_not_sent(use: Use) -> None:
    """Each message is a task of its own."""
    with MailServer(answers={"greylisted": "450 Try again later"}) as server:
        use(options=smtp(server), RETRIES=2)
        people = ["ada", "greylisted", "grace"]
        mail.send_mass_mail([(name, "text", None, [f"{name}@example.com"]) for name in people])
        figures = stats()

        assert sorted(server.subjects) == ["ada", "grace"]
        assert (figures.succeeded, figures.failed, figures.retried) == (2, 1, 2)


class AnswerError(Exception):
    """The error of a mail service's API."""

    def __init__(self, status_code: int) -> None:
        super().__init__()
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (socket.gaierror(socket.EAI_AGAIN, "no name server"), True),
        (OSError(113, "No route to host"), True),
        (ssl.SSLError("bad record"), True),
        (ssl.SSLCertVerificationError("expired"), False),
        (PermissionError(), False),
        (ValueError(), False),
        (smtplib.SMTPServerDisconnected(), True),
        (smtplib.SMTPConnectError(421, "busy"), True),
        (smtplib.SMTPConnectError(554, "no"), False),
        (smtplib.SMTPAuthenticationError(535, "no"), False),
        (smtplib.SMTPAuthenticationError(454, "later"), True),
        (smtplib.SMTPNotSupportedError(), False),
        (smtplib.SMTPRecipientsRefused({"a": (550, b""), "b": (450, b"")}), True),
        (smtplib.SMTPRecipientsRefused({"a": (550, b"")}), False),
        (AnswerError(429), True),
        (AnswerError(503), True),
        (AnswerError(400), False),
    ],
    ids=repr,
)
def test_which_errors_are_temporary(error: Exception, expected: bool) -> None:
    """Those of the network, and those by which a server asks for another try."""
    assert is_temporary(error) is expected


def test_answer_of_a_mail_service_that_does_not_come_is_temporary() -> None:
    """An error of requests, by which the backends for the API of a mail service ask it."""
    requests = pytest.importorskip("requests")

    assert is_temporary(requests.ReadTimeout())
    assert not is_temporary(requests.TooManyRedirects())


# Backends.


def test_console_writes_it(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    use("django.core.mail.backends.console.EmailBackend")
    send("on the console")
    stats()

    assert "Subject: on the console" in capsys.readouterr().out


def test_files_are_written(use: Use, tmp_path: Path) -> None:
    use("django.core.mail.backends.filebased.EmailBackend", {"file_path": str(tmp_path)})
    send("in a file")
    send("in another")
    stats()

    texts = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "Subject: in a file" in texts
    assert "Subject: in another" in texts


class Card(EmailMessage):
    """A project's own kind of message."""

    def message(self, *args: Any, **kwargs: Any) -> Any:
        rendered = super().message(*args, **kwargs)
        rendered["X-Card"] = "yes"
        return rendered


def test_locmem_keeps_the_message_as_it_was_sent(use: Use) -> None:
    """Its class, its attributes, and how it is rendered are those of the project."""
    use(LOCMEM)
    card = Card("card", "text", None, ["ada@example.com"])
    vars(card)["tags"] = ["birthday"]
    card.send()
    stats()

    [sent] = mail.outbox
    assert type(sent) is Card
    assert vars(sent)["tags"] == ["birthday"]
    assert sent.message()["X-Card"] == "yes"
    assert sent.extra_headers == {}


def test_copy_knows_no_connection(use: Use) -> None:
    """The one that it was sent by may hold a socket, and what delivers is another one."""
    use(LOCMEM)
    send("hello")
    stats()

    [sent] = mail.outbox
    assert {vars(sent)[name] for name in CONNECTIONS & vars(sent).keys()} == {None}


def test_anymail_gets_the_attributes(use: Use) -> None:
    """What django-anymail adds to messages, and no header that the API of a service might refuse."""
    use("anymail.backends.test.EmailBackend")
    sent = message("hello", headers={"X-Shop": "1"})
    vars(sent).update(tags=["welcome"], metadata={"user": 7}, merge_global_data={"name": "Ada"})
    sent.send()
    stats()

    [got] = mail.outbox
    params = vars(got)["anymail_test_params"]
    assert (params["tags"], params["metadata"]) == (["welcome"], {"user": 7})
    assert params["merge_global_data"] == {"name": "Ada"}
    assert dict(params["extra_headers"]) == {"X-Shop": "1"}


def test_mail_service_that_is_not_reached_is_tried_again(use: Use, settings: Settings) -> None:
    """django-anymail raises an error of its own, which is one of requests as well."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        settings.ANYMAIL = {
            "POSTMARK_SERVER_TOKEN": "token",
            "POSTMARK_API_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}/",
        }
        use("anymail.backends.postmark.EmailBackend", RETRIES=2)
        send("hello")
        figures = stats()

    assert (figures.failed, figures.retried) == (1, 2)


def test_credentials_are_passed_on(settings: Settings) -> None:
    """``auth_user`` of send_mail, before MAILERS: the task logs in with it, and no engine ever sees it."""
    settings.BGTASKS = {"default": {"HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}}
    with MailServer() as server, Logs() as logs:
        by_email_backend(settings, SMTP, smtp(server), FAST)
        mail.send_mail("hello", "text", None, ["ada@example.com"], auth_user="me", auth_password="secret")
        stats()

    assert server.accepted == []
    assert logs.of("failed: SMTPNotSupportedError")  # the server has no AUTH
    assert not logs.of("secret")


# Nobody is told by mail that a mail has failed.


@pytest.fixture
def admins(settings: Settings) -> Iterator[Callable[[int], None]]:
    """Have the admins told by mail of what bgtasks logs, from a level up."""
    settings.ADMINS = ["admin@example.com"] if django.VERSION >= (6, 0) else [("Admin", "admin@example.com")]
    handler = AdminEmailHandler()
    yield lambda level: (handler.setLevel(level), logger.addHandler(handler))[1]
    logger.removeHandler(handler)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("answer", ["550 No such user", "450 Try again later"])
def test_failed_mail_is_not_mailed(level: int, answer: str, admins: Callable[[int], None], use: Use) -> None:
    """Neither its end nor its tries: the mail about it would fail like it, and so on."""
    with MailServer(answers={"ada": answer}) as server:
        use(options=smtp(server), RETRIES=1)
        admins(level)
        send("hello")
        stats()
        figures = stats()

        assert (figures.spawned, figures.failed) == (1, 1)
        assert server.accepted == []


def test_failed_mail_with_credentials_is_not_mailed(
    admins: Callable[[int], None], settings: Settings
) -> None:
    """Nor are its tries, of which the log tells without an exception."""
    with MailServer(answer=lambda _server: "451 later") as server:
        by_email_backend(settings, SMTP, smtp(server), {"RETRIES": 1, "RETRY_DELAY": 0.001})
        admins(logging.WARNING)
        connection: Any = mail.get_connection(timeout=60)  # an option of the delivery, as credentials are
        connection.send_messages([message()])
        stats()
        figures = stats()

    assert (figures.spawned, figures.failed) == (1, 1)


@has_tasks
def test_options_that_were_not_given_do_not_keep_a_mail_from_travelling(settings: Settings) -> None:
    """send_mail gives None for them, and get_connection a word of its own."""
    from tests import broker

    by_email_backend(settings, LOCMEM, {}, FAST)
    settings.TASKS = {"engine": {"BACKEND": "tests.broker.Broker", "QUEUES": []}}
    settings.BGTASKS = {"default": {"HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}}
    broker.enqueued.clear()
    EmailBackend(username=None, password=None, _ignore_unknown_kwargs=True).send_messages([message()])

    assert stats().handed_off == 1


def test_failure_of_another_task_is_mailed_once(admins: Callable[[int], None], use: Use) -> None:
    """By a mail that fails as well, and that nobody is told of by mail."""
    with MailServer(answers={"admin": "550 No such user"}) as server:
        use(options=smtp(server))
        admins(logging.ERROR)
        bgtasks.spawn("divide", divmod, 1, 0)
        stats()
        figures = stats()

        assert (figures.spawned, figures.failed, server.connections) == (2, 2, 1)


def test_mail_that_hangs_is_not_mailed(admins: Callable[[int], None], use: Use, settings: Settings) -> None:
    """The watchdog reports it from a thread of its own."""
    settings.BGTASKS = {"default": {"TASK_TIMEOUT": 1}}
    admins(logging.ERROR)  # before Logs: what it has seen, the admins were told of
    with socket.socket() as silent, Logs() as logs:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use(options={"host": "127.0.0.1", "port": silent.getsockname()[1]}, RETRIES=0)
        send("hello")
        logs.wait("task 'mail' of pool 'default' has been running for more than 1 s")
        spawned = bgtasks.stats()["default"].spawned
        silent.accept()[0].close()
        stats()

    assert spawned == 1


# fail_silently, and tasks that run at once.


def test_inline_failure_goes_up_unless_silent(use: Use, settings: Settings) -> None:
    """In the MODE "inline" the sender hears of it, as without bgtasks."""
    settings.BGTASKS = {"default": {"MODE": "inline"}}
    with MailServer(answers={"ada": "550 No such user"}) as server:
        use(options=smtp(server))
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send("hello")
        silent = mail.get_connection(fail_silently=True)

        assert silent.send_messages([message(), message(to="grace@example.com")]) == 1
        assert server.recipients == [["grace@example.com"]]


def test_silent_failure_is_tried_again_and_logged(use: Use) -> None:
    """``fail_silently`` is about the sender, not about the mail."""
    with MailServer(answers={"ada": "450 Try again later"}) as server, Logs() as logs:
        use(options=smtp(server), RETRIES=1)
        count = mail.get_connection(fail_silently=True).send_messages([message()])
        figures = stats()

    assert (count, figures.retried) == (1, 1)
    assert logs.of("task 'mail' of pool 'default' failed: TemporaryMailError")


# Handoff.


def kinds_of_mail() -> list[EmailMessage]:
    html = EmailMessage(gettext_lazy("January"), mark_safe("<b>text</b>"), None, ["ada@example.com"])  # noqa: S308
    html.content_subtype = "html"
    html.encoding = "iso-8859-1"
    tagged = message(format_html("{}", "hello"))
    vars(tagged).update(tags=["welcome"], metadata={"user": 7})
    return [html, tagged, rich()]


@pytest.mark.parametrize("number", range(3))
def test_mail_comes_out_of_json_as_it_went_in(number: int) -> None:
    """Rendered, it is the same text; its attributes are those that another backend reads."""
    original = kinds_of_mail()[number]
    headers = fixed_headers(original)
    arrived = from_fields(json.loads(json.dumps(to_fields(original, headers))))

    kinds, arrived_kinds = (
        [isinstance(part, MIMEBase) for part in each.attachments] for each in (original, arrived)
    )
    assert type(arrived) is type(original)
    assert arrived_kinds == kinds
    with fixed(arrived, headers) as one, fixed(original, headers) as other:
        assert text_of(one) == text_of(other)
    for name, value in vars(original).items():
        if "connection" not in name and name != "attachments":
            assert vars(arrived)[name] == value


def text_of(mail: EmailMessage) -> str:
    """Return the mail with the same boundaries, which are random, each time."""
    rendered: Any = mail.message()
    for number, part in enumerate(part for part in rendered.walk() if part.is_multipart()):
        part.set_boundary(f"boundary-{number}")
    return str(rendered.as_bytes(), "utf-8", "replace")


@pytest.mark.parametrize(
    "stays",
    [
        Card("card", "text", "site@example.com", ["ada@example.com"]),
        message(headers={"X-Path": Path("file")}),
        EmailMessage(
            "m", "text", "a@example.com", ["b@example.com"], attachments=[("a", message(), "message/rfc822")]
        ),
    ],
    ids=["class", "attribute", "attachment"],
)
def test_mail_that_json_cannot_hold_does_not_travel(stays: EmailMessage) -> None:
    """A class of its own may do anything, and the worker may not have it."""
    assert to_fields(stays, {}) is None


@has_tasks
def test_mail_is_handed_off_as_json(use: Use, settings: Settings) -> None:
    """What the engine has been given is delivered by its worker; what cannot travel is delivered here."""
    from bgtasks.handoff import payload
    from tests import broker

    settings.TASKS = {"engine": {"BACKEND": "tests.broker.Broker", "QUEUES": []}}
    settings.BGTASKS = {"default": {"HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}}
    broker.enqueued.clear()
    with MailServer() as server, Logs() as logs:
        use(options=smtp(server))
        rich().send()
        Card("card", "text", None, ["ada@example.com"]).send()
        figures = stats()
        here = server.subjects
        [result] = broker.enqueued
        payload.run(None, *json.loads(json.dumps(result.args)))

        assert (figures.handed_off, figures.succeeded, here) == (1, 1, ["card"])
        check_rich(server.accepted[1])
        assert logs.of("task 'mail' of pool 'default' cannot be handed off")


@has_tasks
def test_failure_on_a_worker_is_not_mailed(use: Use, settings: Settings) -> None:
    """The worker logs it while it handles the exception, outside of any task of ours."""
    from bgtasks.handoff import payload
    from tests import broker

    settings.TASKS = {"engine": {"BACKEND": "tests.broker.Broker", "QUEUES": []}}
    settings.BGTASKS = {"default": {"HANDOFF_TO": "engine", "HANDOFF_WHEN": "always"}}
    settings.ADMINS = ["admin@example.com"]
    broker.enqueued.clear()
    with MailServer(answers={"ada": "550 No such user"}) as server:
        use(options=smtp(server))
        send("hello")
        stats()
        try:
            payload.run(None, *broker.enqueued[0].args)
        except smtplib.SMTPRecipientsRefused:
            mail.mail_admins("a task has failed", "text")
        handed_off = stats().handed_off
        mail.mail_admins("something else", "text")

        assert (handed_off, stats().handed_off) == (1, 2)


# The settings.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["default"], "bgtasks.E060"),
        ({"Pool": "default"}, "bgtasks.E061"),
        ({"BACKEND": "no.such.Backend"}, "bgtasks.E062"),
        ({"BACKEND": OURS}, "bgtasks.E062"),
        ({"RETRIES": True}, "bgtasks.E062"),
        ({"RETRIES": -1}, "bgtasks.E062"),
        ({"RETRY_DELAY": float("nan")}, "bgtasks.E062"),
        ({"POOL": "mial"}, "bgtasks.E063"),
        ({"POOL": ["default"]}, "bgtasks.E063"),
    ],
)
def test_mistake_is_an_error_of_the_checks_and_of_the_first_mail(
    value: Any, expected: str, settings: Settings
) -> None:
    """Before anything is sent."""
    by_email_backend(settings, LOCMEM, {}, {})
    settings.BGTASKS_MAIL = value
    [problem] = check_mail()

    assert (problem.id, problem.level) == (expected, checks.ERROR)
    with pytest.raises(InvalidSettings, match=expected):
        send("hello")


@has_mailers
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mailer": "out", "pool": "default", "retries": 0, "retry_delay": 1, "fail_silently": True}, None),
        ({}, "bgtasks.E064"),
        ({"mailer": "default"}, "bgtasks.E064"),
        ({"mailer": "missing"}, "bgtasks.E064"),
        ({"mailer": ["out"]}, "bgtasks.E064"),
        ("out", "bgtasks.E060"),
        (None, "bgtasks.E060"),
        ({"mailer": "out", "host": "localhost"}, "bgtasks.E061"),
        ({"mailer": "out", "retries": 1.5}, "bgtasks.E062"),
        ({"mailer": "out", "retry_delay": "1"}, "bgtasks.E062"),
        ({"mailer": "out", "fail_silently": 1}, "bgtasks.E062"),
        ({"mailer": "out", "pool": "mial"}, "bgtasks.E063"),
        ({"mailer": "out", "pool": []}, "bgtasks.E063"),
    ],
)
def test_mistake_in_mailers_is_an_error_of_the_checks(
    options: Any, expected: str | None, settings: Settings
) -> None:
    """The options of each mailer that sends through a pool."""
    settings.MAILERS = {"default": {"BACKEND": OURS, "OPTIONS": options}, "out": {"BACKEND": LOCMEM}}
    found = [each.id for each in checks.run_checks() if str(each.id).startswith("bgtasks.")]

    assert found == ([] if expected is None else [expected])


@has_mailers
def test_hint_names_every_option_of_a_mailer(settings: Settings) -> None:
    """And says where the options of the mail server belong."""
    options = {"mailer": "out", "host": "localhost"}
    settings.MAILERS = {"default": {"BACKEND": OURS, "OPTIONS": options}, "out": {"BACKEND": LOCMEM}}
    [problem] = check_mail()

    assert problem.hint == (
        "The options are 'mailer', 'pool', 'retries', 'retry_delay', 'fail_silently'; "
        "those of a mail server belong to the mailer that delivers."
    )


@has_mailers
@pytest.mark.parametrize(
    "options", [{}, {"mailer": "default"}, {"mailer": "again"}, {"mailer": "out", "host": "a"}]
)
def test_mailer_that_would_deliver_nothing_raises(options: Any, settings: Settings) -> None:
    """At the first mail, if nobody has run the checks."""
    settings.MAILERS = {
        "default": {"BACKEND": OURS, "OPTIONS": options},
        "again": {"BACKEND": OURS, "OPTIONS": {"mailer": "out"}},
        "out": {"BACKEND": LOCMEM},
    }
    with pytest.raises(ImproperlyConfigured, match=r"'(default|again)'"):
        message().send(using="default")


@pytest.mark.parametrize(
    ("backend", "options", "expected"),
    [
        (SMTP, {"host": "localhost"}, ["bgtasks.W060"]),
        (SMTP, {"host": "localhost", "timeout": 10}, []),
        (SMTP, {"host": "localhost", "use_tls": True, "use_ssl": True}, []),  # which raises
        (LOCMEM, {}, []),
    ],
)
def test_smtp_without_a_timeout_is_warned_of(
    backend: str, options: Any, expected: list[str], use: Use
) -> None:
    """A server that says nothing would hold a slot for good."""
    use(backend, options)
    found = check_mail()

    assert [each.id for each in found] == expected
    assert all("Set EMAIL_TIMEOUT to" in hint or "['timeout'] to" in hint for hint in hints(found))


@has_mailers
def test_options_beside_mailers_are_warned_of(settings: Settings) -> None:
    """With MAILERS, BGTASKS_MAIL is not read."""
    settings.MAILERS = {
        "default": {"BACKEND": OURS, "OPTIONS": {"mailer": "out"}},
        "out": {"BACKEND": LOCMEM},
    }
    assert check_mail() == []
    settings.BGTASKS_MAIL = {"RETRIES": 1}

    (found,) = check_mail()
    assert (found.id, found.msg) == ("bgtasks.W061", "BGTASKS_MAIL does not apply to the mailers in MAILERS.")


def hints(found: list[checks.CheckMessage]) -> list[str]:
    return [str(each.hint) for each in found]


def test_smtp_of_another_backend_may_have_no_timeout(settings: Settings) -> None:
    """Mails that do not come by bgtasks hold no slot."""
    by_email_backend(settings, SMTP, {}, {})
    settings.EMAIL_BACKEND = SMTP

    assert check_mail() == []
