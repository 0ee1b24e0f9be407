"""The context of a task: what it has of the place that spawned it, and what it must not share with that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from datetime import tzinfo
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

from django.urls import get_script_prefix, get_urlconf, set_script_prefix, set_urlconf
from django.utils import timezone, translation

from bgtasks import propagators, shortcuts
from bgtasks.propagators import Carried, Propagator
from bgtasks.repeats import report

LOCAL = "asgiref.local"  # the name of the context variable of each Local

# What a copied context carries of the spawner's thread, by the names of asgiref's context variables:
# thread-tagged storage (it holds the request's cache connections, which sync_to_async would bring to life
# again inside the task) and the executor on which the request runs its thread-sensitive calls.
THREAD_BOUND = frozenset(
    {
        *(LOCAL, "async_single_thread_context", "deadlock_context", "thread_sensitive_context"),
        propagators.restored.name,  # by the task that spawns this one
    }
)

# Objects that are changed in place: a copied context refers to the very same ones, so each task gets copies.
# By the names of their context variables: the module of their type, and the method that copies one.
FORKED = {
    "decimal_context": ("decimal", "copy"),
    "_warnings_context": ("_py_warnings", "copy"),  # Python 3.14
    "warnings_context": ("_py_warnings", "copy"),  # the same, where it is not written in C
    "isolation_scope": ("sentry_sdk.scope", "fork"),
    "current_scope": ("sentry_sdk.scope", "fork"),
}

NOTHING = (None, None, None, None)

SPECIAL = THREAD_BOUND | FORKED.keys()


class Scope(NamedTuple):
    """The language, time zone, script prefix and URL configuration that are active where a task is spawned.

    Django keeps them in asgiref's ``Local``, which tags its data with a thread: in a copied context they
    are invisible on any other, and a French user's mail would go out in English.
    """

    language: str | None
    time_zone: tzinfo
    script_prefix: str
    urlconf: Any  # of the request; None for ROOT_URLCONF

    @classmethod
    def capture(cls) -> Scope:
        """Return the scope of the caller."""
        return cls(
            translation.get_language(),
            timezone.get_current_timezone(),
            get_script_prefix(),
            get_urlconf(),
        )

    def activate(self) -> None:
        """Make it the scope of the caller."""
        if self.language is None:
            translation.deactivate_all()
        else:
            translation.activate(self.language)
        timezone.activate(self.time_zone)
        set_script_prefix(self.script_prefix)
        set_urlconf(self.urlconf)


# Captured in place of all else if a propagator has raised: the task is to be dropped.
FAILED = object()


class Captured(NamedTuple):
    """What is captured where a task is spawned, if the project has propagators."""

    scope: object
    carried: list[Carried]


def _capture_first() -> object:
    """Find out whether the project has propagators, and capture.

    Raises:
        InvalidSettings: BGTASKS_PROPAGATORS has a mistake.
    """
    global capture
    found = propagators.load()
    capture = partial(_capture_all, found) if found else capture_scope
    return capture()


def _capture_all(found: Sequence[tuple[str, Propagator]]) -> object:
    carried = propagators.capture(found)
    return FAILED if carried is None else Captured(capture_scope(), carried)


# Returns the thread with which asgiref has tagged the scope in the current context, or else the scope itself.
capture_scope: Callable[[], object] = get_ident if shortcuts.UNDERSTANDS_LOCAL else Scope.capture

# Called where a task is spawned. Returns what ``enter`` needs beside a copy of the context.
capture: Callable[[], object] = _capture_first


def forget_propagators() -> None:
    """Look at BGTASKS_PROPAGATORS anew with the next spawn."""
    global capture
    capture = _capture_first


def enter(context: Context, captured: object) -> None:
    """Make the current context, an empty one, that of a task.

    Args:
        context: A copy of the spawner's context.
        captured: What ``capture`` returned there.

    Raises:
        BaseException: What a propagator has raised: the task has failed.
    """
    fill(context, captured)
    if type(captured) is Captured:
        propagators.enter(captured.carried)
    elif captured is FAILED:
        raise RuntimeError("a propagator could not capture its value")


def attach(captured: object) -> None:
    """Make the scope of a task visible on this thread, where it goes on in its context."""
    if shortcuts.UNDERSTANDS_LOCAL:
        scope, here = shortcuts.scope_variables(), get_ident()
        for variable, value in copy_context().items():
            if variable in scope:
                variable.set(shortcuts.moved(value, here))
    else:
        own = captured.scope if isinstance(captured, Captured) else captured
        if isinstance(own, Scope):
            own.activate()


def fill(context: Context, captured: object) -> None:
    """Fill the current context, an empty one, with the spawner's variables and scope.

    What else is bound to the spawner's thread stays behind. Propagators are left out.
    """
    tag = captured.scope if type(captured) is Captured else captured
    moves, here = shortcuts.UNDERSTANDS_LOCAL, get_ident()
    language, time_zone, prefix, urlconf = shortcuts.scope_variables() if moves else NOTHING
    for variable, value in context.items():
        name = variable.name
        if name == LOCAL:
            # Data with another thread's tag was not the spawner's: it had only inherited it.
            if (
                variable is language or variable is time_zone or variable is prefix or variable is urlconf
            ) and value.thread_id == tag:
                variable.set(shortcuts.moved(value, here))
        elif name not in SPECIAL:
            variable.set(value)
        elif name in FORKED:
            variable.set(_forked(name, value))
    if not moves and type(tag) is Scope:
        tag.activate()


def fork() -> None:
    """Replace, in the current context, what is changed in place by copies."""
    for variable, value in copy_context().items():
        if variable.name in FORKED:
            variable.set(_forked(variable.name, value))


def _forked(name: str, value: Any) -> Any:
    """Return a copy of `value`, or `value` itself if the variable only has the same name."""
    module, method = FORKED[name]
    if type(value).__module__ != module:
        return value
    try:
        return getattr(value, method)()
    except Exception as error:
        report(logging.ERROR, "the context variable %r could not be copied for a task", name, error)
        return value
