"""Plain sentences: `.ci/language.py`, a part of lint, finds the phrases that readers stumbled over."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.snippets import ROOT

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "language.py"))


def test_every_kind_of_text_is_read() -> None:
    """The messages of the page are in JavaScript, and the forms of issues in YAML."""
    read = {str(path.relative_to(ROOT)) for path in SCRIPT["FILES"]}

    assert read >= {
        "CHANGELOG.md",
        "README.md",
        ".github/ISSUE_TEMPLATE/bug.yml",
        ".github/pull_request_template.md",
        "bgtasks/static/bgtasks/admin.js",
        "bgtasks/templates/bgtasks/admin.html",
        "docs/llms.txt",
        "docs/troubleshooting.md",
    }


def test_texts_are_written_plainly() -> None:
    """No such phrase is in the documentation, the docstrings, the comments and the messages."""
    assert SCRIPT["main"]() == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it shall end", 1),
        ("# of its\n    # own accord", 1),
        ("// hold\n  // still", 1),
        ("It ends nothing", 1),
        ("accepted tasks end at SIGTERM", 1),
        ("What comes then is dropped", 1),
        ("calling it would run nothing of it", 1),
        ("Last word", 1),
        ("a marshall", 0),
        ("accepted tasks finish", 0),
    ],
)
def test_phrases_are_found(text: str, number: int) -> None:
    """Over the end of a line too, and only as whole words."""
    assert len(list(SCRIPT["complaints"](Path("page.md"), text))) == number
