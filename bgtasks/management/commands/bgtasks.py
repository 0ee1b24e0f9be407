"""``manage.py bgtasks``: what the background tasks of all processes do, in a terminal or for a script.

``manage.py bgtasks rehearse`` rehearses a deploy: see ``bgtasks.rehearsal``.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import copy
from time import sleep
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from bgtasks.core.figures import BOUNDS
from bgtasks.monitoring.figures import two_digits
from bgtasks.monitoring.overview import overview
from bgtasks.pools import pools
from bgtasks.rehearsal import command as rehearsal

SHORTEST = BOUNDS[0]  # seconds; of what is shorter no digit is known
CLEAR = "\x1b[H\x1b[2J"
UNWELL = {"silent", "dead", "blocked"}
NOTES = {
    "local": "The cache is local memory, which this command does not share with the processes of the site.",
    "none": "The cache keeps nothing, so the processes of the site cannot be seen.",
    "off": "BGTASKS_SNAPSHOT is None, so the processes of the site cannot be seen.",
    "broken": "The cache does not answer, so the processes of the site cannot be seen.",
}


class Command(BaseCommand):
    """Prints what the processes have published. It starts no task and needs no database."""

    help = (
        "Show the background tasks of all processes of the site. The exit status is 0 if all is well, 1 if a "
        "queue is full, every slot of a pool is stuck, or a process is silent, dead or blocked, and 2 if no "
        "process can be seen. 'rehearse -- COMMAND' rehearses a deploy of the server that COMMAND starts."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare --json, --watch and the rehearsal."""
        parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
        parser.add_argument(
            "--watch",
            nargs="?",
            type=float,
            const=1.0,
            metavar="SECONDS",
            help="print again every so many seconds (1 by default), until Ctrl-C",
        )
        # Django's own options, and --json, may stand before the word and behind it.
        common = CommandParser(add_help=False)
        for action in parser._actions:
            if action.option_strings and action.dest not in {"help", "version", "watch"}:
                common._add_action(copy(action)).default = argparse.SUPPRESS
        rehearse = parser.add_subparsers(dest="action", metavar="[rehearse]").add_parser(
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
                text = json.dumps(seen, indent=2) if options["json"] else _text(seen)
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
    full = any(
        pool["stats"]["queued"] >= pool["stats"]["capacity"]
        or pool["stats"]["stuck"] >= pool["stats"]["runners"]
        for process in seen["processes"]
        for pool in process["pools"]
    )
    return int(full or any(process["state"] in UNWELL for process in seen["processes"]))


def _text(seen: dict[str, Any]) -> str:
    parts: list[str] = []
    if seen["sight"] in NOTES:
        parts.append(NOTES[seen["sight"]])
    if not seen["processes"]:
        parts.append("No process has published anything: none has run a task within the last hour.")
    for pool in seen["pools"]:
        parts += _pool(pool, seen["at"])
    if seen["processes"]:
        rows = [
            [
                _plain(f"{process['host']}:{process['pid']}"),
                process["state"],
                _plain(pool["name"]) + (" (paused)" if pool["paused"] else ""),
                f"{pool['stats']['queued']}/{pool['stats']['capacity']}",
                f"{pool['stats']['running']}/{pool['stats']['conn_max']}",
                str(pool["stats"]["failed"]),
                str(pool["stats"]["dropped"]),
                _seconds(process["age"]),
            ]
            for process in seen["processes"]
            for pool in process["pools"]
        ]
        heads = ["process", "state", "pool", "waiting", "running", "failed", "dropped", "last word"]
        parts.append(_table(heads, rows))
    return "\n\n".join(parts)


def _pool(pool: dict[str, Any], at: float) -> list[str]:
    stats = pool["stats"]
    state = ", paused" if pool["paused"] else ""
    line = (
        f"Pool {_plain(pool['name'])}{state}: {stats['queued']} of {stats['capacity']} waiting, "
        f"{stats['running']} of {stats['conn_max']} running, {stats['stuck']} stuck; "
        f"oldest waits {_seconds(pool['oldest'])}"
    )
    if failures := stats.get("handoff_failures"):
        line += f"; the engine failed {failures} times"
    parts = [line]
    if pool["names"]:
        heads = ["task", "spawned", "waiting", "running", "succeeded", "failed", "dropped"]
        keys = ["spawned", "queued", "running", "succeeded", "failed", "dropped"]
        times = ["wait_p50", "wait_p95", "run_p50", "run_p95"]
        rows = [
            [_plain(of["name"]), *(str(of[key]) for key in keys), *(_roughly(of[key]) for key in times)]
            for of in pool["names"]
        ]
        parts.append(_table([*heads, "wait p50", "wait p95", "run p50", "run p95"], rows))
    if pool["running"]:
        rows = [
            [
                _plain(task["name"]),
                _seconds(task["seconds"]) + (" (stuck)" if task["stuck"] else ""),
                _plain(f"{task['host']}:{task['pid']}"),
            ]
            for task in pool["running"]
        ]
        parts.append(_table(["running now", "for", "process"], rows))
    if pool["failures"]:
        rows = [
            [_plain(failure["name"]), _plain(failure["error"]), _plain(f"{failure['host']}:{failure['pid']}")]
            for failure in pool["failures"][:5]
        ]
        parts.append(_table(["last failures", "error", "process"], rows))
    if pool["drops"]:
        rows = [
            [
                _plain(drop["name"]),
                drop["reason"],
                "-" if drop["count"] is None else str(drop["count"]),
                "earlier" if drop["at"] is None else f"{_seconds(max(0.0, at - drop['at']))} ago",
                _plain(f"{drop['host']}:{drop['pid']}"),
            ]
            for drop in pool["drops"][:5]
        ]
        parts.append(_table(["last drops", "why", "how many", "last", "process"], rows))
    return parts


def _table(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    )


def _plain(text: str) -> str:
    """Return `text` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
