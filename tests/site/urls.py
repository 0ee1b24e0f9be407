"""The views of the tests' site: each request spawns one sync and one async task.

A task waits for the advisory lock of the database that a test holds, which is a gate for all processes, and
then writes a row.
"""

from typing import Any

from asgiref.sync import sync_to_async
from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.urls import path

import bgtasks
from tests.testapp.models import Note

LOCK = 7


def pass_gate() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock_shared(%s), pg_advisory_unlock_shared(%s)", [LOCK, LOCK])


def write(text: str) -> None:
    pass_gate()
    Note.objects.create(text=text)


async def awrite(text: str) -> None:
    await sync_to_async(pass_gate)()
    await Note.objects.acreate(text=text)


def spawn(request: HttpRequest) -> JsonResponse:
    accepted = [bgtasks.spawn("sync", write, "sync"), bgtasks.spawn("async", awrite, "async")]
    return JsonResponse({"accepted": sum(accepted)})


async def aspawn(request: HttpRequest) -> Any:
    return spawn(request)


urlpatterns = [path("spawn/", spawn), path("aspawn/", aspawn)]
