"""Real engines with real workers: one project, whose call sites do not change, on each of them."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.gate import BOUND
from tests.processes import Server, run_python

pytestmark = pytest.mark.engines

ORDERS = 20
KINDS = ("receipt", "ping", "charge", "report", "stays")
WORKERS = {
    "db": ["-m", "django", "db_worker", "--backend", "engine", "--interval", "0.05", "--no-startup-delay"],
    "rq": ["-m", "django", "rqworker", "default", "--job-class", "django_tasks_rq.Job"],
    "celery": ["-m", "celery", "-A", "tests.shop.celery", "worker", "--pool", "solo", "--loglevel", "INFO"],
    "huey": ["-m", "django", "run_huey", "--workers", "2"],
}
READY = {"db": "Starting worker", "rq": "Listening on default", "celery": "ready.", "huey": "Huey consumer"}


@pytest.fixture
def shop(valkey: str) -> Any:
    """Return the environment of a shop with a database of its own."""
    host = os.environ["BGTASKS_TEST_POSTGRESQL"]
    with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        connection.execute("CREATE DATABASE shop")
    return {
        "DJANGO_SETTINGS_MODULE": "tests.shop.settings",
        "SHOP_POSTGRESQL": host,
        "SHOP_VALKEY": valkey,
        "PYTHONWARNINGS": "ignore",  # those of the engines are theirs
    }


@contextmanager
def workers(engine: Any, shop: dict[str, str], number: int = 1) -> Iterator[Any]:
    """Have so many workers of the engine, each a process of its own."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Server([sys.executable, *WORKERS[engine]], line=READY[engine], env=shop, bound=3 * BOUND)
            )
            for _ in range(number)
        ]


def run(code: str, shop: dict[str, str]) -> Any:
    """Run code as a process of the shop, and return what it prints."""
    process = run_python("import django\ndjango.setup()\n" + code, env=shop)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def migrate(shop: dict[str, str]) -> None:
    command = "call_command('migrate', run_syncdb=True, verbosity=0)"
    run(f"from django.core.management import call_command\n{command}", shop)


def query(sql: str) -> Any:
    host = os.environ["BGTASKS_TEST_POSTGRESQL"]
    with psycopg.connect(host=host, user="postgres", dbname="shop", autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def wait_for_rows(number: int, rows: str = "shop_done", bound: float = 3 * BOUND) -> None:
    """Wait until so many tasks have been done, or so many other rows are there."""
    deadline = time.monotonic() + bound
    while (found := query(f"SELECT count(*) FROM {rows}")[0][0]) < number:
        assert time.monotonic() < deadline, f"{found} of {number} are there: {rows}"
        time.sleep(0.05)


# An engine that hangs is not what this is about, and a machine that pauses looks like one.
ORDER = f"""
import os, bgtasks
from bgtasks.handoff import mover
from tests.shop.calls import order
mover.STALL = {10 * BOUND}
for number in range({ORDERS}):
    order(number)
assert bgtasks.drain(30)
stats = bgtasks.stats()["default"]
print(os.getpid(), stats.spawned, stats.handed_off, stats.succeeded)
"""


@pytest.mark.parametrize(
    ("engine", "number"), [("pool", 0), ("db", 3), ("rq", 2), ("celery", 2), ("huey", 1)]
)
def test_the_same_call_sites_run_on_each_engine(engine: Any, number: int, shop: dict[str, str]) -> None:
    """Every task is run once, with its language, and by the workers, but for those that cannot travel."""
    shop = {**shop, "SHOP_ENGINE": engine}
    migrate(shop)
    with workers(engine, shop, number):
        web, spawned, handed_off, succeeded = map(int, run(ORDER, shop).split())
        wait_for_rows(ORDERS * len(KINDS))

    here = ORDERS if number else ORDERS * len(KINDS)
    assert (spawned, handed_off, succeeded) == (ORDERS * len(KINDS), spawned - here, here)
    rows = query("SELECT key, process, language, detail FROM shop_done")
    assert Counter(key.split("-")[0] for key, *_ in rows) == dict.fromkeys(KINDS, ORDERS)
    assert query("SELECT count(*) FROM shop_again") == [(len(rows),)]
    assert {language == ("fr" if int(key.split("-")[1]) % 2 else "en") for key, _, language, _ in rows} == {
        True
    }
    by_web = {key.split("-")[0] for key, process, *_ in rows if process == web}
    assert by_web == ({"stays"} if number else set(KINDS))
    assert all(detail for key, *_, detail in rows if key.startswith("report"))


BROKEN = """
import sys
from django.tasks import task_backends, signals
task_backends["engine"]  # which some write for the backport of Django's tasks, with signals of its own
def broken(**kwargs):
    raise ValueError("a receiver is broken")
signals.task_enqueued.connect(broken, weak=False)
if "django_tasks.signals" in sys.modules:
    sys.modules["django_tasks.signals"].task_enqueued.connect(broken, weak=False)
"""


@pytest.mark.parametrize("engine", ["rq", "celery", "huey"])
def test_a_receiver_that_raises_makes_no_task_run_twice(engine: str, shop: dict[str, str]) -> None:
    """The broker has the task by then, or is about to: it is a worker's, and not run here as well."""
    shop = {**shop, "SHOP_ENGINE": engine}
    migrate(shop)
    with workers(engine, shop):
        _, spawned, handed_off, succeeded = map(int, run(BROKEN + ORDER, shop).split())
        wait_for_rows(ORDERS * len(KINDS))

    assert (spawned, handed_off, succeeded) == (ORDERS * len(KINDS), spawned - ORDERS, ORDERS)
    assert query("SELECT count(*) FROM shop_again") == [(ORDERS * len(KINDS),)]


RIGHT = """
import bgtasks
from tests.shop import tasks
bgtasks.spawn("right", tasks.done, "right")
bgtasks.drain(30)
"""


def test_a_forged_payload_in_the_table_is_refused_and_runs_nothing(shop: dict[str, str]) -> None:
    """Somebody can write to the engine's table: the worker refuses what was not signed, and goes on."""
    shop = {**shop, "SHOP_ENGINE": "db"}
    migrate(shop)
    forge = """
from django_tasks_db.models import DBTaskResult, get_date_max
from bgtasks.handoff.payload import SALT
from django.core import signing
payload = {"f": "tests.shop.tasks.done", "a": ["forged"], "k": {}, "l": None, "z": None}
for text in (
    signing.dumps(payload, key="another key", salt=SALT),
    signing.dumps(payload, salt="another purpose"),
    "tests.shop.tasks.done",
):
    DBTaskResult.objects.create(
        task_path="bgtasks.tasks.run_function", queue_name="default", backend_name="engine",
        run_after=get_date_max(), args_kwargs={"args": [text], "kwargs": {}},
    )
"""
    run(forge, shop)
    with workers("db", shop):
        run(RIGHT, shop)
        wait_for_rows(1)
        wait_for_rows(3, "django_tasks_database_dbtaskresult WHERE status = 'FAILED'")

    assert query("SELECT key FROM shop_done") == [("right",)]
    rows = query("SELECT status, exception_class_path, traceback FROM django_tasks_database_dbtaskresult")
    failed = [row for row in rows if row[0] == "FAILED"]
    assert len(failed) == 3
    assert {row[1] for row in failed} == {"bgtasks.exceptions.PayloadError"}
    assert all(
        "was not signed by this project, or with another SECRET_KEY; nothing was run" in row[2]
        for row in failed
    )


# A signal that arrives while CPython hands over the GIL on its way into a lock's wait does not end that
# wait: so the main thread sleeps for short times.
SLOW = """
import signal, sys, time, bgtasks
from tests.shop import tasks
signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))
for number in range(1000):
    assert bgtasks.spawn("slow", tasks.send_receipt, f"slow-{number}", seconds=1.0)
print("spawned", flush=True)
while True:
    time.sleep(0.1)
"""


def test_sigterm_with_a_thousand_slow_tasks_loses_none(shop: dict[str, str]) -> None:
    """The process ends long before it could have run them, and the workers finish the rest."""
    shop = {**shop, "SHOP_ENGINE": "db", "SHOP_WHEN": "overflow", "SHOP_CAPACITY": "2048"}
    # Not the default of 8 s: a machine that pauses as long would have tasks cancelled.
    shop["SHOP_SHUTDOWN_TIMEOUT"] = str(2 * BOUND)
    migrate(shop)
    argv = [sys.executable, "-c", "import django\ndjango.setup()\n" + SLOW]
    with Server(argv, line="spawned", env=shop, bound=3 * BOUND) as web:
        assert web.stop(signal.SIGTERM) == 0
        output = web.output
    assert "cancelled" not in output
    by_web = query("SELECT count(*) FROM shop_done")[0][0]
    waiting = query("SELECT count(*) FROM django_tasks_database_dbtaskresult")[0][0]

    # A thousand tasks of a second each in seven slots are 143 s: most of them were moved before.
    assert by_web + waiting == 1000
    assert by_web < 500
    query(
        "UPDATE django_tasks_database_dbtaskresult SET status = 'SUCCESSFUL' WHERE id NOT IN "
        "(SELECT id FROM django_tasks_database_dbtaskresult LIMIT 10)"
    )
    with workers("db", shop, 3):
        wait_for_rows(by_web + 10)


def test_an_engine_that_is_down_costs_nothing_but_a_warning(shop: dict[str, str]) -> None:
    """Nobody listens where Valkey should be: every task is run here."""
    shop = {**shop, "SHOP_ENGINE": "rq", "SHOP_VALKEY": "redis://127.0.0.1:1/0"}
    migrate(shop)
    process = run_python("import django\ndjango.setup()\n" + ORDER, env=shop)

    _, spawned, handed_off, succeeded = map(int, process.stdout.split())
    assert (spawned, handed_off, succeeded) == (ORDERS * len(KINDS), 0, ORDERS * len(KINDS))
    assert process.stderr.count("could not be handed off to the engine 'engine'") == 1
    assert query("SELECT count(*) FROM shop_again") == [(ORDERS * len(KINDS),)]


# Workers of other queues, in whose jobs tasks are spawned for the pools of the worker's own process.

JOBS = 10
SLOW_WORKER = {"SHOP_CONN_MAX": "2", "SHOP_SHUTDOWN_TIMEOUT": str(2 * BOUND)}
CELERY = ["-m", "celery", "-A", "tests.shop.celery", "worker", "--concurrency", "2", "--loglevel", "INFO"]
RQ = ["-m", "django", "rqworker", "default"]


CELERY_JOBS = f"""
from tests.shop.celery import spawn_receipts
for number in range({JOBS}):
    spawn_receipts.delay(number)
"""
ENGINE_JOBS = f"""
from tests.shop import jobs
for number in range({JOBS}):
    jobs.receipts.using(backend="engine").enqueue(number)
"""
RQ_JOBS = f"""
import django_rq
from tests.shop import jobs
for number in range({JOBS}):
    django_rq.enqueue(jobs.spawn_receipts, number)
"""


@contextmanager
def job_worker(argv: list[str], line: str, shop: dict[str, str]) -> Iterator[Server]:
    with Server([sys.executable, *argv], line=line, env=shop, bound=3 * BOUND) as server:
        yield server


@pytest.mark.parametrize(
    "options",
    [["--max-tasks-per-child", "1"], [], ["--pool", "solo"], ["--pool", "threads"], ["--pool", "gevent"]],
    ids=["child-for-each-job", "prefork", "solo", "threads", "gevent"],
)
def test_tasks_that_celery_jobs_spawn_are_done(options: Any, shop: dict[str, str]) -> None:
    """Whichever pool the worker has: its children end without exit hooks, but not without a signal."""
    shop = {**shop, "CELERY_BROKER_URL": shop["SHOP_VALKEY"], **SLOW_WORKER}
    migrate(shop)
    with job_worker([*CELERY, *options], "ready.", shop) as server:
        run(CELERY_JOBS, shop)
        wait_for_rows(JOBS, "shop_done WHERE key LIKE 'job-%'")
        assert server.stop() == 0

        assert "cancelled" not in server.output
        assert query("SELECT count(*) FROM shop_done WHERE key LIKE 'receipt-%'") == [(3 * JOBS,)]


@pytest.mark.parametrize("engine", ["db", "huey"])
def test_tasks_that_jobs_of_other_workers_spawn_are_done(engine: Any, shop: dict[str, str]) -> None:
    """Their processes end as Python does."""
    shop = {**shop, "SHOP_ENGINE": engine, "SHOP_WHEN": "never", **SLOW_WORKER}
    migrate(shop)
    with job_worker(WORKERS[engine], READY[engine], shop) as server:
        run(ENGINE_JOBS, shop)
        wait_for_rows(JOBS, "shop_done WHERE key LIKE 'job-%'")
        server.stop()

        assert query("SELECT count(*) FROM shop_done WHERE key LIKE 'receipt-%'") == [(3 * JOBS,)]


@pytest.mark.parametrize(("worker", "done"), [("rq.Worker", False), ("rq.SimpleWorker", True)])
def test_tasks_that_rq_jobs_spawn_are_done_by_a_worker_that_does_not_fork(
    worker: Any, done: Any, shop: dict[str, str]
) -> None:
    """The process of a job ends as it returns, without hooks: its first spawn says so, and what to do."""
    shop = {**shop, "SHOP_ENGINE": "rq", "SHOP_WHEN": "never", **SLOW_WORKER}
    if not done:
        shop["SHOP_SECONDS"] = str(BOUND)  # longer than a slow machine takes to end the process
    migrate(shop)
    with job_worker([*RQ, "--worker-class", worker], READY["rq"], shop) as server:
        run(RQ_JOBS, shop)
        wait_for_rows(JOBS, "shop_done WHERE key LIKE 'job-%'")
        server.stop()

        assert query("SELECT count(*) FROM shop_done WHERE key LIKE 'receipt-%'") == [(3 * JOBS * done,)]
        assert server.output.count("use rq.SimpleWorker") == (0 if done else JOBS)


SIGN_UP = """
import django
django.setup()
from django.core.management import call_command
from django.test import Client
call_command("migrate", verbosity=0)
import bgtasks
response = Client().post("/sign-up/", {"name": "ada", "email": "ada@example.com"})
assert response.status_code == 302, response
assert bgtasks.drain(30)
stats = bgtasks.stats()["default"]
print(stats.spawned, stats.handed_off, stats.failed)
"""


@pytest.mark.parametrize(
    ("engine", "expected"),
    [("pool", "1 0 1"), ("db", "1 1 0"), ("rq", "1 1 0"), ("celery", "1 1 0"), ("huey", "1 1 0")],
)
def test_the_demo_site_runs_on_each_engine(engine: Any, expected: Any, valkey: str, tmp_path: Path) -> None:
    """DEMO_ENGINE alone decides whether a mail is sent here (in vain: no mail server) or handed off."""
    env = {
        "DJANGO_SETTINGS_MODULE": "demo_project.settings",
        "DEMO_DATA_DIR": str(tmp_path),
        "DATABASE_URL": f"sqlite:///{tmp_path / 'demo.sqlite3'}",
        "DEMO_ENGINE": engine,
        "DEMO_HANDOFF": "always",
        "DEMO_BROKER": valkey,
        "DEMO_MAIL_PORT": "1",
        "DEMO_TASK_SECONDS": "0.01",
        "PYTHONWARNINGS": "ignore",
    }
    process = run_python(SIGN_UP, env=env)

    assert process.stdout.split("\n")[-2] == expected, process.stderr


def test_an_unknown_engine_of_the_demo_is_named() -> None:
    """The message lists what there is."""
    env = {"DJANGO_SETTINGS_MODULE": "demo_project.settings", "DEMO_ENGINE": "abacus"}

    assert (
        "the demo knows pool, db, rq, celery and huey"
        in run_python("import django; django.setup()", env=env).stderr
    )


@pytest.mark.timeout(600)
def test_the_proof_at_scale_in_small() -> None:
    """Web processes far beyond their queues, a SIGTERM, a restart of PostgreSQL: each task runs once."""
    script = Path(__file__).parent.parent / "benchmarks" / "scale.py"
    options = ["--tasks", "1998", "--webs", "2", "--workers", "2", "--capacity", "32", "--limit", "400"]
    process = run_python(script, *options, env={"PYTHONWARNINGS": "ignore"}, timeout=550)

    assert process.returncode == 0, process.stdout + process.stderr
    assert "accepted 1998" in process.stdout
    assert process.stdout.endswith("each accepted task ran exactly once\n")


@pytest.mark.timeout(600)
def test_the_speeds_of_the_engines_are_measured() -> None:
    """The script of the table in the documentation runs, and has a row for each engine."""
    script = Path(__file__).parent.parent / "benchmarks" / "engines.py"
    options = ["--tasks", "10", "--workers", "1", "--rounds", "1", "--limit", "120"]
    process = run_python(script, *options, env={"PYTHONWARNINGS": "ignore"}, timeout=550)

    assert process.returncode == 0, process.stdout + process.stderr
    assert [line.split(",")[0] for line in process.stdout.splitlines()[3:]] == [
        "| django-tasks-db",
        "| django-tasks-rq",
        "| Celery",
        "| huey",
    ]
