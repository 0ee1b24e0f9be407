import pytest


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody wait for what does not end when it is told to."""
    for module in ("drainer", "shutdown"):
        monkeypatch.setattr(f"bgtasks.core.{module}.STOP_PATIENCE", 0.01)
