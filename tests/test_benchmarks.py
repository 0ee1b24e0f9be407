"""The benchmarks run, and their page says what they have found."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.servers
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["burst", "call", "compute", "latency", "memory", "stages", "startup", "throughput"]
)
def test_script_runs(name: str) -> None:
    """Each script comes to its table, with targets that it holds its ratios against."""
    env = environment({"BENCHMARKS_QUICK": "1"})
    # It is measured without coverage, under settings of its own.
    for variable in ("DJANGO_SETTINGS_MODULE", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        env.pop(variable, None)
    argv = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
    result = subprocess.run(argv, check=True, capture_output=True, text=True, env=env, cwd=ROOT, timeout=550)

    assert "| target | limit | measured |" in result.stdout


def test_page_says_what_was_measured() -> None:
    """The page of the benchmarks is written from their results, and not by hand."""
    from benchmarks import report

    assert (ROOT / "benchmarks" / "README.md").read_text() == report.page()
