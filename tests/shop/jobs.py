"""Jobs of other queues, which spawn tasks, as a signal handler does that web processes share."""

import os

from django.tasks import task

import bgtasks
from tests.shop import tasks

SECONDS = float(os.environ.get("SHOP_SECONDS", "0.5"))  # of each task


def spawn_receipts(number: int) -> None:
    """Spawn three tasks, and note when they were accepted."""
    accepted = [
        bgtasks.spawn("send-receipt", tasks.send_receipt, f"receipt-{number}-{each}", seconds=SECONDS)
        for each in range(3)
    ]
    assert all(accepted)
    tasks.done(f"job-{number}")


@task()
def receipts(number: int) -> None:
    """Do the same as a task of Django's own kind."""
    spawn_receipts(number)
