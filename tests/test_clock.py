"""The clock of bgtasks goes on while a test freezes time."""

import ast
from pathlib import Path

import pytest

import bgtasks
from tests.processes import run_python

CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}

FREEZING = """
import asyncio
import datetime
import sys

import django

django.setup()

from importlib import import_module
from django.test import override_settings

import bgtasks

seen = []

def note():
    seen.append(datetime.datetime.now().year)

async def note_later():
    await asyncio.sleep(0.01)
    seen.append(datetime.datetime.now().year)

def fail():
    raise ValueError

bgtasks.spawn("before", note)
bgtasks.drain(30)
library = import_module(sys.argv[1])
freeze = library.freeze_time if sys.argv[1] == "freezegun" else library.travel
with freeze("2001-02-03"):
    bgtasks.spawn("inside", note)
    bgtasks.spawn("inside", note_later)
    bgtasks.using(retries=1, retry_delay=0.01).spawn("inside", fail)
    assert bgtasks.drain(30)
    [stats] = bgtasks.stats().values()
    for names in bgtasks.pools.default.slots.queue.account.values():
        assert names.wait_max < 30 and names.run_max < 30, names
    assert (stats.succeeded, stats.failed, stats.retried) == (3, 1, 1), stats
    with override_settings(BGTASKS={"default": {"CONN_MAX": 2}}):
        bgtasks.spawn("overridden", note)
        assert bgtasks.drain(30)
    bgtasks.spawn("at the end", note)
    assert bgtasks.shutdown(30)
print(*seen[1:])
"""


@pytest.mark.parametrize("library", ["freezegun", "time_machine"])
def test_pools_go_on_while_time_is_frozen(library: str) -> None:
    """A drain, a retry, an override_settings and a shutdown end; figures are true; tasks see frozen time."""
    pytest.importorskip(library)  # time_machine has no wheel for the newest Pythons
    process = run_python(FREEZING, library)

    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["2001"] * 4


def test_every_module_has_its_clock_from_one_place() -> None:
    """Freezegun would replace what a module takes from `time` itself."""
    package = Path(bgtasks.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "clock.py" or "rehearsal" in path.parts:
            continue  # a rehearsal starts servers, and runs in no test of a project
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not CLOCKS & {name.name for name in node.names}, path
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "time"
            ):
                assert node.attr not in CLOCKS, path
