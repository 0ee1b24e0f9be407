"""Every snippet of the README and the documentation runs, as tests/snippets.py says."""

import logging
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.test import override_settings

import bgtasks
from tests.gate import BOUND
from tests.pool import Logs
from tests.snippets import ELSEWHERE, PAGES, ROOT, TUTORIAL, Block, Reader, blocks


def send_welcome(user_pk: int) -> None: ...


def send_newsletter() -> None: ...


async def ping_partner(url: str) -> None: ...


def given() -> dict[str, object]:
    """Return the names that every page may use without a word: the README's own examples."""
    return {
        "__name__": "snippet",
        "bgtasks": bgtasks,
        "HttpResponse": HttpResponse,
        "User": User,
        "ping_partner": ping_partner,
        "send_newsletter": send_newsletter,
        "send_welcome": send_welcome,
        "user": User.objects.create_user("ada", "ada@example.com"),
    }


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_snippet_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """Somebody who does what a page says, from top to bottom, meets no error, nor does a task of theirs."""
    with Logs() as logs, override_settings(BGTASKS={"email": {}}):
        with Reader(page, given(), tmp_path) as reader:
            for block in blocks(page):
                reader.do(block)
            assert bgtasks.drain(BOUND)

    assert logs.above(logging.ERROR) == []


def read(tmp_path: Path, text: str) -> list[Block]:
    page = tmp_path / "page.md"
    page.write_text(text)
    found = blocks(page)
    with Reader(page, {}, tmp_path) as reader:
        for block in found:
            reader.do(block)
    return found


def test_an_error_shows_the_line_of_the_page(tmp_path: Path) -> None:
    """Who breaks a snippet is shown where."""
    with pytest.raises(ZeroDivisionError) as caught:
        read(tmp_path, "# Title\n\n```python\na = 1\na / 0\n```\n")

    assert caught.traceback[-1].lineno + 1 == 5


def test_blocks_share_their_names_and_may_await(tmp_path: Path) -> None:
    """A page is one file: what a comment or a block defines, the next one knows."""
    text = "<!-- setup:\na = 1\n-->\n\n```python\nimport asyncio\nb = await asyncio.sleep(0, a)\n```\n\n"
    read(
        tmp_path, text + "- in a list\n\n  ```python\n  assert b == 1\n  ```\n\n```pycon\n>>> b + 1\n2\n```\n"
    )

    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        read(tmp_path, "```pycon\n>>> 1 + 1\n3\n```\n")


def test_commands_run_and_print_what_the_page_shows(tmp_path: Path) -> None:
    """What a console block shows is what its commands print."""
    read(tmp_path, "```console\n$ echo one two three\none ... three\n$ python -c 'print(6)'\n6\n```\n")

    with pytest.raises(AssertionError, match="two"):
        read(tmp_path, "```console\n$ echo two\none\n```\n")


def test_commands_that_are_only_shown_have_to_parse(tmp_path: Path) -> None:
    """A command that would do too much here is at least one that a shell understands, and Django knows."""
    read(tmp_path, "```sh\npython manage.py migrate\n```\n\n```json\n{}\n```\n\n```toml\na = 1\n```\n")

    with pytest.raises(Exception, match="bash"):
        read(tmp_path, "```sh\nif\n```\n")
    with pytest.raises(AssertionError, match="migrat"):
        read(tmp_path, "```sh\npython manage.py migrat\n```\n")


def test_a_block_that_is_not_run_here_says_why(tmp_path: Path) -> None:
    """What is run by another test has to name a test that is there."""
    [block] = read(tmp_path, "<!-- run by tests/test_snippets.py -->\n```python\n1 / 0\n```\n")
    read(tmp_path, "<!-- not run: it is a mistake -->\n```python\n1 / 0\n```\n\n```text\nshown\n```\n")

    assert block.mark == "run by tests/test_snippets.py"
    with pytest.raises(AssertionError, match="test_nothing"):
        read(tmp_path, "<!-- run by tests/test_nothing.py -->\n```python\n1 / 0\n```\n")


def test_settings_of_a_page_are_in_force_from_there_on(tmp_path: Path) -> None:
    """A page that defines a pool may use it afterwards, and no other test sees it."""
    text = "```python\nBGTASKS = {'mine': {}}\n```\n\n"
    read(tmp_path, text + "```python\nimport bgtasks\nassert 'mine' in bgtasks.pools\n```\n")

    assert "mine" not in bgtasks.pools
    with pytest.raises(AssertionError):
        read(tmp_path, "```python\nBGTASKS = {'mine': {'CAPACITY': 0}}\n```\n")


def test_a_page_that_is_run_elsewhere_names_a_test() -> None:
    """Who takes a page over is there, and knows the page."""
    others = {page: ELSEWHERE.findall(page.read_text()) for page in ROOT.glob("docs/**/*.md")}

    for page, tests in others.items():
        for test in tests:
            assert page.name in (ROOT / test).read_text() or page == TUTORIAL
    assert others[TUTORIAL] == ["tests/test_tutorial.py"]
