"""Views that spawn tasks. Each waits at a gate in the database, which the test holds, and writes a row."""

import os
import threading
import time

from asgiref.sync import sync_to_async
from django.db import connection
from django.http import HttpRequest, JsonResponse

import bgtasks
from tests.testapp.models import Note


def identify(request: HttpRequest) -> JsonResponse:
    """Say who has answered."""
    return JsonResponse({"pid": os.getpid(), "package": bgtasks.__file__})


def spawn(request: HttpRequest) -> JsonResponse:
    """Spawn n tasks, half of them asynchronous, and say how many were accepted."""
    return JsonResponse({"pid": os.getpid(), "accepted": spawn_tasks(request)})


async def aspawn(request: HttpRequest) -> JsonResponse:
    """Do as `spawn` does, in an asynchronous view."""
    return JsonResponse({"pid": os.getpid(), "accepted": spawn_tasks(request)})


def busy(request: HttpRequest) -> JsonResponse:
    """Do as `spawn` does, and answer once the gate is open."""
    accepted = spawn_tasks(request)
    wait_at(int(request.GET["gate"]))
    return JsonResponse({"pid": os.getpid(), "accepted": accepted})


def rows(request: HttpRequest) -> JsonResponse:
    """Say how many rows the tasks of a test have written, by the ORM."""
    return JsonResponse({"pid": os.getpid(), "rows": Note.objects.filter(text=request.GET["run"]).count()})


def spawn_tasks(request: HttpRequest) -> int:
    """Spawn what the query asks for."""
    run, gate, n = request.GET["run"], int(request.GET["gate"]), int(request.GET["n"])
    watch()
    accepted = [
        bgtasks.spawn("awrite", awrite, run, gate) if number % 2 else bgtasks.spawn("write", write, run, gate)
        for number in range(n)
    ]
    return sum(accepted)


def write(run: str, gate: int) -> None:
    """Write a row once the gate is open."""
    wait_at(gate)
    Note.objects.create(text=run)


async def awrite(run: str, gate: int) -> None:
    """Do as `write` does, with the asynchronous ORM."""
    await sync_to_async(wait_at)(gate)
    await Note.objects.acreate(text=run)


def wait_at(gate: int) -> None:
    """Wait until the test gives up its lock."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock_shared(%s)", [gate])
        cursor.execute("SELECT pg_advisory_unlock_shared(%s)", [gate])


def watch() -> None:
    """Say on standard error when this process has begun to shut its pools down. Once is enough."""
    if "watch" not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=_watch, name="watch", daemon=True).start()


def _watch() -> None:
    while bgtasks.pools.drainer.accepting:
        time.sleep(0.01)  # nobody tells
    os.write(2, f"{os.getpid()} shuts its pools down\n".encode())


def slow(request: HttpRequest) -> JsonResponse:
    """Answer after a while, so that a signal comes in the middle of it."""
    time.sleep(2)
    return JsonResponse({"pid": os.getpid()})
