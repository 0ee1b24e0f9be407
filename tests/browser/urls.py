"""The admin, and views that spawn what the browser is to see."""

import os
from typing import Any

from django.contrib import admin
from django.contrib.staticfiles.views import serve
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

import bgtasks
from tests.site.urls import pass_gate


def fail(address: str) -> None:
    """Fail as a mail server makes a task fail."""
    raise ConnectionRefusedError("the mail server does not answer")


calls: set[str] = set()  # of the test, which this process has answered


def spawn(request: HttpRequest, pool: Any, what: str, count: int) -> JsonResponse:
    """Spawn `count` tasks, once for each call of the test, which asks until every worker has answered.

    Those called "held" wait for the lock of the database that the test holds.
    """
    task: Any = {"held": (pass_gate,), "fail": (fail, "ada@example.com"), "done": (int,)}[what]
    if request.GET["call"] not in calls:
        calls.add(request.GET["call"])
        for _ in range(count):
            bgtasks.pools[pool].spawn(f"{what}-task", *task)
    return JsonResponse({"pid": os.getpid()})


urlpatterns = [
    path("favicon.ico", lambda request: HttpResponse(content_type="image/x-icon")),
    path("admin/", admin.site.urls),
    path("spawn/<str:pool>/<str:what>/<int:count>/", spawn),
    path("static/<path:path>", serve, {"insecure": True}),
]
