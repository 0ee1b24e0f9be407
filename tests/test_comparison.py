"""What docs/comparison.md says of other packages, as far as a small program can tell.

A new version in which a claim is no longer true, or that the page does not name, fails here.
"""

import asyncio
import os
import re
from contextvars import ContextVar
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import pytest

from tests.gate import BOUND, Gate
from tests.processes import run_python

pytestmark = pytest.mark.engines

PAGE = (Path(__file__).parent.parent / "docs" / "comparison.md").read_text()
PACKAGES = {
    "bgtasks": "django-bgtasks",
    "Starlette": "starlette",
    "aiojobs": "aiojobs",
    "django-tasks-local": "django-tasks-local",
    "Celery": "celery",
    "RQ": "rq",
    "django-rq": "django-rq",
    "huey": "huey",
    "django-q2": "django-q2",
    "django-tasks-db": "django-tasks-db",
    "Procrastinate": "procrastinate",
    "Dramatiq": "dramatiq",
    "django-vtasks": "django-vtasks",
    "dj-queue": "dj-queue",
    "django-tasks-local-db": "django-tasks-local-db",
    "django-dbtasks": "django-dbtasks",
    "DBOS": "dbos",
}
RUBY = {("Queue", "1.5"), ("GoodJob", "4.19")}  # read, not run
DURABLE = [
    "django-vtasks",
    "dj-queue",
    "django-tasks-local-db",
    "django-dbtasks",
    "dbos",
]  # in the web process
WITH_WORKERS = [
    *["celery", "rq", "django-rq", "huey", "django-q2", "django-tasks-db", "procrastinate", "dramatiq"],
    *DURABLE,
]

who: ContextVar[str] = ContextVar("who", default="nobody")


async def answer() -> int:
    return 7


def source(package: str) -> str:
    """Return all Python source of an installed package, without its own tests."""
    return "\n".join(
        file.read_text(encoding="utf-8")
        for file in files(package) or ()
        if file.suffix == ".py" and "tests" not in file.parts
    )


def test_the_versions_in_the_table_heads_are_those_that_are_tested() -> None:
    """A cell is about the version its column names."""
    heads = "".join(re.findall(r"^\| \|.*\|$", PAGE, re.MULTILINE))
    named = set(re.findall(r"([\w-]+) (\d+\.\d+)", heads))

    assert named - RUBY == {(name, ".".join(version(it).split(".")[:2])) for name, it in PACKAGES.items()}


def test_which_packages_have_a_backend_for_the_tasks_of_django() -> None:
    """The row "Backend for django.tasks"."""
    others = [package for package in PACKAGES.values() if package != "django-bgtasks"]
    backends = {package for package in others if "BaseTaskBackend" in source(package)}

    assert backends == {
        "django-tasks-local",
        "huey",
        "django-tasks-db",
        "django-vtasks",
        "dj-queue",
        "django-dbtasks",
    }


@pytest.mark.parametrize("package", WITH_WORKERS)
def test_no_language_and_no_context_goes_to_a_worker(package: str) -> None:
    """Nobody asks for the language, or copies the context, of the code that calls."""
    assert not re.search(r"\b(get_language|copy_context)\b", source(package))


# Starlette


def test_starlette_runs_its_tasks_in_the_request_one_after_the_other() -> None:
    """After the response, before the request ends, with its context; a failure takes the later ones along."""
    from starlette.background import BackgroundTasks
    from starlette.responses import PlainTextResponse

    events: list[str] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        events.append(message["type"])

    def sync_task() -> None:
        events.append(who.get())

    def fails() -> None:
        raise ZeroDivisionError

    async def request() -> None:
        who.set("ada")
        tasks = BackgroundTasks()
        for task in (sync_task, fails, sync_task):
            tasks.add_task(task)
        with pytest.raises(ZeroDivisionError):
            await PlainTextResponse("ok", background=tasks)({"type": "http"}, receive, send)
        events.append("ended")

    asyncio.run(request())
    assert events == ["http.response.start", "http.response.body", "ada", "ended"]


# aiojobs


def test_aiojobs_lets_the_caller_wait_when_full() -> None:
    """With `limit` running and `pending_limit` waiting, spawn() does not return."""
    from aiojobs import Scheduler

    async def main() -> tuple[bool, int]:
        opened = asyncio.Event()
        scheduler = Scheduler(limit=1, pending_limit=1)
        for _ in range(2):
            await scheduler.spawn(opened.wait())
        third = asyncio.create_task(scheduler.spawn(opened.wait()))
        await asyncio.sleep(0)  # it runs until it waits
        waits = not third.done(), scheduler.pending_count
        opened.set()
        await third
        await scheduler.wait_and_close()
        return waits

    assert asyncio.run(main()) == (True, 1)


def test_aiojobs_defaults() -> None:
    """The numbers in its column."""
    from aiojobs import Scheduler

    async def main() -> Scheduler:
        return Scheduler()

    scheduler = asyncio.run(main())
    assert (scheduler.limit, scheduler.pending_limit, scheduler._wait_timeout) == (100, 10_000, 60)


def test_aiojobs_gives_a_job_that_waited_the_context_of_another() -> None:
    """It is started where the job before it ends, in what that one inherited."""
    from aiojobs import Scheduler

    seen = []

    async def job(opened: asyncio.Event) -> None:
        await opened.wait()
        seen.append(who.get())

    async def main() -> None:
        scheduler, opened = Scheduler(limit=1), asyncio.Event()

        async def request(name: str) -> None:
            who.set(name)
            await scheduler.spawn(job(opened))

        await asyncio.create_task(request("ada"))
        await asyncio.create_task(request("grace"))
        opened.set()
        await scheduler.wait_and_close()

    asyncio.run(main())
    assert seen == ["ada", "ada"]


def test_aiojobs_cancels_what_runs_and_what_waits_on_close() -> None:
    """Unlike wait_and_close()."""
    from aiojobs import Scheduler

    ended = []

    async def job(opened: asyncio.Event) -> None:
        await opened.wait()
        ended.append("job")  # pragma: no cover  # that it is not reached is the point

    async def main() -> list[bool]:
        scheduler, opened = Scheduler(limit=1), asyncio.Event()
        jobs = [await scheduler.spawn(job(opened)) for _ in range(2)]
        await scheduler.close()
        return [it.closed for it in jobs]

    assert asyncio.run(main()) == [True, True]
    assert ended == []


# django-tasks-local, executors and threads

LOCAL = """
import sys
import threading
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=[],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}},
    TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": {"MAX_WORKERS": 1}}},
)
django.setup()
from contextvars import ContextVar
from django.db import connection
from django.tasks import task
from django.utils import translation
from django_tasks_local import ThreadPoolBackend
"""
IN_LOCAL = """
from django.tasks.exceptions import InvalidTask
who = ContextVar("who", default="nobody")
opened = threading.Event()

def wait():
    opened.wait(30)

def look():
    was_open = connection.connection is not None
    connection.ensure_connection()
    return [was_open, who.get(), translation.get_language()]

async def coroutine(): ...

who.set("ada")
translation.activate("fr")
wait = task(wait)
look = task(look)
held = wait.enqueue()
results = [look.enqueue() for _ in range(5000)]
print(len(results), {result.status.name for result in results})
opened.set()
wait.get_backend()._state.executor.shutdown()
print(*[result.return_value for result in map(look.get_result, [it.id for it in results[-2:]])])
try:
    task(coroutine)
except InvalidTask as error:
    print(type(error).__name__)
"""


def test_django_tasks_local_accepts_without_limit_and_cares_for_no_connection(tmp_path: Path) -> None:
    """Five thousand wait behind one worker; its connection stays open; no context, no language, no async."""
    process = run_python(LOCAL + IN_LOCAL, str(tmp_path / "db"), env={"PYTHONWARNINGS": "ignore"})

    assert process.stdout.splitlines() == [
        "5000 {'READY'}",
        "[True, 'nobody', 'en-us'] [True, 'nobody', 'en-us']",
        "InvalidTask",
    ], process.stderr


def test_an_executor_accepts_without_limit() -> None:
    """Five thousand wait behind one worker."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor, Gate() as gate:
        executor.submit(gate)
        gate.wait_entered()
        futures = [executor.submit(len, "") for _ in range(5000)]

        assert not any(future.done() for future in futures)


def test_threads_and_executors_start_with_an_empty_context() -> None:
    """What the caller has set is not there."""
    from concurrent.futures import ThreadPoolExecutor

    token = who.set("ada")
    try:
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(who.get).result(BOUND) == "nobody"
    finally:
        who.reset(token)


EXITS = {
    "executor": "for number in range(3): executor.submit(work)",
    "local": "for number in range(3): work_task.enqueue()",
    "thread": "for number in range(3): threading.Thread(target=work).start()",
    "daemon": "for number in range(3): threading.Thread(target=work, daemon=True).start()",
}
EXIT = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
begun, exiting = threading.Event(), threading.Event()

def work():
    begun.set()
    exiting.wait(30)
    print("done", flush=True)

executor = ThreadPoolExecutor(1)
work_task = task(work)
"""
ENDS = {
    # Called before that of concurrent.futures, which was registered before.
    "exit": "threading._register_atexit(exiting.set)",
    # Nothing is called: uvicorn ends so.
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); signal.pause()",
}


@pytest.mark.parametrize(("how", "number"), [("executor", 3), ("local", 3), ("thread", 3), ("daemon", 0)])
@pytest.mark.parametrize("end", ENDS)
def test_what_the_end_of_a_process_leaves(how: str, number: int, end: str, tmp_path: Path) -> None:
    """An exit of Python waits for all but daemon threads, without limit; a signal for none."""
    leave = "" if how == "daemon" and end == "exit" else ENDS[end]
    code = "\n".join([LOCAL, EXIT, EXITS[how], "begun.wait(30)", leave])
    process = run_python(code, str(tmp_path / "db"), env={"PYTHONWARNINGS": "ignore"})

    assert process.returncode == (0 if end == "exit" else -15), process.stderr
    assert process.stdout.count("done") == (number if end == "exit" else 0)


# Those with workers


def test_what_becomes_of_an_async_function() -> None:
    """The row "async def" of the second table, but for django-q2 and django-tasks-db."""
    from celery import Celery
    from huey import MemoryHuey
    from huey.exceptions import ConfigurationError
    from redis import Redis
    from rq.job import Job

    celery: Any = Celery(broker="memory://", set_as_current=False)
    coroutine = celery.task(name="answer")(answer).apply().result
    with pytest.raises(ConfigurationError, match="does not support async functions"):
        MemoryHuey().task()(answer)
    with Redis(port=1) as nobody:
        result = Job.create(answer, connection=nobody)._execute()

    assert asyncio.iscoroutine(coroutine)
    coroutine.close()
    assert result == 7


def test_django_q2_does_not_await() -> None:
    """Its worker passes the coroutine on as the result, which is then never awaited."""
    script = """
import django, queue
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_q"], Q_CLUSTER={"orm": "default", "timeout": 5, "retry": 10})
django.setup()
from multiprocessing import Value
from django_q.worker import worker
tasks, results = queue.Queue(), queue.Queue()

async def answer():
    return 7

tasks.put({"func": answer, "name": "answer", "args": (), "kwargs": {}})
tasks.put("STOP")
worker(tasks, results, Value("f", -1))
task = results.get()
print(type(task["result"]).__name__, task["success"])
from django_q.conf import Conf
print(Conf.ACK_FAILURES, Conf.MAX_ATTEMPTS)
task["result"].close()
"""
    process = run_python(script, env={"PYTHONWARNINGS": "ignore"})

    assert process.stdout.splitlines() == ["coroutine True", "False 0"], process.stderr


def test_a_broker_that_is_down_raises_in_the_request() -> None:
    """Celery after three retries, RQ and huey at once or after those of the client."""
    from celery import Celery
    from huey import RedisHuey
    from kombu.exceptions import OperationalError
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as NoRedis
    from redis.retry import Retry
    from rq import Queue

    app: Any = Celery(broker="redis://127.0.0.1:1/0", set_as_current=False)
    with pytest.raises(OperationalError):
        app.task(name="answer")(answer).delay()
    with Redis(port=1, retry=Retry(NoBackoff(), 0)) as nobody, pytest.raises(NoRedis):
        Queue(connection=nobody).enqueue(print)
    with pytest.raises(NoRedis):
        RedisHuey(url="redis://127.0.0.1:1/0").task()(print)()
    assert app.conf.task_publish_retry_policy["max_retries"] == 3
    assert (app.conf.task_acks_late, app.conf.result_backend) == (False, None)


DB = """
import sys
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_tasks_db"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}},
    TASKS={"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}},
)
django.setup()
from django.core.management import call_command
from django.db import transaction
from django.tasks import task
from django_tasks_db.models import DBTaskResult

async def answer():
    return 7

answer = task(answer)
call_command("migrate", verbosity=0)
try:
    with transaction.atomic():
        answer.enqueue()
        raise ZeroDivisionError
except ZeroDivisionError:
    print("rolled back", DBTaskResult.objects.count())
answer.enqueue()
DBTaskResult.objects.get().claim("a worker that is killed now")
print("ready", DBTaskResult.objects.ready().count())
answer.enqueue()
call_command("db_worker", batch=True, interval=0, startup_delay=False, reload=False, verbosity=0)
print(*sorted(DBTaskResult.objects.values_list("status", "return_value")))
"""


def test_django_tasks_db_is_part_of_the_transaction_and_forgets_a_killed_worker(tmp_path: Path) -> None:
    """What is rolled back is not stored; what a worker had when it was killed stays RUNNING; async runs."""
    process = run_python(DB, str(tmp_path / "db"), env={"PYTHONWARNINGS": "ignore"})

    assert process.stdout.splitlines() == [
        "rolled back 0",
        "ready 0",
        "('RUNNING', None) ('SUCCESSFUL', 7)",
    ], process.stderr


# Those that store tasks and run them in the web process

ENGINES = {
    "vtasks": ("django_vtasks.backends.db.DatabaseTaskBackend", ["django_vtasks", "django_vtasks.db"]),
    "dj-queue": ("dj_queue.backend.DjQueueBackend", ["dj_queue"]),
    "local-db": ("django_tasks_local_db.LocalDBBackend", ["django_tasks_db", "django_tasks_local_db"]),
    "dbtasks": ("dbtasks.backend.DatabaseBackend", ["dbtasks"]),
}
SITE = """
import asyncio, os, sys, threading, time
import django
from django.conf import settings
backend, *apps = sys.argv[2:]
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", *apps],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": sys.argv[1],
            "OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 30},
        }
    },
    TASKS={"default": {"BACKEND": backend, "OPTIONS": {}}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
)
django.setup()
from contextvars import ContextVar
from django.core.management import call_command
from django.db import transaction
from django.tasks import default_task_backend, task
from django.utils import translation
call_command("migrate", verbosity=0)
who = ContextVar("who", default="nobody")
ran = threading.Event()
seen = []

@task
def look():
    seen.append((os.getpid(), who.get(), translation.get_language()))
    ran.set()

async def request():
    who.set("ada")
    translation.activate("fr")
    await look.aenqueue()

"""
ROLLED_BACK = """
from django.db import connection
def rows():
    tables = connection.introspection.table_names()
    return sum(
        connection.cursor().execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
        for name in tables if not name.startswith(("django_migrations", "django_content", "auth_"))
    )
before = rows()
try:
    with transaction.atomic():
        look.enqueue()
        assert rows() > before
        raise ZeroDivisionError
except ZeroDivisionError:
    print("rolled back", rows() - before)
look.enqueue()
print("stored", rows() > before)
"""


def run_site(engine: str, code: str, tmp_path: Path) -> list[str]:
    backend, apps = ENGINES[engine]
    env = {"PYTHONWARNINGS": "ignore"}
    process = run_python(SITE + code, str(tmp_path / "db.sqlite3"), backend, *apps, env=env)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("engine", ENGINES)
def test_durable_tasks_are_stored_in_the_transaction_of_the_request(engine: str, tmp_path: Path) -> None:
    """A rolled back transaction leaves no task, a committed one does."""
    code = "import django_tasks_local_db.backend as b; b.LocalDBBackend.close(default_task_backend)\n"
    still = code if engine == "local-db" else ""  # its thread runs the task at once
    assert run_site(engine, still + ROLLED_BACK + "os._exit(0)", tmp_path) == ["rolled back 0", "stored True"]


IN_LIFESPAN = """
async def main(application):
    to_app, from_app = asyncio.Queue(), asyncio.Queue()
    lifespan = asyncio.create_task(application({"type": "lifespan"}, to_app.get, from_app.put))
    await to_app.put({"type": "lifespan.startup"})
    print((await from_app.get())["type"])
    await asyncio.create_task(request())
    await asyncio.to_thread(ran.wait, 60)
    await to_app.put({"type": "lifespan.shutdown"})
    print((await from_app.get())["type"])
    await lifespan

async def refuse(scope, receive, send): ...
"""
IN_WEB_PROCESS = {
    "vtasks": """
from django_vtasks.asgi import get_worker_application
asyncio.run(main(get_worker_application(refuse)))
""",
    "dj-queue": """
from dj_queue.contrib.asgi import DjQueueLifespan
asyncio.run(main(DjQueueLifespan(refuse, forward_wrapped_lifespan=False)))
""",
    "local-db": """
asyncio.run(request())  # its thread has started with Django
ran.wait(60)
default_task_backend.close()
""",
    "dbtasks": """
from dbtasks.runner import Runner
runner = Runner(workers=1, worker_id="in-process")
thread = threading.Thread(target=runner.run)
thread.start()
asyncio.run(request())
ran.wait(60)
runner.stop()
thread.join()
""",
}


@pytest.mark.parametrize("engine", IN_WEB_PROCESS)
def test_durable_tasks_run_in_the_process_and_see_nothing_of_the_caller(engine: str, tmp_path: Path) -> None:
    """One process is enough; context variables and the language stay where they were."""
    code = (
        IN_LIFESPAN + IN_WEB_PROCESS[engine] + "print(seen == [(os.getpid(), 'nobody', 'en-us')], len(seen))"
    )
    lines = run_site(engine, code, tmp_path)

    if engine in {"vtasks", "dj-queue"}:
        assert lines[:-1] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert lines[-1] == "True 1"


def test_django_dbtasks_refuses_async_functions_and_the_others_accept_them(tmp_path: Path) -> None:
    """The row "async def"."""
    code = """
from django.tasks.exceptions import InvalidTask
async def answer(): return 7
try:
    task(answer)
    print("accepted")
except InvalidTask:
    print("refused")
os._exit(0)
"""
    said = {}
    for engine in ENGINES:
        (tmp_path / engine).mkdir()
        said[engine] = run_site(
            engine, "import __main__; __main__.__name__ = 'site_tasks'" + code + "", tmp_path / engine
        )[-1]

    assert said == {
        "vtasks": "accepted",
        "dj-queue": "accepted",
        "local-db": "accepted",
        "dbtasks": "refused",
    }


def test_django_tasks_local_db_runs_the_task_of_a_killed_process_again(tmp_path: Path) -> None:
    """After HEARTBEAT_TIMEOUT, 30 s, in any process that lives."""
    code = """
import datetime
from django.utils import timezone
from django_tasks_db.models import DBTaskResult
from django_tasks_local_db.models import TaskHeartbeat
default_task_backend.close()
look.enqueue()
row = DBTaskResult.objects.get()
row.claim("a process that is killed now")
dead = timezone.now() - datetime.timedelta(seconds=31)
TaskHeartbeat.objects.create(task_result=row, last_heartbeat_at=dead)
default_task_backend._watcher_tick()
ran.wait(60)
default_task_backend.close()
print(len(seen), DBTaskResult.objects.get().status)
"""
    assert run_site("local-db", code, tmp_path)[-1] == "1 SUCCESSFUL"


def test_django_vtasks_fails_the_task_of_a_killed_process(tmp_path: Path) -> None:
    """Unless `max_rescues` is raised from 0; then it runs again."""
    code = """
from django_vtasks.conf import settings as vtasks
print(vtasks.VTASKS_MAX_RESCUES, vtasks.VTASKS_CONCURRENCY)
"""
    assert run_site("vtasks", code, tmp_path)[-1] == "0 20"


DBOS = """
import os, sys
from dbos import DBOS
config = {"name": "site", "application_version": "1", "log_level": "ERROR"}
DBOS(config={**config, "system_database_url": sys.argv[1]})

@DBOS.step()
def first():
    print("first", flush=True)

@DBOS.workflow()
def work():
    first()
    if sys.argv[2] == "killed":
        os._exit(9)
    print("second", flush=True)

DBOS.launch()
"""


def test_dbos_resumes_the_workflow_of_a_killed_process_after_its_last_step(tmp_path: Path) -> None:
    """The next start of the process goes on, without the step that was done."""
    env = {"PYTHONWARNINGS": "ignore"}
    path = f"postgresql://postgres@/dbos?host={os.environ['BGTASKS_TEST_POSTGRESQL']}"
    killed = run_python(DBOS + "DBOS.start_workflow(work).get_result()", path, "killed", env=env)
    resumed = run_python(
        DBOS
        + "[it] = DBOS.list_workflows()\nDBOS.retrieve_workflow(it.workflow_id).get_result()\nDBOS.destroy()",
        path,
        "lives",
        env=env,
    )

    assert (killed.returncode, killed.stdout) == (9, "first\n"), killed.stderr
    assert (resumed.returncode, resumed.stdout) == (0, "second\n"), resumed.stderr


# Procrastinate and Dramatiq


def test_dramatiq_awaits_retries_and_raises_if_its_broker_is_down() -> None:
    """A worker runs coroutines with a middleware; Redis that is down is an error of the request."""
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.brokers.stub import StubBroker
    from dramatiq.middleware import AsyncIO, Retries
    from redis.exceptions import ConnectionError as NoRedis

    answers: list[int] = []
    broker = StubBroker()
    broker.add_middleware(AsyncIO())

    @dramatiq.actor(broker=broker)
    async def ask() -> None:
        answers.append(await answer())

    worker = dramatiq.Worker(broker, worker_timeout=10)
    worker.start()
    ask.send()
    broker.join(ask.queue_name, timeout=int(BOUND * 1000))
    worker.join()
    worker.stop()

    assert answers == [7]
    assert [it.max_retries for it in broker.middleware if isinstance(it, Retries)] == [20]
    with pytest.raises(NoRedis):
        dramatiq.actor(broker=RedisBroker(url="redis://127.0.0.1:1/0"), actor_name="down")(print).send()


def test_procrastinate_runs_async_functions_one_at_a_time() -> None:
    """With the defaults, and in the process that calls run_worker_async()."""
    import procrastinate
    from procrastinate.testing import InMemoryConnector
    from procrastinate.worker import WORKER_CONCURRENCY

    answers: list[int] = []
    app = procrastinate.App(connector=InMemoryConnector())

    @app.task
    async def ask() -> None:
        answers.append(await answer())

    async def main() -> None:
        async with app.open_async():
            await ask.defer_async()
            await app.run_worker_async(wait=False, install_signal_handlers=False, listen_notify=False)

    asyncio.run(main())
    assert answers == [7]
    assert WORKER_CONCURRENCY == 1
