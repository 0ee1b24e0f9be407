"""Scripts of the tests: functions of test modules, each run in an interpreter of its own."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

from tests.processes import run_python


def run_script(
    function: Callable[[], Any], *, env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a function of a test module as the main program of a fresh interpreter with Django set up.

    What it returns is written to standard output, as JSON in the last line.
    """
    program = "from tests.scripts.call import main; main()"
    return run_python(program, function.__module__, function.__name__, env=env, timeout=timeout)


def run_function(
    function: Callable[[], Any],
    *,
    env: dict[str, str] | None = None,
    status: int = 0,
    timeout: float = 60,
) -> Any:
    """Run a function as `run_script` does.

    Returns:
        What it returned, and what was written on standard error.

    Raises:
        AssertionError: The exit status was not `status`.
    """
    done = run_script(function, env=env, timeout=timeout)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout or "null"), done.stderr
