"""What does a waiting task hold in memory, and is it given back?

Resident memory of a fresh process before and after so many tasks were spawned on a pool whose slots are all
held, divided by their number: all that a task is, with its copied context and its argument, a small number.
Three times over, to see whether the queue grows from one time to the next.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from time import sleep

from benchmarks.measure import QUICK, Result, set_up

COUNTS = (1_000, 2_000) if QUICK else (100_000, 300_000, 1_000_000)


def task(_number: int) -> None:
    """Do nothing."""


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(count: int) -> None:
    """Print, as JSON, the bytes a task that waits and the share that is given back."""
    import gc
    import threading

    set_up()
    import bgtasks

    gate = threading.Event()
    for _ in range(8):
        bgtasks.spawn("held", gate.wait)
    for _ in range(1000):
        bgtasks.spawn("warm-up", task, 1)
    gate.set()
    bgtasks.drain()
    gc.collect()
    before = resident()
    full, after = [], []
    for _ in range(3):
        gate.clear()
        for _ in range(8):
            bgtasks.spawn("held", gate.wait)
        for _ in range(count):
            bgtasks.spawn("waits", task, 1)
        full.append(resident() - before)
        gate.set()
        # Not by drain(), which makes a set of all tasks it waits for.
        while (stats := bgtasks.stats()["default"]).queued or stats.running:
            sleep(0.01)
        gc.collect()
        after.append(resident() - before)
    print(json.dumps({"each": full[0] / count, "kept": after[0] / full[0], "third": full[2] / full[0]}))


def main() -> None:
    """Measure in fresh processes, and report."""
    result = Result(
        "What does a waiting task hold in memory?",
        ["waiting tasks", "bytes each", "resident afterwards", "third time / first time"],
    )
    each: list[float] = []
    third: list[float] = []
    for count in COUNTS:
        output = subprocess.run(
            [sys.executable, __file__, str(count)], check=True, capture_output=True, text=True
        ).stdout
        got = json.loads(output)
        each.append(got["each"])
        result.rows.append((f"{count:,}", got["each"], f"{got['kept']:.0%}", got["third"]))
        third.append(got["third"])
    result.target("bytes a task / 600", max(each) / 600, at_most=1.0)
    result.target(f"bytes each at {COUNTS[-1]:,} / at {COUNTS[0]:,}", each[-1] / each[0], at_most=1.1)
    result.target("filled a third time / the first time", max(third), at_most=1.05)
    result.notes.append(
        "What stays resident are pages that the allocators keep for the next time: a queue that is filled "
        "and emptied again needs no more than before."
    )
    result.finish()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        main()
