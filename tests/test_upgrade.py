"""From which release `.ci/upgrade.py` upgrades. That it does is the `dist` environment's to show."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

FILE = Path(__file__).parent.parent / ".ci" / "upgrade.py"
spec = importlib.util.spec_from_file_location("upgrade", FILE)
assert spec is not None
assert spec.loader is not None
upgrade = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upgrade)


def git(root: Path, *args: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    subprocess.run(["git", *identity, *args], cwd=root, check=True, capture_output=True)


def commit(root: Path, *tags: str) -> None:
    git(root, "commit", "--allow-empty", "--message", "a change")
    for tag in tags:
        git(root, "tag", tag)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--initial-branch", "main")
    commit(tmp_path)
    return tmp_path


def test_the_newest_release_before_this_commit(repository: Path) -> None:
    """By version, not by date or spelling; not the release that is being made, nor what is no release."""
    commit(repository, "v0.9.0")
    commit(repository, "v0.10.0")
    commit(repository, "v0.9.1", "nightly")
    commit(repository, "v0.11.0")

    assert upgrade.previous_tag(repository) == "v0.10.0"


def test_development_upgrades_from_the_last_release(repository: Path) -> None:
    """Even before the version is raised."""
    commit(repository, "v0.9.0")
    commit(repository)

    assert upgrade.previous_tag(repository) == "v0.9.0"


def test_a_release_of_another_branch_is_not_the_one_before(repository: Path) -> None:
    """A fix of an old version upgrades from that one."""
    commit(repository, "v0.9.0")
    git(repository, "checkout", "-b", "fixes")
    git(repository, "checkout", "main")
    commit(repository, "v1.0.0")
    git(repository, "checkout", "fixes")
    commit(repository)

    assert upgrade.previous_tag(repository) == "v0.9.0"


def test_without_a_tag_the_upgrade_is_skipped_and_says_so(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody takes silence for success."""
    commit(repository)

    upgrade.main(repository, repository / "no.whl")

    assert "SKIPPED: the upgrade" in capsys.readouterr().out


def test_without_a_repository_there_is_no_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sdist that was unpacked, on a machine with git or without."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert upgrade.previous_tag(tmp_path) is None

    monkeypatch.setenv("PATH", "")
    assert upgrade.previous_tag(tmp_path) is None
