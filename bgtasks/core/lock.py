"""What the steps of the queue need of their lock, a re-entrant one of ``threading``, beside ``with``."""

from __future__ import annotations

import contextlib
import sys
import threading
import time


def has_gil() -> bool:
    """Tell whether the threads share the GIL. On a free-threaded Python, a module's import may turn it on."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


YIELDS = 20 if sys.version_info < (3, 14) and has_gil() else 0


def new_lock() -> threading.RLock:
    """Return a lock. It is looked up each time, since gevent may have replaced it."""
    return threading.RLock()


def acquire(lock: threading.RLock) -> None:
    """Take a `lock` that another thread has in the middle of a step of less than a microsecond.

    Before Python 3.14, with the GIL, whoever finds it held has been let in by the interpreter, and the holder
    needs nothing but the GIL. So it is given that. To block at once puts every slot to sleep: no-op tasks get
    2.6 times as slow, and with only three tries they still need a tenth more processor time than with twenty.
    """
    for _ in range(YIELDS):
        time.sleep(0)
        if lock.acquire(False):
            return
    lock.acquire()


def free(lock: threading.RLock) -> None:
    """Release `lock` if the caller holds it, however often: an exception has come in the middle of a step.

    A ``with`` statement does not always do so: a signal handler that raises as it is entered or left leaves
    the lock held.
    """
    with contextlib.suppress(RuntimeError):
        while True:
            lock.release()
