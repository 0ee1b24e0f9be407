"""A pool that hands off to an engine which a test controls."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from bgtasks.handoff.slots import HandoffSlots
from tests.engines import Ends, FakeEngine
from tests.gate import wait_until
from tests.pool import Core


class HandoffCore(Core):
    """A pool that hands off to an engine which the test controls, and a record of how its tasks end."""

    def __init__(self, *, always: bool = False, capacity: int = 8, conn_max: int = 2, **kwargs: Any) -> None:
        self.engine = FakeEngine()
        self.ends = Ends()
        self.ran: list[str] = []
        slots = partial(HandoffSlots, engine=self.engine, always=always)
        super().__init__(capacity=capacity, conn_max=conn_max, slots=slots, **kwargs)
        assert isinstance(self.slots, HandoffSlots)
        self.mover = self.slots.mover

    def __enter__(self) -> Self:
        self.ends.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            super().__exit__(*exc_info)
        finally:
            self.ends.__exit__()

    def put(self, *names: Any) -> None:
        """Spawn a task of each name, which notes that it ran here."""
        for name in names:
            assert self.spawn(name, self.ran.append, name)

    def hold_mover(self) -> None:
        """Keep the mover from looking at the queue."""
        self.mover._pass = lambda bell: None
        wait_until(lambda: not self.mover.in_pass)

    def release_mover(self) -> None:
        """Have the mover look at the queue again."""
        vars(self.mover).pop("_pass", None)
        self.mover.ring()

    @contextmanager
    def mover_held(self) -> Iterator[None]:
        """Keep the mover from looking at the queue."""
        self.hold_mover()
        yield
        self.release_mover()

    def wait_rest(self) -> None:
        """Wait until the mover has nothing to do."""
        wait_until(lambda: not self.mover._rung and not self.mover.in_pass)

    def assert_each_once(self, *names: Any) -> None:
        """Every task was run here or is the engine's: one of the two, and once."""
        assert Counter(self.ran + self.engine.taken) == Counter(names)


def numbers(first: Any, last: Any) -> list[Any]:
    return [str(number) for number in range(first, last + 1)]


def fail(parcels: Any) -> None:
    raise ConnectionError("the engine is down")
