"""The page on guarantees names tests that there are."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_guarantee_has_its_tests() -> None:
    """Each of G1 to G11 has at least one line, and each line a test."""
    sections = re.split(r"^## (G\d+)", PAGE, flags=re.MULTILINE)[1:]
    named = dict(zip(sections[::2], sections[1::2], strict=True))

    assert list(named) == [f"G{number}" for number in range(1, 12)]
    for text in named.values():
        rows = [row for row in text.splitlines() if row.startswith("| `")]
        assert rows
        assert all("::test_" in row or "::Test" in row for row in rows)


def test_every_test_that_is_named_exists() -> None:
    """A test that was renamed is renamed on the page as well."""
    for file, name in set(re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?", PAGE)):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assigned = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
        defined |= {target.id for target in assigned if isinstance(target, ast.Name)}

        assert not name or name in defined, f"{file}::{name}"


def test_every_line_that_is_named_exists() -> None:
    """A module and a function of the package are what the page calls them."""
    for file, qualified in set(re.findall(r"^\| `((?:\w+/)?\w+\.py)`: `([\w.]+)`", PAGE, flags=re.MULTILINE)):
        source = (ROOT / "bgtasks" / file).read_text()
        for name in qualified.split("."):
            assert re.search(rf"\b{name}\b", source), f"{file}: {qualified}"
