"""Snapshots of others are checked and bounded, each by itself; and sites that share a cache do not meet."""

import json
import math
import socket
from typing import Any

import pytest
from django.core.cache import BaseCache
from django.test import override_settings

from bgtasks.monitoring import reading, snapshot
from bgtasks.monitoring.cache import pause_key, place_keys, prefix, snapshot_key
from bgtasks.monitoring.overview import overview
from bgtasks.monitoring.publisher import SIZE_MAX
from bgtasks.pools import pools
from tests.gate import Gate
from tests.monitoring.test_publisher import Observed, cache, other, publish

__all__ = ["cache"]  # the fixture

pytestmark = pytest.mark.usefixtures("patient")


def busy() -> dict[str, Any]:
    """Return the snapshot of another process, in which all parts are filled."""
    with Observed(conn_max=1, capacity=1) as core, Gate() as gate:
        core.publisher.config = None
        core.spawn("bad", int, "x")
        core.drain()
        core.spawn("held", gate)
        gate.wait_entered()
        core.spawn("waits", int)
        core.spawn("late", int)
        return other(pools=json.loads(json.dumps(core.publisher.snapshot()))["pools"])


def changed(content: Any, path: str, value: Any) -> Any:
    """Return `content` with another value at a `path` such as "pools.0.name"."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def test_what_a_process_publishes_can_be_read() -> None:
    """Each field passes its check unchanged."""
    content = busy()

    assert reading.read(json.dumps(content)) == {
        key: value for key, value in content.items() if key != "version"
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (7, "is not text"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5_000, "is not JSON"),
        ("[]", "is malformed"),
        ("{}", "is of version None, not 3"),
        ('{"version": 2}', "is of version 2, not 3"),
        ('{"version": 3}', "is malformed"),
        ("x" * (SIZE_MAX + 1), "has 900,001 characters, more than 900,000"),
    ],
)
def test_bad_entry_is_one_line_and_hides_no_other(text: Any, problem: str, cache: BaseCache) -> None:
    """What is wrong is said of it, and all other processes are shown."""
    publish(cache, other(id="good:1:a", host="good"), number=0)
    cache.set_many({place_keys()[1]: "bad:2:b", snapshot_key("bad:2:b"): text})
    seen = overview(pools)

    assert seen["unread"] == [{"process": "bad:2:b", "problem": problem}]
    assert [process["host"] for process in seen["processes"]][1:] == ["good"]
    assert seen["sight"] == "local"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("host", None),
        ("pid", "1"),
        ("pid", True),
        ("at", math.nan),
        ("at", math.inf),
        ("at", 1e300),
        ("started", 10**4000),
        ("idle", 1),
        ("pools", {}),
        ("pools.0", []),
        ("pools.0.stats", {}),
        ("pools.0.stats.queued", -1),
        ("pools.0.stats.queued", 1.5),
        ("pools.0.stats.runners", ...),
        ("pools.0.pause", []),
        ("pools.0.names.0.name", 7),
        ("pools.0.names.0.ended", {"failed": "many"}),
        ("pools.0.names.0.ended", {str(number): 1 for number in range(1000)}),
        ("pools.0.names.0.runs.counts", {"x": 1}),
        ("pools.0.names.0.runs.counts", {"999": 1}),
        ("pools.0.names.0.oldest", "long"),
        ("pools.0.running.0.stack", 7),
        ("pools.0.failures.0.message", None),
        ("pools.0.drops.0.at", None),
        ("pools.0.history.queued", [1, "2"]),
    ],
)
def test_malformed_snapshot_is_not_read(path: str, value: Any, cache: BaseCache) -> None:
    """Whatever is wrong in it, and wherever."""
    publish(cache, changed(busy(), path, value))
    seen = overview(pools)

    assert [entry["problem"] for entry in seen["unread"]] == ["is malformed"]
    assert len(seen["processes"]) == 1


def test_long_snapshot_is_bounded() -> None:
    """Lists and texts are cut, so no process takes more of the page than another."""
    content = busy()
    pool = content["pools"][0]
    for part in ("names", "running", "failures", "drops"):
        pool[part] *= 110
    pool["history"]["queued"] = [1] * 5000
    pool["failures"][0]["message"] = "x" * 5000
    [read] = reading.read(json.dumps(content))["pools"]

    lengths = [len(read[part]) for part in ("names", "running", "failures", "drops")]
    assert lengths == [snapshot.NAMES_SHOWN + 1, snapshot.RUNNING_MAX, 20, 20]
    assert len(read["history"]["queued"]) == 100
    assert len(read["failures"][0]["message"]) == reading.SHORT


def test_id_is_the_one_under_which_the_snapshot_lies(cache: BaseCache) -> None:
    """A process that says it is another one is shown beside that, and no row is there twice."""
    publish(cache, other(), number=0)
    cache.set_many({place_keys()[1]: "twin:1:b", snapshot_key("twin:1:b"): json.dumps(other())})

    ids = [process["id"] for process in overview(pools)["processes"][1:]]
    assert sorted(ids) == ["other:1:abc", "twin:1:b"]


class Unpicklable:
    """Cannot be read back from the cache."""

    def __reduce__(self) -> Any:
        return int, ("x",)


def test_entry_that_cannot_be_unpickled_hides_no_other(cache: BaseCache) -> None:
    """The cache raises for it, also if it is asked for all at once."""
    publish(cache, other(host="good"))
    cache.set_many({place_keys()[1]: "bad:2:b", snapshot_key("bad:2:b"): Unpicklable()})
    seen = overview(pools)

    assert [process["host"] for process in seen["processes"]][1:] == ["good"]
    assert [entry["process"] for entry in seen["unread"]] == ["bad:2:b"]


def test_host_whose_name_is_no_utf_8_can_be_seen(cache: BaseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is shown as far as it can be, and it hides nobody."""
    monkeypatch.setattr(socket, "gethostname", lambda: b"b\xfcro".decode(errors="surrogateescape"))
    with Observed() as core:
        core.spawn("task", int)
        core.wait_idle()
        seen = overview(pools)

    assert [process["host"] for process in seen["processes"][1:]] == ["b\\udcfcro"]
    assert (seen["unread"], seen["sight"]) == ([], "local")


def test_two_sites_that_share_a_cache_do_not_meet(cache: BaseCache) -> None:
    """Neither sees or pauses what the other one has."""
    mine = prefix()
    with override_settings(SECRET_KEY="that of another site"):
        publish(cache, other(host="theirs"))
        cache.set(pause_key("default"), {"by": "eve"})
        assert prefix() != mine

    assert len(overview(pools)["processes"]) == 1
    assert pause_key("default") not in cache


def test_script_without_a_secret_key_has_keys() -> None:
    """Django refuses to read an empty one."""
    with override_settings(SECRET_KEY=""):
        assert prefix() == "bgtasks.3."
