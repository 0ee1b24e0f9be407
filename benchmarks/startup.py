"""What does bgtasks add to the start of a process, and what to its idleness?

Start: ``import bgtasks``, ``ready()`` and the page for the admin, after the ``django.setup()`` of the demo
project without bgtasks, in fresh processes, so whatever both need is counted with Django. Idleness: how often
the threads of a process that has run tasks, and has none, were given a processor in ten seconds, as Linux
counts it.
"""

import json
import os
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from time import perf_counter, sleep

from benchmarks.measure import QUICK, Result

RUNS = 1 if QUICK else 15
IDLE = 0.5 if QUICK else 10.0  # seconds


def start() -> None:
    """Print, as JSON, the seconds of ``django.setup()`` and those of bgtasks."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "demo_project.settings"
    began = perf_counter()
    import django
    from django.apps import apps
    from django.conf import settings

    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "bgtasks"]
    django.setup()
    without = perf_counter()
    import bgtasks
    from bgtasks.apps import BgtasksConfig

    app = BgtasksConfig("bgtasks", bgtasks)
    apps.app_configs["bgtasks"] = app  # or ready() would warn that it is not installed
    app.apps = apps
    app.import_models()
    app.ready()
    import_module("bgtasks.admin")  # as the admin's autodiscovery does
    print(json.dumps({"django": without - began, "bgtasks": perf_counter() - without}))


def idle() -> None:
    """Print, as JSON, how often each thread of this process was woken in IDLE seconds."""
    from benchmarks.measure import set_up

    set_up()
    import bgtasks

    async def atask() -> None:
        """Do nothing."""

    for _ in range(1000):
        bgtasks.spawn("sync", int)
        bgtasks.spawn("async", atask)
    bgtasks.drain()
    sleep(3.0)  # the threads that watch tasks end meanwhile
    before = switches()
    sleep(IDLE)
    after = switches()
    print(json.dumps({name: after[name] - before.get(name, 0) for name in after}))


def switches() -> dict[str, int]:
    """Return how often each thread but the calling one has got a processor so far."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) == os.getpid():
            continue
        status = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
        found[thread.name] = int(status["voluntary_ctxt_switches"]) + int(
            status["nonvoluntary_ctxt_switches"]
        )
    return found


def run(part: str) -> dict[str, float]:
    """Run a part of this script in a process of its own."""
    # With compiled modules, as installed packages have them.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    output = subprocess.run(
        [sys.executable, __file__, part], check=True, capture_output=True, text=True, env=environment
    ).stdout
    got: dict[str, float] = json.loads(output)
    return got


def main() -> None:
    """Measure and report."""
    run("start")  # compiles
    runs = [run("start") for _ in range(RUNS)]
    django = statistics.median(each["django"] for each in runs)
    own = statistics.median(each["bgtasks"] for each in runs)
    woken = run("idle")
    result = Result("What does bgtasks add to the start of a process, and to its idleness?", ["", ""])
    result.rows = [
        ("django.setup() of the demo project, ms", django * 1000),
        ("import bgtasks, ready() and its admin page, ms", own * 1000),
        (f"wake-ups of {len(woken)} threads of an idle process in {IDLE:g} s", float(sum(woken.values()))),
    ]
    result.target("import, ready() and admin page / django.setup()", own / django, at_most=0.05)
    result.target("wake-ups of an idle process", sum(woken.values()), at_most=0.0)
    result.finish()


if __name__ == "__main__":
    {"start": start, "idle": idle}.get(sys.argv[1], main)() if len(sys.argv) > 1 else main()
