"""`manage.py bgtasks` shows what other processes have published."""

import io
import json
import re
from typing import Any

import pytest
from django.core.cache import BaseCache, caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.management import CommandError, call_command
from pytest_django import Settings

from bgtasks.management.commands import bgtasks as command
from bgtasks.monitoring.cache import place_keys, snapshot_key
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
    content["pools"][0]["pause"] = {"id": "1", "by": "ada\n", "at": 12 * 3600.0}
    publish(cache, content)
    text, status = run()

    assert status == 0
    assert "Pool core, paused by ada? since 12:00:00: 1 of 5 waiting, 1 of 1 running" in text
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
    rows = {row["name"]: row for row in pool["names"]}
    rows["bad"]["dropped"] = {"full": 172}
    rows["held\x1b[2J"]["dropped"] = {"shutdown": 3}
    pool["drops"] = [
        {"at": content["at"], "name": "bad", "reason": "full"},
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
    """For scripts there is all that is known but the charts, in one line."""
    publish(cache, busy())
    text, _ = run("--json")

    [line] = text.splitlines()
    assert ", " not in line.replace("line ", "")[:200]
    [pool] = json.loads(line)["pools"]
    assert (pool["name"], pool["failures"][0]["error"]) == ("core", "ValueError")
    assert "history" not in pool


def test_failures_are_shown_with_their_time_and_message(cache: BaseCache) -> None:
    """Equal ones are one line, which says how often, and when the last one was."""
    content = busy()
    [failure] = content["pools"][0]["failures"]
    failure |= {"times": 333, "at": 18 * 3600.0, "message": "no\x1b such address"}
    publish(cache, content)
    text, _ = run()

    [line] = [line for line in text.splitlines() if "x 333" in line]
    assert line.startswith("bad ")
    assert "18:00:00" in line
    assert "ValueError: no? such address" in line


def test_time_outs_are_shown_as_such(cache: BaseCache) -> None:
    """What was raised is only how the task was ended."""
    content = busy()
    [failure] = content["pools"][0]["failures"]
    failure |= {"times": 333, "outcome": "timed_out", "error": "CancelledError"}
    publish(cache, content)
    text, _ = run()

    [line] = [line for line in text.splitlines() if "x 333" in line]
    assert " timed out " in line
    assert "CancelledError" not in line


def test_policies_are_shown_by_name(cache: BaseCache) -> None:
    """What was shed, coalesced and retried has a column, and so have all other ends, and the next try."""
    content = busy()
    [pool] = content["pools"]
    pool |= {"delayed": 2, "due": 7.5}
    [row] = [row for row in pool["names"] if row["name"] == "waits"]
    row |= {
        "delayed": 2,
        "due": 7.5,
        "retried": 41,
        "ended": {"shed": 42, "coalesced": 43, "timed_out": 40, "handed_off": 4},
    }
    publish(cache, content)
    text, _ = run()
    lines = text.splitlines()
    [heads] = [line for line in lines if line.startswith("task ")]
    [line] = [line for line in lines if line.startswith("waits ")]

    assert "; 2 are delayed, the first for 7.5 s" in text
    shown = {"delayed": "2", "retried": "41", "shed": "42", "coalesced": "43", "other ends": "44"}
    for head, value in shown.items():
        assert line[heads.index(f" {head} ") + 1 :].split()[0] == value
    assert "in 7.5 s" in line


def test_what_is_to_be_done_is_said(cache: BaseCache) -> None:
    """A pool that is not well has a line that says why."""
    content = busy()
    content["pools"][0]["stats"]["queued"] = 5
    publish(cache, content)
    text, _ = run()

    assert "Pool core, full: 5 of 5 waiting" in text
    assert "\n  ! The queue is full in other:1: a new task is dropped" in text


def test_snapshot_that_cannot_be_read_is_one_line(cache: BaseCache) -> None:
    """The others are shown."""
    publish(cache, busy())
    cache.set_many({place_keys()[5]: "bad\n:7:x", snapshot_key("bad\n:7:x"): "not JSON"})
    text, _ = run()

    assert "Pool core, well" in text
    assert "The snapshot of bad?:7:x is not JSON." in text.splitlines()


def test_status_is_2_if_no_process_can_be_seen(cache: BaseCache) -> None:
    """A script learns that there is nobody, and a person why, and what to set."""
    text, status = run()

    assert status == 2
    assert "local memory" in text
    assert "Set a cache that the processes share, in CACHES" in text
    assert "No process can be seen. A process is shown from its first task" in text


@pytest.mark.parametrize("changes", [{"idle": False, "at": 0}, {"drainer": "dead"}])
def test_status_is_1_if_a_process_is_unwell(changes: Any, cache: BaseCache) -> None:
    """A process that has fallen silent is a reason for an alarm."""
    publish(cache, busy(**changes))

    assert run()[1] == 1


def test_process_whose_loss_is_told_is_not_unwell(cache: BaseCache) -> None:
    """What it has lost is said instead."""
    publish(cache, busy(idle=False, at=0))
    loss = {"at": 50.0, "host": "other", "pid": 1, "tasks": 2, "names": "2 'lost'"}
    publish(cache, busy(id="teller", host="teller", losses=[loss]), number=1)
    text, status = run()

    assert status == 0
    assert "has not been seen" not in text
    assert re.search(r"^other:1 +2 +2 'lost'", text, re.MULTILINE)


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


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_watch_needs_a_positive_number_of_seconds(seconds: str, cache: BaseCache) -> None:
    """0 would draw without a pause."""
    with pytest.raises(CommandError, match=f"{seconds!r} is not a positive number of seconds"):
        run(f"--watch={seconds}")


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
