"""Snapshots through the caches that Django has: each with its real server, table or files."""

import gc
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

import pytest
from django.core.cache import BaseCache, caches
from django.core.management import call_command
from django.db import connection, connections
from django.test import override_settings
from pytest_django import Settings

from bgtasks.monitoring import control, overview, publisher
from bgtasks.monitoring.cache import pause_key, snapshot_key
from bgtasks.monitoring.publisher import SIZE_MAX
from bgtasks.pools import pools
from tests.gate import Gate, wait_until
from tests.monitoring.test_publisher import Observed
from tests.processes import Server, free_port, program

pytestmark = pytest.mark.usefixtures("patient")

TABLE = "bgtasks_test_cache"


@pytest.fixture
def database_cache(settings: Settings, transactional_db: None) -> Iterator[BaseCache]:
    """A cache in a table of its own."""
    yield use(settings, "django.core.cache.backends.db.DatabaseCache", TABLE)
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE {TABLE}")


@pytest.fixture
def memcached() -> Iterator[str]:
    """Start Memcached; return its address."""
    port = free_port()
    argv = [program("memcached"), "-u", "nobody", "-l", "127.0.0.1", "-p", str(port)]
    with Server(argv, port=port) as server:
        yield f"127.0.0.1:{port}"
        server.stop()


def use(settings: Settings, backend: str, location: str) -> BaseCache:
    """Have snapshots published in this cache, ten times a second; return it, empty."""
    settings.CACHES = {"default": {"BACKEND": backend, "LOCATION": location}}
    settings.BGTASKS_SNAPSHOT = {"INTERVAL": 0.1}
    if "DatabaseCache" in backend:
        call_command("createcachetable", verbosity=0)
    cache: BaseCache = caches["default"]
    cache.clear()
    return cache


def seen(core: Observed) -> dict[str, Any] | None:
    """Return what another process sees of the pool `core`."""
    found = overview.overview(pools)
    assert found["sight"] == "all"
    return next((pool for pool in found["pools"] if pool["name"] == "core"), None)


def check_snapshots(cache: BaseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, read, pause, resume, take back and let expire; and have room for the largest snapshot."""
    with Observed(conn_max=1) as core, Gate() as gate:
        core.spawn("held", gate)
        gate.wait_entered()
        wait_until(lambda: (pool := seen(core)) and pool["running"])
        control.set_paused(pools, "core", True, by="ada")
        core.logs.wait("pool 'core' is paused")
        gate.open()
        core.spawn("waits", int)
        wait_until(lambda: (pool := seen(core)) and (pool["paused"], pool["stats"]["succeeded"]) == (True, 1))
        assert core.stats().queued == 1
        control.set_paused(pools, "core", False, by="ada")
        core.logs.wait("pool 'core' is resumed")
        core.wait_idle()
        assert pause_key("core") not in cache
        assert (pool := seen(core)) is not None
        assert (pool["paused"], pool["stats"]["succeeded"]) == (False, 2)

        core.publisher.leave()
        assert seen(core) is None

        monkeypatch.setattr(publisher, "KEPT", 1)
        core.spawn("task", int)
        core.wait_idle()
        # It may have expired before we could look. Its two keys were set, and expire, one after the other.
        wait_until(lambda: seen(core) is None and snapshot_key(core.publisher.identity.id) not in cache)
        # What has expired is published again, in a place of its own.
        monkeypatch.undo()
        core.spawn("task", int)
        core.wait_idle()
        assert (pool := seen(core)) is not None
        assert pool["stats"]["succeeded"] == 4
        core.publisher.leave()
    cache.set("largest", "x" * SIZE_MAX)
    assert "largest" in cache


def test_snapshots_in_a_database(
    database_cache: BaseCache, monkeypatch: pytest.MonkeyPatch, transactional_db: None
) -> None:
    """A table of Django's database cache serves all."""
    check_snapshots(database_cache, monkeypatch)


def test_publishing_in_a_database_holds_a_connection_only_for_that_moment(database_cache: BaseCache) -> None:
    """Between two snapshots the publisher has no connection, however long the pool is busy."""
    held: list[int] = []

    def listener() -> None:  # called on the publisher's thread, before each publishing
        held.append(sum(of.connection is not None for of in connections.all(initialized_only=True)))

    with Observed(conn_max=1) as core, Gate() as gate:
        core.publisher.listeners.append(listener)
        core.spawn("held", gate)
        gate.wait_entered()
        wait_until(lambda: len(held) > 3)
        gate.open()
        core.wait_idle()

        assert seen(core) is not None
        core.publisher.leave()
    assert set(held) == {0}


def test_snapshots_in_files(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A directory that the processes share serves all."""
    files = tmp_path_factory.mktemp("cache")
    cache = use(settings, "django.core.cache.backends.filebased.FileBasedCache", str(files))
    check_snapshots(cache, monkeypatch)


def test_snapshots_are_seen_from_every_tenant(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A key function that knows the tenant of the caller hides no process, from the page and the command."""
    files = tmp_path_factory.mktemp("cache")
    use(settings, "django.core.cache.backends.filebased.FileBasedCache", str(files))
    with override_settings(CACHES={"default": {**settings.CACHES["default"], "KEY_FUNCTION": key_of_tenant}}):
        tenant.set("ada")  # the publisher's thread has none
        with Observed(conn_max=1) as core, Gate() as gate:
            core.spawn("held", gate)
            gate.wait_entered()
            wait_until(lambda: (pool := seen(core)) and pool["running"])
            control.set_paused(pools, "core", True, by="ada")
            core.logs.wait("pool 'core' is paused")
            control.set_paused(pools, "core", False, by="ada")
            core.logs.wait("pool 'core' is resumed")
            gate.open()
            core.wait_idle()
            core.publisher.leave()

            assert seen(core) is None
        tenant.set(None)


tenant: ContextVar[Any] = ContextVar("tenant", default=None)


def key_of_tenant(key: str, key_prefix: str, version: int) -> str:
    return f"{tenant.get()}:{key_prefix}:{version}:{key}"


@pytest.fixture
def redis(settings: Settings, valkey: str) -> Iterator[str]:
    """Return the address of Valkey for a cache, whose connections are closed when the test has ended.

    Django leaves that to the collector, which may come to the socket before the client, and warn of it.
    """
    yield valkey
    for pool in cast(Any, caches["default"])._cache._pools.values():
        pool.disconnect()
    with warnings.catch_warnings():  # of those that the publisher's threads have opened
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.engines
def test_snapshots_in_redis(settings: Settings, monkeypatch: pytest.MonkeyPatch, redis: str) -> None:
    """Redis, or Valkey, serves all."""
    cache = use(settings, "django.core.cache.backends.redis.RedisCache", redis)
    check_snapshots(cache, monkeypatch)


@pytest.mark.engines
def test_snapshots_in_memcached(settings: Settings, monkeypatch: pytest.MonkeyPatch, memcached: str) -> None:
    """Memcached serves all."""
    cache = use(settings, "django.core.cache.backends.memcached.PyMemcacheCache", memcached)
    check_snapshots(cache, monkeypatch)
