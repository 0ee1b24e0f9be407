"""Set Django up, call a function of a test module, and print what it returns as JSON.

Before Django is set up, and so before bgtasks registers its own hook, a hook is registered here that notes
the threads at each fork: hooks run in reverse order, so it comes after that of bgtasks.
"""

import importlib
import json
import os
import sys
import threading
from typing import Any

import django

threads_at_fork: list[Any] = []


def note_threads() -> None:
    threads_at_fork.append([thread.name for thread in threading.enumerate()])


def main() -> None:
    """Call the function that the command line names: module, function."""
    os.register_at_fork(before=note_threads)
    django.setup()
    module, name = sys.argv[1:]
    result = getattr(importlib.import_module(module), name)()
    if result is not None:
        print(json.dumps(result))  # noqa: T201  # for run_function
