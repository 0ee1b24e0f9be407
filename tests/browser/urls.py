"""The admin, and views that spawn what the browser shall see."""

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


def spawn(request: HttpRequest, pool: Any, what: str, count: int) -> JsonResponse:
    """Spawn `count` tasks; those called "held" wait for the lock of the database that the test holds."""
    task: Any = {"held": (pass_gate,), "fail": (fail, "ada@example.com"), "done": (int,)}[what]
    accepted = sum(bgtasks.pools[pool].spawn(f"{what}-task", *task) for _ in range(count))
    return JsonResponse({"accepted": accepted, "pid": os.getpid()})


urlpatterns = [
    path("favicon.ico", lambda request: HttpResponse(content_type="image/x-icon")),
    path("admin/", admin.site.urls),
    path("spawn/<str:pool>/<str:what>/<int:count>/", spawn),
    path("static/<path:path>", serve, {"insecure": True}),
]
