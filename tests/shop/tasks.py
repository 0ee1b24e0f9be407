"""What the shop does in the background: plain functions, and tasks of Django's own kind."""

import os
import time
import uuid
from typing import Any

from django.db import InterfaceError, OperationalError, connection
from django.tasks import task
from django.utils import translation

from tests.shop.models import Again, Done, Run


def done(key: str, detail: str = "") -> None:
    Again.objects.create(key=key)
    language = translation.get_language()
    Done.objects.create(key=key, process=os.getpid(), language=language, detail=detail)


def send_receipt(key: str, *, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    done(key)


def count(key: str, *, seconds: float = 0.0) -> None:
    """Note that the task was run, once for each run, whatever happens to the database meanwhile."""
    run = uuid.uuid4()
    time.sleep(seconds)
    for _ in range(600):
        try:
            Run.objects.get_or_create(run=run, defaults={"key": key})
        except (OperationalError, InterfaceError):
            # It is being restarted. The row may be there all the same: it has the number of this run.
            connection.close()
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the database did not come back")


async def ping_partner(key: str) -> None:
    await Again.objects.acreate(key=key)
    await Done.objects.acreate(key=key, process=os.getpid(), language=translation.get_language())


@task()
def charge(key: str) -> Any:
    done(key)
    return key


@task(takes_context=True)
def report(context: Any, key: str) -> None:
    done(key, detail=context.task_result.id)
