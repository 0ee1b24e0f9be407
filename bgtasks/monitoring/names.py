"""The tasks of one name each, as rows of JSON: which of them matter most, and what several are together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bgtasks.core.figures import OTHERS

Row = dict[str, Any]

COUNTS = ("spawned", "queued", "running", "retried", "delayed")
BAD = ("failed", "timed_out", "cancelled", "shed")  # outcomes


def most_important(rows: Sequence[Row], most: int) -> list[Row]:
    """Return `most` rows: those that matter most, and one called OTHERS that adds all further ones up."""
    if len(rows) <= most:
        return sorted(rows, key=_importance, reverse=True)
    named = sorted((row for row in rows if row["name"] != OTHERS), key=_importance, reverse=True)
    others = [row for row in rows if row["name"] == OTHERS]
    return [*named[: most - 1], merge(OTHERS, [*named[most - 1 :], *others])]


def _importance(row: Row) -> tuple[int, int, int]:
    """What waits or runs comes first, then what has gone wrong."""
    bad = sum(row["ended"].get(outcome, 0) for outcome in BAD) + sum(row["dropped"].values())
    return row["queued"] + row["running"], bad, row["spawned"]


def merge(name: str, rows: Sequence[Row]) -> Row:
    """Return one row called `name` for several."""
    if len(rows) == 1:
        return {**rows[0], "name": name}
    return {
        "name": name,
        **{key: sum(row[key] for row in rows) for key in COUNTS},
        "oldest": max((row["oldest"] for row in rows if row["oldest"] is not None), default=None),
        "due": min((row["due"] for row in rows if row["due"] is not None), default=None),
        **{key: _added(row[key] for row in rows) for key in ("ended", "dropped")},
        **{key: _merge_times([row[key] for row in rows]) for key in ("waits", "runs")},
    }


def _merge_times(parts: Sequence[Row]) -> Row:
    return {
        "counts": _added(part["counts"] for part in parts),
        "seconds": sum(part["seconds"] for part in parts),
        "longest": max(part["longest"] for part in parts),
    }


def _added(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total
