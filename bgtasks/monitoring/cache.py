"""The cache through which the processes of a site see each other, and the keys that they use in it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import quote

from django.conf import settings
from django.core.cache import BaseCache, caches
from django.core.cache.backends.base import default_key_func
from django.core.exceptions import ImproperlyConfigured
from django.utils.crypto import salted_hmac

from bgtasks.monitoring.snapshot import VERSION

PLACES = 256  # processes of a site that can be seen
ORDERS = 8  # orders to cancel waiting tasks that can be under way


@contextmanager
def site_cache(alias: str) -> Generator[BaseCache]:
    """Give the cache of this alias, with keys that are the same in every thread and process of the site.

    A project's KEY_FUNCTION may put the tenant of the caller into each key, and the page of a tenant would
    find nothing.
    """
    cache = caches[alias]
    if cache.key_func is default_key_func:
        yield cache
        return
    own: BaseCache | None = vars(cache).get("bgtasks_own")  # as long as this thread has the other
    if own is None:
        vars(cache)["bgtasks_own"] = own = caches.create_connection(alias)
        own.key_func = default_key_func
    try:
        yield own
    finally:
        own.close()


def prefix() -> str:
    """Return what the keys of this site begin with: sites with another SECRET_KEY may use the same cache."""
    try:
        salted = salted_hmac("bgtasks.monitoring", "site", settings.SECRET_KEY, algorithm="sha256")
        site = salted.hexdigest()[:12]
    except ImproperlyConfigured:
        site = ""  # a script without a SECRET_KEY
    return f"bgtasks.{VERSION}.{site}"


def place_keys() -> list[str]:
    """Return the keys under which processes write their ids."""
    start = prefix()
    return [f"{start}.process.{number}" for number in range(PLACES)]


def snapshot_key(process: str) -> str:
    """Return the key of a process's snapshot."""
    return f"{prefix()}.snapshot.{quote(process, safe=':', errors='replace')}"[:240]


def pause_key(pool: str) -> str:
    """Return the key that is there as long as a pool is to be paused."""
    return f"{prefix()}.paused.{quote(pool, safe='')}"[:200]


def order_keys() -> list[str]:
    """Return the keys under which orders to cancel waiting tasks are written."""
    start = prefix()
    return [f"{start}.order.{number}" for number in range(ORDERS)]
