"""The background work of a sign-up: a mail that takes its time, and a row that says it went out.

The same task twice, as a function and as a coroutine function: bgtasks runs both.
"""

import time

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.mail import send_mail
from django.db import connection
from django.template.loader import render_to_string

from .live import board
from .models import Delivery, Member


def send_welcome(pk: int) -> None:
    """Send a member's welcome mail and write its receipt; holds a database connection for all of its time.

    Args:
        pk: the member's primary key. A key, not the object: it is read when the task runs.
    """
    started = time.monotonic()
    member = Member.objects.get(pk=pk)
    choose_table()
    send_mail(*_welcome(member))
    Delivery.objects.create(member=member, seconds=time.monotonic() - started)
    board.mail_delivered()


async def asend_welcome(pk: int) -> None:
    """Do what `send_welcome` does, in a coroutine."""
    started = time.monotonic()
    member = await Member.objects.aget(pk=pk)
    await sync_to_async(choose_table)()
    await sync_to_async(send_mail)(*_welcome(member))
    await Delivery.objects.acreate(member=member, seconds=time.monotonic() - started)
    board.mail_delivered()


def choose_table() -> None:
    """Stand in for a heavy query: half of a task's time. The mail server spends the other half."""
    seconds = settings.DEMO_TASK_SECONDS / 2
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", [seconds])
    else:
        time.sleep(seconds)


def _welcome(member: Member) -> tuple[str, str, None, list[str]]:
    """Return the arguments of `send_mail` for a member's welcome mail."""
    body = render_to_string("demo_project/welcome.txt", {"member": member})
    return "You are on the list", body, None, [member.email]
