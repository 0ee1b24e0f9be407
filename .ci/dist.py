"""Build the release into dist/, check it, use it, and upgrade a project to it (tox runs this as `dist`).

Two builds have to be the same to the byte: anybody can build a release again and compare.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import upgrade
from upgrade import git, run

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"

USE = """
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["bgtasks"])
django.setup()
import bgtasks
ran = []
assert bgtasks.spawn("use", ran.append, 1) and bgtasks.drain(30) and ran == [1]
print("django-bgtasks", __import__("importlib.metadata").metadata.version("django-bgtasks"), "works")
"""


def build(directory: Path) -> dict[str, str]:
    """Build the sdist, and the wheel from it, into `directory`; return their hashes."""
    epoch = git(ROOT, "log", "-1", "--format=%ct").strip() or "1700000000"
    env = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT, env=env)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def relative_links(wheel: Path) -> list[str]:
    """Return the links and pictures of the wheel's description that have no address."""
    with zipfile.ZipFile(wheel) as files:
        [metadata] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        text = files.read(metadata).decode()
    return re.findall(r'(?:\]\(|src=")(?!https?://)([^)"]*)', text)


def main() -> int:
    """Build, compare, check, install and use; return the exit status."""
    shutil.rmtree(DIST, ignore_errors=True)
    first = build(DIST)
    with tempfile.TemporaryDirectory() as scratch:
        if build(Path(scratch) / "again") != first:
            print("two builds differ")
            return 1
        files = sorted(DIST.iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *files)
        [wheel] = DIST.glob("*.whl")
        if relative := relative_links(wheel):
            print("the description has links that lead nowhere:", *relative)
            return 1
        run("check-wheel-contents", "--toplevel", "bgtasks,pytest_bgtasks", wheel)
        empty = Path(scratch) / "empty"
        venv.create(empty, with_pip=True)
        python = empty / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        run(python, "-c", USE, cwd=scratch)
        upgrade.main(ROOT, wheel)
        run("cyclonedx-py", "environment", "--output-reproducible", "-o", DIST / "sbom.cdx.json", python)
    for name, digest in first.items():
        print(digest, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
