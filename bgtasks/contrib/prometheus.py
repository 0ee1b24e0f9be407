"""Metrics for Prometheus, by ``prometheus_client``.

::

    INSTALLED_APPS = [..., "bgtasks", "bgtasks.contrib.prometheus.PrometheusConfig"]

In one process the figures are read when they are scraped. With ``PROMETHEUS_MULTIPROC_DIR``, where one worker
speaks for all, each process writes its figures to the files of ``prometheus_client`` while tasks are spawned
or run, and a last time after that; ``MultiProcessCollector`` adds them up. The sum includes the counters of
workers that have ended, as it must.

The label ``task`` is a task's name. A pool tells 200 names apart; the tasks of all further ones are counted
as ``(other names)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from django.apps import AppConfig
from prometheus_client import REGISTRY, CollectorRegistry, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from bgtasks.core.figures import EXPORTED, Outcome
from bgtasks.monitoring.figures import NameStats, PoolStats, oldest_wait, read_stats_by_name
from bgtasks.pools import pools

COUNTERS = {
    "bgtasks_spawned": ("Calls of spawn, dropped tasks included.", ("pool", "task")),
    "bgtasks_dropped": ("Tasks that were not accepted.", ("pool", "task", "reason")),
    "bgtasks_finished": ("Accepted tasks that have ended.", ("pool", "task", "outcome")),
    "bgtasks_retried": ("Failed tries after which the task waited for another try.", ("pool", "task")),
    "bgtasks_tasks_lost": ("Lost tasks of killed processes that this one has reported.", ("pool", "task")),
    "bgtasks_handoff_failures": ("How often the engine could not be reached, or failed.", ("pool",)),
}
GAUGES = {
    "bgtasks_queue_length": "Tasks that wait now.",
    "bgtasks_delayed_queue_length": "The ones among them that wait for a later time, such as a retry.",
    "bgtasks_queue_capacity": "Tasks that may wait.",
    "bgtasks_running": "Tasks that run now.",
    "bgtasks_slots": "Tasks that may run at once.",
    "bgtasks_oldest_queued_seconds": "How long the oldest waiting task has waited.",
}
HISTOGRAMS = {
    "bgtasks_wait_seconds": "How long tasks waited before they ran.",
    "bgtasks_run_seconds": "How long tasks ran.",
}
LARGEST = {"bgtasks_oldest_queued_seconds"}  # of several processes; all other gauges are added up

Labels = tuple[str, ...]
PoolFigures = tuple[str, PoolStats, list[NameStats], float, int]


class BgtasksCollector(Collector):
    """The figures of this process at the moment of the scrape."""

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        figures = list(_figures())
        for name, (text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for at, count in _counts(name, figures):
                counter.add_metric(at, count)
            yield counter
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=("pool",))
            for pool, value in _gauge(name, figures):
                gauge.add_metric((pool,), value)
            yield gauge
        for name, text in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=("pool", "task"))
            for at, counts, total in _histogram(name, figures):
                buckets = list(zip(_bounds(), map(float, accumulate(counts)), strict=True))
                histogram.add_metric(at, buckets, total)
            yield histogram


class Files:
    """The figures of this process in the files that ``MultiProcessCollector`` reads."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, Labels], Any] = {}

    def write(self) -> None:
        """Write all figures as they are now. Called by the publisher."""
        figures = list(_figures())
        for name, (text, labels) in COUNTERS.items():
            for at, count in _counts(name, figures):
                self._set(("counter", name, f"{name}_total", labels, at, text), count)
        for name, text in GAUGES.items():
            mode = "livemax" if name in LARGEST else "livesum"
            for pool, value in _gauge(name, figures):
                self._set(("gauge", name, name, ("pool",), (pool,), text), value, mode)
        for name, text in HISTOGRAMS.items():
            for at, counts, total in _histogram(name, figures):
                for bound, count in zip(_bounds(), counts, strict=True):
                    labels, place = ("pool", "task", "le"), (*at, bound)
                    self._set(("histogram", name, f"{name}_bucket", labels, place, text), count)
                self._set(("histogram", name, f"{name}_sum", ("pool", "task"), at, text), total)

    def _set(self, what: tuple[str, str, str, Labels, Labels, str], value: float, mode: str = "") -> None:
        key = what[2], what[4]
        if key not in self._values:
            make: Any = values.ValueClass  # of files, as PROMETHEUS_MULTIPROC_DIR was set at its import
            self._values[key] = make(*what, multiprocess_mode=mode)
        self._values[key].set(value)


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Have the figures of all pools collected: from `registry`, or from the files of all processes.

    A second call does nothing.
    """
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        if not any(isinstance(getattr(of, "__self__", None), Files) for of in pools.publisher.listeners):
            pools.publisher.listeners.append(Files().write)
    elif registry not in _registered:
        _registered.append(registry)
        registry.register(BgtasksCollector())


_registered: list[CollectorRegistry] = []


class PrometheusConfig(AppConfig):
    """Calls ``register()``."""

    name = "bgtasks.contrib.prometheus"
    label = "bgtasks_prometheus"
    verbose_name = "Background tasks: Prometheus"

    def ready(self) -> None:
        """Register the metrics."""
        register()


def _figures() -> Iterator[PoolFigures]:
    for slots in pools.built():
        stats, names = read_stats_by_name(slots.queue)
        yield slots.queue.pool, stats, names, oldest_wait(slots.queue) or 0.0, len(slots.queue.delayed)


def _counts(metric: str, figures: Iterable[PoolFigures]) -> Iterator[tuple[Labels, int]]:
    if metric == "bgtasks_tasks_lost":
        yield from pools.journal.lost.copy().items()
        return
    for pool, stats, names, *_ in figures:
        if metric == "bgtasks_handoff_failures":
            yield (pool,), stats.handoff_failures
            continue
        for of in names:
            if metric == "bgtasks_spawned":
                yield (pool, of.name), of.spawned
            elif metric == "bgtasks_retried":
                yield (pool, of.name), of.retried
            elif metric == "bgtasks_dropped":
                yield from (((pool, of.name, reason), count) for reason, count in of.dropped.items())
            else:
                yield from (
                    ((pool, of.name, outcome.label), of.ended[outcome])
                    for outcome in Outcome
                    if of.ended[outcome]
                )


def _gauge(metric: str, figures: Iterable[PoolFigures]) -> Iterator[tuple[str, float]]:
    for pool, stats, _, oldest, delayed in figures:
        yield (
            pool,
            {
                "bgtasks_queue_length": stats.queued,
                "bgtasks_delayed_queue_length": delayed,
                "bgtasks_queue_capacity": stats.capacity,
                "bgtasks_running": stats.running,
                "bgtasks_slots": stats.conn_max,
                "bgtasks_oldest_queued_seconds": oldest,
            }[metric],
        )


def _histogram(metric: str, figures: Iterable[PoolFigures]) -> Iterator[tuple[Labels, Sequence[int], float]]:
    for pool, _, names, *_ in figures:
        for of in names:
            times = of.waits if metric == "bgtasks_wait_seconds" else of.runs
            yield (pool, of.name), times.exported(), times.seconds


def _bounds() -> list[str]:
    return [*map(str, EXPORTED), "+Inf"]
