"""How many tasks does a process get through, and how much processor does that take from its requests?

No-op tasks, spawned one after the other by one thread, until the last one has ended. CPU is user plus system
time of the whole process. The pool runs with what it does for each task (context, language, time zone,
account, database care). What that costs is to be seen in the rows below it: without a language, time zone and
context variable set; eight threads that take functions from a deque and do nothing else, without and with the
spawner's context, language and time zone; and a loop that does the same with coroutines.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from contextvars import Context, copy_context
from functools import partial
from queue import SimpleQueue
from secrets import token_hex
from typing import TypeAlias, cast

import aiojobs

from benchmarks.measure import QUICK, Result, interleaved, set_up

NUMBER = 500 if QUICK else 50_000
FEWER = 50 if QUICK else 5_000  # for what keeps a result of each

Copied: TypeAlias = tuple[Callable[[], None], Context]


def task() -> None:
    """Do nothing."""


async def atask() -> None:
    """Do nothing."""


def rate(number: int, work: Callable[[], object]) -> dict[str, float]:
    """Return tasks/s and CPU seconds for 100,000 tasks, of `work` on `number` tasks."""
    cpu, start = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"rate": number / seconds, "cpu": (time.process_time() - cpu) * 100_000 / number}


def pool(function: Callable[..., object]) -> dict[str, float]:
    """Measure the pool."""

    def work() -> None:
        for _ in range(NUMBER):
            bgtasks.spawn("no-op", function)
        assert bgtasks.drain()

    return rate(NUMBER, work)


def pool_without_scope(function: Callable[..., object]) -> dict[str, float]:
    """Measure the pool where no language, no time zone and no context variable is set."""
    return Context().run(pool, function)


def executor() -> dict[str, float]:
    """Measure ThreadPoolExecutor."""

    def work() -> None:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(NUMBER):
                threads.submit(task)

    return rate(NUMBER, work)


def bare(call: Callable[[Copied], None]) -> dict[str, float]:
    """Measure eight threads on one deque, with nothing around it but what `call` does."""
    waiting: deque[Copied] = deque()
    bell = SimpleQueue[bool]()

    threads = [threading.Thread(target=_work_off, args=(waiting, bell, call)) for _ in range(8)]
    for each in threads:
        each.start()

    def work() -> None:
        for number in range(NUMBER):
            waiting.append((task, copy_context()))
            if number % 1000 == 0:
                bell.put(True)
        for _ in threads:
            bell.put(True)
            bell.put(False)
        for each in threads:
            each.join()

    return rate(NUMBER, work)


def _work_off(waiting: deque[Copied], bell: "SimpleQueue[bool]", call: Callable[[Copied], None]) -> None:
    while bell.get():
        while True:
            try:
                copied = waiting.popleft()
            except IndexError:
                break
            call(copied)


def plain(copied: Copied) -> None:
    """Call a function, and leave the context alone."""
    copied[0]()


def isolated(copied: Copied) -> None:
    """Call a function in a new context with the spawner's variables, as G7 and G8 ask for."""
    Context().run(_isolated, *copied)


def _isolated(function: Callable[[], None], context: Context) -> None:
    for variable, value in context.items():
        if variable.name != "asgiref.local":
            variable.set(value)
        else:
            variable.set(type(value)(threading.get_ident(), value.data))
    function()


def bare_loop() -> dict[str, float]:
    """Measure one loop that starts the coroutines of a deque, each with the spawner's variables, eagerly."""
    waiting: deque[Context] = deque()
    loop = asyncio.new_event_loop()
    start = partial(cast(Callable[..., object], asyncio.Task), loop=loop, eager_start=True)

    async def run(context: Context) -> None:
        _isolated(task, context)
        await atask()

    def burst() -> None:
        for _ in range(64):
            if not waiting:
                loop.stop()
                return
            start(run(waiting.popleft()), context=Context())
        loop.call_soon(burst)

    def work() -> None:
        for _ in range(NUMBER):
            waiting.append(copy_context())
        loop.call_soon(burst)
        loop.run_forever()

    with closing(loop):
        return rate(NUMBER, work)


def jobs() -> dict[str, float]:
    """Measure aiojobs on its own loop."""

    async def main() -> None:
        scheduler = aiojobs.Scheduler()
        for _ in range(NUMBER):
            await scheduler.spawn(atask())
        while scheduler.active_count or scheduler.pending_count:  # noqa: ASYNC110  # it has no event for it
            await asyncio.sleep(0)
        await scheduler.close()

    return rate(NUMBER, lambda: asyncio.run(main()))


def enqueue(alias: str) -> dict[str, float]:
    """Measure a backend of django.tasks: enqueuing and running."""
    from django.tasks import task_backends

    from benchmarks.tasks import no_op

    own = no_op.using(backend=alias)

    def work() -> None:
        for _ in range(FEWER):
            own.enqueue()
        if alias == "pool":
            assert bgtasks.drain()
        if alias == "local":
            wait(list(vars(task_backends[alias])["_state"].futures.values()))

    return rate(FEWER, work)


def backend_without_work() -> dict[str, float]:
    """Measure what Django has any backend do for a task: check it, make its result, send three signals."""
    from django.tasks import task_backends
    from django.tasks.base import TaskResult, TaskResultStatus
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils import timezone

    from benchmarks.tasks import no_op

    backend = task_backends["pool"]

    def work() -> None:
        for _ in range(FEWER):
            backend.validate_task(no_op)
            now = timezone.now()
            result = TaskResult(
                task=no_op,
                id=token_hex(16),
                status=TaskResultStatus.SUCCESSFUL,
                enqueued_at=now,
                started_at=now,
                last_attempted_at=now,
                finished_at=now,
                args=[],
                kwargs={},
                backend="pool",
                errors=[],
                worker_ids=[],
            )
            for signal in (task_enqueued, task_started, task_finished):
                signal.send_robust(sender=type(backend), task_result=result)

    return rate(FEWER, work)


def main() -> None:
    """Measure and report."""
    measures = {
        "bgtasks, sync": lambda: pool(task),
        "ThreadPoolExecutor(8)": executor,
        "bgtasks, sync, without language and time zone": lambda: pool_without_scope(task),
        "bare: 8 threads on a deque": lambda: bare(plain),
        "the same, and the spawner's context, isolated": lambda: bare(isolated),
        "bgtasks, async": lambda: pool(atask),
        "aiojobs on its own loop": jobs,
        "bgtasks, async, without language and time zone": lambda: pool_without_scope(atask),
        "bare: a loop on a deque, and the spawner's context, isolated": bare_loop,
        "PoolBackend.enqueue": lambda: enqueue("pool"),
        "django-tasks-local's enqueue": lambda: enqueue("local"),
        "Django's ImmediateBackend (runs in the call)": lambda: enqueue("default"),
        "what Django has any backend do, and nothing else": backend_without_work,
    }
    got = interleaved(measures)
    result = Result(
        "How many tasks does a process get through, and how much processor does that take?",
        ["no-op tasks", "tasks/s", "CPU s for 100,000", "x ThreadPoolExecutor", "x aiojobs"],
    )
    threads, loop = got["ThreadPoolExecutor(8)"], got["aiojobs on its own loop"]
    for name, each in got.items():
        result.rows.append(
            (
                name,
                each["rate"],
                each["cpu"],
                each["rate"] / threads["rate"],
                each["rate"] / loop["rate"],
            )
        )
    mine = got["bgtasks, sync"]
    result.target("sync tasks / ThreadPoolExecutor", mine["rate"] / threads["rate"], at_least=1.15)
    result.target(
        "async tasks / aiojobs on its own loop", got["bgtasks, async"]["rate"] / loop["rate"], at_least=0.6
    )
    result.target("CPU / ThreadPoolExecutor", mine["cpu"] / threads["cpu"], at_most=0.9)
    local = got["django-tasks-local's enqueue"]["rate"]
    result.target(
        "PoolBackend.enqueue / django-tasks-local's", got["PoolBackend.enqueue"]["rate"] / local, at_least=1.0
    )
    result.notes.append(
        "No task of a site does nothing. Earlier targets, such as three times as many no-op tasks as an "
        "executor, are withdrawn: no use needs them, and they asked for a core that nobody else could change."
    )
    limit = got["the same, and the spawner's context, isolated"]["rate"] / threads["rate"]
    result.notes.append(
        f"Eight threads on a deque that restore context, language and time zone, and do nothing "
        f"else, get through {limit:.1f} x as many tasks as the executor, which restores nothing."
    )
    limit = got["bare: a loop on a deque, and the spawner's context, isolated"]["rate"] / loop["rate"]
    result.notes.append(
        f"A loop that starts coroutines from a deque, without a thread between, with the spawner's context, "
        f"language and time zone, gets through {limit:.1f} x as many as aiojobs, which shares one context."
    )
    floor = got["what Django has any backend do, and nothing else"]["rate"] / local
    result.notes.append(
        f"One thread that only does what Django has any backend do for a task (check it, make its result, "
        f"send three signals), and runs and keeps nothing, gets through {floor:.1f} x as many as "
        f"django-tasks-local."
    )
    result.finish()


if __name__ == "__main__":
    set_up()
    import bgtasks

    main()
