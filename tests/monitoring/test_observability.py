"""docs/observability.md says what the code does: its tables are those of the code, and its snippets work."""

import io
import json
import logging
import logging.config
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import BaseCache
from django.core.management import call_command

import bgtasks
from bgtasks import conf, health
from bgtasks.core.log import logger
from bgtasks.models import BackgroundTasks
from tests.gate import BOUND
from tests.monitoring.test_publisher import cache, publish
from tests.monitoring.test_reading import busy

__all__ = ["cache"]  # the fixture

PAGE = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()


def snippet(containing: str) -> str:
    """Return the one Python block of the page that contains a text."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    [found] = [block for block in blocks if containing in block]
    return found


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the table under a header row."""
    table = PAGE.split(heading, 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def test_snapshot_setting_shows_the_defaults() -> None:
    """The setting on the page is the default."""
    names: dict[str, Any] = {}
    exec(snippet("BGTASKS_SNAPSHOT = {"), names)

    options = {key.lower(): value for key, value in names["BGTASKS_SNAPSHOT"].items()}
    assert conf.SnapshotConfig(**options) == conf.SnapshotConfig()


def test_every_permission_is_documented() -> None:
    """The table of permissions has each one."""
    codenames = [f"bgtasks.{codename}" for codename, _ in BackgroundTasks._meta.permissions]

    assert first_column("| permission | what it allows |") == codenames


def test_every_metric_is_documented() -> None:
    """The table of metrics has each one that is exported, with its labels."""
    prometheus = pytest.importorskip("bgtasks.contrib.prometheus", exc_type=ImportError)
    exported = [
        *(f"{name}_total" for name in prometheus.COUNTERS),
        *prometheus.GAUGES,
        *prometheus.HISTOGRAMS,
    ]

    assert first_column("| metric | labels | |") == exported


def test_every_field_of_the_json_is_documented(cache: BaseCache) -> None:
    """The tables of `--json` have each field, and no other."""

    def fields(heading: str) -> set[str]:
        table = PAGE.split(heading, 1)[1].split("\n\n", 1)[0]
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    def mentioned(heading: str, field: str) -> set[str]:
        table = PAGE.split(heading, 1)[1].split("\n\n", 1)[0]
        [line] = [line for line in table.splitlines() if line.startswith(f"| `{field}`")]
        return {*re.findall(r"`(\w+)`", line)} - {field, f"{field}_known"}

    publish(cache, busy())
    out = io.StringIO()
    with pytest.raises(SystemExit):  # its queue is full
        call_command("bgtasks", "--json", stdout=out)
    seen = json.loads(out.getvalue())
    [process], [pool] = seen["processes"], seen["pools"]

    assert fields("| field | |") == set(seen)
    assert fields("| field of a process | |") == set(process)
    assert fields("| field of a pool | |") == set(pool)
    assert fields("| field of a name | |") == set(pool["names"][0])
    assert mentioned("| field of a process | |", "pools") == {*process["pools"][0], "stats"}
    for part in ("running", "failures", "drops"):
        assert mentioned("| field of a pool | |", part) == set(pool[part][0])


def test_snippets_in_code_run() -> None:
    """What the page shows of figures and of health can be copied."""
    exec(snippet("print(stats.queued"), {"bgtasks": bgtasks, "print": lambda *values: None})
    exec(snippet("import bgtasks.health"), {})

    assert health.WAIT_MAX == 60.0


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Leave the logger as it was: a configuration replaces its handlers."""
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("needed", "containing"), [("pythonjsonlogger", "JsonFormatter"), ("structlog", "ExtraAdder")]
)
@pytest.mark.usefixtures("logging_restored")
def test_record_of_a_failed_task_has_its_keys(needed: Any, containing: Any) -> None:
    """With the configurations on the page, the attributes of a record are keys of a line of JSON."""
    module = pytest.importorskip(needed)
    names: dict[str, Any] = {needed: module}
    exec(snippet(containing), names)
    output = io.StringIO()
    names["LOGGING"]["handlers"]["console"]["stream"] = output
    names["LOGGING"]["disable_existing_loggers"] = False
    logging.config.dictConfig(names["LOGGING"])
    bgtasks.spawn("send-welcome", int, "x")
    assert bgtasks.drain(BOUND)
    [line] = [json.loads(line) for line in output.getvalue().splitlines() if "send-welcome" in line]

    assert (line["task"], line["pool"], line["outcome"]) == ("send-welcome", "default", "failed")
    assert {"wait_s", "run_s", "queue_length"} <= set(line)
