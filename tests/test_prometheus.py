"""Metrics: their names and labels, and that they agree with `stats()` to the last task."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings

prometheus_client = pytest.importorskip("prometheus_client")

import bgtasks  # noqa: E402  # after the module it may lack
from bgtasks.contrib import prometheus  # noqa: E402
from bgtasks.pools import pools  # noqa: E402
from tests.gate import BOUND, Gate, wait_until  # noqa: E402
from tests.monitoring.test_journal import leave  # noqa: E402
from tests.processes import run_python  # noqa: E402

LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def read(text: str) -> dict[tuple[str, frozenset[Any]], float]:
    """Return the samples of a scrape."""
    return {
        (name, frozenset(LABEL.findall(labels or ""))): float(value)
        for name, labels, value in LINE.findall(text)
    }


def scrape() -> dict[tuple[str, frozenset[Any]], float]:
    registry = prometheus_client.CollectorRegistry()
    prometheus.register(registry)
    prometheus.register(registry)
    return read(prometheus_client.generate_latest(registry).decode())


def total(samples: Any, name: str, **labels: str) -> float:
    found: float = sum(
        value for (of, at), value in samples.items() if of == name and set(labels.items()) <= at
    )
    return found


@pytest.fixture(autouse=True)
def anew(settings: Settings) -> None:
    """Pools that have counted nothing yet."""
    settings.BGTASKS = {"default": {"CAPACITY": 5, "CONN_MAX": 1}}


def scrape_when_busy() -> dict[tuple[str, frozenset[Any]], float]:
    """Return the figures of a pool that has failed a task, runs one, is full, and has dropped one."""
    with Gate() as gate:
        bgtasks.spawn("bad", int, "x")
        assert bgtasks.drain(BOUND)
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        for _ in range(6):
            bgtasks.spawn("waits", print, end="")
        return scrape()


def test_metrics_have_the_names_and_labels_that_are_documented() -> None:
    """What a dashboard was built on stays."""
    seen = scrape_when_busy()

    assert total(seen, "bgtasks_spawned_total", pool="default", task="waits") == 6
    assert total(seen, "bgtasks_dropped_total", pool="default", task="waits", reason="full") == 1
    assert total(seen, "bgtasks_finished_total", pool="default", task="bad", outcome="failed") == 1
    assert total(seen, "bgtasks_queue_length", pool="default") == 5
    assert total(seen, "bgtasks_queue_capacity", pool="default") == 5
    assert total(seen, "bgtasks_running", pool="default") == 1
    assert total(seen, "bgtasks_slots", pool="default") == 1
    assert total(seen, "bgtasks_oldest_queued_seconds", pool="default") > 0
    assert ("bgtasks_handoff_failures_total", frozenset({("pool", "default")})) in seen
    for name in ("bgtasks_wait_seconds", "bgtasks_run_seconds"):
        assert total(seen, f"{name}_count", pool="default", task="bad") == 1
        assert total(seen, f"{name}_bucket", pool="default", task="bad", le="+Inf") == 1
        assert total(seen, f"{name}_sum", pool="default", task="bad") > 0
    assert bgtasks.drain(BOUND)


def test_retries_and_what_was_shed_are_metrics() -> None:
    """Tries that have failed, what waits for another one, and outcomes of policies, by name."""
    with Gate() as gate:
        bgtasks.using(retries=1, retry_delay=BOUND).spawn("bad", int, "x")
        wait_until(lambda: bgtasks.stats()["default"].retried)
        bgtasks.spawn("held", gate)
        gate.wait_entered()
        keyed = bgtasks.using(key="7")
        assert all(keyed.spawn("equal", int) for _ in range(3))
        bgtasks.using(expires=1e-9).spawn("old", int)
        seen = scrape()
    queue = pools["default"].build().slots.queue
    queue.cancel(lambda task: task.name == "bad", [])
    assert bgtasks.drain(BOUND)
    after = scrape()

    assert total(seen, "bgtasks_retried_total", pool="default", task="bad") == 1
    assert total(seen, "bgtasks_delayed_queue_length", pool="default") == 1
    assert total(seen, "bgtasks_finished_total", task="equal", outcome="coalesced") == 2
    assert total(after, "bgtasks_finished_total", task="old", outcome="shed") == 1
    assert total(after, "bgtasks_delayed_queue_length", pool="default") == 0


def test_lost_tasks_are_a_metric(tmp_path: Path, settings: Settings) -> None:
    """What this process has told of killed ones is exported, also of pools that it does not have."""
    settings.BGTASKS_JOURNAL = {"DIR": str(tmp_path)}
    leave(tmp_path, "lost", "lost")
    bgtasks.spawn("task", int)
    wait_until(lambda: pools.journal.lost)
    seen = scrape()
    pools.journal.lost.clear()

    assert total(seen, "bgtasks_tasks_lost_total", pool="default", task="lost") == 2


def test_failures_of_the_engine_are_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``stats()`` says of them is exported, so that an alarm can be made of it."""
    bgtasks.spawn("task", int)
    assert bgtasks.drain(BOUND)
    [slots] = pools.built()
    monkeypatch.setattr(slots.queue, "handoff_failures", 3)

    assert bgtasks.stats()["default"].handoff_failures == 3
    assert total(scrape(), "bgtasks_handoff_failures_total", pool="default") == 3


def test_scrapes_during_a_burst_agree_with_the_figures(settings: Settings) -> None:
    """No counter ever falls while tasks come and go, and afterwards each agrees to the last task."""
    settings.BGTASKS = {"default": {"CAPACITY": 100, "CONN_MAX": 4}}
    before: dict[tuple[str, frozenset[Any]], float] = {}
    for round_ in range(30):
        for number in range(40):
            bgtasks.spawn(f"task {number % 3}", int, "x" if number % 5 == 0 else "1")
        seen = scrape()
        for key, value in before.items():
            if key[0].endswith("_total") or key[0].endswith("_bucket"):
                assert seen[key] >= value, (round_, key)
        before = seen
    assert bgtasks.drain(BOUND)

    seen, stats = scrape(), bgtasks.stats()["default"]
    assert total(seen, "bgtasks_spawned_total") == stats.spawned == 1200
    assert total(seen, "bgtasks_dropped_total") == stats.dropped
    for outcome in ("succeeded", "failed"):
        assert total(seen, "bgtasks_finished_total", outcome=outcome) == getattr(stats, outcome)
    assert total(seen, "bgtasks_run_seconds_count") == stats.succeeded + stats.failed


def test_app_registers_the_metrics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics are in the default registry as soon as the app is installed."""
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus.register, "__defaults__", (registry,))
    config = prometheus.PrometheusConfig("bgtasks.contrib.prometheus", prometheus)
    config.ready()

    assert "bgtasks_slots" in prometheus_client.generate_latest(registry).decode()


MULTIPROCESS = """
import os, sys
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_prometheus", "bgtasks", "bgtasks.contrib.prometheus.PrometheusConfig"],
    BGTASKS={"default": {"CONN_MAX": 2}},
    BGTASKS_SNAPSHOT={"INTERVAL": 0.1},
    ROOT_URLCONF="django_prometheus.urls",
    ALLOWED_HOSTS=["*"],
)
django.setup()
import bgtasks
from bgtasks.monitoring import publisher

if sys.argv[1] == "work":
    publisher.STOP_PATIENCE = 30  # for the last figures, on a machine that is busy
    for number in range(7):
        bgtasks.spawn("good", int)
    bgtasks.spawn("bad", int, "x")
else:
    from django.test import Client
    print(Client().get("/metrics").content.decode())
"""


def test_processes_are_added_up_in_multi_process_mode(tmp_path: Path) -> None:
    """Beside django-prometheus, one worker's /metrics speaks for all, those that have ended included."""
    pytest.importorskip("django_prometheus")
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONWARNINGS": "default"}
    for _ in range(2):
        done = run_python(MULTIPROCESS, "work", env=env)
        assert done.returncode == 0, done.stderr
    scraped = run_python(MULTIPROCESS, "scrape", env=env)
    assert scraped.returncode == 0, scraped.stderr
    seen = read(scraped.stdout)

    assert total(seen, "bgtasks_spawned_total", task="good") == 14
    assert total(seen, "bgtasks_finished_total", task="good", outcome="succeeded") == 14
    assert total(seen, "bgtasks_finished_total", task="bad", outcome="failed") == 2
    assert total(seen, "bgtasks_run_seconds_count", task="good") == 14
    assert total(seen, "bgtasks_run_seconds_bucket", task="good", le="+Inf") == 14
    # Of workers that have ended, their counters count, and their queues are gone.
    assert total(seen, "bgtasks_queue_length") == total(seen, "bgtasks_running") == 0


def test_files_are_written_by_the_publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In multi-process mode the figures go into files, once, and nothing is added to a registry."""

    class Value:
        def __init__(self, *what: Any, multiprocess_mode: Any) -> None:
            self.what, self.mode = what, multiprocess_mode
            written[what[2], what[4]] = self

        def set(self, value: Any) -> None:
            self.value = value

    written: dict[tuple[str, tuple[str, ...]], Any] = {}
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr("bgtasks.contrib.prometheus.values.ValueClass", Value)
    monkeypatch.setattr(pools.publisher, "listeners", [])
    prometheus.register()
    prometheus.register()
    [write] = pools.publisher.listeners
    bgtasks.spawn("good", int)
    assert bgtasks.drain(BOUND)
    write()
    write()

    assert written["bgtasks_finished_total", ("default", "good", "succeeded")].value == 1
    assert written["bgtasks_queue_length", ("default",)].mode == "livesum"
    assert written["bgtasks_oldest_queued_seconds", ("default",)].mode == "livemax"
    assert sum(of.value for (name, _), of in written.items() if name == "bgtasks_run_seconds_bucket") == 1


def test_package_needs_none_of_the_extras() -> None:
    """Without them the package imports, starts and runs a task."""
    blocked = ("prometheus_client", "opentelemetry", "health_check", "sentry_sdk", "structlog")
    done = run_python(
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import django; django.setup(); import bgtasks\n"
        "bgtasks.spawn('task', print, 'it ran')\n"
        "import bgtasks.admin, bgtasks.health\n"
    )

    assert (done.returncode, done.stdout) == (0, "it ran\n"), done.stderr


DASHBOARD = json.loads((Path(__file__).parent.parent / "docs" / "grafana.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
FUNCTIONS = {
    "sum",
    "max",
    "rate",
    "increase",
    "histogram_quantile",
    "or",
    "unless",
    "vector",
}  # of the language of Prometheus


@pytest.fixture
def exported() -> dict[str, dict[str, set[str]]]:
    """The metrics of a pool that has run, failed and dropped a task: their labels with all values."""
    seen = scrape_when_busy()
    metrics: dict[str, dict[str, set[str]]] = {}
    for name, labels in seen:
        for label, value in labels:
            metrics.setdefault(name, {}).setdefault(label, set()).add(value)
    return metrics


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_dashboard_asks_for_what_is_exported(
    target: dict[str, str], exported: dict[str, dict[str, set[str]]]
) -> None:
    """Metrics, their labels, what is grouped by, and what a legend shows: all of it is in a real scrape."""
    expression = target["expr"]
    selectors = re.findall(r"(bgtasks_\w+)\{([^}]*)\}", expression)
    groupings = [set(labels.split(", ")) for labels in re.findall(r"by \(([^)]*)\)", expression)]
    legend = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
    rest = re.sub(r"\{[^}]*\}|by \([^)]*\)|\[[^\]]*\]|offset [$\w]+|\$\w+", "", expression)

    assert selectors
    for name, matchers in selectors:
        for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', matchers):
            assert value in exported[name][label] if operator == "=" else value == "$pool"
            assert label in exported[name]
        assert all(grouping <= set(exported[name]) for grouping in groupings)
    assert legend <= set.intersection(*groupings) if groupings else not legend
    assert set(re.findall(r"[a-zA-Z]\w*", rest)) <= FUNCTIONS | {name for name, _ in selectors}


def test_dashboard_offers_the_pools_that_are_exported(exported: dict[str, dict[str, set[str]]]) -> None:
    """The choice of pools is made of a label that exists."""
    queries = [of["query"] for of in DASHBOARD["templating"]["list"] if of["type"] == "query"]
    [[name, label]] = [re.findall(r"\w+", query)[1:] for query in queries]

    assert exported[name][label] == {"default"}
