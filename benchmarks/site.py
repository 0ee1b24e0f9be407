"""The site that ``benchmarks/burst.py`` puts a burst of tasks on: the demo's member list, and a way each."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from django.contrib import admin
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

import bgtasks
from benchmarks.measure import set_up_apart
from benchmarks.tasks import Count, local_task, run, work
from demo_project.views import members

executor = ThreadPoolExecutor(64)
executor_8 = ThreadPoolExecutor(8)
processes_8 = ProcessPoolExecutor(8, get_context("spawn"), initializer=set_up_apart)
running: set[asyncio.Task[None]] = set()
loops: list[asyncio.AbstractEventLoop] = []  # the server's, once it has announced itself


def run_apart(kind: str) -> None:
    """Do the same in a process without requests."""

    def end(future: Future[None]) -> None:
        Count.end(future.exception() is None)

    processes_8.submit(work, kind).add_done_callback(end)


async def arun(kind: str) -> None:
    """Do the same in a thread of the loop's executor."""
    await asyncio.to_thread(run, kind)


async def starlette_run(kind: str) -> None:
    """Do the same as Starlette does it after a response."""
    from starlette.background import BackgroundTask

    await BackgroundTask(run, kind)()


def start_on_loop(function: Callable[[str], Coroutine[None, None, None]], kind: str) -> None:
    """Create a task on the server's loop, and keep it, as Python's documentation asks for."""

    def create() -> None:
        task = loops[0].create_task(function(kind))
        running.add(task)
        task.add_done_callback(running.discard)

    loops[0].call_soon_threadsafe(create)


MEANS: dict[str, Callable[[str], object]] = {
    "bgtasks": lambda kind: bgtasks.spawn(kind, run, kind),
    "thread": lambda kind: threading.Thread(target=run, args=(kind,)).start(),
    "executor": lambda kind: executor.submit(run, kind),
    "executor-8": lambda kind: executor_8.submit(run, kind),
    "starlette": lambda kind: start_on_loop(starlette_run, kind),
    "create-task": lambda kind: start_on_loop(arun, kind),
    "tasks-local": local_task.enqueue,
    "processes-8": run_apart,
}


@csrf_exempt
def burst(request: HttpRequest, means: str, kind: str, count: int) -> JsonResponse:
    """Start so many tasks at once."""
    failed = 0
    for _ in range(count):
        try:
            MEANS[means](kind)
        except RuntimeError:  # "can't start new thread"
            failed += 1
    return JsonResponse({"not started": failed})


def state(request: HttpRequest) -> JsonResponse:
    """Say how many tasks have ended."""
    return JsonResponse({"ended": Count.ended, "succeeded": Count.succeeded})


urlpatterns = [
    path("page/", members),
    path("members/", members, name="members"),
    path("sign-up/", members, name="sign-up"),
    path("sign-up/async/", members, name="sign-up-async"),
    path("dashboard/", members, name="dashboard"),
    path("admin/", admin.site.urls),  # a link in the page leads there
    path("burst/<str:means>/<str:kind>/<int:count>/", burst),
    path("state/", state),
]
