"""The tables of the documentation are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

from bgtasks import PoolStats, conf, signals
from tests.snippets import ROOT


def first_column(page: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_every_option_has_its_row() -> None:
    """The page of the settings has each option of a pool, and of the snapshots."""
    options = {name.upper() for name in conf.PoolConfig._fields}

    snapshot = {name.upper() for name in conf.SnapshotConfig._fields}

    assert options | snapshot == set(first_column("settings.md"))
    assert options == set(conf.PoolOptions.__annotations__)


def test_every_check_has_its_row() -> None:
    """The page of the checks has each id that the code can report, and no other."""
    source = "".join(path.read_text() for path in Path(conf.__file__).parent.rglob("*.py"))

    assert set(first_column("checks.md")) == set(re.findall(r'"(bgtasks\.[EW]\d{3})"', source))


def test_every_signal_and_figure_has_its_row() -> None:
    """The page of the signals has each signal and each figure of a pool."""
    names = {name for name in vars(signals) if name.startswith("task_")}

    assert names | {field.name for field in fields(PoolStats)} == set(first_column("signals.md"))
