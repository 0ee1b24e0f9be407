"""Processes in which gevent or eventlet has replaced threads by greenlets.

All greenlets run on one thread of the system, and asyncio notes for a whole thread that it runs a loop. With
the drainer's loop in one greenlet, Django would refuse the ORM calls of all others: no loop is started there.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

NO_LOOP = "gevent has replaced threads, so there is no event loop for asynchronous tasks"
NO_GREENLETS = "eventlet has replaced threads, and bgtasks starts none of its greenlets"


def patched() -> Literal["gevent", "eventlet"] | None:
    """Return what has replaced this process's threads; None if they are real ones."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        return "gevent"
    patcher: Any = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        return "eventlet"
    return None


def may_have_loop() -> bool:
    """Tell whether the drainer may run an event loop. With eventlet it starts nothing at all."""
    return patched() != "gevent"
