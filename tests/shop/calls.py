"""The call sites of the shop. No line here says what runs the tasks."""

import asyncio

from django.utils import translation

import bgtasks
from tests.shop import tasks


def order(number: int) -> None:
    """Do for one order what a view would do."""
    with translation.override("fr" if number % 2 else "en"):
        bgtasks.spawn("send-receipt", tasks.send_receipt, f"receipt-{number}")
        bgtasks.spawn("ping-partner", tasks.ping_partner, f"ping-{number}")
        tasks.charge.enqueue(f"charge-{number}")
        asyncio.run(tasks.report.aenqueue(f"report-{number}"))
        bgtasks.spawn("stays", lambda: tasks.done(f"stays-{number}"))
