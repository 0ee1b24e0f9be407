"""Jobs of other queues, which spawn tasks, as a signal handler does that web processes share."""

from django.tasks import task

import bgtasks
from tests.shop import tasks


def spawn_receipts(number: int) -> None:
    """Spawn three tasks, and note when they were accepted."""
    accepted = [
        bgtasks.spawn("send-receipt", tasks.send_receipt, f"receipt-{number}-{each}", seconds=0.5)
        for each in range(3)
    ]
    assert all(accepted)
    tasks.done(f"job-{number}")


@task()
def receipts(number: int) -> None:
    """Do the same as a task of Django's own kind."""
    spawn_receipts(number)
