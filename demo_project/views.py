"""The views: a sync and an async sign-up, the guest list, and the dashboard with what feeds it."""

import inspect
import json
import textwrap
import uuid
from collections.abc import Callable, Mapping

from django.conf import settings
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, HttpResponseForbidden, JsonResponse
from django.shortcuts import redirect, render
from django.utils.crypto import constant_time_compare
from django.views.decorators.csrf import csrf_exempt, ensure_csrf_cookie
from django.views.decorators.http import require_GET, require_POST

import bgtasks

from .forms import BurstForm, SignUpForm
from .live import board
from .means import FRESH_SECONDS, MEANS, POLICIES
from .models import Delivery, Member
from .tasks import asend_welcome, send_welcome

# Signing up: the part to copy.


def sign_up(request: HttpRequest) -> HttpResponse:
    """Sign a person up, in a sync view. The mail is spawned once the row is committed."""
    form = SignUpForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        with transaction.atomic():
            member = Member.objects.create(**form.cleaned_data, how=Member.How.SYNC_VIEW)
            bgtasks.spawn_on_commit("welcome", send_welcome, member.pk)
        return redirect("members")
    return render(request, "demo_project/sign_up.html", {"form": form})


async def asign_up(request: HttpRequest) -> HttpResponse:
    """Sign a person up, in an async view."""
    form = SignUpForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        member = await Member.objects.acreate(**form.cleaned_data, how=Member.How.ASYNC_VIEW)
        await bgtasks.aspawn_on_commit("welcome", asend_welcome, member.pk)
        return redirect("members")
    return render(request, "demo_project/sign_up.html", {"form": form})


@require_GET
def members(request: HttpRequest) -> HttpResponse:
    """List the latest sign-ups. The page the probe asks for: an ORM query and a template, like any page."""
    latest = Member.objects.select_related("delivery").order_by("-pk")[:12]
    return render(request, "demo_project/members.html", {"members": latest})


# The demonstration around it.


@require_GET
@ensure_csrf_cookie
def dashboard(request: HttpRequest) -> HttpResponse:
    """Show the dashboard: the four means and the two policies with their code, and the live figures."""
    context = {
        "means": described(MEANS),
        "counts": [100, 400, 1000],
        "policies": described(POLICIES),
        "fresh_seconds": FRESH_SECONDS,
        "overload": overload(),
        "task_seconds": settings.DEMO_TASK_SECONDS,
        "database": connection.display_name,
        "pool_size": settings.DEMO_POOL_SIZE if connection.vendor == "postgresql" else None,
    }
    return render(request, "demo_project/dashboard.html", context)


def overload() -> int:
    """Return twice the number of tasks that can be run in `FRESH_SECONDS`, or as many as may wait."""
    pool = bgtasks.stats()["default"]
    served = FRESH_SECONDS * pool.conn_max / float(settings.DEMO_TASK_SECONDS)
    return min(round(2 * served), pool.capacity)


def described(means: Mapping[Member.How, Callable[..., object]]) -> list[dict[str, object]]:
    """Return the means with their docstrings and their code, for showing."""
    return [{"how": how, "note": start.__doc__, "code": body(start)} for how, start in means.items()]


def body(function: Callable[..., object]) -> str:
    """Return the source of a function below its docstring, for showing."""
    return textwrap.dedent(inspect.getsource(function).rpartition('"""\n')[2]).strip()


@require_POST
def start_burst(request: HttpRequest) -> JsonResponse:
    """Sign many people up at once and start a task for each, by the means the form names."""
    form = BurstForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=400)
    how, count = form.cleaned_data["how"], form.cleaned_data["count"]
    key = uuid.uuid4()
    people = Member.objects.bulk_create(
        Member(name=f"Guest {number}", email=f"guest{number}@party.example", how=how, burst=key)
        for number in range(1, count + 1)
    )
    burst = board.begin(key, how.value, how.label, count)
    task = board.watched(burst, send_welcome)
    start = (MEANS | POLICIES)[how]
    for person in people:
        try:
            accepted = start(task, person.pk)
        except RuntimeError:  # "can't start new thread"
            accepted = False
        if not accepted:
            board.refused(burst)
    return JsonResponse(burst.as_json())


@require_GET
def burst(request: HttpRequest, key: uuid.UUID) -> JsonResponse:
    """Return a burst's account, with the number of mails that have a row to show for it."""
    account = board.find(key)
    if account is None:
        return JsonResponse({"error": f"no burst {key}"}, status=404)
    return JsonResponse(account.as_json() | {"rows": Delivery.objects.filter(member__burst=key).count()})


@require_GET
async def live(request: HttpRequest) -> JsonResponse:
    """Return the live figures. An async view that needs no thread and no database connection."""
    after = request.GET.get("after", "0")
    return JsonResponse(board.as_json(int(after) if after.isdecimal() else 0))


@csrf_exempt
@require_POST
async def probe(request: HttpRequest) -> HttpResponse:
    """Take a report of the probe, which knows the token because the same command started both."""
    token = request.headers.get("X-Probe-Token", "")
    if not settings.DEMO_PROBE_TOKEN or not constant_time_compare(token, settings.DEMO_PROBE_TOKEN):
        return HttpResponseForbidden("this is for the probe")
    report = json.loads(request.body)
    board.report(
        ((due, latency, ok) for due, latency, ok in report["samples"]), report["waiting"], report["oldest_ms"]
    )
    return HttpResponse(status=204)
