"""The code blocks of the README and of the documentation, and how each kind of them is run.

The Python blocks of a page run in their order, in one namespace, as if they were one file. What a page takes
for granted, a comment says that no reader sees; it is run like a block::

    <!-- setup:
    from shop.models import Order
    -->

A page that needs a project or packages of its own says what test runs its blocks::

    <!-- this page is run by tests/test_tutorial.py -->

A block that cannot be run here says where it is run, or why it is not run at all, in the line before it::

    <!-- run by tests/test_servers.py -->
    <!-- not run: it is the mistake that this page is about -->
"""

import ast
import asyncio
import doctest
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.management import get_commands
from django.test import override_settings

from bgtasks import conf
from tests.processes import environment

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
ELSEWHERE = re.compile(r"^<!-- this page is run by (\S+) -->$", re.MULTILINE)
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if not ELSEWHERE.search(page.read_text())
]

PIECE = re.compile(
    r"""
    ^(?P<indent>[ ]*)
    (?:
        <!--\ (?P<mark>setup:\n.*?|run\ by\ .*?|not\ run:\ .*?)\s*-->\n
      | (?P<fence>```+)(?P<kind>[\w{}-]+)[^\n]*\n(?P<text>.*?)^[ ]*(?P=fence)[ ]*$
    )
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)

# What is shown and not run: output, diagrams, Sphinx's own directives.
SHOWN = {"text", "html", "diff", "mermaid", "nginx", "ini", "docker", "dockerfile", "yaml", "promql"}


@dataclass(frozen=True)
class Block:
    """One code block, or a comment with what a page takes for granted.

    Attributes:
        kind: Its language.
        text: What is in it.
        line: Where it begins, counted from 1.
        mark: "run by ..." or "not run: ..." from the comment before it, or "".
    """

    kind: str
    text: str
    line: int
    mark: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    source = page.read_text()
    found = []
    mark, end = "", -1
    for piece in PIECE.finditer(source):
        line = source.count("\n", 0, piece.start()) + 1
        if piece["mark"] is None:
            text = textwrap.dedent(piece["indent"] + piece["text"])
            found.append(Block(piece["kind"], text, line + 1, mark if piece.start() == end else ""))
        elif piece["mark"].startswith("setup:"):
            found.append(Block("python", textwrap.dedent(piece["mark"].removeprefix("setup:")), line, ""))
        else:
            mark, end = piece["mark"], piece.end()
    return found


def snippet(page: str, containing: str) -> str:
    """Return the one Python block of a page that contains a text."""
    [found] = [block.text for block in blocks(ROOT / page) if containing in block.text]
    return found


class Reader:
    """Somebody who reads a page from top to bottom, and does what it says."""

    def __init__(self, page: Path, names: dict[str, object], scratch: Path) -> None:
        self._page = page
        self._names = names
        self._scratch = scratch
        self._overridden: list[override_settings] = []

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        while self._overridden:
            self._overridden.pop().disable()

    def do(self, block: Block) -> None:
        """Run one block; an error shows its line in the page."""
        if block.mark:
            self._look_up(block.mark)
        elif block.kind not in SHOWN and not block.kind.startswith("{"):
            getattr(self, f"_{block.kind}")(block)

    def _look_up(self, mark: str) -> None:
        if mark.startswith("run by "):
            test = ROOT / mark.removeprefix("run by ").split("::")[0]
            assert test.is_file(), f"{self._page.name}: no {test}"

    def _python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + block.text
        code = compile(source, self._page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        before = self._names.get("BGTASKS")
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, self._names))
        else:
            exec(code, self._names)
        if (setting := self._names.get("BGTASKS")) != before:
            # What the page tells to write into the settings is in force from there on.
            assert list(conf.problems(setting)) == []
            self._overridden.append(override_settings(BGTASKS=setting))
            self._overridden[-1].enable()

    def _pycon(self, block: Block) -> None:
        parser = doctest.DocTestParser()
        output: list[str] = []
        test = parser.get_doctest(block.text, self._names, self._page.name, str(self._page), block.line - 1)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(test, out=output.append, clear_globs=False)
        self._names.update(test.globs)
        assert not runner.failures, "".join(output)

    def _sh(self, block: Block) -> None:
        """Check the grammar of commands that would do too much here, and that those of manage.py exist."""
        subprocess.run(["bash", "-n", "-c", block.text], check=True, timeout=60)
        for command in re.findall(r"manage\.py (\w+)", block.text):
            assert command in get_commands() or command in {"demo", "compare", "startapp"}, command

    _bash = _shell = _sh

    def _console(self, block: Block) -> None:
        """Run each command after a `$`, and compare what it prints; `...` stands for anything."""
        for session in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = session.partition("\n")
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self._scratch,
                env=environment({"PATH": path}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            matches = doctest.OutputChecker().check_output(expected, done.stdout, flags)
            assert matches, f"{self._page.name}: $ {shlex.quote(command)}\n{done.stdout}"

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _toml(self, block: Block) -> None:
        tomllib.loads(block.text)
