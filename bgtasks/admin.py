"""The page "Background tasks" in Django's admin: what all processes of the site do, live.

It is there for staff with the permission ``bgtasks.view_background_tasks``. ``bgtasks.pause_pools`` adds the
buttons that pause and resume a pool, ``bgtasks.cancel_waiting_tasks`` those that cancel what waits under a
name. The page is two static files and one view that answers with JSON, so it works under a
Content-Security-Policy of ``default-src 'self'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponseBase, HttpResponseNotAllowed, JsonResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path

from bgtasks.models import BackgroundTasks
from bgtasks.pools import pools

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[BackgroundTasks]
else:
    _ModelAdmin = admin.ModelAdmin


@admin.register(BackgroundTasks)
class BackgroundTasksAdmin(_ModelAdmin):
    """The page, its data, the switch that pauses a pool, and the button that cancels waiting tasks."""

    def get_urls(self) -> list[URLPattern]:
        """Return the four views. There are no rows, so there is no list, form or history of them."""

        def wrap(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
            return self.admin_site.admin_view(view)

        return [
            path("", wrap(self.changelist_view), name="bgtasks_backgroundtasks_changelist"),
            path("data/", wrap(self.data_view), name="bgtasks_backgroundtasks_data"),
            path("pause/", wrap(self.pause_view), name="bgtasks_backgroundtasks_pause"),
            path("cancel/", wrap(self.cancel_view), name="bgtasks_backgroundtasks_cancel"),
        ]

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002  # Django's signature
        """Return False: a pool is added in the settings."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Return False: a pool is changed in the settings."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Return False: a pool is removed in the settings."""
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Tell whether the user may look at the page."""
        return _has_permission(request, "view_background_tasks")

    def has_module_permission(self, request: HttpRequest) -> bool:
        """Tell whether the app is listed: it has only this page."""
        return self.has_view_permission(request)

    def has_pause_permission(self, request: HttpRequest) -> bool:
        """Tell whether the user may pause and resume pools."""
        return _has_permission(request, "pause_pools")

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        """Tell whether the user may cancel waiting tasks."""
        return _has_permission(request, "cancel_waiting_tasks")

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> TemplateResponse:
        """Show the page, which then asks for its data."""
        self._require(self.has_view_permission(request))
        published = pools.publisher.config is not None  # or nobody would hear of an order
        context = {
            **self.admin_site.each_context(request),
            "title": "Background tasks",
            "opts": self.opts,
            "may_pause": published and self.has_pause_permission(request),
            "may_cancel": published and self.has_cancel_permission(request),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "bgtasks/admin.html", context)

    def data_view(self, request: HttpRequest) -> HttpResponseBase:
        """Answer with what all processes do."""
        self._require(self.has_view_permission(request))
        from bgtasks.monitoring.overview import overview  # only who looks at the page pays for importing it

        return JsonResponse(overview(pools))

    def pause_view(self, request: HttpRequest) -> HttpResponseBase:
        """Pause or resume a pool, and write that into the log of the admin."""
        self._require(self.has_view_permission(request) and self.has_pause_permission(request))
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        from bgtasks.monitoring.control import NotOrdered, set_paused

        pool, paused = request.POST.get("pool", ""), request.POST.get("paused") == "true"
        if pool not in _known():
            return JsonResponse({"error": f"no pool named {pool!r}"}, status=404)
        try:
            told = set_paused(pools, pool, paused, by=request.user.get_username())
        except NotOrdered as error:
            return JsonResponse({"error": str(error)}, status=409)
        self.log_change(request, BackgroundTasks(name=pool), "Paused." if paused else "Resumed.")
        return JsonResponse({"pool": pool, "paused": paused, "told": told})

    def cancel_view(self, request: HttpRequest) -> HttpResponseBase:
        """Cancel what waits in a pool under a name, and write that into the log of the admin."""
        self._require(self.has_view_permission(request) and self.has_cancel_permission(request))
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        from bgtasks.monitoring.control import NotOrdered, cancel_waiting

        pool, name = request.POST.get("pool", ""), request.POST.get("name", "")
        if name not in _known().get(pool, ()):
            return JsonResponse({"error": f"no task {name!r} in a pool named {pool!r}"}, status=404)
        try:
            here = cancel_waiting(pools, pool, name, by=request.user.get_username())
        except NotOrdered as error:
            return JsonResponse({"error": str(error)}, status=409)
        self.log_change(request, BackgroundTasks(name=pool), f"Cancelled what waited as {name!r}.")
        return JsonResponse({"pool": pool, "name": name, "here": here})

    def _require(self, allowed: bool) -> None:  # noqa: FBT001  # the one thing it is about
        if not allowed:
            raise PermissionDenied


def _known() -> dict[str, set[str]]:
    """Return by pool the names under which tasks wait, as far as each is the name of one kind of task."""
    from bgtasks.monitoring.overview import overview

    return {
        pool["name"]: {of["name"] for of in pool["names"] if of["queued"] and of["single"]}
        for pool in overview(pools)["pools"]
    }


def _has_permission(request: HttpRequest, codename: str) -> bool:
    user: Any = request.user  # whatever AUTH_USER_MODEL is, the admin needs it to have this method
    return bool(user.has_perm(f"bgtasks.{codename}"))
