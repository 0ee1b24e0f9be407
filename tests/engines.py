"""Engines that a test controls, standing for those outside."""

import threading
from collections.abc import Callable
from typing import Any

from bgtasks.core.figures import Outcome
from bgtasks.handoff.engine import Engine, Fate, Parcel
from bgtasks.signals import task_finished
from tests.gate import BOUND


class Ends:
    """The ends of tasks, by the signal ``task_finished``, between entry and exit."""

    def __enter__(self) -> "Ends":
        self.seen: list[tuple[str, str]] = []  # name and outcome; written under _changed
        self._changed = threading.Condition()
        task_finished.connect(self._receive)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        task_finished.disconnect(self._receive)

    def _receive(self, name: str, outcome: str, **kwargs: Any) -> None:
        with self._changed:
            self.seen.append((name, outcome))
            self._changed.notify_all()

    def of(self, outcome: Outcome) -> list[str]:
        """Return the names of the tasks that have ended so."""
        with self._changed:
            return [name for name, how in self.seen if how == outcome.label]

    def wait(self, outcome: Outcome, count: int = 1) -> list[str]:
        """Wait until `count` tasks have ended so, and return their names."""
        with self._changed:
            self._changed.wait_for(lambda: sum(how == outcome.label for _, how in self.seen) >= count, BOUND)
        names = self.of(outcome)
        assert len(names) >= count, f"waited {BOUND} s for {count} {outcome.label}: {self.seen}"
        return names


class FakeEngine(Engine):
    """An engine as the mover knows it. `before` and `after` are called around each send, with the batch."""

    def __init__(self) -> None:
        self.alias = "engine"
        self.packed: list[str] = []  # names of tasks, as they came
        self.taken: list[Any] = []  # names of tasks, as they came
        self.batches: list[int] = []  # their sizes
        self.stays: Callable[[str], bool] = lambda name: False  # names of tasks that cannot travel
        self.before: Callable[[list[Parcel]], object] = lambda parcels: None
        self.after: Callable[[list[Parcel]], object] = lambda parcels: None
        self.answers: Callable[[Parcel], Fate] = lambda parcel: Fate.UNSURE

    def pack(self, task: Any) -> Any:
        self.packed.append(task.name)
        content: Any = task.name
        return None if self.stays(task.name) else Parcel(task, content)

    def send(self, parcels: Any) -> None:
        self.before(parcels)
        self.batches.append(len(parcels))
        for parcel in parcels:
            parcel.fate = Fate.TAKEN
            self.taken.append(parcel.content)
        self.after(parcels)

    def confirm(self, parcels: Any) -> None:
        for parcel in parcels:
            parcel.fate = self.answers(parcel)
            if parcel.fate is Fate.TAKEN:
                self.taken.append(parcel.content)
