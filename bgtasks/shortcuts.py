"""All private names of Django and asgiref that are used, each with its gain and a way without it.

Measured on CPython 3.13:

====================  ==========================================  =============================
short cut             the way through public names                gain
====================  ==========================================  =============================
``moved``             ask each ``Local`` for its value            2.3 µs a spawn, 1.2 µs a task
``SlotContexts``      enter and leave ``ThreadSensitiveContext``  5.9 µs an asynchronous task
``open_connections``  ``connections.all()``                       2.7 µs a plain task
``has_caches``        ``caches.all()``                            2.4 µs a task
====================  ==========================================  =============================

``take_connection_pools`` has no other way: Django can only close a pool, and a forked child must not. Nor
has ``call_next``: with ``call_soon`` a child would first run what was due on its parent's loop.

Where something private has changed, the public names are used. That is found out by a try: for the first two
as this module is imported, for the others at each call.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from contextvars import Context
from threading import get_ident
from typing import Any, cast

from asgiref.local import Local
from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core.cache import caches
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.urls import base as urls
from django.utils import timezone
from django.utils.translation import trans_real

# What is private in there has no type.
_caches: Any = caches
_connections: Any = connections
_timezone: Any = timezone
_translation: Any = trans_real
_urls: Any = urls


# Language, time zone, script prefix and URL configuration. Django keeps them in asgiref's Local, whose data
# is tagged with a thread.


def moved(stored: Any, thread: int) -> Any:
    """Return what a ``Local`` would keep if the thread of that ident had stored the same."""
    return type(stored)(thread, stored.data)


def scope_variables() -> tuple[Any, ...]:
    """Return the context variables in which the language, time zone, script prefix and urlconf are."""
    # Looked up anew each time, since ``override_settings`` replaces Django's Locals.
    return (
        _translation._active._storage._data,
        _timezone._active._storage._data,
        _urls._prefixes._storage._data,
        _urls._urlconfs._storage._data,
    )


def _understands_local() -> bool:
    """Tell whether the data inside a ``Local`` can be moved to another thread as ``moved`` does it."""
    local: Any = Local()

    def try_it() -> bool:
        local.value = "moved"
        variable = local._storage._data
        stored = variable.get()
        scope_variables()
        elsewhere = Context()
        elsewhere.run(variable.set, moved(stored, get_ident()))
        return bool(stored.thread_id == get_ident() and elsewhere.run(getattr, local, "value") == "moved")

    try:
        return Context().run(try_it)
    except Exception:
        return False


UNDERSTANDS_LOCAL = _understands_local()


# The thread of an asynchronous task's thread-sensitive calls.


def _understands_context() -> bool:
    """Tell whether a ``ThreadSensitiveContext`` can be entered and left as ``_SlotContext`` does it."""
    executors = getattr(SyncToAsync, "context_to_thread_executor", None)
    return isinstance(executors, weakref.WeakKeyDictionary) and hasattr(ThreadSensitiveContext(), "_exited")


UNDERSTANDS_CONTEXT = _understands_context()


class _SlotContext(ThreadSensitiveContext):
    """The right of one task to its slot's thread.

    asgiref looks a context's executor up in a table. All contexts of one slot are equal to the one that is in
    there, so none has to be noted anew. A coroutine that a task has left behind keeps the task's context. As
    soon as the task has ended, asgiref does not accept that one any more: otherwise the coroutine would use
    the connection of the slot's next task.
    """

    def __init__(self, slot: Executor) -> None:
        self._slot = slot
        self._exited = False  # all that asgiref looks at

    def __hash__(self) -> int:
        return id(self._slot)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SlotContext) and self._slot is other._slot

    def __enter__(self) -> None:
        SyncToAsync.thread_sensitive_context.set(self)

    def __exit__(self, *_: object) -> None:
        self._exited = True


class PublicSlotContext(ThreadSensitiveContext):
    """The same by public names, which costs a task 6 µs more: asgiref's context, entered without waiting."""

    def __init__(self, slot: Executor) -> None:
        super().__init__(executor=slot)

    def __enter__(self) -> None:
        with contextlib.suppress(StopIteration):
            self.__aenter__().send(None)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(StopIteration):
            cast(Any, self).__aexit__(None, None, None).send(None)


class _WeakExecutor(Executor):
    """What asgiref's table of executors has in place of a slot: it would keep the slot, which has the key."""

    def __init__(self, slot: Executor) -> None:
        self._slot = weakref.ref(slot)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` on the slot's thread. Whoever has a context has the slot, so it is there.

        Raises:
            RuntimeError: The slot's thread has ended.
        """
        slot = self._slot()
        assert slot is not None
        return slot.submit(fn, *args, **kwargs)


class SlotContexts:
    """Makes the contexts of one slot's tasks."""

    def __init__(self, slot: Executor) -> None:
        self._key = _SlotContext(slot)  # by which asgiref finds the slot, as long as this lives
        self._slot = slot
        SyncToAsync.context_to_thread_executor[self._key] = _WeakExecutor(slot)

    def __call__(self) -> AbstractContextManager[None]:
        """Return the context of one task."""
        return _SlotContext(self._slot)


# The loop of a child that was forked by a coroutine.


def call_next(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have the running `loop` call `callback` before all that it was to call: it then ends the process."""
    private: Any = loop
    try:
        private._ready.appendleft(asyncio.Handle(callback, (), loop))
    except AttributeError:
        loop.call_soon(callback)


# Connections of a thread.


def open_connections() -> list[BaseDatabaseWrapper]:
    """Return the database connections that the calling thread has, opened or not."""
    try:
        # On a thread without a running loop the Local has one attribute for each alias.
        mine: dict[str, object] = _connections._connections._storage.__dict__
    except (AttributeError, TypeError):
        return list(connections.all(initialized_only=True))
    return [connection for connection in mine.values() if isinstance(connection, BaseDatabaseWrapper)]


def take_connection_pools() -> list[object]:
    """Empty Django's registries of connection pools, close none, and return them. Django makes new ones."""
    pools: list[object] = []
    for vendor in ("postgresql", "oracle"):
        base: Any = sys.modules.get(f"django.db.backends.{vendor}.base")
        registry = getattr(getattr(base, "DatabaseWrapper", None), "_connection_pools", None)
        if isinstance(registry, dict):
            pools += cast("dict[str, object]", registry).values()
            registry.clear()
    return pools


def has_caches() -> bool:
    """Tell whether the current context has opened a cache; True if that is not known."""
    try:
        return _caches._connections._storage._data.get(None) is not None
    except AttributeError:
        return True
