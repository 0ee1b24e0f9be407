"""The options of a submission: when the task expires, its key, and whether it is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from math import inf
from typing import Any, NamedTuple, TypeAlias

from bgtasks.core.figures import Outcome

DELAY_MAX = 60.0  # seconds between two tries
JITTER = 0.25  # of a delay, which becomes so much shorter or longer at random

Function: TypeAlias = "Callable[..., Any] | Coroutine[Any, Any, Any]"


class Options(NamedTuple):
    """The options of a submission. See ``bgtasks.using``."""

    expires: float | None = None  # seconds
    key: str | None = None
    retries: int = 0
    retry_delay: float = 1.0  # seconds
    retry_on: tuple[type[BaseException], ...] = (Exception,)


class Policy:
    """The options of one task, and which of its tries have been made. Written under the pool's lock."""

    __slots__ = ("asynchronous", "due_at", "expires_at", "function", "key", "options", "tries")

    def __init__(
        self, options: Options, name: str, function: Function, asynchronous: bool, spawned_at: float
    ) -> None:
        self.options = options
        # One for all names of the pool; "" for none.
        self.key = "" if options.key is None else f"{name}\0{options.key}"
        # What to call in each try. The task's own may be the coroutine that the function has returned.
        self.function = function
        self.asynchronous = asynchronous
        # In monotonic seconds:
        self.expires_at = inf if options.expires is None else spawned_at + options.expires
        self.due_at = 0.0  # when it may run, or is to be tried again
        self.tries = 0  # that have failed

    def delay_after(self, outcome: Outcome, error: BaseException | None, now: float) -> float | None:
        """Return after how many seconds to try again what ended like this; None if not at all."""
        if not self.allows_retry(outcome, error):
            return None
        options = self.options
        delay = options.retry_delay * 2**self.tries * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
        delay = min(delay, DELAY_MAX)
        return delay if now + delay < self.expires_at else None

    def allows_retry(self, outcome: Outcome, error: BaseException | None) -> bool:
        """Tell whether what ended like this may be tried again, if that is not too late."""
        if self.tries >= self.options.retries or outcome not in {Outcome.FAILED, Outcome.TIMED_OUT}:
            return False
        kind = TimeoutError if outcome is Outcome.TIMED_OUT else type(error)
        return issubclass(kind, self.options.retry_on)


NO_POLICY = Policy(Options(), "", int, asynchronous=False, spawned_at=0.0)  # of all tasks without options
