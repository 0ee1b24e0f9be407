"""The tables of the documentation are those of the code."""

import re
import tomllib
from dataclasses import fields
from inspect import getdoc, signature
from pathlib import Path

import bgtasks
from bgtasks import PoolStats, conf, core, signals
from bgtasks.core.figures import Outcome
from bgtasks.mail import MailConfig
from tests.snippets import ROOT, blocks


def first_column(page: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_every_option_has_its_row() -> None:
    """The page of the settings has each option of a pool, of the snapshots, the mails and the journal."""
    options = {name.upper() for name in conf.PoolConfig._fields}

    snapshot = {name.upper() for name in conf.SnapshotConfig._fields}
    mail = {name.upper() for name in MailConfig._fields}

    assert options | snapshot | mail | {"DIR"} == set(first_column("settings.md"))
    assert options == set(conf.PoolOptions.__annotations__)


def test_every_option_of_a_submission_has_its_row() -> None:
    """The page of the policies has each option of `using`, and its docstring too."""
    options = set(signature(bgtasks.using).parameters)

    assert options == set(first_column("policies.md"))
    assert options <= set(re.findall(r"^ +(\w+): ", getdoc(bgtasks.using) or "", re.MULTILINE))


def test_picture_of_a_task_has_every_outcome() -> None:
    """The picture of a task's life has each outcome of an accepted task, and the drop of another one."""
    words = set(re.findall(r"<text[^>]*>([^<]+)<", (ROOT / "docs" / "images" / "task-life.svg").read_text()))

    assert {outcome.label.replace("_", " ") for outcome in Outcome} | {"dropped"} <= words


def test_every_check_has_its_row() -> None:
    """The page of the checks has each id that the code can report, and no other."""
    source = "".join(path.read_text() for path in Path(conf.__file__).parent.rglob("*.py"))

    assert set(first_column("checks.md")) == set(re.findall(r'"(bgtasks\.[EW]\d{3})"', source))


def test_every_module_has_its_layer() -> None:
    """The page of the design shows the layers that import-linter holds, and every module of the core."""
    design = (ROOT / "docs" / "design.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [each["layers"] for each in contracts if each["type"] == "layers"]
    lines = design.split("## Modules and layers")[1].split("```")[1].splitlines()
    shown = " ".join(line[4:96] for line in lines[1:]).replace("/", "").split()

    assert sorted(shown) == sorted(re.findall(r"\w+", " ".join(layers)))
    assert {path.stem for path in Path(core.__file__).parent.glob("*.py")} - {"__init__"} <= set(
        first_column("design.md")
    )


def test_every_signal_and_figure_has_its_row() -> None:
    """The page of the signals has each signal and each figure of a pool."""
    names = {name for name in vars(signals) if name.startswith("task_")}

    assert names | {field.name for field in fields(PoolStats)} == set(first_column("signals.md"))


def test_every_column_of_the_comparison_says_how_it_was_checked_and_its_source() -> None:
    """The last rows of each table do, and a link to PyPI leads to the version that the column names."""
    page = (ROOT / "docs" / "comparison.md").read_text()
    tables = [
        [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()]
        for table in re.findall(r"^\| \|.*\n(?:\|.*\n)+", page, re.MULTILINE)
    ]

    assert len(tables) == 3
    for head, *_, checked, source in tables:
        assert (checked[0], source[0]) == ("Checked", "Source")
        for name, how, where in zip(head[1:], checked[1:], source[1:], strict=True):
            assert "run" in how or "read" in how, name
            assert "](" in where or where == "this repository", name
            versions = re.findall(r"/project/[\w-]+/(\d+\.\d+)", where)
            assert set(versions) <= set(re.findall(r" (\d+\.\d+)", name)), name


def test_every_word_of_the_project_is_in_the_glossary() -> None:
    """The words that CONTRIBUTING.md asks for are explained to readers."""
    [words] = re.findall(r"^- Words: ([^.]*)\.", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    glossary = re.findall(r"^(\w+)\n  \w", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)

    assert set(re.split(r",\s+", words)) <= set(glossary)


def test_example_of_a_change_to_the_core_is_in_the_core() -> None:
    """CONTRIBUTING.md quotes it, each block from a module that it names."""
    example = (ROOT / "CONTRIBUTING.md").read_text().split("As an example")[1].split("\n## ")[0]
    parts = example.split("```python\n")
    names = [re.findall(r"^`(\w+\.py)`:", part, re.MULTILINE)[-1] for part in parts[:-1]]

    assert names == ["policy.py", "queue.py", "waiting.py"]
    for name, part in zip(names, parts[1:], strict=True):
        assert part.split("```")[0] in (ROOT / "bgtasks" / "core" / name).read_text()


def test_every_page_is_in_the_contents() -> None:
    """A page that neither the contents nor llms.txt name cannot be found."""
    index = (ROOT / "docs" / "index.md").read_text()
    contents = re.findall(r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)+)```", index)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}

    assert sorted("".join(contents).split()) == sorted(pages)

    listed = re.findall(r"\(_sources/([\w-]+)\.md\.txt\)", (ROOT / "docs" / "llms.txt").read_text())
    assert sorted(listed) == sorted(pages)


def test_links_lead_somewhere_where_the_repository_is_read() -> None:
    """Sphinx's roles and directives for links and pictures are plain text to everybody else."""
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    del pages["index.md"]  # the start of the site; the repository has its README

    assert {name for name, text in pages.items() if re.search(r"\{(?:doc|ref|image)\}", text)} == set()


def test_asgi_py_is_the_same_everywhere() -> None:
    """Whatever page a reader copies it from, it is one file, and a whole one."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {
        page.name: block.text.removeprefix("# mysite/asgi.py\n\n")
        for page in pages
        for block in blocks(page)
        if "lifespan(get_asgi_application())" in block.text and block.kind == "python"
    }

    assert set(found) == {"README.md", "deploying.md", "tutorial.md"}
    assert len(set(found.values())) == 1
    assert found["README.md"].startswith("import os\n")
