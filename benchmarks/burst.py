"""What does a burst of background work do to the requests of a site?

One burst of tasks, while 60 requests a second come in, on PostgreSQL with psycopg's pool of 25 connections:
400 tasks that hold a connection for 0.3 s each. Every way to start them gets a fresh server, whose visitors
are measured first without and then with the burst; the ways take turns, and the figures are medians over the
rounds. A request belongs to the stretch it was due in, however late its answer (an open loop).

Eight processes of their own share the machine and the database with the requests, but not the GIL: what they
do to the requests is what no way to run tasks in the process of the site can avoid.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import QUICK, Result, percentile, say, set_up
from benchmarks.visitors import REQUEST_TIMEOUT, Visitors
from demo_project import processes

IDLE = 1.0 if QUICK else 8.0  # seconds
LIMIT = 60.0  # seconds after which tasks that have not ended are lost
RATE = 60  # requests a second

LABELS = {
    "bgtasks": "bgtasks, 8 slots",
    "thread": "a thread each",
    "executor": "`ThreadPoolExecutor(64)`",
    "executor-8": "`ThreadPoolExecutor(8)`",
    "starlette": "Starlette's `BackgroundTask`",
    "create-task": "`asyncio.create_task`, `to_thread`",
    "tasks-local": "django-tasks-local, 8 workers",
    "processes-8": "`ProcessPoolExecutor(8)`",
}
KINDS = {
    "hold": "tasks that hold a connection",
    "cpu": "tasks that compute",
    "long": "a task that computes for 3 s",
}
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "benchmarks.asgi:application", "--log-level=warning", "--port={port}"],
    "gunicorn gthread": [
        *("-m", "gunicorn", "benchmarks.wsgi:application", "--worker-class=gthread", "--threads=16"),
        *("--log-level=warning", "--bind=127.0.0.1:{port}"),
    ],
}


@dataclass(frozen=True)
class Scenario:
    """A server, a kind of tasks, how many, and the ways to start them."""

    server: str
    kind: str
    count: int
    means: Sequence[str]

    @property
    def name(self) -> str:
        """Return what it is called in the table."""
        return f"{self.server}, {KINDS[self.kind]}"


QUESTION = "What does a burst of background work do to the requests of a site?"
SCENARIOS = [
    Scenario("uvicorn", "hold", 400, list(LABELS)),
    Scenario("gunicorn gthread", "hold", 400, ["bgtasks", "thread", "executor", "executor-8", "tasks-local"]),
]


@dataclass
class Run:
    """What one server has shown: latencies in ms without and with the burst, and what became of it."""

    idle: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)
    failed: int = 0
    lost: int = 0
    seconds: float = 0.0
    series: list[tuple[float, float]] = field(default_factory=list)  # seconds since the burst, latency


def get(url: str) -> dict[str, int]:
    """Return the JSON at an address."""
    with urllib.request.urlopen(url, timeout=LIMIT) as response:
        got: dict[str, int] = json.load(response)
        return got


@contextmanager
def server(name: str, environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run the site on a server, and provide its address once it answers."""
    port = processes.free_port(0)
    command = [sys.executable, *(part.format(port=port) for part in SERVERS[name])]
    address = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=processes.ROOT)
        try:
            for _ in range(300):
                try:
                    get(f"{address}/state/")
                    break
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"{name} ended at once; see {log}") from None
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(scenario: Scenario, means: str, environment: dict[str, str], log: Path) -> Run:
    """Measure one way on a fresh server."""
    run = Run()
    with server(scenario.server, environment, log) as address:
        with processes.probe(f"{address}/page/", RATE, environment, timeout=REQUEST_TIMEOUT) as process:
            visitors = Visitors(process)
            warming = "cpu" if scenario.kind == "long" else scenario.kind
            get(f"{address}/burst/{means}/{warming}/16/")
            wait(address, 16)
            time.sleep(2)
            idle = time.time()
            time.sleep(IDLE)
            started = time.time()
            get(f"{address}/burst/{means}/{scenario.kind}/{scenario.count}/")
            run.lost = scenario.count + 16 - wait(address, scenario.count + 16)
            time.sleep(max(0.0, started + 2 / RATE - time.time()))  # so that a request is due in it
            ended = time.time()
            visitors.catch_up(ended)
            visitors.leave()
    run.seconds = ended - started
    for due, latency, ok in visitors.samples:
        if idle <= due < started:
            run.idle.append(latency)
        elif started <= due < ended:
            run.burst.append(latency)
            run.failed += not ok
        run.series.append((due - started, latency))
    return run


def wait(address: str, count: int) -> int:
    """Wait until so many tasks have ended; return how many of them ended well."""
    deadline = time.time() + LIMIT
    while True:
        try:
            got = get(f"{address}/state/")
        except OSError:
            got = {"ended": 0, "succeeded": 0}
        if got["ended"] >= count or time.time() > deadline:
            return got["succeeded"]
        time.sleep(0.1)


def main(question: str, scenarios: Sequence[Scenario]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if QUICK:
        scenarios = [replace(each, count=min(each.count, 16), means=each.means[:1]) for each in scenarios]
        rounds = 1
    result = Result(
        question,
        [
            "",
            "idle p99 ms",
            "burst p50 ms",
            "burst p99 ms",
            "p99 x idle",
            "failed requests",
            "lost tasks",
            "s",
        ],
    )
    with ExitStack() as stack:
        data = Path(stack.enter_context(TemporaryDirectory(prefix="bgtasks-")))
        database = stack.enter_context(processes.database(data, sqlite=False))
        environment = processes.Scenario().variables(database, 0, data)
        processes.migrate(environment)
        environment["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        for scenario in scenarios:
            runs: dict[str, list[Run]] = {means: [] for means in scenario.means}
            for number in range(rounds):
                for means in scenario.means:
                    say(f"{scenario.name}: round {number + 1} of {rounds}: {means}")
                    runs[means].append(measure(scenario, means, environment, data / "server.log"))
            report(result, scenario, runs)
        say("")
    result.finish()


def middle(runs: list[list[float]], percent: float) -> float:
    """Return the median of a percentile of the latencies over several runs."""
    return statistics.median(percentile(latencies, percent) for latencies in runs)


def report(result: Result, scenario: Scenario, runs: dict[str, list[Run]]) -> None:
    """Add the rows and targets of a scenario."""
    result.rows.append((f"**{scenario.name}**", "", "", "", "", "", "", ""))
    # Without a burst all servers are alike, so what is idle is the median of all of them.
    idle = middle([run.idle for each in runs.values() for run in each], 99)
    ratios = {means: middle([run.burst for run in each], 99) / idle for means, each in runs.items()}
    for means, each in runs.items():
        burst = [run.burst for run in each]
        requests = sum(len(run.burst) for run in each)
        result.rows.append(
            (
                LABELS[means],
                middle([run.idle for run in each], 99),
                middle(burst, 50),
                middle(burst, 99),
                ratios[means],
                f"{sum(run.failed for run in each)} of {requests}",
                f"{sum(run.lost for run in each)} of {scenario.count * len(each)}",
                statistics.median(run.seconds for run in each),
            )
        )
        if scenario.kind == "hold" and scenario.server == "uvicorn":
            result.extra[means] = [[round(at, 3), round(latency, 2)] for at, latency in each[0].series]
    if scenario.kind == "hold":
        result.target(f"{scenario.server}: p99 under the burst / idle", ratios["bgtasks"], at_most=1.15)
        result.notes.append(
            f"{scenario.server}: eight threads of a `ThreadPoolExecutor` that do the same tasks bring the "
            f"p99 to {ratios.get('executor-8', 0):.2f} x idle. Above 1, that is the tasks' own Python, "
            "between one query and the next, for which a request has to wait at the GIL."
        )
        if "processes-8" in ratios:
            result.notes[-1] += (
                f" Eight processes of their own, which share no GIL with the requests, bring it to "
                f"{ratios['processes-8']:.2f} x idle."
            )
    else:
        peers = [ratio for means, ratio in ratios.items() if means in {"executor-8", "tasks-local"}]
        best = min(peers, default=ratios["bgtasks"])
        result.target(
            f"{scenario.server}: p99 x idle / that of the best peer with 8 threads",
            ratios["bgtasks"] / best,
            at_most=0.4 if scenario.kind == "long" else 1.0,
        )


if __name__ == "__main__":
    set_up()
    main(QUESTION, SCENARIOS)
