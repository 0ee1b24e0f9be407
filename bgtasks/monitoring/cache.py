"""The cache through which the processes of a site see each other."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from django.core.cache import BaseCache, caches
from django.core.cache.backends.base import default_key_func


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
