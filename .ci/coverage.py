"""Combine the coverage of the test environments and report it (tox runs this as `coverage`).

All environments together must reach what pyproject.toml asks for. Where an interpreter was missing, lines
for that interpreter cannot have run: then the report is printed, says what it lacks, and does not fail.
"""

import configparser
import itertools
import re
import subprocess
import sys
from pathlib import Path

UNMEASURED = r"py312|py313|py314t|py315"  # the environments that tox.ini runs without coverage


def test_environments() -> list[str]:
    """Return the names of tox's test environments, with their factors written out."""
    config = configparser.ConfigParser(interpolation=None)
    config.read("tox.ini")
    names = []
    for line in config["tox"]["env_list"].split():
        parts = [part.split(",") for part in re.split(r"[{}]", line)]
        names += ["".join(choice) for choice in itertools.product(*parts)]
    return [name for name in names if re.match(r"py\d", name) and not re.match(UNMEASURED, name)]


def main(directory: Path) -> int:
    """Report what the data files in `directory` say; return the exit status."""
    missing = [name for name in test_environments() if not list(directory.glob(f".coverage.{name}.*"))]
    data = sorted(str(path) for path in directory.glob(".coverage.*"))
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "--keep", "--quiet", *data], check=True)
    report = [*coverage, "report"]
    if missing:
        report.append("--fail-under=0")
    code = subprocess.run(report, check=False).returncode
    if missing:
        print(f"not run, so nothing is asked for: {', '.join(missing)}")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
