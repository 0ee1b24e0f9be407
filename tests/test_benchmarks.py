"""The benchmarks run, and their page says what they have found."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import report
from tests.processes import environment, run_python

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.servers
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", report.SCRIPTS)
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
    assert (ROOT / "benchmarks" / "README.md").read_text() == report.page()


def imported(file: Path) -> set[str]:
    """Return what a file imports, inside of functions too; `from x import y` may mean x or x.y."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{each.name}" for each in node.names}
    return names


def test_no_module_is_imported_in_a_cycle() -> None:
    """The modules of the benchmarks have an order in which each imports only those before it."""
    graph = {f"benchmarks.{file.stem}": imported(file) for file in (ROOT / "benchmarks").glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError

    assert order.index("benchmarks.tasks") < order.index("benchmarks.site")


def test_only_compare_needs_the_benchmarks() -> None:
    """The package and the rest of the demo do without them."""
    files = [
        file for name in ("bgtasks", "pytest_bgtasks", "demo_project") for file in (ROOT / name).rglob("*.py")
    ]
    users = [file for file in files if any(each.split(".")[0] == "benchmarks" for each in imported(file))]

    assert users == [ROOT / "demo_project" / "management" / "commands" / "compare.py"]


def test_help_lists_the_scripts() -> None:
    """`python -m benchmarks --help` says what can be measured, and an unknown name is refused."""
    code = "import runpy; runpy.run_module('benchmarks', run_name='__main__')"
    told = run_python(code, "--help").stdout
    refused = run_python(code, "no-such")

    assert ", ".join(report.SCRIPTS) in " ".join(told.split())
    assert refused.returncode == 2
    assert "no-such" in refused.stderr
