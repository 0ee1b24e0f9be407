"""``manage.py bgtasks``: what the background tasks of all processes do, in a terminal or for a script.

``manage.py bgtasks rehearse`` rehearses a deploy: see ``bgtasks.rehearsal``.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import copy
from datetime import UTC, datetime
from time import sleep
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.utils import timezone

from bgtasks.core.figures import BOUNDS, Outcome
from bgtasks.monitoring.condition import Condition
from bgtasks.monitoring.figures import two_digits
from bgtasks.monitoring.overview import overview
from bgtasks.pools import pools
from bgtasks.rehearsal import command as rehearsal

SHORTEST = BOUNDS[0]  # seconds; of what is shorter no digit is known
FEW = 5  # rows of failures and drops that are shown
CLEAR = "\x1b[H\x1b[2J"
UNWELL = {"silent", "dead", "blocked"}
SHARED = (
    "Set a cache that the processes share, in CACHES, such as\n"
    '    {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": "redis://127.0.0.1:6379"}\n'
    "or one in the database or in files; under another alias, name that in BGTASKS_SNAPSHOT."
)
NOTES = {
    "local": (
        "The cache is local memory, which this command does not share with the processes of the site.\n"
        f"{SHARED}"
    ),
    "none": f"The cache keeps nothing, so the processes of the site cannot be seen.\n{SHARED}",
    "off": "BGTASKS_SNAPSHOT is None, so the processes of the site cannot be seen.",
    "broken": "The cache does not answer, so the processes of the site cannot be seen. The log says why.",
}
NOBODY = (
    "No process can be seen. A process is shown from its first task until it ends, or until an hour after "
    "its last task."
)


class Command(BaseCommand):
    """Prints what the processes have published. It starts no task and needs no database."""

    help = (
        "Show the background tasks of all processes of the site. The exit status is 0 if all is well, 1 if a "
        "queue is full, every slot of a pool is stuck, or a process is silent, dead or blocked, and 2 if no "
        "process can be seen. 'rehearse -- COMMAND' rehearses a deploy of the server that COMMAND starts."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare --json, --watch and the rehearsal."""
        parser.add_argument("--json", action="store_true", help="print all data, as one line of JSON")
        parser.add_argument(
            "--watch",
            nargs="?",
            type=rehearsal.seconds,
            const=1.0,
            metavar="SECONDS",
            help="print again every so many seconds (1 by default), until Ctrl-C",
        )
        # Django's own options, and --json, may stand before the word and behind it.
        common = CommandParser(add_help=False)
        for action in parser._actions:
            if action.option_strings and action.dest not in {"help", "version", "watch"}:
                common._add_action(copy(action)).default = argparse.SUPPRESS
        rehearse = parser.add_subparsers(dest="action", metavar="[rehearse -- COMMAND]").add_parser(
            "rehearse", parents=[common], help="rehearse a deploy of the project's own server"
        )
        rehearsal.add_arguments(rehearse)

    def handle(self, *_args: Any, **options: Any) -> None:
        """Print once, or until Ctrl-C; or rehearse."""
        if options["action"] == "rehearse":
            if status := rehearsal.rehearse(options, self.stdout, self.stderr, self.style):
                sys.exit(status)
            return
        try:
            while True:
                seen = _others()
                text = _json(seen) if options["json"] else _text(seen)
                watched = options["watch"] is not None and not options["json"]
                self.stdout.write(CLEAR + text if watched else text)
                if options["watch"] is None:
                    break
                sleep(options["watch"])
        except KeyboardInterrupt:
            return
        if status := _status(seen):
            sys.exit(status)


def _others() -> dict[str, Any]:
    """Return the overview without this very process, which is none of the site's."""
    return overview(pools, own=False)


def _status(seen: dict[str, Any]) -> int:
    if not seen["processes"]:
        return 2
    unwell = any(
        pool["state"] == Condition.STUCK.value or pool["queued"] >= pool["capacity"]
        for process in seen["processes"]
        for pool in process["pools"]
    )
    return int(unwell or any(process["state"] in UNWELL for process in seen["processes"]))


def _json(seen: dict[str, Any]) -> str:
    """Return all but the charts. Each field is described in docs/observability.md."""
    pools = [{key: value for key, value in pool.items() if key != "history"} for pool in seen["pools"]]
    return json.dumps({**seen, "pools": pools}, separators=(",", ":"))


def _text(seen: dict[str, Any]) -> str:
    parts: list[str] = []
    if seen["sight"] in NOTES:
        parts.append(NOTES[seen["sight"]])
    if not seen["processes"]:
        parts.append(NOBODY)
    for pool in seen["pools"]:
        parts += _pool(pool, seen["at"])
    if seen["processes"]:
        parts.append(_processes(seen["processes"]))
    parts += [f"The snapshot of {_plain(of['process'])} {_plain(of['problem'])}." for of in seen["unread"]]
    parts += _losses(seen)
    return "\n\n".join(parts)


def _processes(processes: list[dict[str, Any]]) -> str:
    heads = ["process", "state", "pool", "", "waiting", "running", "failed", "dropped", "shed", "last seen"]
    rows = [
        [
            _plain(f"{process['host']}:{process['pid']}"),
            process["state"],
            _plain(pool["name"]),
            pool["state"],
            f"{pool['queued']}/{pool['capacity']}",
            f"{pool['running']}/{pool['conn_max']}",
            *(str(pool[key]) for key in ("failed", "dropped", "shed")),
            _seconds(process["age"]),
        ]
        for process in processes
        for pool in process["pools"]
    ]
    return _table(heads, rows)


def _losses(seen: dict[str, Any]) -> list[str]:
    rows = [
        [
            _plain(f"{loss['host']}:{loss['pid']}"),
            str(loss["tasks"]),
            _plain(loss["names"]),
            f"{_seconds(max(0.0, seen['at'] - loss['at']))} ago",
        ]
        for loss in seen["losses"]
    ]
    return [_table(["killed process", "lost", "tasks", "reported"], rows)] if rows else []


def _pool(pool: dict[str, Any], at: float) -> list[str]:
    lines = [_summary(pool), *(f"  ! {_plain(advice)}" for advice in pool["advice"])]
    tables = [_names(pool), _running(pool), _failures(pool, at), _drops(pool, at)]
    return ["\n".join(lines), *filter(None, tables)]


def _summary(pool: dict[str, Any]) -> str:
    stats, pause = pool["stats"], pool["pause"]
    state = pool["state"]
    if pause is not None:
        state += f" by {_plain(pause['by'])} since {_clock(pause['at'])}"
    line = (
        f"Pool {_plain(pool['name'])}, {state}: {stats['queued']} of {stats['capacity']} waiting, "
        f"{stats['running']} of {stats['conn_max']} running, {stats['stuck']} stuck; "
        f"oldest waits {_seconds(pool['oldest'])}"
    )
    if pool["delayed"]:
        line += f"; {pool['delayed']} are delayed, the first for {_seconds(pool['due'])}"
    if failures := stats["handoff_failures"]:
        line += f"; the engine failed {failures} times"
    return line


def _names(pool: dict[str, Any]) -> str:
    keys = [
        "spawned",
        "queued",
        "delayed",
        "running",
        "succeeded",
        "failed",
        "retried",
        "dropped",
        "shed",
        "coalesced",
    ]
    heads = ["task", "spawned", "waiting", "delayed", *keys[3:]]
    times = ["wait_p50", "wait_p95", "run_p50", "run_p95"]
    rows = [
        [
            _plain(of["name"]),
            *(str(of[key]) for key in keys),
            str(of["timed_out"] + of["cancelled"] + of["handed_off"]),
            _seconds(of["oldest"]),
            "-" if of["due"] is None else f"in {_seconds(of['due'])}",
            *(_roughly(of[key]) for key in times),
        ]
        for of in pool["names"]
    ]
    more = ["other ends", "oldest", "next try", "wait p50", "wait p95", "run p50", "run p95"]
    return _table([*heads, *more], rows)


def _running(pool: dict[str, Any]) -> str:
    rows = [
        [
            _plain(task["name"]),
            _seconds(task["seconds"]) + (" (stuck)" if task["stuck"] else ""),
            _plain(f"{task['host']}:{task['pid']}"),
        ]
        for task in pool["running"]
    ]
    return _table(["running now", "for", "process"], rows)


def _failures(pool: dict[str, Any], at: float) -> str:
    rows = [
        [
            _plain(of["name"]),
            f"x {of['times']}",
            _clock(of["at"]),
            _ago(at, of["at"]),
            _plain(_error(of)),
            _plain(f"{of['host']}:{of['pid']}"),
        ]
        for of in pool["failures"][:FEW]
    ]
    return _table(["last failures", "times", "last at", "", "error", "process"], rows)


def _error(failure: dict[str, Any]) -> str:
    if failure["outcome"] == Outcome.TIMED_OUT.label:
        return "timed out"
    return f"{failure['error']}: {failure['message']}" if failure["message"] else str(failure["error"])


def _drops(pool: dict[str, Any], at: float) -> str:
    rows = [
        [
            _plain(drop["name"]),
            drop["reason"],
            "-" if drop["count"] is None else str(drop["count"]),
            "earlier" if drop["at"] is None else _ago(at, drop["at"]),
            _plain(f"{drop['host']}:{drop['pid']}"),
        ]
        for drop in pool["drops"][:FEW]
    ]
    return _table(["last drops", "why", "how many", "last", "process"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table; "" without rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    )


def _plain(text: str) -> str:
    """Return `text` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _clock(at: float) -> str:
    return timezone.localtime(datetime.fromtimestamp(at, UTC)).strftime("%H:%M:%S")


def _ago(now: float, at: float) -> str:
    return f"{_seconds(max(0.0, now - at))} ago"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _roughly(seconds: float | None) -> str:
    """Return a percentile with no more digits than are known of it, which are two."""
    if seconds is None:
        return "-"
    if seconds < SHORTEST:
        return f"<{SHORTEST * 1000:g} ms"
    for unit, size, below in (("ms", 0.001, 1.0), ("s", 1.0, 100.0), ("min", 60.0, 6000.0)):
        if seconds < below:
            return f"{two_digits(seconds / size):g} {unit}"
    return f"{two_digits(seconds / 3600):g} h"
