"""Jobs of other queues, which spawn tasks, as a signal handler does that web processes share."""

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
