"""The recipes of docs/integrations.md work: each is done in a project of its own, with the real packages."""

import re
from pathlib import Path

import pytest

from tests.processes import run_python
from tests.snippets import ROOT

pytestmark = pytest.mark.kit

PAGE = ROOT / "docs" / "integrations.md"
SECTIONS = {
    match[1]: match for match in re.finditer(r"^## (.+)\n(?:(?!## ).*\n)*", PAGE.read_text(), re.MULTILINE)
}
FOLLOW = Path(__file__).parent / "scripts" / "recipe.py"


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_works(section: str, tmp_path: Path, valkey: str) -> None:
    """Somebody who copies the recipe has what it promises, and no task of theirs fails."""
    match = SECTIONS[section]
    page = tmp_path / "recipe.md"
    # With the lines of the page, for an error to show.
    page.write_text("\n" * match.string.count("\n", 0, match.start()) + match[0])

    env = {"VALKEY": valkey, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done = run_python(FOLLOW, str(page), str(tmp_path / "db.sqlite3"), env=env)

    assert done.returncode == 0, done.stderr
    succeeded, failed = map(int, done.stdout.split())
    assert succeeded > 0
    assert failed == 0
