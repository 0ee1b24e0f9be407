"""Reading the snapshots of other processes: each is checked and bounded by itself.

Whatever lies in the cache, one bad entry hides no other process, and costs no more time than a good one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from django.core.cache import BaseCache

from bgtasks.core.figures import BOUNDS
from bgtasks.hooks import TEXT_MAX
from bgtasks.monitoring import snapshot
from bgtasks.monitoring.cache import place_keys, site_cache, snapshot_key
from bgtasks.monitoring.history import POINTS
from bgtasks.monitoring.publisher import LOSSES, SIZE_MAX
from bgtasks.recent import LAST

Json = dict[str, Any]
Check: TypeAlias = Callable[[Any], Any]  # returns what is shown of a value, or raises ValueError

POOLS_MAX = 1000  # pools of a process
LARGEST = 1e15  # no figure of a process is larger
SHORT = 300  # characters of any text but a traceback


class Unreadable(ValueError):  # noqa: N818  # what it is
    """Why a snapshot cannot be read, as the end of a sentence."""


def published(alias: str) -> tuple[list[Json], list[Json]]:
    """Return the snapshots that can be read; and of the others, whose they are and what is wrong."""
    with site_cache(alias) as cache:
        ids = {str(process)[:SHORT] for process in cache.get_many(place_keys()).values()}
        keys = {snapshot_key(process): process for process in ids}
        texts = _get_many(cache, keys)
    good: list[Json] = []
    bad: list[Json] = []
    for key, text in texts.items():
        try:
            good.append({**read(text), "id": keys[key]})
        except Unreadable as problem:
            bad.append({"process": keys[key], "problem": str(problem)})
    return good, bad


def _get_many(cache: BaseCache, keys: Json) -> Json:
    try:
        return cache.get_many(keys)
    except Exception:  # one entry is enough, such as one that cannot be unpickled
        return {key: text for key in keys if (text := _get(cache, key)) is not None}


def _get(cache: BaseCache, key: str) -> Any:
    try:
        return cache.get(key)
    except Exception:
        return ""


def read(text: object) -> Json:
    """Return the snapshot that `text` is.

    Raises:
        Unreadable: It is none, or one of another version.
    """
    if not isinstance(text, str):
        raise Unreadable("is not text")
    if len(text) > SIZE_MAX:
        raise Unreadable(f"has {len(text):,} characters, more than {SIZE_MAX:,}")
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("is not JSON") from None
    if not isinstance(content, dict):
        raise Unreadable("is malformed")
    version: Any = cast("Json", content).get("version")
    if version != snapshot.VERSION:
        raise Unreadable(f"is of version {str(version)[:20]}, not {snapshot.VERSION}")
    try:
        checked: Json = _PROCESS(content)
    except (ValueError, KeyError):
        raise Unreadable("is malformed") from None
    return checked


# The checks.


def _typed(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError
    return value


def _number(value: Any) -> Any:
    if type(value) not in {int, float} or not -LARGEST < value < LARGEST:  # NaN is not
        raise ValueError
    return value


def _whole(value: Any) -> Any:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise ValueError
    return value


def _flag(value: Any) -> Any:
    return _typed(value, bool)


def _text(most: int = SHORT) -> Check:
    def check(value: Any) -> Any:
        return _typed(value, str)[:most]

    return check


def _maybe(of: Check) -> Check:
    return lambda value: None if value is None else of(value)


def _several(of: Check, most: int) -> Check:
    def check(value: Any) -> Any:
        return [of(each) for each in _typed(value, list)[:most]]

    return check


def _record(*whole: str, **others: Check) -> Check:
    """Return the check of an object. Most of its fields are whole numbers: no call for each of them."""
    checks = list(others.items())

    def check(value: Any) -> Any:
        content: Json = _typed(value, dict)
        checked: Json = {}
        for name in whole:
            number = content[name]
            if type(number) is not int or not 0 <= number < LARGEST:
                raise ValueError
            checked[name] = number
        for name, of in checks:
            checked[name] = of(content[name])
        return checked

    return check


def _counts(value: Any) -> Any:
    counts: Json = _typed(value, dict)
    if len(counts) > len(BOUNDS) + 1:
        raise ValueError
    for count in counts.values():
        if type(count) is not int or not 0 <= count < LARGEST:
            raise ValueError
    return counts


def _buckets(value: Any) -> Any:
    for bucket in _counts(value):
        if not 0 <= int(bucket) <= len(BOUNDS):
            raise ValueError
    return value


_short = _text()
_seconds = _maybe(_number)
_name = _text(snapshot.NAME_MAX)
_long = _maybe(_text(TEXT_MAX + 100))
_times = _record(counts=_buckets, seconds=_number, longest=_number)
_row = _record(
    "spawned", "queued", "running", "retried", "delayed",
    name=_name, oldest=_seconds, due=_seconds, ended=_counts, dropped=_counts, waits=_times, runs=_times,
)  # fmt: skip
_stats = _record(
    "capacity", "conn_max", "runners", "spawned", "queued", "running", "succeeded", "failed", "timed_out",
    "cancelled", "dropped", "shed", "coalesced", "handed_off", "retried", "stuck", "handoff_failures",
)  # fmt: skip
_running = _record(
    name=_name, seconds=_number, slot=_maybe(_short), stuck=_flag, asynchronous=_flag, stack=_long
)
_failure = _record(
    at=_number, since=_number, times=_whole, name=_name, outcome=_short, error=_short, message=_short,
    where=_short, traceback=_long, wait_s=_number, run_s=_number,
)  # fmt: skip
_points = _several(_whole, POINTS)
_pool = _record(
    name=_short,
    state=_short,
    paused=_flag,
    pause=_maybe(_record(id=_short, by=_short, at=_number)),
    stats=_stats,
    oldest=_seconds,
    delayed=_whole,
    due=_seconds,
    threads=_whole,
    names=_several(_row, snapshot.NAMES_SHOWN + 1),
    running=_several(_running, snapshot.RUNNING_MAX),
    failures=_several(_failure, LAST),
    drops=_several(_record(at=_number, name=_name, reason=_short), LAST),
    history=_record(queued=_points, running=_points),
)
_loss = _record("pid", "tasks", at=_number, host=_short, names=_text(1000))
_PROCESS = _record(
    id=_short, host=_short, place=_short, pid=_whole, started=_number, at=_number, idle=_flag,
    interval=_number, drainer=_short, losses=_several(_loss, LOSSES), pools=_several(_pool, POOLS_MAX),
)  # fmt: skip
