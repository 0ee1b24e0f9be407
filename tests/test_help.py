"""What a shell shows of the public names: ``help()``, ``dir()``, and examples that work."""

import asyncio
import doctest
import inspect
from collections.abc import Iterator

import pytest
from django.contrib.auth.models import User
from django.db import transaction
from django.test import override_settings

import bgtasks
from bgtasks import testing
from bgtasks.pool import Pool
from bgtasks.pools import pools
from bgtasks.spawning import Using
from tests.snippets import ROOT

FUNCTIONS = [name for name in bgtasks.__all__ if inspect.ismethod(getattr(bgtasks, name))]
EXAMPLES = [
    *(getattr(bgtasks, name) for name in FUNCTIONS),
    *(Pool, Using, testing.inline, testing.captured, testing.drained),
]


@pytest.fixture
def pools_are_open_again() -> Iterator[None]:
    yield

    pools.restart()


def test_dir_shows_public_names_only() -> None:
    """Completion in a shell does not offer the package's modules."""
    assert dir(bgtasks) == sorted(bgtasks.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_of_a_function_stands_by_itself(name: str) -> None:
    """It says what the function returns and raises, and has an example, without a look at another one's."""
    text = inspect.getdoc(getattr(bgtasks, name)) or ""

    assert "Returns:\n" in text
    assert "Raises:\n" in text
    assert ">>> " in text
    assert ("Args:\n" in text) is (name != "stats")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("pools_are_open_again")
@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda each: each.__name__)
def test_example_of_a_docstring_works(documented: object) -> None:
    """Somebody who types what the docstring shows sees what it shows."""
    user = User.objects.create_user("ada")
    names = {
        "asyncio": asyncio,
        "bgtasks": bgtasks,
        "ping_partner": lambda pk: None,
        "partner": user,
        "send_welcome": lambda pk: None,
        "transaction": transaction,
        "user": user,
    }
    source = inspect.getdoc(documented) or ""
    example = doctest.DocTestParser().get_doctest(source, names, "docstring", None, 0)
    output: list[str] = []

    with override_settings(BGTASKS={"email": {}}):
        doctest.DocTestRunner().run(example, out=output.append)

    assert example.examples
    assert output == []


def test_api_page_lists_each_function_under_its_public_name() -> None:
    """So ``objects.inv`` has ``bgtasks.spawn``, and other projects can link to it."""
    page = (ROOT / "docs" / "api.md").read_text()

    assert [name for name in FUNCTIONS if f".. autofunction:: {name}\n" not in page] == []
