"""`manage.py bgtasks` shows what other processes have published."""

import io
import json
from typing import Any

import pytest
from django.core.cache import BaseCache, caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.management import call_command
from pytest_django import Settings

from bgtasks.management.commands import bgtasks as command
from tests.gate import Gate
from tests.monitoring.test_publisher import Observed, cache, locmem, other, publish

__all__ = ["cache"]  # the fixture


class Shared(LocMemCache):
    """Any cache but those that are known not to be shared."""


def run(*args: str) -> tuple[str, str | int | None]:
    """Run the command; return what it prints and its exit status."""
    out = io.StringIO()
    try:
        call_command("bgtasks", *args, stdout=out)
    except SystemExit as end:
        return out.getvalue(), end.code
    return out.getvalue(), 0


def busy(**changes: Any) -> dict[str, Any]:
    """Return the snapshot of another process, in which all can be seen."""
    with Observed(conn_max=1, capacity=5) as core, Gate() as gate:
        core.publisher.config = None
        core.spawn("bad", int, "x")
        core.drain()
        core.spawn("held\x1b[2J", gate)
        gate.wait_entered()
        core.spawn("waits", print, end="")
        pools = json.loads(json.dumps(core.publisher.snapshot()))["pools"]
    return other(pools=pools, **changes)


def test_processes_and_tasks_are_shown(cache: BaseCache) -> None:
    """Pools, names, what runs, failures and processes each have a table, and no name moves the cursor."""
    content = busy()
    content["pools"][0]["running"][0]["stuck"] = content["pools"][0]["paused"] = True
    publish(cache, content)
    text, status = run()

    assert status == 0
    assert "Pool core, paused: 1 of 5 waiting, 1 of 1 running" in text
    assert "held?[2J" in text
    assert "(stuck)" in text
    assert "ValueError" in text
    assert "other:1" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.00005, "<0.1 ms"),
        (0.0057, "5.7 ms"),
        (0.57, "570 ms"),
        (5.7, "5.7 s"),
        (61.0, "61 s"),
        (170.0, "2.8 min"),
        (20_000.0, "5.6 h"),
    ],
)
def test_percentile_is_shown_with_two_digits(seconds: float | None, shown: str) -> None:
    """More is not known of it."""
    assert command._roughly(seconds) == shown


def test_drops_are_shown_with_their_number(cache: BaseCache) -> None:
    """What was dropped is shown with how often, and when the last time was, as far as that is known."""
    content = busy()
    [pool] = content["pools"]
    pool["names"][0]["dropped"] = {"full": 172}
    pool["names"][1]["dropped"] = {"shutdown": 3}
    pool["drops"] = [
        {"at": content["at"], "name": pool["names"][0]["name"], "reason": "full"},
        {"at": content["at"], "name": "left-out", "reason": "full"},
    ]
    publish(cache, content)
    text, _ = run()
    lines = [line.split() for line in text.splitlines()]

    assert ["bad", "full", "172"] in [line[:3] for line in lines]
    assert ["held?[2J", "shutdown", "3", "earlier", "other:1"] in lines
    assert ["left-out", "full", "-"] in [line[:3] for line in lines]


def test_failures_of_the_engine_are_shown(cache: BaseCache) -> None:
    """Whoever looks learns that the engine was down, also if there was nobody to read the log."""
    content = busy()
    content["pools"][0]["stats"]["handoff_failures"] = 7
    publish(cache, content)
    text, _ = run()

    assert "; the engine failed 7 times" in text


def test_json_is_the_overview(cache: BaseCache) -> None:
    """For scripts there is all that is known."""
    publish(cache, busy())
    text, _ = run("--json")

    assert [pool["name"] for pool in json.loads(text)["pools"]] == ["core"]


def test_status_is_2_if_no_process_can_be_seen(cache: BaseCache) -> None:
    """A script learns that there is nobody, and a person why."""
    text, status = run()

    assert status == 2
    assert "local memory" in text
    assert "No process has published anything" in text


@pytest.mark.parametrize("changes", [{"idle": False, "at": 0}, {"drainer": "dead"}])
def test_status_is_1_if_a_process_is_unwell(changes: Any, cache: BaseCache) -> None:
    """A process that has fallen silent is a reason for an alarm."""
    publish(cache, busy(**changes))

    assert run()[1] == 1


@pytest.mark.parametrize(("figure", "value"), [("queued", 5), ("stuck", 1)])
def test_status_is_1_if_a_pool_is_full_or_stuck(figure: Any, value: Any, cache: BaseCache) -> None:
    """So is a pool that takes nothing more or does nothing more."""
    content = busy()
    content["pools"][0]["stats"][figure] = value
    publish(cache, content)

    assert run()[1] == 1


def test_pool_without_a_task_has_no_tables(cache: BaseCache, settings: Settings) -> None:
    """What is empty is not printed, and a cache that is shared needs no note."""
    settings.CACHES = {"default": locmem("shared", Shared)}
    content = busy()
    content["pools"][0] |= {"names": [], "running": [], "failures": [], "drops": []}
    publish(caches["default"], content)
    text, _ = run()

    assert text.startswith("Pool core")
    assert "running now" not in text


def test_watch_prints_until_it_is_interrupted(cache: BaseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --watch the screen is drawn anew every so many seconds, and Ctrl-C is no error."""
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "sleep", sleep)
    text, status = run("--watch")

    assert status == 0
    assert text.count(command.CLEAR) == 2
    assert naps == [1.0, 1.0]
