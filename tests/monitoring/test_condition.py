"""Whether a pool is well over all processes, and what is said about it."""

from typing import Any

import pytest

from bgtasks.core.figures import OTHERS
from bgtasks.monitoring import condition
from bgtasks.monitoring.condition import Condition
from bgtasks.monitoring.names import most_important


def part(state: str = "active", *, pid: int = 1, paused: bool = False, **stats: int) -> Any:
    """Return a process with one pool."""
    figures = {"queued": 0, "capacity": 5, "stuck": 0, "runners": 2, "handoff_failures": 0, **stats}
    return {"state": state, "host": "web", "pid": pid}, {"paused": paused, "stats": figures}


WELL, SILENT, FULL = part(), part("silent", pid=2), part(queued=5)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([WELL], Condition.WELL),
        ([WELL, SILENT], Condition.WELL),  # the others go on
        ([SILENT], Condition.NOT_SEEN),
        ([WELL, FULL], Condition.FULL),
        ([part(paused=True), FULL], Condition.PAUSED),
        ([part(paused=True), part("blocked")], Condition.STUCK),
        ([WELL, part("dead")], Condition.STUCK),
        ([part(stuck=1)], Condition.WELL),
        ([part(stuck=2)], Condition.STUCK),
    ],
)
def test_pool_is_as_well_as_in_the_worst_process(parts: Any, expected: Condition) -> None:
    """One process that needs somebody is enough."""
    assert condition.of_pool(parts) is expected


def advice(parts: Any, **changes: Any) -> list[str]:
    pool = {
        "paused": False,
        "oldest": None,
        "failures": [],
        "drops": [],
        "stats": parts[0][1]["stats"],
        **changes,
    }
    return condition.advice(parts, pool, 1000.0)


@pytest.mark.parametrize(
    ("parts", "changes", "said"),
    [
        ([SILENT], {}, "web:2 has not been seen"),
        ([FULL], {}, "The queue is full in web:1"),
        ([part(queued=5, pid=pid) for pid in range(9)], {}, "in web:0, web:1, web:2 and 6 more"),
        ([part(paused=True)], {"paused": True}, "It accepts tasks and runs none"),
        ([part("blocked")], {}, "A coroutine blocks the event loop of web:1"),
        ([part("dead")], {}, "The drainer of web:1 is dead"),
        ([part(stuck=2)], {}, "Every slot of web:1 is stuck"),
        ([part(stuck=1)], {}, "1 of 2 slots are stuck"),
        ([WELL], {"oldest": 61.0}, "The oldest task has waited for over 60 s"),
        ([WELL], {"failures": [{"at": 900.0}]}, "Tasks have failed"),
        ([WELL], {"drops": [{"at": None}, {"at": 900.0}]}, "Tasks were not accepted"),
        ([part(handoff_failures=7)], {}, "The engine could not be reached, or failed, 7 times"),
    ],
)
def test_what_is_to_be_known_is_said(parts: Any, changes: Any, said: str) -> None:
    """Each in a sentence or two, and nothing else."""
    [sentence] = advice(parts, **changes)

    assert said in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"oldest": 59.0},
        {"failures": [{"at": 600.0}]},
        {"drops": [{"at": None}]},
    ],
)
def test_nothing_is_said_of_what_is_well(changes: Any) -> None:
    """What is long ago, and what waits for a moment, is no news."""
    assert advice([WELL], **changes) == []


def row(name: str, **changes: Any) -> Any:
    none = {"counts": {}, "seconds": 0.0, "longest": 0.0}
    counts = dict.fromkeys(("spawned", "queued", "running", "retried", "delayed"), 0)
    nothing = {"oldest": None, "due": None, "ended": {}, "dropped": {}, "waits": none, "runs": none}
    return {"name": name, **counts, **nothing, **changes}


def test_names_that_matter_most_come_first() -> None:
    """What waits, what has gone wrong, and then what there is most of. The rest is added up."""
    rows = [
        row("quiet", spawned=1),
        row(OTHERS, spawned=50, queued=50),
        row("busy", spawned=100),
        row("fails", spawned=2, ended={"failed": 2}),
        row("waits", spawned=3, queued=2, oldest=4.0),
        row("late", spawned=4, dropped={"full": 1}, due=7.0),
    ]
    shown = most_important(rows, 4)

    assert [each["name"] for each in shown] == ["waits", "fails", "late", OTHERS]
    assert (shown[3]["spawned"], shown[3]["queued"]) == (151, 50)
    assert sum(each["spawned"] for each in shown) == sum(each["spawned"] for each in rows)
